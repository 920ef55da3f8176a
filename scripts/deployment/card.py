"""The card of an exported net: what it is, what it is worth and how it is used, in ten lines."""

import json
from pathlib import Path

from scripts.deployment.certificate import AT_BOUND, SET_LEVEL
from utils.columns import COLUMNS

JSON_TEXTS = (
    "classes",
    "coverage",
    "ece",
    "ece_upper",
    "image_side",
    "images",
    "set_size",
    "temperature",
    "top1",
)
# By --calibration, of what the file's probabilities are the softmax.
SOFTMAX_OF = {
    "none": "of its logits as they are",
    "temperature": "at T",
    "vector": "with vector scaling",
}
USES = {
    "onnx": "`python -m scripts.predict {file} photos/`, or any program for ONNX",
    "safetensors": "`python -m scripts.predict {file} photos/`; to teach: `--teacher_path {file}`",
    "torchscript": '`torch.jit.load("{file}")`',
}
# Of a net of the user's own, whose code is not in the file of its weights.
USE_OWN = (
    "`python -m scripts.predict {file} photos/ --model {net}`; to teach: "
    "`--teacher {net} --teacher_path {file}`; FILE.py is the file that makes the net"
)


def card_of(title: str, file: Path, form: str, content: bytes, about: dict[str, str]) -> str:
    """Markdown. `about`: the file's metadata; `title`: what the run is called."""
    facts = about | {key: json.loads(about[key]) for key in JSON_TEXTS}
    images = facts["images"]
    side = facts["image_side"]
    top1 = 100 * facts["top1"]
    temperature = facts["temperature"]

    ece = {logits: f"{COLUMNS['ece'].text(value)} %" for logits, value in facts["ece"].items()}
    # Files of older versions do not say whether T is at a bound.
    at_bound = json.loads(about.get("temperature_at_bound", "false"))
    suits = "" if at_bound else ", which suits validation"
    upper = COLUMNS["ece"].text(facts["ece_upper"])

    lines = [
        f"Data: {facts['dataset']}, {facts['classes']} classes, {side} x {side} pixels; "
        f"{images['train']:,} images trained it, {images['val']:,} validated it.",
        f"Measured on {images['test']:,} test images.",
        f"Trained by `{facts['command']}`",
        f"File: {form}, {facts['precision']} precision, {len(content) / 1e6:.2f} MB.",
        f"Top-1: {top1:.2f} %.",
        f"ECE of its logits as they are: {ece['raw']}.",
        f"ECE at T = {temperature:.3f}{suits}: {ece['scaled']}.",
    ]

    # What not every file has.
    if at_bound:
        lines.append(f"{AT_BOUND}.")
    if "vector" in ece:
        lines.append(f"ECE with vector scaling: {ece['vector']}.")
    softmax = SOFTMAX_OF[facts["calibration"]]
    lines.append(
        f"Its probabilities, the softmax {softmax}: a true ECE below {upper} % (95 % confidence)."
    )
    if SET_LEVEL in facts["coverage"]:
        coverage = 100 * facts["coverage"][SET_LEVEL]
        size = facts["set_size"][SET_LEVEL]
        lines.append(
            f"Sets at 90 %: {coverage:.2f} % hold the label, with {size:.1f} classes in the mean."
        )
    lines.append(f"Use: {use_of(file, form, json.loads(about['checkpoint']))}")
    return f"# {title}\n\n" + "".join(f"- {line}\n" for line in lines)


def use_of(file: Path, form: str, checkpoint: dict) -> str:
    """The commands that take the file. `checkpoint`: what it says of its net."""
    if form == "safetensors" and "model_sha256" in checkpoint:
        _, _, function = checkpoint["model"].rpartition(".")
        return USE_OWN.format(file=file, net=f"FILE.py:{function}")
    return USES[form].format(file=file)
