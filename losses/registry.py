"""Losses by name, each with the flags that it reads: what the command line offers follows from it.

`--loss` is a base, then `+TERM` if wanted: "FL+MDCA" = focal + beta * MDCA. `--distill` is one of
DISTILLATIONS: Lambda * distillation + ce_weight * NLL. Then one of FEATURES if wanted: "KD+AT" =
KD + feature_weight * AT. A new one is a function of logits, labels and its flags by name (a
distillation: student's logits, teacher's logits, labels, T, ...; a term on features: student's
maps, teacher's maps, its flags) that returns a scalar, and its entry below. One that changes
between epochs is a module of its flags with `after_validation`, that keeps in buffers what changes.
A term on features that has weights of its own is a module of maps of some images and of its flags.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

from losses.calibration import cpc, dca, mbls, mdca, mmce
from losses.classification import AdaFocal, brier, dual_focal, flsd, focal, label_smoothing, nll
from losses.distillation import dist, dkd, kd, lskd
from losses.features import (
    FitNet,
    LayerPairs,
    Maps,
    attention,
    every_stage,
    last_stage,
    middle_stage,
    pooled_features,
    probabilities,
    relations,
    similarity,
)
from losses.modules import ClassificationLoss, DistillationLoss, FeatureTerm

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

    def checked(self, value: float) -> float:
        """The value itself. Raises ValueError outside of the range."""
        wanted, allowed = self.range
        if not allowed(value):
            raise ValueError(f"--{self.name}: '{value:g}' will not do; give {wanted}")
        return value


class LossEntry(NamedTuple):
    """What computes a loss, a term or a distillation, and what it reads."""

    function: Callable
    flags: tuple[Flag, ...] = ()
    of_batch: bool = False  # compares counts of labels, which mixed labels do not have
    ramp: int = 0  # epochs over which a distillation's weight rises to Lambda
    # Of a term on features: which layers it compares, from the names of both nets' stages.
    pairing: Callable[[Sequence[str], Sequence[str]], LayerPairs] | None = None


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


def feature_weight(default: float) -> Flag:
    return Flag("feature_weight", default, "weight of the term on features")


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
FEATURES = {  # added to a distillation; weights as in RepDistiller's scripts
    "FitNet": LossEntry(FitNet, (feature_weight(100.0),), pairing=middle_stage),
    "AT": LossEntry(attention, (feature_weight(1000.0),), pairing=every_stage),
    "SP": LossEntry(similarity, (feature_weight(3000.0),), pairing=last_stage),
    "RKD": LossEntry(relations, (feature_weight(1.0),), pairing=pooled_features),
    "PKT": LossEntry(probabilities, (feature_weight(30000.0),), pairing=pooled_features),
}


def refuse_shared_flags(bases: Mapping[str, LossEntry], terms: Mapping[str, LossEntry]) -> None:
    """A base and its term get their numbers by name, so that each needs names of its own."""
    of_terms = {flag.name: term for term, entry in terms.items() for flag in entry.flags}
    for base, entry in bases.items():
        for flag in entry.flags:
            if flag.name in of_terms:
                raise ValueError(
                    f"{base} and {of_terms[flag.name]} both read --{flag.name}, and "
                    f"{base}+{of_terms[flag.name]} could not tell whose it is; name one otherwise"
                )


refuse_shared_flags(BASES, TERMS)
refuse_shared_flags(DISTILLATIONS, FEATURES)

ALIASES = {"cross_entropy": "NLL", "focal_loss": "FL"}
for term in TERMS:
    ALIASES[term] = f"NLL+{term}"


def loss_names() -> list[str]:
    """The canonical names: every base alone and with every term."""
    return alone_and_with(BASES, TERMS)


def distillation_names() -> list[str]:
    """Every distillation of logits alone and with every term on features."""
    return alone_and_with(DISTILLATIONS, FEATURES)


def alone_and_with(bases: Iterable[str], terms: Iterable[str]) -> list[str]:
    names = []
    for base in bases:
        names.append(base)
        names += [f"{base}+{term}" for term in terms]
    return names


def base_of(name: str) -> str:
    """The name without its term: FL of FL+MDCA, KD of KD+AT."""
    return name.partition("+")[0]


def term_of(name: str) -> str | None:
    """MDCA of FL+MDCA, AT of KD+AT, None of FL or KD."""
    return name.partition("+")[2] or None


def is_distillation(name: str) -> bool:
    return base_of(name) in DISTILLATIONS


def canonical_loss(name: str) -> str:
    """The name a run records: "focal_loss" -> "FL", "MDCA" -> "NLL+MDCA", "LS" -> "LS".

    ValueError, with the nearest name and all that there are, where there is none of that name.
    """
    canonical = ALIASES.get(name, name)
    if canonical in loss_names():
        return canonical
    raise ValueError(
        f"unknown loss {name!r}; {nearest_hint(name, [*loss_names(), *ALIASES])}known losses: "
        f"{', '.join(BASES)}, each alone or with +{', +'.join(TERMS)}; {', '.join(ALIASES)}"
    )


def check_distillation(name: str) -> str:
    """The name itself. ValueError, with the nearest, where there is no such distillation."""
    if name in distillation_names():
        return name
    raise ValueError(
        f"unknown distillation {name!r}; {nearest_hint(name, distillation_names())}known "
        f"distillations: {', '.join(DISTILLATIONS)}, each alone or with +{', +'.join(FEATURES)}"
    )


def nearest_hint(name: str, names: Iterable[str]) -> str:
    """`did you mean 'FL'? `; empty where no name is near."""
    spelling = {choice.lower(): choice for choice in names}
    nearest = get_close_matches(name.lower(), spelling, n=1)
    return f"did you mean {spelling[nearest[0]]!r}? " if nearest else ""


def loss_flags(name: str) -> tuple[Flag, ...]:
    """The flags that a loss or a distillation reads, in their order in a run's name."""
    if is_distillation(name):
        return flags_of(check_distillation(name), DISTILLATIONS, FEATURES)
    return flags_of(canonical_loss(name), BASES, TERMS)


def flags_of(
    name: str, bases: Mapping[str, LossEntry], terms: Mapping[str, LossEntry]
) -> tuple[Flag, ...]:
    """Those of a base, then those of its term if it has one."""
    flags = bases[base_of(name)].flags
    term = term_of(name)
    return flags if term is None else flags + terms[term].flags


def all_parameters(name: str, choices: Mapping[str, float | None]) -> dict[str, float]:
    """The value of every flag that this loss or distillation reads; ce_weight is the last.

    What is not among the choices, or None there, takes its default. ValueError, with the flag, if
    the name is unknown, a choice is out of range or a 1 - Lambda is negative.
    """
    values = {}
    for flag in loss_flags(name):
        choice = choices.get(flag.name)
        values[flag.name] = flag.default if choice is None else flag.checked(choice)
    if not is_distillation(name):
        return values

    # Without a choice the labels have the weight that the distillation leaves.
    ce_weight = values.pop("ce_weight")
    if ce_weight is None:
        ce_weight = usual_ce_weight(name, values["Lambda"])
        if ce_weight < 0:
            raise ValueError(f"--Lambda {values['Lambda']:g}: above 1, --ce_weight must be given")
    return {**values, "ce_weight": ce_weight}


def loss_parameters(name: str, choices: Mapping[str, float | None]) -> dict[str, float]:
    """The {flag: value}, in order, that name a run; `all_parameters` without a usual ce_weight."""
    values = all_parameters(name, choices)
    if is_distillation(name):
        usual = usual_ce_weight(name, values["Lambda"])
        if math.isclose(values["ce_weight"], usual):
            del values["ce_weight"]
    return values


def usual_ce_weight(name: str, Lambda: float) -> float:
    """The ce_weight of a distillation for which none is chosen."""
    defaults = {flag.name: flag.default for flag in DISTILLATIONS[base_of(name)].flags}
    default = defaults["ce_weight"]
    return 1 - Lambda if default is None else default


def build(entry: LossEntry, values: Mapping[str, float], *maps: Maps) -> Callable:
    """The entry's function with those of the values that it reads, or an object of its class.

    `maps`: of some images, the student's and the teacher's, which the class of a term on features
    is made for.
    """
    arguments = {flag.name: values[flag.name] for flag in entry.flags if flag.name in values}
    if isinstance(entry.function, type):
        return entry.function(*maps, **arguments)
    return partial(entry.function, **arguments)


def build_loss(name: str, **parameters: float) -> ClassificationLoss:
    """Its module; `parameters` as the choices of `loss_parameters`."""
    name = canonical_loss(name)
    term = term_of(name)
    values = all_parameters(name, parameters)
    beta = values.pop("beta", 0.0)  # no base reads it (refuse_shared_flags)
    return ClassificationLoss(
        base=build(BASES[base_of(name)], values),
        term=None if term is None else build(TERMS[term], values),
        beta=beta,
    )


def build_distillation(name: str, **parameters: float) -> DistillationLoss:
    """The loss on logits of a distillation, without its term on features."""
    entry = DISTILLATIONS[base_of(name)]
    values = all_parameters(name, parameters)
    # They weigh the distillation and the labels, and are no numbers of the function's.
    Lambda = values.pop("Lambda")
    ce_weight = values.pop("ce_weight")
    return DistillationLoss(
        build(entry, values), Lambda=Lambda, ce_weight=ce_weight, ramp=entry.ramp
    )


def feature_layers(name: str, student: Sequence[str], teacher: Sequence[str]) -> LayerPairs:
    """The layers that a distillation's term on features compares, from the names of the stages."""
    return FEATURES[term_of(name)].pairing(student, teacher)


def build_features(
    name: str, pairs: LayerPairs, student: Maps, teacher: Maps, **parameters: float
) -> FeatureTerm:
    """A distillation's term on features. `student` and `teacher`: maps of those layers, by which
    weights of the term's own get their shapes."""
    values = all_parameters(name, parameters)
    weight = values.pop("feature_weight")
    term = build(FEATURES[term_of(name)], values, student, teacher)
    return FeatureTerm(term, weight, pairs)
