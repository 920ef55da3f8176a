"""Losses by name: a base, then `+TERM` if wanted, e.g. "FL+MDCA" = focal + beta * MDCA.

A new base is a function of (logits, labels) and of the parameters named beside it in BASES; a new
term is a function of (logits, labels) in TERMS.
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from torch import Tensor

from losses.calibration import mdca, mmce
from losses.classification import focal, label_smoothing, nll
from losses.distillation import distillation_loss

__all__ = ["build_loss", "canonical_loss", "distillation_loss", "loss_names", "loss_parameters"]

Loss = Callable[[Tensor, Tensor], Tensor]

BASES = {  # name: (function, the parameters that it reads)
    "NLL": (nll, ()),
    "FL": (focal, ("gamma",)),
    "LS": (label_smoothing, ("alpha",)),
}
TERMS = {"MDCA": mdca, "MMCE": mmce}  # each weighted by beta
ALIASES = {
    "cross_entropy": "NLL",
    "focal_loss": "FL",
    "MDCA": "NLL+MDCA",
    "MMCE": "NLL+MMCE",
}


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
    known = [*loss_names(), *ALIASES]
    spelling = {known_name.lower(): known_name for known_name in known}
    nearest = get_close_matches(name.lower(), spelling, n=1)
    hint = f"did you mean {spelling[nearest[0]]!r}? " if nearest else ""
    raise ValueError(f"unknown loss {name!r}; {hint}known losses: {', '.join(known)}")


def loss_parameters(name: str) -> tuple[str, ...]:
    """Which of ("alpha", "gamma", "beta") the loss reads, in this order; ValueError as above."""
    base, _, term = canonical_loss(name).partition("+")
    return BASES[base][1] + (("beta",) if term else ())


def build_loss(name: str, alpha: float = 0.1, beta: float = 1.0, gamma: float = 1.0) -> Loss:
    """The loss as a function of logits (B, K) and labels (B,) that returns a scalar.

    alpha: label smoothing; beta: weight of the calibration term; gamma: focal exponent. What the
    loss does not read is ignored. Raises ValueError where the name is unknown.
    """
    base, _, term = canonical_loss(name).partition("+")
    function, reads = BASES[base]
    given = {"alpha": alpha, "gamma": gamma}
    base_loss = partial(function, **{parameter: given[parameter] for parameter in reads})
    if not term:
        return base_loss
    calibration = TERMS[term]
    return lambda logits, labels: base_loss(logits, labels) + beta * calibration(logits, labels)
