"""What confidence is worth for choosing which predictions to keep: risk against coverage.

Coverage is the share of samples that are kept, the surest first; risk is their error rate. All
functions take confidences (N,) in rising order and whether each prediction is right (N,), float64
and bool tensors. None depends on the order of samples with equal confidence: such samples share
their errors evenly, which is the mean over all their orders. Only `coverage_at_risk` keeps or drops
them together, as a threshold on the confidence would.
"""

import torch
from torch import Tensor


def aurc(ordered: Tensor, right: Tensor) -> float:
    """The mean error rate of the i surest samples over i = 1..N (Geifman et al., ICLR 2019)."""
    errors = _errors_of_surest(ordered, right)
    return (errors / torch.arange(1, len(errors) + 1)).mean().item()


def augrc(ordered: Tensor, right: Tensor) -> float:
    """Area under generalised risk, the share of samples that are kept and wrong, over coverage.

    Linear between samples, from (0, 0). Half the error rate where the confidence says nothing.
    Traub et al., NeurIPS 2024.
    """
    errors = _errors_of_surest(ordered, right)
    samples = len(errors)
    return ((errors.sum() - errors[-1] / 2) / samples**2).item()


def risk_at_coverage(ordered: Tensor, right: Tensor, percent: int) -> float:
    """Error rate, a fraction, of the surest samples: so many percent, rounded up to a whole one."""
    kept = -(-percent * len(ordered) // 100)
    return (_errors_of_surest(ordered, right)[kept - 1] / kept).item()


def coverage_at_risk(ordered: Tensor, right: Tensor, risk: float) -> float:
    """The largest share of samples that a threshold on the confidence keeps with at most this risk.

    0 where every threshold leaves more.
    """
    surest_first = ordered.flip(0)
    kept = torch.arange(1, len(ordered) + 1)
    errors = (~right).flip(0).cumsum(dim=0)
    last_of_equals = torch.ones_like(right)
    last_of_equals[:-1] = surest_first[:-1] != surest_first[1:]
    accepted = kept[last_of_equals & (errors / kept.double() <= risk)]
    return accepted[-1].item() / len(ordered) if len(accepted) else 0.0


def _errors_of_surest(ordered: Tensor, right: Tensor) -> Tensor:
    """(N,): how many of the i surest samples are wrong, i = 1..N; equals share their errors."""
    wrong = 1 - right.flip(0).double()
    _, group, counts = ordered.flip(0).unique_consecutive(return_inverse=True, return_counts=True)
    shared = torch.bincount(group, weights=wrong) / counts
    return shared.repeat_interleave(counts).cumsum(dim=0)
