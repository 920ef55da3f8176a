"""Temperature scaling: the one number that logits are divided by."""

import math

import torch
from torch import Tensor

from utils.calibration.metrics import Array, as_float64

T_MIN, T_MAX = 0.05, 20.0
# Each step halves log(T_MAX / T_MIN) = 6: the last bracket is 1e-14 wide, relative to T.
STEPS = 50


def fit_temperature(logits: Array, labels: Array) -> tuple[float, bool]:
    """The T in [T_MIN, T_MAX] with the least NLL of softmax(logits / T), and whether it is a bound.

    Logits (N, K), labels (N,). The NLL is convex in 1/T, so bisection of its derivative, in
    float64, finds the minimum. A bound is met where the true minimum lies beyond: T_MIN where every
    prediction is right (the NLL falls with T without end), T_MAX where the logits are no better
    than a guess. T = 1 where the NLL does not depend on T. The NLL is never above that at T = 1.
    Raises ValueError as the metrics do, and where a logit is infinite.
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Section 4.2.
    """
    logits, labels = as_float64(logits, labels)
    if logits.isinf().any():
        raise ValueError("logits hold infinite values")
    margins = logits - logits.gather(1, labels.unsqueeze(1))
    if not margins.any():
        return 1.0, False
    if _slope(margins, T_MIN) <= 0:
        return T_MIN, True
    if _slope(margins, T_MAX) >= 0:
        return T_MAX, True
    low, high = math.log(T_MIN), math.log(T_MAX)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(margins, math.exp(middle)) > 0 else (low, middle)
    temperature = math.exp((low + high) / 2)
    # At an optimum of 1 the last rounding may fall on the wrong side.
    return (temperature if _nll(margins, temperature) <= _nll(margins, 1.0) else 1.0), False


def _slope(margins: Tensor, temperature: float) -> float:
    """The derivative of the NLL by 1/T; it falls as T grows."""
    return ((margins / temperature).softmax(dim=1) * margins).sum(dim=1).mean().item()


def _nll(margins: Tensor, temperature: float) -> float:
    return torch.logsumexp(margins / temperature, dim=1).mean().item()
