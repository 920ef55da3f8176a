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
from importlib.util import find_spec

import torch
from torch import Tensor

from scripts.exported_net import FORMATS, ONNX_PACKAGES, ONNX_TORCH, CalibratedNet
from utils.analysis.columns import COLUMNS
from utils.analysis.nets import load_net
from utils.analysis.record import Record
from utils.analysis.records import finished_nets
from utils.analysis.shift import test_split
from utils.program import UserError, one_line_errors
from utils.program.command_line import CommandLine, location, path
from utils.program.files import atomic

CHECKED = 256  # images
EXACT, COARSE = 1e-5, 0.2  # largest difference of a probability


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    nets = finished_nets(args.runs, args.epoch, with_teacher=False)
    if len(nets) > 1:
        raise UserError(f"{args.runs[0]}: {len(nets)} finished runs lie there; name one")
    images = test_split(nets, args).images[:CHECKED].contiguous()
    content, said = export(nets[0], images, args)
    with atomic(args.out) as file:
        file.write(content)
    print(f"{said}\nwritten: {args.out}, {len(content) / 1e6:.2f} MB")


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(prog="python -m scripts.export", description=__doc__.splitlines()[0])
    calibrations = ("temperature", "vector", "none")
    of = "temperature: the run's own; vector: as scripts.posthoc --write left it"
    data_dir = Path(os.environ.get("KD_DATA") or "data")
    add = parser.add_argument
    add("runs", nargs=1, type=location, metavar="RUN", help="a run folder, or one above it")
    add("--out", type=location, metavar="FILE", required=True, help="the file to write")
    add("--format", choices=FORMATS, default="onnx", help="safetensors comes back as a teacher")
    add("--calibration", choices=calibrations, default="temperature", help=of)
    add("--epoch", choices=("best", "last"), default="best", help="best: by validation top-1")
    add("--data_dir", type=location, default=data_dir, help="where the run's data set lies")
    add("--dataset", type=path, help="the run's data set where it is no longer in its place")
    args = parser.parse_args(argv)
    if os.path.isdir(args.out) or not os.access(args.out.absolute().parent, os.W_OK):
        raise UserError(f"--out {args.out}: give a file in a folder that you may write to")
    if args.format == "onnx" and torch.__version__ < ONNX_TORCH:
        oldest = ".".join(map(str, ONNX_TORCH))
        raise UserError(
            f"--format onnx: needs torch {oldest} or later, this is {torch.__version__}; give "
            "--format safetensors or torchscript"
        )
    if args.format == "onnx" and not all(map(find_spec, ONNX_PACKAGES)):
        raise UserError(f"--format onnx: first run pip install {' '.join(ONNX_PACKAGES)}")
    return args


def export(net: Record, images: Tensor, args: Namespace) -> tuple[bytes, str]:
    """The content of a file that has been checked, and what to say of it. Raises UserError."""
    weight, bias, ece = calibration(net, args.calibration)
    own, saved = load_net(net)
    metadata = {
        "calibration": args.calibration,
        "temperature": net.measured["temperature"],
        "ece": ece,
        "classes": net.result["num_classes"],
        "class_names": net.config.get("class_names"),
        "dataset": net.dataset,
        "command": net.config.get("command", ""),
        "checkpoint": saved | {"softmax": {"weight": weight, "bias": bias}},
    }
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    calibrated = CalibratedNet(own, saved["mean"], saved["std"], weight, bias)
    write, reopen = FORMATS[args.format]
    content = write(calibrated, images, metadata)
    found = reopen(content)(images)
    stored = net.stored("test")[0][:CHECKED].double() * torch.tensor(weight) + torch.tensor(bias)
    on_cpu = " cores, " in net.config.get("hardware", "")
    exact = net.settings["mixed_precision"] == "no" and on_cpu
    said = []
    for expected, allowed, of in (
        (calibrated(images), EXACT, "the net in float32"),
        (stored.softmax(dim=1), EXACT if exact else COARSE, "the run's stored predictions"),
    ):
        difference = (found - expected).abs().max().item()
        said.append(f"{difference:.1e} from {of}")
        if not difference <= allowed:
            fault = f"a probability would differ by {said[-1]}, {allowed:g} is allowed"
            way_out = "copy the run or its data again, or train it again"
            raise UserError(f"{net.folder}: not written, {fault}; {way_out}")
    eces = ", ".join(f"{key} {COLUMNS['ece'].text(value)} %" for key, value in ece.items())
    return content, f"{net.title}: ECE {eces}; probabilities differ by up to {' and '.join(said)}"


def calibration(net: Record, name: str) -> tuple[list, list, dict[str, float]]:
    """Weight and bias (K,) of the logits, and the ECE (fractions) of the test split."""
    ece = {logits: metrics["ece"] for logits, metrics in net.measured["test"].items()}
    if name != "vector":
        temperature = net.temperatures["scaled" if name == "temperature" else "raw"]
        classes = net.result["num_classes"]
        return [1 / temperature] * classes, [0.0] * classes, ece
    found = net.posthoc.get("vector")
    if found is None:
        command = f"python -m scripts.posthoc {net.folder} --write --epoch {net.owner}"
        raise UserError(f"--calibration vector: the run has none; {command} makes it")
    return found["weight"], found["bias"], ece | {"vector": found["test"]["ece"]}


if __name__ == "__main__":
    with one_line_errors("python -m scripts.export"):
        main()
