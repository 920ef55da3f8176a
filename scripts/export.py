"""A finished run as a file for other programs: uint8 images in, calibrated probabilities out.

    python -m scripts.export RUN --out net.onnx       and other formats and calibrations: --help

docs/export.md says what is in a file, and what is checked before it is written.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/export.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

import json
import os
from argparse import Namespace
from contextlib import suppress
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from scripts.exported_net import FORMATS, ONNX_PACKAGES, ONNX_TORCH, CalibratedNet
from utils.analysis.columns import COLUMNS
from utils.analysis.nets import check_own_nets, load_net
from utils.analysis.record import Record
from utils.analysis.records import finished_nets
from utils.analysis.shift import test_split
from utils.calibration import fit_sets
from utils.flags import add_own_nets
from utils.program import UserError, one_line_errors
from utils.program.command_line import CommandLine, location, path
from utils.program.files import atomic

CHECKED = 256  # images
SET_LEVELS = (0.8, 0.9, 0.95, 0.99)
# The largest difference of a probability.
EXACT = 1e-5
COARSE = 0.2


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    nets = finished_nets(args.runs, args.epoch, with_teacher=False)
    if len(nets) > 1:
        raise UserError(f"{args.runs[0]}: {len(nets)} finished runs lie there; name one")
    net = nets[0]
    check_own_nets(nets, args.model or ())
    images = test_split(nets, args.data_dir, args.dataset).images[:CHECKED].contiguous()
    softmax = calibration(net, args.calibration)

    own, saved = load_net(net)
    calibrated = CalibratedNet(own, saved["mean"], saved["std"], softmax.weight, softmax.bias)
    write, reopen = FORMATS[args.format]
    content = write(calibrated, images, metadata_of(net, saved, args.calibration, softmax))
    differences = check(net, calibrated, softmax, images, reopen(content)(images))

    with atomic(args.out) as file:
        file.write(content)
    eces = ", ".join(f"{key} {COLUMNS['ece'].text(ece)} %" for key, ece in softmax.ece.items())
    print(
        f"{net.title}: ECE {eces}; probabilities differ by up to {differences}\n"
        f"written: {args.out}, {len(content) / 1e6:.2f} MB"
    )


def options(argv: list[str] | None) -> Namespace:
    """What the command line asks for, checked as a whole. Raises UserError."""
    parser = CommandLine(prog="python -m scripts.export", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs=1, type=location, metavar="RUN", help="a run folder, or one above it"
    )
    parser.add_argument(
        "--out", type=location, metavar="FILE", required=True, help="the file to write"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="onnx", help="safetensors comes back as a teacher"
    )
    parser.add_argument(
        "--calibration",
        choices=("temperature", "vector", "none"),
        default="temperature",
        help="temperature: the run's own; vector: as scripts.posthoc --write left it",
    )
    parser.add_argument(
        "--epoch", choices=("best", "last"), default="best", help="best: by validation top-1"
    )
    add_own_nets(parser)
    parser.add_argument(
        "--data_dir",
        type=location,
        default=Path(os.environ.get("KD_DATA") or "data"),
        help="where the run's data set lies",
    )
    parser.add_argument(
        "--dataset", type=path, help="the run's data set where it is no longer in its place"
    )
    args = parser.parse_args(argv)

    if os.path.isdir(args.out) or not os.access(args.out.absolute().parent, os.W_OK):
        raise UserError(f"--out {args.out}: give a file in a folder that you may write to")
    if args.format == "onnx":
        check_onnx()
    return args


def check_onnx() -> None:
    """Raises UserError where this torch or the packages beside it cannot write ONNX."""
    if torch.__version__ < ONNX_TORCH:
        oldest = ".".join(map(str, ONNX_TORCH))
        raise UserError(
            f"--format onnx: needs torch {oldest} or later, this is {torch.__version__}; give "
            "--format safetensors or torchscript"
        )
    if not all(find_spec(package) for package in ONNX_PACKAGES):
        raise UserError(f"--format onnx: first run pip install {' '.join(ONNX_PACKAGES)}")


class Softmax(NamedTuple):
    """What makes probabilities of logits z: softmax(weight * z + bias)."""

    weight: list[float]  # (K,)
    bias: list[float]  # (K,)
    ece: dict[str, float]  # of the test split (fractions): raw, scaled, and vector where chosen


def calibration(net: Record, name: str) -> Softmax:
    """That of --calibration. Raises UserError where the run has none of this name."""
    ece = {logits: metrics["ece"] for logits, metrics in net.measured["test"].items()}
    if name == "vector":
        vector = net.posthoc.get("vector")
        if vector is None:
            raise UserError(
                f"--calibration vector: the run has none; python -m scripts.posthoc {net.folder} "
                f"--write --epoch {net.owner} makes it"
            )
        ece["vector"] = vector["test"]["ece"]
        return Softmax(vector["weight"], vector["bias"], ece)
    temperature = net.temperatures["scaled" if name == "temperature" else "raw"]
    classes = net.result["num_classes"]
    return Softmax([1 / temperature] * classes, [0.0] * classes, ece)


def metadata_of(net: Record, saved: dict, name: str, softmax: Softmax) -> dict[str, str]:
    """What a file says of itself: texts as they are, all else as JSON.

    `saved`: what the run's weights file holds beside the weights. `name`: --calibration.
    """
    checkpoint = saved | {"softmax": {"weight": softmax.weight, "bias": softmax.bias}}
    return {
        "calibration": name,
        "temperature": json.dumps(net.measured["temperature"]),
        "ece": json.dumps(softmax.ece),
        "sets": json.dumps(set_thresholds(net, softmax)),
        "classes": json.dumps(net.result["num_classes"]),
        "class_names": json.dumps(net.config.get("class_names")),
        "dataset": net.dataset,
        "command": net.config.get("command", ""),
        "checkpoint": json.dumps(checkpoint),
    }


def set_thresholds(net: Record, softmax: Softmax) -> dict[str, float]:
    """By level, the least probability of a class that is in an image's conformal set (LAC).

    Fitted on the run's stored validation logits; empty where there are none, and without a level
    that they are too few for.
    """
    thresholds = {}
    if net.has_stored("val"):
        logits, labels = net.stored("val")
        calibrated = logits.double() * torch.tensor(softmax.weight) + torch.tensor(softmax.bias)
        for level in SET_LEVELS:
            with suppress(ValueError):
                sets = fit_sets(calibrated, labels, alpha=1 - level)
                thresholds[f"{level:g}"] = sets.threshold
    return thresholds


def check(
    net: Record, calibrated: CalibratedNet, softmax: Softmax, images: Tensor, probabilities: Tensor
) -> str:
    """Hold the file's probabilities (N, K) of the images against the net's and the run's own.

    How far they are from either, in words. Raises UserError where that is too far.
    """
    logits, _ = net.stored("test")
    weight = torch.tensor(softmax.weight)
    bias = torch.tensor(softmax.bias)
    stored = (logits[:CHECKED].double() * weight + bias).softmax(dim=1)

    # Half precision, and TF32 in a GPU's convolutions, are coarser than the file. A run of an older
    # version does not say where it was computed.
    in_float32 = net.settings["mixed_precision"] == "no" and net.config.get("device") == "cpu"
    texts = [
        difference(net, probabilities, calibrated(images), EXACT, "the net in float32"),
        difference(
            net,
            probabilities,
            stored,
            EXACT if in_float32 else COARSE,
            "the run's stored predictions",
        ),
    ]
    return " and ".join(texts)


def difference(
    net: Record, probabilities: Tensor, expected: Tensor, allowed: float, name: str
) -> str:
    """The largest difference, in words. Raises UserError where it is more than allowed, or NaN."""
    largest = (probabilities - expected).abs().max().item()
    text = f"{largest:.1e} from {name}"
    if not largest <= allowed:
        raise UserError(
            f"{net.folder}: not written, a probability would differ by {text}, {allowed:g} is "
            "allowed; copy the run or its data again, or train it again"
        )
    return text


if __name__ == "__main__":
    with one_line_errors("python -m scripts.export"):
        main()
