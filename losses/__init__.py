"""Losses by name, each with the flags that it reads: what the command line offers follows from it.

`--loss` is a base, then `+TERM` if wanted: "FL+MDCA" = focal + beta * MDCA. `--distill` is one of
DISTILLATIONS: Lambda * distillation + ce_weight * NLL. A new one is a function of logits, labels
and its flags by name (a distillation: student's logits, teacher's logits, labels, T, ...) that
returns a scalar, and its entry below. One that changes between epochs is a module, built from its
flags, that keeps in buffers what changes.
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
TEMPERATURE = ("a number above 0, at most 1e6", lambda x: 0 < x <= 1e6)


class Flag(NamedTuple):
    name: str
    default: float | None  # None: follows from another flag, as `help` says
    help: str
    grid: tuple[float, ...] = ()  # values in the literature; empty: the default alone
    range: tuple[str, Callable[[float], bool]] = NOT_NEGATIVE  # in words, and as a check


class Entry(NamedTuple):
    function: Callable
    paper: str
    flags: tuple[Flag, ...] = ()
    of_batch: bool = False  # compares counts of labels, which mixed labels do not have
    ramp: int = 0  # epochs over which a distillation's weight rises to Lambda


SMOOTHING = "share of the target that is spread over all classes"
TERM = "weight of the calibration term"
EXCLUSION = "weight of exclusion relative to discrimination; 0.1 and 1 together are 0.1 and 10 here"
TEACHER = "weight of the distillation term; may be above 1"
LABELS = "weight of the labels' NLL"
SOFT = "temperature of both softmaxes"

BASES = {
    "NLL": Entry(nll, "cross entropy"),
    "FL": Entry(
        focal,
        "focal loss, Lin et al. 2017",
        (Flag("gamma", 1.0, "focal exponent; 0 is NLL", (1, 2, 3, 4, 5)),),
    ),
    "LS": Entry(
        label_smoothing,
        "label smoothing, Müller et al. 2019",
        (Flag("alpha", 0.1, SMOOTHING, range=BELOW_ONE),),
    ),
    "FLSD": Entry(flsd, "sample-dependent focal loss FLSD-53, Mukhoti et al. 2020"),
    "DFL": Entry(
        dual_focal,
        "dual focal loss, Tao et al. 2023",
        (Flag("gamma", 5.0, "exponent of the dual focal loss", (1, 2, 3, 4, 5)),),
    ),
    "AdaFocal": Entry(AdaFocal, "focal loss steered by validation, Ghosh et al. 2022"),
    "Brier": Entry(brier, "Brier score, 1950"),
}
TERMS = {  # beta, which weighs the term, comes first
    "MDCA": Entry(
        mdca, "Hebbalaguppe et al. 2022", (Flag("beta", 1.0, TERM, (1, 5, 10)),), of_batch=True
    ),
    "MMCE": Entry(
        mmce, "Kumar et al. 2018", (Flag("beta", 1.0, TERM, (1, 2, 3, 4, 5)),), of_batch=True
    ),
    "DCA": Entry(dca, "Liang et al. 2020", (Flag("beta", 1.0, TERM, (1, 5, 10)),), of_batch=True),
    "MbLS": Entry(
        mbls,
        "margin-based label smoothing, Liu et al. 2022",
        (Flag("beta", 0.1, TERM), Flag("margin", 10.0, "what logits may differ by", (6, 10))),
    ),
    "CPC": Entry(
        cpc,
        "pairwise constraints, Cheng and Vasconcelos 2022",
        (Flag("beta", 0.1, TERM), Flag("exclusion", 10.0, EXCLUSION)),
    ),
}
DISTILLATIONS = {  # T and Lambda come first, ce_weight last
    "KD": Entry(
        kd,
        "Hinton et al. 2015",
        (
            Flag("T", 4.0, SOFT, (1, 1.5, 2, 3, 4, 5, 10, 20), TEMPERATURE),
            Flag("Lambda", 0.9, TEACHER, (0.9, 0.95, 1)),
            Flag("ce_weight", None, f"{LABELS}; 1 - Lambda unless given"),
        ),
    ),
    "DKD": Entry(
        dkd,
        "decoupled, Zhao et al. 2022; its weight rises over 20 epochs",
        (
            Flag("T", 4.0, SOFT, range=TEMPERATURE),
            Flag("Lambda", 1.0, TEACHER),
            Flag("alpha", 1.0, "weight of the label's class against the rest"),
            Flag("beta", 8.0, "weight of the other classes among themselves", (1, 2, 4, 6, 8, 10)),
            Flag("ce_weight", 1.0, LABELS),
        ),
        ramp=20,
    ),
    "LSKD": Entry(
        lskd,
        "standardised logits, Sun et al. 2024",
        (
            Flag("T", 2.0, SOFT, range=TEMPERATURE),
            Flag("Lambda", 9.0, TEACHER),
            Flag("ce_weight", 0.1, LABELS),
        ),
    ),
    "DIST": Entry(
        dist,
        "correlations, Huang et al. 2022",
        (
            Flag("T", 1.0, SOFT, (1, 4), TEMPERATURE),
            Flag("Lambda", 1.0, TEACHER, (1, 2)),
            Flag("beta", 1.0, "weight of the correlation over classes"),
            Flag("gamma", 1.0, "weight of the correlation over images"),
            Flag("ce_weight", 1.0, LABELS),
        ),
    ),
}
ALIASES = {"cross_entropy": "NLL", "focal_loss": "FL", **{term: f"NLL+{term}" for term in TERMS}}


class Loss(nn.Module):
    """base + beta * term, of logits (B, K) and labels (B,)."""

    def __init__(self, base: Callable, term: Callable | None = None, beta: float = 0.0):
        super().__init__()
        self.base, self.term, self.beta = base, term, beta

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = self.base(logits, labels)
        return loss if self.term is None else loss + self.beta * self.term(logits, labels)

    def after_validation(self, logits: Tensor, labels: Tensor) -> None:
        """To be called after each epoch, in every process, with the whole validation split."""
        for part in self.children():
            part.after_validation(logits, labels)


class Distillation(nn.Module):
    """Lambda * distillation + ce_weight * NLL, of both logits (B, K) and labels (B,)."""

    def __init__(self, distil: Callable, Lambda: float, ce_weight: float, ramp: int):
        super().__init__()
        self.distil, self.Lambda, self.ce_weight, self.ramp = distil, Lambda, ce_weight, ramp
        if ramp:  # in a tensor, so that a captured step follows it
            self.register_buffer("share", torch.ones(()))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss = self.Lambda * self.distil(student, teacher, labels)
        return (loss * self.share if self.ramp else loss) + self.ce_weight * nll(student, labels)

    def before_epoch(self, epoch: int) -> None:
        """To be called before each epoch, the first of which is 1."""
        if self.ramp:
            self.share.fill_(min(epoch / self.ramp, 1))


def loss_names() -> list[str]:
    """The canonical names: every base alone and with every term."""
    return [base + term for base in BASES for term in ("", *(f"+{name}" for name in TERMS))]


def canonical_loss(name: str) -> str:
    """The name a run records: "focal_loss" -> "FL", "MDCA" -> "NLL+MDCA", "LS" -> "LS".

    Raises ValueError, with the nearest name and all known ones, where the name is unknown.
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
    """The flags that a loss reads, in their order in a run's name; ValueError as above."""
    base, _, term = canonical_loss(name).partition("+")
    return BASES[base].flags + (TERMS[term].flags if term else ())


def distillation_flags(name: str) -> tuple[Flag, ...]:
    """The same for one of DISTILLATIONS."""
    return DISTILLATIONS[name].flags


def loss_parameters(name: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """The {flag: value}, in order, that name a run of this loss or distillation and build it.

    What is not given, or None, takes its default; what the loss does not read is left out, and so
    is ce_weight at its default. Raises ValueError where the name is unknown, and where a ce_weight
    of 1 - Lambda would be negative.
    """
    flags = distillation_flags(name) if name in DISTILLATIONS else loss_flags(name)
    parameters = {
        flag.name: flag.default if given.get(flag.name) is None else given[flag.name]
        for flag in flags
    }
    if name in DISTILLATIONS:
        ce_weight, usual = parameters.pop("ce_weight"), usual_ce_weight(name, parameters["Lambda"])
        if ce_weight is None and usual < 0:
            raise ValueError("where Lambda is above 1, ce_weight must be given")
        if ce_weight is not None and not math.isclose(ce_weight, usual):
            parameters["ce_weight"] = ce_weight
    return parameters


def usual_ce_weight(name: str, Lambda: float) -> float:
    default = distillation_flags(name)[-1].default
    return 1 - Lambda if default is None else default


def build_loss(name: str, **given: float) -> Loss:
    """The loss as a module of logits (B, K) and labels (B,) that returns a scalar.

    What is not given takes its default, and what the loss does not read is ignored. Raises
    ValueError where the name is unknown.
    """
    base, _, term = canonical_loss(name).partition("+")
    parameters = loss_parameters(name, given)
    if not term:
        return Loss(build(BASES[base], parameters))
    beta = parameters.pop("beta")
    return Loss(build(BASES[base], parameters), build(TERMS[term], parameters), beta)


def build_distillation(name: str, **given: float) -> Distillation:
    """The same for one of DISTILLATIONS, of student's and teacher's logits (B, K) and labels."""
    parameters = loss_parameters(name, given)
    Lambda = parameters.pop("Lambda")
    ce_weight = parameters.pop("ce_weight", usual_ce_weight(name, Lambda))
    entry = DISTILLATIONS[name]
    return Distillation(build(entry, parameters), Lambda, ce_weight, entry.ramp)


def build(entry: Entry, parameters: dict[str, float]) -> Callable:
    own = {flag.name: parameters[flag.name] for flag in entry.flags if flag.name in parameters}
    make = entry.function if isinstance(entry.function, type) else partial(partial, entry.function)
    return make(**own)


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, T: float, Lambda: float
) -> Tensor:
    """KD: Lambda T^2 KL(teacher || student), both at T, + (1 - Lambda) NLL of the student."""
    return build_distillation("KD", T=T, Lambda=Lambda)(student, teacher, labels)
