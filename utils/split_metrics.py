"""Every metric from the logits of a split. Reports use it as well: no net is run here."""

import math

import torch
from torch import Tensor

from utils.calibration.metrics import classification_metrics, posterior_metrics
from utils.calibration.temperature import fit_temperature
from utils.data import Split


def evaluate(logits: Tensor, split: Split, temperature: float = 1.0) -> dict[str, float]:
    """Every metric of a split's logits (fractions), those against a known posterior included.

    One that is infinite is left out.
    """
    metrics = classification_metrics(logits, split.labels.cpu(), temperature)
    if split.posterior is not None:
        metrics |= posterior_metrics(logits, split.posterior, temperature)
    return finite_only(metrics)


def metrics_of(logits: dict[str, Tensor], splits: dict[str, Split]) -> dict:
    """Every metric of a net's logits (N, K), as result.json has them: fractions.

    `logits`: by split, val and test, or one of the two where the other is unknown. The temperature
    is the one that suits the validation logits best.
    """
    metrics = {}
    if "val" in logits:
        val = splits["val"]
        temperature, at_bound = fit_temperature(with_finite_logits(logits["val"]), val.labels)
        metrics["temperature"] = temperature
        metrics["temperature_at_bound"] = at_bound
        metrics["val"] = evaluate(logits["val"], val)
    if "test" in logits:
        test = splits["test"]
        metrics["test"] = {"raw": evaluate(logits["test"], test)}
        if "val" in logits:
            metrics["test"]["scaled"] = evaluate(logits["test"], test, temperature)
    return metrics


def finite_only(values: dict) -> dict:
    """Without numbers that are infinite, which JSON has not; so of the mappings within, too.

    Such is the NLL of a net that rules a label out: a report leaves that cell empty.
    """
    kept = {}
    for name, value in values.items():
        if isinstance(value, dict):
            kept[name] = finite_only(value)
        elif not isinstance(value, float) or math.isfinite(value):
            kept[name] = value
    return kept


def with_finite_logits(logits: Tensor) -> Tensor:
    """For a fit: -inf, a class that a teacher rules out, as a number of the same probability, 0."""
    return logits.clamp_min(torch.finfo(logits.dtype).min)
