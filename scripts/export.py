"""A finished run as a file for other programs: uint8 images in, calibrated probabilities out.

    python -m scripts.export RUN --out net.onnx       and other formats, int8, half, sets: --help

docs/export.md says what is in a file, and what is checked before it is written.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/export.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

import os
from argparse import Namespace
from importlib.util import find_spec

import torch

from scripts.deployment.card import card_of
from scripts.deployment.certificate import (
    AT_BOUND,
    SET_LEVEL,
    Certificate,
    certify,
    stored_evidence,
)
from scripts.deployment.exported_file import (
    SMALLER,
    File,
    Source,
    computed_in_float32,
    float32_file,
    precision_of,
    recalibrated_file,
    smaller_file,
)
from scripts.deployment.exported_net import (
    FORMATS,
    ONNX_PACKAGES,
    ONNX_TORCH,
    CalibratedNet,
    with_sets,
)
from utils.analysis.nets import add_own_nets, check_own_nets, load_net, own_files
from utils.analysis.record import Record
from utils.analysis.records import finished_net
from utils.analysis.shift import data_dir_of, data_of
from utils.program import UserError, one_line_errors
from utils.program.command_line import CommandLine, location, path
from utils.program.files import atomic, check_not_input, check_writable
from utils.run_files import files_of_run

# The one format that has what a flag asks for.
ONLY_IN = {"int8": "onnx", "with_sets": "onnx", "half": "safetensors"}


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    net = finished_net(args.run, args.epoch)
    check_own_nets([net], args.model or ())
    args.data_dir = data_dir_of([net], args.data_dir)
    check_outputs(args, net)
    data = data_of([net], args.data_dir, args.dataset)
    certificate = certify(net, args.calibration, stored_evidence(net))
    if args.with_sets:
        check_sets(net, certificate)

    own, saved = load_net(net)
    weight, bias = certificate.softmax
    calibrated = CalibratedNet(own, mean=saved["mean"], std=saved["std"], weight=weight, bias=bias)
    source = Source(net, calibrated=calibrated, saved=saved, data=data, args=args)
    in_float32 = float32_file(source, certificate)
    # That file shows that weights and images are right. Now its net may be made smaller.
    if precision_of(args) in SMALLER:
        file = smaller_file(source, in_float32)
    elif computed_in_float32(net):
        file = in_float32
    else:
        file = recalibrated_file(source, in_float32)
    save(file, net, args)


def save(file: File, net: Record, args: Namespace) -> None:
    """The file on disk, its card if one is asked for, and what is said of both."""
    content = file.content
    if args.with_sets:
        content = with_sets(content, SET_LEVEL, file.certificate.thresholds[SET_LEVEL])
    lines = list(file.lines)
    if file.certificate.at_bound:
        lines.append(AT_BOUND)

    with atomic(args.out) as out:
        out.write(content)
    lines.append(f"written: {args.out}, {len(content) / 1e6:.2f} MB")
    if args.card is not None:
        card = card_of(
            net.title, file=args.out, form=args.format, content=content, about=file.metadata
        )
        with atomic(args.card, "w") as out:
            out.write(card)
        lines.append(f"written: {args.card}")
    print("\n".join(lines))


def options(argv: list[str] | None) -> Namespace:
    """What the command line asks for, checked as a whole. Raises UserError."""
    parser = CommandLine(prog="python -m scripts.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=location, metavar="RUN", help="a run folder, or one above it")
    add_file(parser)
    parser.add_argument(
        "--epoch",
        choices=("best", "last"),
        default="best",
        help="best: the one that the run's --select chose on validation",
    )
    add_own_nets(parser)
    parser.add_argument(
        "--data_dir",
        type=location,
        help="where the run's data set lies (default: where the run found it, else $KD_DATA, data)",
    )
    parser.add_argument(
        "--dataset", type=path, help="the run's data set where it is no longer in its place"
    )
    args = parser.parse_args(argv)
    check_options(args)
    return args


def add_file(parser: CommandLine) -> None:
    """Which file is written, and what is in it."""
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
        "--int8",
        action="store_true",
        help="8-bit integers, calibrated again on the validation split; ONNX",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="weights in half precision (float16), calibrated again; safetensors",
    )
    parser.add_argument(
        "--with-sets",
        action="store_true",
        help="a second output says which classes are in the conformal set at 90 %%; ONNX",
    )
    parser.add_argument(
        "--card", type=location, metavar="FILE.md", help="what the file is worth, in ten lines"
    )


def check_options(args: Namespace) -> None:
    """Refuse what cannot be written, here or at all. Raises UserError."""
    check_writable(args.out, "--out")
    if args.card is not None:
        check_writable(args.card, "--card")
        if os.path.realpath(args.card) == os.path.realpath(args.out):
            raise UserError(f"--card {args.card}: that is --out; give another file")
    if args.format == "onnx":
        check_onnx()
    check_format(args)


def check_outputs(args: Namespace, net: Record) -> None:
    """Raises UserError where a file would be written over that this command reads."""
    dataset = args.dataset or net.config.get("arguments", {}).get("dataset", net.dataset)
    inputs = [
        *files_of_run(net.folder),
        Path(dataset),
        args.data_dir / f"{dataset}.npz",
        *own_files(args.model or ()),
    ]
    check_not_input(args.out, "--out", inputs)
    if args.card is not None:
        check_not_input(args.card, "--card", inputs)


def check_format(args: Namespace) -> None:
    """Raises UserError where the format does not have what a flag asks for."""
    for flag, form in ONLY_IN.items():
        if getattr(args, flag) and args.format != form:
            name = flag.replace("_", "-")
            raise UserError(f"--{name}: --format {form} alone has it, and not {args.format}")
    for flag in SMALLER:
        if getattr(args, flag) and args.calibration == "vector":
            raise UserError(
                f"--calibration vector: --{flag} fits a temperature of its own, and no vector; "
                "leave it out, or give none"
            )
    if args.int8 and find_spec("onnxruntime.quantization") is None:
        raise UserError(
            "--int8: this onnxruntime has no onnxruntime.quantization; first run "
            "pip install --upgrade onnxruntime"
        )


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


def check_sets(net: Record, certificate: Certificate) -> None:
    """Raises UserError where the run has no conformal sets for --with-sets."""
    if SET_LEVEL not in certificate.thresholds:
        raise UserError(
            f"--with-sets: {net.predictions} has no validation logits, or too few for sets at "
            f"{SET_LEVEL}; leave it out"
        )


if __name__ == "__main__":
    with one_line_errors("python -m scripts.export"):
        main()
