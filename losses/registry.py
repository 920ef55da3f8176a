"""Losses by name, each with the flags that it reads: what the command line offers follows from it.

`--loss` is a base, then `+TERM` if wanted: "FL+MDCA" = focal + beta * MDCA. `--distill` is one of
DISTILLATIONS: Lambda * distillation + ce_weight * NLL. A new one is a function of logits, labels
and its flags by name (a distillation: student's logits, teacher's logits, labels, T, ...) that
returns a scalar, and its entry below. One that changes between epochs is a module of its flags
with `after_validation`, that keeps in buffers what changes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

from losses.calibration import cpc, dca, mbls, mdca, mmce
from losses.classification import AdaFocal, brier, dual_focal, flsd, focal, label_smoothing, nll
from losses.distillation import dist, dkd, kd, lskd
from losses.modules import ClassificationLoss, DistillationLoss

# What a flag may be: in words, and as a check.
NOT_NEGATIVE = ("a number of at least 0", lambda value: value >= 0)
BELOW_ONE = ("a number from 0 to below 1", lambda value: 0 <= value < 1)
ABOVE_ZERO = ("a number from 0.001 to 1e6", lambda value: 1e-3 <= value <= 1e6)

RAMP = 20  # epochs, of DKD: Zhao et al., CVPR 2022


class Flag(NamedTuple):
    """A number that a loss reads from the command line."""

    name: str
    default: float | None  # None: 1 - Lambda
    help: str
    grid: Sequence[float] = ()  # values in the literature; empty: the default alone
    range: tuple[str, Callable[[float], bool]] = NOT_NEGATIVE


class LossEntry(NamedTuple):
    """What computes a loss, a term or a distillation, and what it reads."""

    function: Callable
    flags: tuple[Flag, ...] = ()
    of_batch: bool = False  # compares counts of labels, which mixed labels do not have
    ramp: int = 0  # epochs over which a distillation's weight rises to Lambda


# Flags that several entries read, each with a default and a grid of its own.


def focus(default: float) -> Flag:
    return Flag("gamma", default, "focal exponent", grid=(1, 2, 3, 4, 5))


def term_weight(default: float, grid: Sequence[float] = ()) -> Flag:
    return Flag("beta", default, "weight of the calibration term", grid)


def temperature(default: float, grid: Sequence[float] = ()) -> Flag:
    return Flag("T", default, "temperature of both softmaxes", grid, range=ABOVE_ZERO)


def distillation_weight(default: float, grid: Sequence[float] = ()) -> Flag:
    return Flag(
        "Lambda", default, f"weight of the distillation; DKD reaches it after {RAMP} epochs", grid
    )


def label_weight(default: float | None) -> Flag:
    return Flag(
        "ce_weight",
        default,
        "weight of the labels' cross entropy; needed if KD's Lambda > 1",
    )


BASES = {
    "NLL": LossEntry(nll),
    "FL": LossEntry(focal, (focus(1.0),)),
    "LS": LossEntry(
        label_smoothing,
        (Flag("alpha", 0.1, "share of the target spread over all classes", range=BELOW_ONE),),
    ),
    "FLSD": LossEntry(flsd),
    "DFL": LossEntry(dual_focal, (focus(5.0),)),
    "AdaFocal": LossEntry(AdaFocal),
    "Brier": LossEntry(brier),
}
TERMS = {  # each weighed by beta
    "MDCA": LossEntry(mdca, (term_weight(1.0, grid=(1, 5, 10)),), of_batch=True),
    "MMCE": LossEntry(mmce, (term_weight(1.0, grid=(1, 2, 3, 4, 5)),), of_batch=True),
    "DCA": LossEntry(dca, (term_weight(1.0, grid=(1, 5, 10)),), of_batch=True),
    "MbLS": LossEntry(
        mbls,
        (
            term_weight(0.1),
            Flag("margin", 10.0, "by how much logits may differ at no cost"),
        ),
    ),
    "CPC": LossEntry(
        cpc,
        (
            term_weight(0.1),
            Flag("exclusion", 10.0, "weight of exclusion; times beta it is the literature's 1"),
        ),
    ),
}
DISTILLATIONS = {
    "KD": LossEntry(
        kd,
        (
            temperature(4.0, grid=(1, 1.5, 2, 3, 4, 5, 10, 20)),
            distillation_weight(0.9, grid=(0.9, 0.95, 1)),
            label_weight(None),
        ),
    ),
    "DKD": LossEntry(
        dkd,
        (
            temperature(4.0),
            distillation_weight(1.0),
            Flag("alpha", 1.0, "weight of the label's class against the rest"),
            Flag(
                "beta",
                8.0,
                "weight of the other classes among themselves",
                grid=(1, 2, 4, 6, 8, 10),
            ),
            label_weight(1.0),
        ),
        ramp=RAMP,
    ),
    "LSKD": LossEntry(
        lskd,
        (
            temperature(2.0),
            distillation_weight(9.0),
            label_weight(0.1),
        ),
    ),
    "DIST": LossEntry(
        dist,
        (
            temperature(1.0, grid=(1, 4)),
            distillation_weight(1.0, grid=(1, 2)),
            Flag("beta", 1.0, "weight of the correlation over classes"),
            Flag("gamma", 1.0, "weight of the correlation over images"),
            label_weight(1.0),
        ),
    ),
}
ALIASES = {"cross_entropy": "NLL", "focal_loss": "FL"}
for term in TERMS:
    ALIASES[term] = f"NLL+{term}"


def loss_names() -> list[str]:
    """The canonical names: every base alone and with every term."""
    names = []
    for base in BASES:
        names.append(base)
        names += [f"{base}+{term}" for term in TERMS]
    return names


def canonical_loss(name: str) -> str:
    """The name a run records: "focal_loss" -> "FL", "MDCA" -> "NLL+MDCA", "LS" -> "LS".

    ValueError, with the nearest name and all that there are, where there is none of that name.
    """
    canonical = ALIASES.get(name, name)
    if canonical in loss_names():
        return canonical
    spelling = {choice.lower(): choice for choice in [*loss_names(), *ALIASES]}
    nearest = get_close_matches(name.lower(), spelling, n=1)
    hint = f"did you mean {spelling[nearest[0]]!r}? " if nearest else ""
    raise ValueError(
        f"unknown loss {name!r}; {hint}known losses: {', '.join(BASES)}, each alone or with "
        f"+{', +'.join(TERMS)}; {', '.join(ALIASES)}"
    )


def loss_flags(name: str) -> tuple[Flag, ...]:
    """The flags that a loss or one of DISTILLATIONS reads, in their order in a run's name."""
    if name in DISTILLATIONS:
        return DISTILLATIONS[name].flags
    base, _, term = canonical_loss(name).partition("+")
    if not term:
        return BASES[base].flags
    return BASES[base].flags + TERMS[term].flags


def loss_parameters(name: str, choices: Mapping[str, float | None]) -> dict[str, float]:
    """The {flag: value}, in order, that name a run of this loss or distillation and build it.

    What is not among the choices, or None there, takes its default. What the loss does not read is
    left out, and so is ce_weight at its default. ValueError if the name is unknown or a 1 - Lambda
    is negative.
    """
    values = {}
    for flag in loss_flags(name):
        choice = choices.get(flag.name)
        values[flag.name] = flag.default if choice is None else choice
    if name not in DISTILLATIONS:
        return values

    ce_weight = values.pop("ce_weight")
    usual = usual_ce_weight(name, values["Lambda"])
    if ce_weight is None and usual < 0:
        raise ValueError("where Lambda is above 1, ce_weight must be given")
    if ce_weight is not None and not math.isclose(ce_weight, usual):
        values["ce_weight"] = ce_weight
    return values


def usual_ce_weight(name: str, Lambda: float) -> float:
    """The ce_weight of a distillation for which none is chosen."""
    default = DISTILLATIONS[name].flags[-1].default
    return 1 - Lambda if default is None else default


def build(entry: LossEntry, values: Mapping[str, float]) -> Callable:
    """The entry's function with those of the values that it reads, or an object of its class."""
    arguments = {flag.name: values[flag.name] for flag in entry.flags if flag.name in values}
    if isinstance(entry.function, type):
        return entry.function(**arguments)
    return partial(entry.function, **arguments)


def build_loss(name: str, **parameters: float) -> ClassificationLoss:
    """Its module; `parameters` as the choices of `loss_parameters`."""
    base, _, term = canonical_loss(name).partition("+")
    values = loss_parameters(name, parameters)
    beta = values.pop("beta", 0.0)  # is the module's, and no term's own
    return ClassificationLoss(
        base=build(BASES[base], values),
        term=build(TERMS[term], values) if term else None,
        beta=beta,
    )


def build_distillation(name: str, **parameters: float) -> DistillationLoss:
    """The same for one of DISTILLATIONS."""
    entry = DISTILLATIONS[name]
    values = loss_parameters(name, parameters)
    Lambda = values.pop("Lambda")
    ce_weight = values.pop("ce_weight", usual_ce_weight(name, Lambda))
    return DistillationLoss(
        build(entry, values), Lambda=Lambda, ce_weight=ce_weight, ramp=entry.ramp
    )
