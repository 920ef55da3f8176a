"""Post-hoc maps that another package makes: those of probmetrics, by its own names.

Among them are structured matrix and vector scaling (`sms`, `svs`: Berta et al., AISTATS 2026),
isotonic regression (`isotonic`) and inductive Venn-Abers predictors (`ivap`).
"""

import importlib.util
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .scores import Array, checked_pair, checked_probs

PACKAGE = "probmetrics"


@dataclass(frozen=True)
class PackagedMap:
    """A fitted map of logits (N, K) to log probabilities, float64; -inf where one is 0.

    `facts` and `notes` are what a `Calibration` has, and empty: the package says nothing.
    """

    calibrator: Any  # with the methods of the package's own base class
    facts: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def parameters(self) -> dict:
        """None: the package keeps them, in another form for each map."""
        return {}

    def __call__(self, logits: Array) -> Tensor:
        """The logarithms of the calibrated probabilities. Raises ValueError where they are none."""
        logits = torch.as_tensor(logits).double()
        probs = self.calibrator.predict_proba_torch(_distribution(logits)).get_probs()
        if probs.shape != logits.shape:
            # Venn-Abers leaves out a class of which it has seen no label.
            raise ValueError(
                f"it gives {probs.shape[1]} probabilities for {logits.shape[1]} classes, as where "
                "a class has no validation image"
            )
        return checked_probs(probs).double().log()


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def calibrator(method: str) -> Any:
    """An unfitted calibrator. Raises ValueError for a name that the package does not know.

    Raises ImportError where it needs another package, or is missing itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, which are the package's affair
        from probmetrics.calibrators import get_calibrator
    return get_calibrator(method)


def packaged_map(method: str, logits: Array, labels: Array) -> PackagedMap:
    """The map that the package calls `method`, fitted with its own settings.

    Logits (N, K), labels (N,). Raises ValueError as the metrics do, where a logit is infinite, and
    where the map cannot be fitted; ImportError as `calibrator`.
    """
    logits, labels = checked_pair(logits, labels)
    # Some of the maps take these as they come.
    if not logits.isfinite().all():
        raise ValueError("logits hold infinite values")
    fitted = PackagedMap(calibrator(method).fit_torch(_distribution(logits.double()), labels))
    fitted(logits)  # a map that gives no probabilities is found here
    return fitted


def _distribution(logits: Tensor):
    from probmetrics.distributions import CategoricalLogits

    return CategoricalLogits(logits)
