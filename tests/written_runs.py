"""Runs that are written by hand, and what scripts/report.py reads of them."""

import hashlib
import json
from pathlib import Path

import numpy as np

from scripts import report
from utils.analysis.groups import group_runs
from utils.analysis.records import read_runs
from utils.analysis.rendering import render
from utils.analysis.sections import sections_of
from utils.analysis.tables import main_table
from utils.calibration.metrics import classification_metrics
from utils.run_files import label_of

CLASSES = 3


def measured(val: dict | None = None, test: dict | None = None, scaled: dict | None = None) -> dict:
    """A part of a result, in which what is not given is one half."""
    every = dict.fromkeys(("top1", "top5", "nll", "brier", "ece", "sce", "adaece", "mce"), 0.5)
    test = every | (test or {})
    tests = {"raw": test, "scaled": test | (scaled or {})}
    fitted = {"temperature": 1.5, "temperature_at_bound": False}
    return fitted | {"val": every | (val or {}), "test": tests}


def write_run(
    root: Path, loss="NLL", parameters=None, seed=42, model="resnet8", dataset="toy", **more
) -> Path:
    """A run folder with config.json, metrics.jsonl and result.json."""
    parameters, exp_name, teacher = parameters or {}, more.get("exp_name"), more.get("teacher")
    label = label_of(loss, parameters)
    if teacher:
        label += f"_from_{teacher['model']}_{teacher['label']}"
    folder = root / dataset / model / f"{label}_seed={seed}{exp_name or ''}"
    folder.mkdir(parents=True)
    own = {"lr": 0.1, "epochs": 2, "seed": seed, "label": label} | parameters
    own |= more.get("settings", {})
    result = {"model": model, "dataset": dataset, "fingerprint": "f", "label": label, "seed": seed}
    result |= {"loss": loss, "loss_parameters": parameters, "settings": own, "seconds": 60.0}
    result |= {"num_classes": CLASSES, "split_seed": 0, "mean": [0.5] * 3, "std": [0.2] * 3}
    result |= {name: {"epoch": 1} | more.get(name, measured()) for name in ("best", "last")}
    if teacher:
        facts = {*measured(), "epoch", "path", "loss", "seen"}
        own["teacher"] = {key: value for key, value in teacher.items() if key not in facts}
        result["teacher"] = measured(test={"top1": 0.9}) | teacher
    command = more.get("command", "python train_teacher.py")
    config = {"arguments": {"exp_name": exp_name}, "settings": own, "command": command}
    (folder / "config.json").write_text(json.dumps(config))
    values = dict.fromkeys(("val_top1", "val_ece", "val_nll", "val_refinement"), 0.5)
    epochs = [json.dumps({"epoch": epoch} | values) for epoch in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(epochs) + "\n")
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def identity(model="resnet56", label="NLL", seed=42, sha256="unknown") -> dict:
    """What a student's settings say of its teacher."""
    norm = {"mean": [0.5] * 3, "std": [0.2] * 3}
    return {"model": model, "label": label, "seed": seed, "sha256": sha256} | norm


def divided(temperature: float | str, **more) -> dict:
    """The same of a teacher whose logits are divided by a temperature."""
    label = f"NLL_Tcal={temperature}"
    return identity(label=label, **more) | {"teacher_temperature": temperature}


def predictions(rng: np.random.Generator, images: int, excess: float) -> tuple:
    """Logits (N, 3) and labels; the confidence exceeds the accuracy by `excess`."""
    confidence = rng.uniform(0.6, 1 - 1e-6, images)
    labels = np.where(rng.random(images) < confidence - excess, 0, 1)
    rest = (1 - confidence) / 2
    return np.log(np.stack([confidence, rest, rest], 1)).astype(np.float32), labels


def write_predicted_run(root: Path, excess: float = 0.1, **options) -> Path:
    """A run and its predictions.npz; on test the confidence exceeds the accuracy by `excess`."""
    rng = np.random.default_rng(options.get("seed", 1))
    logits, labels = predictions(rng, 2000, excess)
    val_logits, val_labels = predictions(rng, 1000, excess / 2)
    raw = classification_metrics(logits, labels)
    val = classification_metrics(val_logits, val_labels)
    part = measured(val, raw, classification_metrics(logits, labels, 1.5))
    folder = write_run(root, best=part, last=part, **options)
    arrays = {"test_labels": labels, "val_labels": val_labels}
    for name in ("best", "last", "teacher"):
        arrays |= {f"{name}_test_logits": logits, f"{name}_val_logits": val_logits}
    np.savez(folder / "predictions.npz", **arrays)
    return folder


def with_logits(folder: Path, logits: np.ndarray) -> None:
    """Give a run written by `write_predicted_run` other test logits, of the same labels."""
    with np.load(folder / "predictions.npz") as stored:
        arrays = dict(stored)
    arrays |= dict.fromkeys(("best_test_logits", "teacher_test_logits"), logits)
    np.savez(folder / "predictions.npz", **arrays)


def write_posthoc(folder: Path, digest: str | None = None) -> None:
    """What scripts.posthoc would write there; of other predictions where a digest is given."""
    digest = digest or hashlib.sha256((folder / "predictions.npz").read_bytes()).hexdigest()
    one = measured()["test"]["raw"]
    found = {"val": one, "test": one | {"ece": 0.0456}, "notes": ["class 3 is <absent>"]}
    best = dict.fromkeys(("none", "temperature", "vector", "Dirichlet ODIR"), found)
    (folder / "posthoc.json").write_text(json.dumps({"predictions": digest, "best": best}))


def read(*roots: Path):
    records, left_out = read_runs(roots, "best")
    groups, repeated = group_runs(records)
    return groups, left_out + repeated


def sections(root: Path, *flags: str):
    args = report.options([str(root), "--resamples", "0", *flags])
    return sections_of(read_runs(args.roots, args.epoch)[0], report.choice_of(args))[0]


def only_section(root: Path, *flags: str):
    [section] = sections(root, *flags)
    return section


def cells(section, name: str, logits: str = "raw") -> dict:
    [group] = [group for group in section.groups if group.full_name == name]
    return group.rows[logits].cells


def shown(section) -> str:
    return render(main_table(section), "terminal")
