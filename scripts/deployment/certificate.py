"""What an exported file says of its own worth: fitted on validation logits, measured on test."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from utils.analysis.record import Record
from utils.calibration import fit_sets
from utils.calibration.bootstrap import bins_of, error_interval, gaps
from utils.columns import COLUMNS
from utils.data import Dataset
from utils.evaluation import CPU_BATCH
from utils.program import UserError
from utils.program.bars import progress_bar
from utils.split_metrics import metrics_of

SET_LEVELS = (0.8, 0.9, 0.95, 0.99)
AT_BOUND = "T lies at the bound of its range: do not trust confidences that it scales"
SET_LEVEL = "0.9"  # of the sets that a line speaks of, and of export's --with-sets


class Evidence(NamedTuple):
    """What a net made of the validation and the test split: logits (N, K) and labels (N,).

    `measured` is the net's part of result.json. `val` is None where it is not stored.
    """

    measured: dict
    val: tuple[Tensor, Tensor] | None
    test: tuple[Tensor, Tensor]


class Softmax(NamedTuple):
    """What makes probabilities of logits z: softmax(weight * z + bias)."""

    weight: list[float]  # (K,)
    bias: list[float]  # (K,)

    def __call__(self, logits: Tensor) -> Tensor:
        """The probabilities, float64, of logits (N, K)."""
        return self.scaled(logits).softmax(dim=1)

    def scaled(self, logits: Tensor) -> Tensor:
        return logits.double() * torch.tensor(self.weight) + torch.tensor(self.bias)


class Certificate(NamedTuple):
    """What makes probabilities of a net's logits, and what these are worth (fractions)."""

    softmax: Softmax
    temperature: float  # that suits the validation logits, whether it is used or not
    at_bound: bool  # whether it lies at the bound of its range, and so suits nothing
    top1: float
    ece: dict[str, float]  # raw, scaled, and vector where chosen
    ece_upper: float  # of the 95 % interval of the true ECE of the file's probabilities
    thresholds: dict[str, float]  # of LAC's sets by level, see `set_thresholds`
    coverage: dict[str, float]  # by level, the share of images whose set holds the label
    set_size: dict[str, float]  # by level, the classes of a set in the mean

    def metadata(self) -> dict[str, str]:
        return {
            "temperature": json.dumps(self.temperature),
            "temperature_at_bound": json.dumps(self.at_bound),
            "top1": json.dumps(self.top1),
            "ece": json.dumps(self.ece),
            "ece_upper": json.dumps(self.ece_upper),
            "sets": json.dumps(self.thresholds),
            "coverage": json.dumps(self.coverage),
            "set_size": json.dumps(self.set_size),
        }

    def eces(self) -> str:
        """`raw 4.61 %, scaled 1.20 %`, for a line."""
        texts = [f"{key} {COLUMNS['ece'].text(ece)} %" for key, ece in self.ece.items()]
        return ", ".join(texts)

    def line(self) -> str:
        """The whole, in percent."""
        text = COLUMNS["ece"].text
        coverage = self.coverage.get(SET_LEVEL)
        sets = "no sets" if coverage is None else f"sets at 90 % hold {100 * coverage:.2f} %"
        return (
            f"top-1 {100 * self.top1:.2f} %, T {self.temperature:.3f}, ECE {self.eces()}, "
            f"true ECE below {text(self.ece_upper)} %, {sets}"
        )


def stored_evidence(net: Record) -> Evidence:
    """That of a finished run, in the run's own precision. Raises UserError."""
    val = net.stored("val") if net.has_stored("val") else None
    return Evidence(net.measured, val, net.stored("test"))


def evidence_of(logits_of: Callable[[Tensor], Tensor], data: Dataset, name: str) -> Evidence:
    """What a net makes of the validation and the test split, when both are run through it.

    `logits_of`: (N, K) of images uint8 (N, 3, H, W); `name`: what the progress bar says.
    """
    splits = {"val": data.val, "test": data.test}
    logits = {}
    for split, images in splits.items():
        pieces = progress_bar(images.images.split(CPU_BATCH), f"{name}, {split}")
        logits[split] = torch.cat([logits_of(piece.contiguous()) for piece in pieces])
    return Evidence(
        measured=metrics_of(logits, splits),
        val=(logits["val"], data.val.labels),
        test=(logits["test"], data.test.labels),
    )


def certify(net: Record, calibration: str, evidence: Evidence) -> Certificate:
    """That of a run's net, calibrated as --calibration says.

    Raises UserError where the run has no such calibration.
    """
    # How the logits become probabilities.
    measured = evidence.measured
    ece = {logits: metrics["ece"] for logits, metrics in measured["test"].items()}
    temperature = measured["temperature"] if calibration == "temperature" else 1.0
    classes = net.result["num_classes"]
    softmax = Softmax(weight=[1 / temperature] * classes, bias=[0.0] * classes)
    if calibration == "vector":
        vector = fitted_vector(net)
        ece["vector"] = vector["test"]["ece"]
        softmax = Softmax(vector["weight"], vector["bias"])

    # What these are worth on test, which has decided nothing.
    logits, labels = evidence.test
    probabilities = softmax(logits)
    _, ece_upper = error_interval(bins_of([gaps(probabilities, labels)]))

    # Sets with the thresholds of validation.
    thresholds = set_thresholds(softmax, evidence)
    of_label = probabilities.gather(1, labels[:, None])
    return Certificate(
        softmax=softmax,
        temperature=measured["temperature"],
        at_bound=measured["temperature_at_bound"],
        top1=(probabilities.argmax(dim=1) == labels).double().mean().item(),
        ece=ece,
        ece_upper=ece_upper,
        thresholds=thresholds,
        coverage={
            level: (of_label >= threshold).double().mean().item()
            for level, threshold in thresholds.items()
        },
        set_size={
            level: (probabilities >= threshold).sum(dim=1).double().mean().item()
            for level, threshold in thresholds.items()
        },
    )


def fitted_vector(net: Record) -> dict:
    """The vector scaling that scripts/posthoc.py left beside the run. Raises UserError."""
    vector = net.posthoc.get("vector")
    if vector is None:
        raise UserError(
            f"--calibration vector: the run has none; python -m scripts.posthoc {net.folder} "
            f"--write --epoch {net.part} makes it"
        )
    return vector


def set_thresholds(softmax: Softmax, evidence: Evidence) -> dict[str, float]:
    """By level, the least probability of a class that is in an image's conformal set (LAC).

    Fitted on validation; empty without its logits, and without a level that they are too few for.
    """
    thresholds = {}
    if evidence.val is not None:
        logits, labels = evidence.val
        scaled = softmax.scaled(logits)
        for level in SET_LEVELS:
            with suppress(ValueError):
                sets = fit_sets(scaled, labels, alpha=1 - level)
                thresholds[f"{level:g}"] = sets.threshold
    return thresholds
