"""A finished run as a file for other programs: uint8 images in, calibrated probabilities out.

    python -m scripts.export RUN --out net.onnx       and other formats, int8, half, sets: --help

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
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from scripts.card import card_of
from scripts.certificate import (
    AT_BOUND,
    SET_LEVEL,
    Certificate,
    Softmax,
    certify,
    evidence_of,
    stored_evidence,
)
from scripts.exported_net import FORMATS, ONNX_PACKAGES, ONNX_TORCH, CalibratedNet, with_sets
from scripts.half_net import half_safetensors, round_to_half
from scripts.int8_net import int8_model, logits_of_model, with_softmax
from utils.analysis.nets import add_own_nets, check_own_nets, load_net, own_files
from utils.analysis.record import Record
from utils.analysis.records import finished_net
from utils.analysis.shift import data_of
from utils.data import Dataset
from utils.program import UserError, one_line_errors
from utils.program.command_line import CommandLine, location, path
from utils.program.files import atomic, check_not_input, check_writable
from utils.run_files import files_of_run

CHECKED = 256  # images
# The largest difference of a probability at T of 1 or more, see `allowed_difference`.
EXACT = 1e-5
COARSE = 0.2
OTHER_NET = 0.9  # some probability of another net's, or of other images, differs by more
# The one format that has what a flag asks for.
ONLY_IN = {"int8": "onnx", "with_sets": "onnx", "half": "safetensors"}

Logits = Callable[[Tensor], Tensor]  # (N, K) of images uint8 (N, 3, H, W)
Writer = Callable[[Softmax, dict[str, str]], bytes]  # a softmax and metadata -> a file


def in_int8(calibrated: CalibratedNet, data: Dataset) -> tuple[Logits, Writer]:
    """The net in 8-bit integers."""
    model = int8_model(calibrated, data.val.images)
    return logits_of_model(model), partial(with_softmax, model)


def in_half(calibrated: CalibratedNet, data: Dataset) -> tuple[Logits, Writer]:
    """The net itself, each weight rounded to half precision."""
    round_to_half(calibrated.net)

    def write(softmax: Softmax, metadata: dict[str, str]) -> bytes:
        return half_safetensors(calibrated, metadata)  # whose files keep the softmax in metadata

    return calibrated.logits, write


SMALLER = {"int8": in_int8, "half": in_half}  # by flag


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    net = finished_net(args.run, args.epoch)
    check_own_nets([net], args.model or ())
    check_outputs(args, net)
    data = data_of([net], args.data_dir, args.dataset)
    certificate = certify(net, args.calibration, stored_evidence(net))
    if args.with_sets:
        check_sets(net, certificate)

    own, saved = load_net(net)
    softmax = certificate.softmax
    calibrated = CalibratedNet(own, saved["mean"], saved["std"], softmax.weight, softmax.bias)
    metadata = metadata_of(net, saved, data, args, certificate)
    content, differences = checked_file(net, calibrated, softmax, data, args.format, metadata)
    lines = [f"{net.title}: ECE {certificate.eces()}; probabilities differ by up to {differences}"]

    # That file shows that weights and images are right. Now its net is made smaller.
    precision = precision_of(args)
    if precision in SMALLER:
        lines.append(f"float32: {certificate.line()}")
        logits_of_images, write_smaller = SMALLER[precision](calibrated, data)
        evidence = evidence_of(logits_of_images, data, name=precision)
        certificate = certify(net, args.calibration, evidence)
        metadata = metadata_of(net, saved, data, args, certificate)
        content = write_smaller(certificate.softmax, metadata)
        lines.append(f"{precision}:    {certificate.line()}")
    if args.with_sets:
        content = with_sets(content, SET_LEVEL, certificate.thresholds[SET_LEVEL])

    if certificate.at_bound:
        lines.append(AT_BOUND)

    with atomic(args.out) as file:
        file.write(content)
    lines.append(f"written: {args.out}, {len(content) / 1e6:.2f} MB")
    if args.card is not None:
        with atomic(args.card, "w") as file:
            file.write(card_of(net.title, args.out, args.format, content, metadata))
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
        default=Path(os.environ.get("KD_DATA") or "data"),
        help="where the run's data set lies",
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


def precision_of(args: Namespace) -> str:
    """In which the file holds its weights: a key of SMALLER, or float32."""
    for precision in SMALLER:  # one at most is asked for: each has a format of its own
        if getattr(args, precision):
            return precision
    return "float32"


def metadata_of(
    net: Record, saved: dict, data: Dataset, args: Namespace, certificate: Certificate
) -> dict[str, str]:
    """What a file says of itself: texts as they are, all else as JSON.

    `saved`: what the run's weights file holds beside the weights.
    """
    checkpoint = saved | {"softmax": certificate.softmax._asdict()}
    splits = {"train": data.train, "val": data.val, "test": data.test}
    images = {name: len(split.labels) for name, split in splits.items()}
    return {
        "calibration": args.calibration,
        "precision": precision_of(args),
        **certificate.metadata(),
        "classes": json.dumps(net.result["num_classes"]),
        "class_names": json.dumps(net.config.get("class_names")),
        "image_side": json.dumps(data.test.images.shape[-1]),
        "images": json.dumps(images),
        "dataset": net.dataset,
        "command": net.config.get("command", ""),
        "checkpoint": json.dumps(checkpoint),
    }


def checked_file(
    net: Record,
    calibrated: CalibratedNet,
    softmax: Softmax,
    data: Dataset,
    form: str,
    metadata: dict[str, str],
) -> tuple[bytes, str]:
    """The content of a file in float32, and what `check` says of it, read back."""
    images = data.test.images[:CHECKED].contiguous()
    write, reopen = FORMATS[form]
    content = write(calibrated, images, metadata)
    probabilities = reopen(content)(images)
    return content, check(net, calibrated, softmax, images, probabilities)


def check(
    net: Record, calibrated: CalibratedNet, softmax: Softmax, images: Tensor, probabilities: Tensor
) -> str:
    """Hold the file's probabilities (N, K) of the images against the net's and the run's own.

    How far they are from either, in words. Raises UserError where that is too far.
    """
    logits, _ = net.stored("test")
    stored = softmax(logits[:CHECKED])

    # Half precision, and TF32 in a GPU's convolutions, are coarser than the file. A run of an older
    # version does not say where it was computed.
    in_float32 = net.settings["mixed_precision"] == "no" and net.config.get("device") == "cpu"
    exact = allowed_difference(EXACT, softmax)
    coarse = allowed_difference(COARSE, softmax)
    texts = [
        difference(net, probabilities, calibrated(images), exact, "the net in float32"),
        difference(
            net,
            probabilities,
            stored,
            exact if in_float32 else coarse,
            "the run's stored predictions",
        ),
    ]
    return " and ".join(texts)


def allowed_difference(at_one: float, softmax: Softmax) -> float:
    """What a probability may differ by, where it may differ by `at_one` with weights of 1.

    Larger weights, as those of T < 1, multiply what the logits differ by through rounding.
    """
    largest = max(1.0, *map(abs, softmax.weight))
    return min(at_one * largest, OTHER_NET)


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
