"""What predicts: the net of a finished run, or a file that scripts/export.py has written."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.own import name_of_saved
from scripts.deployment.certificate import AT_BOUND, SET_LEVELS
from scripts.deployment.exported_net import logits_from, onnx_session, open_safetensors
from utils.analysis.nets import check_own_nets
from utils.analysis.record import Record
from utils.analysis.records import finished_net
from utils.analysis.shift import logits_in_precision
from utils.calibration import ConformalSets, fit_sets
from utils.columns import printable
from utils.evaluation import CPU_BATCH
from utils.program import UserError
from utils.program.files import is_safetensors, refused, safetensors_metadata
from utils.program.words import counted
from utils.run_files import files_of_run

LEVEL = 0.9  # of sets, where none is given
ARCHIVE = b"PK"  # how a file of torch.save or torch.jit.save begins


@dataclass(frozen=True)
class Predictor:
    """A net with all that turns its logits into a decision.

    `sets` are conformal sets of those logits, where there are any; `notes` are lines that say why
    there are none, or why a confidence is not to be trusted.
    """

    files: Sequence[Path]  # that it was made from
    side: int  # pixels of the images that it takes
    classes: Sequence[str]
    # (N, K) of images uint8 (N, 3, H, W); -inf where a file does not say how unlikely a class is.
    logits: Callable[[Tensor], Tensor]
    temperature: float  # that calibrates them
    sets: ConformalSets | None
    notes: Sequence[str] = ()
    is_tempered: bool = True  # whether the temperature is all that calibrates them


def run_predictor(
    root: Path,
    epoch: str,
    level: float,
    side: int | None,
    batch_size: int | None,
    own_nets: Sequence[str],
) -> Predictor:
    """The net of the finished run at or below a folder. Raises UserError.

    `side`: pixels, for a run that does not say it; `own_nets`: what --model names.
    """
    net = finished_net(root, epoch)
    check_own_nets([net], own_nets)
    notes = []
    if net.measured["temperature_at_bound"]:
        notes.append(AT_BOUND)
    sets = None
    try:
        sets = validation_sets(net, level)
    except ValueError as error:
        notes.append(f"no sets: {error}")

    side = side_of(net, given=side)
    logits = logits_in_precision(net, batch_size)
    with refused(
        f"{net.folder}: its net cannot take images of {side} x {side} pixels",
        "give --image_size, the side of those that it was trained on",
    ):
        logits(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    return Predictor(
        files=files_of_run(net.folder),
        side=side,
        classes=names_of(net.config.get("class_names"), net.result["num_classes"]),
        logits=logits,
        temperature=net.measured["temperature"],
        sets=sets,
        notes=notes,
    )


def validation_sets(net: Record, level: float) -> ConformalSets:
    """Sets that hold the true class with a chance of `level`, a fraction.

    Raises ValueError where the validation logits are missing or too few.
    """
    if not net.has_stored("val"):
        raise ValueError(f"{net.predictions} has no validation logits to fit them on")
    logits, labels = net.stored("val")
    return fit_sets(logits, labels, alpha=1 - level, temperature=net.measured["temperature"])


def side_of(net: Record, given: int | None) -> int:
    """Pixels a side of the run's images. Raises UserError where neither it nor the user says it."""
    arguments = net.config.get("arguments", {})
    side = net.config.get("image_side") or arguments.get("image_size")
    if side is None and given is None:
        raise UserError(
            f"{net.folder}: its config.json does not say which images it was trained on; "
            "--image_size PIXELS says of how many pixels a side"
        )
    if side is not None and given not in (None, side):
        raise UserError(
            f"--image_size {given}: {net.folder} was trained on images of {side} x {side} pixels; "
            "leave it out"
        )
    return side or given


def names_of(names, classes: int) -> list[str]:
    """Those that a run or a file has for so many classes, else the numbers of the labels."""
    if isinstance(names, list) and len(names) == classes:
        return [printable(name) for name in names]
    return [str(label) for label in range(classes)]


class ExportedNet(NamedTuple):
    """What lies in a file of scripts/export.py."""

    # Calibrated, float64 (N, K), up to a number for each of the images uint8 (N, 3, H, W).
    logits: Callable[[Tensor], Tensor]
    about: Mapping[str, str]  # its metadata
    side: int  # pixels


def file_predictor(
    file: Path, level: float | None, batch_size: int | None, own_nets: Sequence[str]
) -> Predictor:
    """That of an ONNX or safetensors file of scripts/export.py. Raises UserError.

    `level`: None takes LEVEL, and no sets where the file has none of it.
    """
    net = exported_net(file, own_nets)
    with refused(**not_exported(file)):
        about = net.about
        classes = names_of(json.loads(about["class_names"]), json.loads(about["classes"]))
        calibration = about["calibration"]
        temperature = 1.0
        if calibration == "temperature":
            temperature = json.loads(about["temperature"])
        # Files of older versions do not say it.
        at_bound = json.loads(about.get("temperature_at_bound", "false"))
        thresholds = json.loads(about.get("sets", "{}"))

    notes = []
    if calibration == "none":
        notes.append("the confidences are raw: the file was exported with --calibration none")
    if at_bound and calibration == "temperature":
        notes.append(AT_BOUND)
    sets = None
    try:
        sets = sets_of_file(
            file, about=about, thresholds=thresholds, level=level, temperature=temperature
        )
    except ValueError as error:
        notes.append(f"no sets: {error}")

    def logits(images: Tensor) -> Tensor:
        pieces = images.split(batch_size or CPU_BATCH)
        calibrated = torch.cat([net.logits(piece.contiguous()) for piece in pieces])
        # Uncalibrated again, as those of a run are: `Predictor.temperature` divides them.
        return calibrated * temperature

    return Predictor(
        files=[file],
        side=net.side,
        classes=classes,
        logits=logits,
        temperature=temperature,
        sets=sets,
        notes=notes,
        is_tempered=calibration != "vector",
    )


def exported_net(file: Path, own_nets: Sequence[str]) -> ExportedNet:
    """The net in a file, ONNX or safetensors. Raises UserError."""
    with refused(f"{file} cannot be read", "check its permissions", kinds=OSError):
        content = file.read_bytes()
    if content.startswith(ARCHIVE):
        raise UserError(
            f"{file}: holds weights or a TorchScript net, which are not read here; give a run "
            "folder, or what python -m scripts.export wrote as onnx or safetensors"
        )
    if is_safetensors(content):
        return safetensors_net(file, content, own_nets)
    return onnx_net(file, content, own_nets)


def onnx_net(file: Path, content: bytes, own_nets: Sequence[str]) -> ExportedNet:
    """Raises UserError."""
    if own_nets:
        raise UserError(f"--model has no effect with {file}; leave it out")
    if find_spec("onnxruntime") is None:
        raise UserError(f"{file}: first run pip install onnxruntime")
    with refused(**not_exported(file)):
        session = onnx_session(content)
        [images] = session.get_inputs()
        return ExportedNet(
            logits=partial(logits_from, session),
            about=session.get_modelmeta().custom_metadata_map,
            side=int(images.shape[2]),
        )


def safetensors_net(file: Path, content: bytes, own_nets: Sequence[str]) -> ExportedNet:
    """Raises UserError, also where the net of a user's own is not named by --model."""
    with refused(**not_exported(file)):
        about = safetensors_metadata(content)
        checkpoint = json.loads(about["checkpoint"])
        side = json.loads(about["image_side"])
    if own_nets and "model_sha256" not in checkpoint:
        raise UserError(f"--model has no effect with {file}; leave it out")
    try:
        name = name_of_saved(checkpoint, flag="--model", given=own_nets)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    with refused(**not_exported(file)):
        return ExportedNet(open_safetensors(content, name).calibrated_logits, about, side)


def not_exported(file: Path) -> dict[str, str]:
    return {
        "fault": f"{file}: no ONNX or safetensors file of python -m scripts.export",
        "way_out": "give one, export the run again, or give a run folder",
    }


def sets_of_file(
    file: Path,
    about: Mapping[str, str],
    thresholds: dict[str, float],
    level: float | None,
    temperature: float,
) -> ConformalSets:
    """Raises UserError where the file has sets, but none of the level that was given.

    Raises ValueError, which says why, where there are none of LEVEL, or none at all.
    """
    key = f"{level or LEVEL:g}"
    if key in thresholds:
        return ConformalSets("LAC", thresholds[key], temperature)
    if thresholds:
        levels = ", ".join(thresholds)
        if level is not None:
            raise UserError(f"--level {key}: {file} has sets at {levels}; give one")
        raise ValueError(f"the file has them at {levels}, not at {key}; give one as --level")
    if "sets" not in about or "images" not in about:
        raise ValueError("the file is of an older version; export the run again")

    images = json.loads(about["images"])["val"]
    fewest = round(1 / (1 - min(SET_LEVELS))) - 1  # see `fit_sets`
    if images < fewest:
        raise ValueError(f"it was fitted on {counted(images, 'validation image')}, too few")
    raise ValueError("the run that the file was made from stored no validation logits")
