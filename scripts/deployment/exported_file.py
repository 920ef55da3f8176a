"""The content of an exported file: of a net as it is, which is checked, or of a smaller one."""

import json
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from scripts.deployment.certificate import Certificate, Softmax, certify, evidence_of
from scripts.deployment.exported_net import FORMATS, CalibratedNet
from scripts.deployment.half_net import half_safetensors, round_to_half
from scripts.deployment.int8_net import int8_model, logits_of_model, with_softmax
from utils.analysis.record import Record
from utils.data import Dataset
from utils.program import UserError

CHECKED = 256  # images
# The largest difference of a probability at T of 1 or more, see `allowed_difference`.
EXACT = 1e-5
COARSE = 0.2
OTHER_NET = 0.9  # some probability of another net's, or of other images, differs by more

Logits = Callable[[Tensor], Tensor]  # (N, K) of images uint8 (N, 3, H, W)
Writer = Callable[[Softmax, dict[str, str]], bytes]  # a softmax and metadata -> a file


class Source(NamedTuple):
    """What a file is made from."""

    net: Record
    calibrated: CalibratedNet  # that run's, with the calibration that was chosen
    saved: dict  # what the run's weights file holds beside the weights
    data: Dataset
    args: Namespace


class File(NamedTuple):
    """A file that is not on disk yet."""

    content: bytes
    metadata: dict[str, str]
    certificate: Certificate
    lines: list[str]  # what is said of it


def quantised_copy(calibrated: CalibratedNet, data: Dataset) -> tuple[Logits, Writer]:
    """A net in 8-bit integers."""
    model = int8_model(calibrated, data.val.images)
    return logits_of_model(model), partial(with_softmax, model)


def rounded_in_place(calibrated: CalibratedNet, data: Dataset) -> tuple[Logits, Writer]:
    """The net itself, each of whose weights is rounded to half precision here."""
    round_to_half(calibrated.net)

    def write(softmax: Softmax, metadata: dict[str, str]) -> bytes:
        return half_safetensors(calibrated, metadata)  # whose files keep the softmax in metadata

    return calibrated.logits, write


SMALLER = {"int8": quantised_copy, "half": rounded_in_place}  # by flag


def float32_file(source: Source, certificate: Certificate) -> File:
    """The file of the net as it is; read back, and checked on some images. Raises UserError."""
    net = source.net
    images = source.data.test.images[:CHECKED].contiguous()
    write, reopen = FORMATS[source.args.format]
    metadata = metadata_of(source, certificate)
    content = write(source.calibrated, images, metadata)
    differences = check(
        net,
        certificate.softmax,
        probabilities=reopen(content)(images),
        expected=source.calibrated(images),
    )
    line = f"{net.title}: ECE {certificate.eces()}; probabilities differ by up to {differences}"
    return File(content, metadata, certificate, lines=[line])


def smaller_file(source: Source, in_float32: File) -> File:
    """The file of the net in 8-bit integers or in half precision, calibrated again.

    Raises UserError.
    """
    precision = precision_of(source.args)
    logits_of_images, write = SMALLER[precision](source.calibrated, source.data)
    evidence = evidence_of(logits_of_images, source.data, name=precision)
    certificate = certify(source.net, source.args.calibration, evidence)
    metadata = metadata_of(source, certificate)
    lines = [
        *in_float32.lines,
        f"float32: {in_float32.certificate.line()}",
        f"{precision}:    {certificate.line()}",
    ]
    return File(write(certificate.softmax, metadata), metadata, certificate, lines)


def computed_in_float32(net: Record) -> bool:
    """Whether the run computed its logits as the file does.

    Not in half precision, nor with TF32 in a GPU's convolutions. A run of an older version does not
    say where it computed.
    """
    return net.settings["mixed_precision"] == "no" and net.config.get("device") == "cpu"


def recalibrated_file(source: Source, in_float32: File) -> File:
    """The float32 file of a run that computed otherwise: calibrated and measured on its own logits.

    Raises UserError.
    """
    evidence = evidence_of(source.calibrated.logits, source.data, name="float32")
    certificate = certify(source.net, source.args.calibration, evidence)
    calibrated = source.calibrated.with_softmax(*certificate.softmax)
    metadata = metadata_of(source, certificate)
    images = source.data.test.images[:CHECKED].contiguous()
    write, _ = FORMATS[source.args.format]
    lines = [*in_float32.lines, f"in float32, as the file computes: {certificate.line()}"]
    return File(write(calibrated, images, metadata), metadata, certificate, lines)


def precision_of(args: Namespace) -> str:
    """In which the file holds its weights: a key of SMALLER, or float32."""
    for precision in SMALLER:  # one at most is asked for: each has a format of its own
        if getattr(args, precision):
            return precision
    return "float32"


def metadata_of(source: Source, certificate: Certificate) -> dict[str, str]:
    """What a file says of itself: texts as they are, all else as JSON."""
    net = source.net
    data = source.data
    checkpoint = source.saved | {"softmax": certificate.softmax._asdict()}
    splits = {"train": data.train, "val": data.val, "test": data.test}
    images = {name: len(split.labels) for name, split in splits.items()}
    return {
        "calibration": source.args.calibration,
        "precision": precision_of(source.args),
        **certificate.metadata(),
        "classes": json.dumps(net.result["num_classes"]),
        "class_names": json.dumps(net.config.get("class_names")),
        "image_side": json.dumps(data.side),
        "images": json.dumps(images),
        "dataset": net.dataset,
        "command": net.config.get("command", ""),
        "checkpoint": json.dumps(checkpoint),
    }


def check(net: Record, softmax: Softmax, probabilities: Tensor, expected: Tensor) -> str:
    """Hold the probabilities (N, K) of a file against those `expected`, the net's, and the run's.

    How far they are from either, in words. Raises UserError where that is too far.
    """
    logits, _ = net.stored("test")
    stored = softmax(logits[:CHECKED])

    # What the run computed may be coarser than the file.
    exact = allowed_difference(EXACT, softmax)
    coarse = allowed_difference(COARSE, softmax)
    texts = [
        difference(
            net,
            probabilities,
            expected=expected,
            allowed=exact,
            name="the net in float32",
        ),
        difference(
            net,
            probabilities,
            expected=stored,
            allowed=exact if computed_in_float32(net) else coarse,
            name="the run's stored predictions",
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
