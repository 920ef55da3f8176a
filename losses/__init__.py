"""Losses by name, each with the flags that it reads: what the command line offers follows from it.

`--loss` is a base, then `+TERM` if wanted: "FL+MDCA" = focal + beta * MDCA. `--distill` is one of
DISTILLATIONS: Lambda * distillation + ce_weight * NLL. A new one is a function of logits, labels
and its flags by name (a distillation: student's logits, teacher's logits, labels, T, ...) that
returns a scalar, and its entry below. One that changes between epochs is a module of its flags
with `after_validation`, that keeps in buffers what changes.
"""

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses.calibration import cpc, dca, mbls, mdca, mmce
from losses.classification import AdaFocal, brier, dual_focal, flsd, focal, label_smoothing, nll
from losses.distillation import dist, dkd, kd, lskd

NOT_NEGATIVE = ("a number of at least 0", lambda x: x >= 0)
BELOW_ONE = ("a number from 0 to below 1", lambda x: 0 <= x < 1)
ABOVE_ZERO = ("a number from 0.001 to 1e6", lambda x: 1e-3 <= x <= 1e6)
RAMP = 20


class Flag(NamedTuple):
    name: str
    default: float | None  # None: 1 - Lambda
    help: str
    grid: tuple[float, ...] = ()  # values in the literature; empty: the default alone
    range: tuple[str, Callable[[float], bool]] = NOT_NEGATIVE  # in words, and as a check

    def at(self, default: float | None, *grid: float) -> "Flag":
        return self._replace(default=default, grid=grid)


class LossEntry(NamedTuple):
    function: Callable
    flags: tuple[Flag, ...] = ()
    of_batch: bool = False  # compares counts of labels, which mixed labels do not have
    ramp: int = 0  # epochs over which a distillation's weight rises to Lambda


FOCUS = Flag("gamma", 1.0, "focal exponent", (1, 2, 3, 4, 5))
SMOOTHING = Flag("alpha", 0.1, "share of the target spread over all classes", range=BELOW_ONE)
WEIGHT = Flag("beta", 1.0, "weight of the calibration term", (1, 5, 10))
MARGIN = Flag("margin", 10.0, "by how much logits may differ at no cost")
EXCLUSION = Flag("exclusion", 10.0, "weight of exclusion; times beta it is the literature's 1")
T = Flag("T", 4.0, "temperature of both softmaxes", range=ABOVE_ZERO)
SHARE = Flag("Lambda", 1.0, f"weight of the distillation; DKD reaches it after {RAMP} epochs")
LABELS = Flag("ce_weight", 1.0, "weight of the labels' cross entropy; needed if KD's Lambda > 1")
TARGET = Flag("alpha", 1.0, "weight of the label's class against the rest")
OTHERS = Flag("beta", 8.0, "weight of the other classes among themselves", (1, 2, 4, 6, 8, 10))
OVER_CLASSES = Flag("beta", 1.0, "weight of the correlation over classes")
OVER_IMAGES = Flag("gamma", 1.0, "weight of the correlation over images")

BASES = {
    "NLL": LossEntry(nll),
    "FL": LossEntry(focal, (FOCUS,)),
    "LS": LossEntry(label_smoothing, (SMOOTHING,)),
    "FLSD": LossEntry(flsd),
    "DFL": LossEntry(dual_focal, (FOCUS._replace(default=5.0),)),
    "AdaFocal": LossEntry(AdaFocal),
    "Brier": LossEntry(brier),
}
TERMS = {  # each weighed by its first flag
    "MDCA": LossEntry(mdca, (WEIGHT,), of_batch=True),
    "MMCE": LossEntry(mmce, (WEIGHT.at(1.0, 1, 2, 3, 4, 5),), of_batch=True),
    "DCA": LossEntry(dca, (WEIGHT,), of_batch=True),
    "MbLS": LossEntry(mbls, (WEIGHT.at(0.1), MARGIN)),
    "CPC": LossEntry(cpc, (WEIGHT.at(0.1), EXCLUSION)),
}
DISTILLATIONS = {
    "KD": LossEntry(
        kd, (T.at(4.0, 1, 1.5, 2, 3, 4, 5, 10, 20), SHARE.at(0.9, 0.9, 0.95, 1), LABELS.at(None))
    ),
    "DKD": LossEntry(dkd, (T, SHARE, TARGET, OTHERS, LABELS), ramp=RAMP),
    "LSKD": LossEntry(lskd, (T.at(2.0), SHARE.at(9.0), LABELS.at(0.1))),
    "DIST": LossEntry(
        dist, (T.at(1.0, 1, 4), SHARE.at(1.0, 1, 2), OVER_CLASSES, OVER_IMAGES, LABELS)
    ),
}
ALIASES = {"cross_entropy": "NLL", "focal_loss": "FL", **{name: f"NLL+{name}" for name in TERMS}}


class ClassificationLoss(nn.Module):
    """base + beta * term, of logits (B, K) and labels (B,)."""

    def __init__(self, base: Callable, term: Callable | None = None, beta: float = 0.0):
        super().__init__()
        self.base = base
        self.term = term
        self.beta = beta

    def parts(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scalars whose sum is the loss: `labels`, and with a term `calibration`."""
        parts = {"labels": self.base(logits, labels)}
        if self.term is not None:
            parts["calibration"] = self.beta * self.term(logits, labels)
        return parts

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sum_of(self.parts(logits, labels))

    def after_validation(self, logits: Tensor, labels: Tensor) -> None:
        """After each epoch, in every process, with the whole validation split."""
        for part in self.children():
            part.after_validation(logits, labels)


class DistillationLoss(nn.Module):
    """Lambda * distillation + ce_weight * NLL, of both logits (B, K) and labels (B,).

    `ramp`: over so many epochs the distillation's weight rises to Lambda; 0: it is Lambda at once.
    """

    def __init__(self, distil: Callable, Lambda: float, ce_weight: float, ramp: int = 0):
        super().__init__()
        self.distil = distil
        self.Lambda = Lambda
        self.ce_weight = ce_weight
        self.ramp = ramp
        if ramp:  # in a tensor, so that a captured step follows it
            self.register_buffer("share", torch.ones(()))

    def parts(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scalars whose sum is the loss: `distillation` and `labels`."""
        distillation = self.Lambda * self.distil(student, teacher, labels)
        if self.ramp:
            distillation = distillation * self.share
        return {"distillation": distillation, "labels": self.ce_weight * nll(student, labels)}

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return sum_of(self.parts(student, teacher, labels))

    def before_epoch(self, epoch: int) -> None:
        """Before each epoch, the first of which is 1."""
        if self.ramp:
            self.share.fill_(min(epoch / self.ramp, 1))

    def after_validation(self, logits: Tensor, labels: Tensor) -> None:
        """Nothing here learns from the validation split."""


def sum_of(parts: Mapping[str, Tensor]) -> Tensor:
    total, *others = parts.values()
    for part in others:
        total = total + part
    return total


def loss_names() -> list[str]:
    """The canonical names: every base alone and with every term."""
    return [base + term for base in BASES for term in ("", *(f"+{name}" for name in TERMS))]


def canonical_loss(name: str) -> str:
    """The name a run records: "focal_loss" -> "FL", "MDCA" -> "NLL+MDCA", "LS" -> "LS".

    ValueError, with the nearest name and all known ones, where it is unknown.
    """
    canonical = ALIASES.get(name, name)
    if canonical in loss_names():
        return canonical
    spelling = {known.lower(): known for known in [*loss_names(), *ALIASES]}
    nearest = get_close_matches(name.lower(), spelling, n=1)
    hint = f"did you mean {spelling[nearest[0]]!r}? " if nearest else ""
    known = f"{', '.join(BASES)}, each alone or with +{', +'.join(TERMS)}; {', '.join(ALIASES)}"
    raise ValueError(f"unknown loss {name!r}; {hint}known losses: {known}")


def loss_flags(name: str) -> tuple[Flag, ...]:
    """The flags that a loss or one of DISTILLATIONS reads, in their order in a run's name."""
    if name in DISTILLATIONS:
        return DISTILLATIONS[name].flags
    base, _, term = canonical_loss(name).partition("+")
    return BASES[base].flags + (TERMS[term].flags if term else ())


def loss_parameters(name: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """The {flag: value}, in order, that name a run of this loss or distillation and build it.

    What is not given, or None, takes its default; what the loss does not read is left out, and so
    is ce_weight at its default. ValueError if the name is unknown or a 1 - Lambda is negative.
    """
    values = {flag.name: flag.default for flag in loss_flags(name)}
    values |= {flag: x for flag, x in given.items() if flag in values and x is not None}
    if name in DISTILLATIONS:
        ce_weight, usual = values.pop("ce_weight"), usual_ce_weight(name, values["Lambda"])
        if ce_weight is None and usual < 0:
            raise ValueError("where Lambda is above 1, ce_weight must be given")
        if ce_weight is not None and not math.isclose(ce_weight, usual):
            values["ce_weight"] = ce_weight
    return values


def usual_ce_weight(name: str, Lambda: float) -> float:
    default = loss_flags(name)[-1].default
    return 1 - Lambda if default is None else default


def build(entry: LossEntry, values: dict[str, float]) -> Callable:
    """The entry's function with those of the values that it reads, or an object of its class."""
    function = entry.function
    own = {flag.name: values[flag.name] for flag in entry.flags if flag.name in values}
    return function(**own) if isinstance(function, type) else partial(function, **own)


def build_loss(name: str, **parameters: float) -> ClassificationLoss:
    """Its module; `parameters` as `given` in `loss_parameters`."""
    base, _, term = canonical_loss(name).partition("+")
    values = loss_parameters(name, parameters)
    beta = values.pop("beta", 0.0)
    return ClassificationLoss(
        base=build(BASES[base], values),
        term=build(TERMS[term], values) if term else None,
        beta=beta,
    )


def build_distillation(name: str, **parameters: float) -> DistillationLoss:
    """The same for one of DISTILLATIONS."""
    entry, values = DISTILLATIONS[name], loss_parameters(name, parameters)
    Lambda = values.pop("Lambda")
    ce_weight = values.pop("ce_weight", usual_ce_weight(name, Lambda))
    return DistillationLoss(build(entry, values), Lambda, ce_weight, entry.ramp)
