"""Temperature scaling: the one number that logits are divided by."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .scores import Array, checked_pair, in_pieces

T_MIN = 0.05
T_MAX = 20.0
LAST_STEP = 1e-7  # of Newton, relative to 1/T: it leaves an error of about its square
HALVINGS = 40  # of log(T_MAX / T_MIN): they leave an error of 5e-12, relative to T


def fit_temperature(logits: Array, labels: Array) -> tuple[float, bool]:
    """The T in [T_MIN, T_MAX] with the least NLL of softmax(logits / T), and whether it is a bound.

    Logits (N, K), labels (N,). Met are T_MIN where every prediction is right (the NLL falls with T
    without end), T_MAX where the logits are no better than a guess; T = 1 where the NLL does not
    depend on T. Raises ValueError as the metrics do, and where a logit is infinite.
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Section 4.2.
    """
    logits, labels = checked_pair(logits, labels)
    if logits.amin().isinf() or logits.amax().isinf():
        raise ValueError("logits hold infinite values")
    temperature, _ = least_nll(logits, labels)
    return temperature, temperature in (T_MIN, T_MAX)


def mean_confidence(logits: Tensor, temperature: float = 1.0) -> float:
    """The mean of max softmax(logits / T) over N rows of K logits, a fraction; 0 of no rows."""
    total = 0.0
    for [z] in in_pieces(logits):
        below_top = z - z.amax(dim=1, keepdim=True)
        top_probability = 1 / (below_top / temperature).exp().sum(dim=1)
        total += top_probability.sum().item()
    return total / max(len(logits), 1)


def matching_temperature(
    confidence: Callable[[float], float], accuracy: float
) -> tuple[float, bool]:
    """The T in [T_MIN, T_MAX] at which mean confidence equals accuracy, and whether it is a bound.

    Both are fractions. `confidence` takes T. It falls from 1 to 1/K while T rises, so halving the
    range in log T finds the only place.
    """
    if confidence(T_MIN) <= accuracy:
        return T_MIN, True
    if confidence(T_MAX) >= accuracy:
        return T_MAX, True
    low = math.log(T_MIN)
    high = math.log(T_MAX)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if confidence(math.exp(middle)) > accuracy:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2), False


def least_nll(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The T that `fit_temperature` finds, and its NLL, of logits and labels that are checked.

    The NLL is convex in b = 1/T: Newton's method on its slope, which halves a bracket where its
    steps do not shrink.
    """
    lowest = 1 / T_MAX
    highest = 1 / T_MIN
    b = _first_guess(logits, labels)

    # The bracket: where the slope was seen to be negative, and positive. At first nowhere.
    below = 0.0
    above = math.inf
    last_step = math.inf
    while True:
        nll, slope, curvature = _derivatives(logits, labels, b)

        # The minimum lies at an end of the range, or no T changes such logits.
        if b == highest and slope == 0 and (logits == logits[:, :1]).all():
            return 1.0, nll
        if (b == highest and slope <= 0) or (b == lowest and slope >= 0):
            return 1 / b, nll

        # After the last step, which is small, the NLL follows from the slope.
        step = _newton_step(slope, curvature)
        goal = min(max(b + step, lowest), highest)
        if abs(step) <= LAST_STEP * b:
            return 1 / goal, nll + slope * step / 2

        # The bracket closes in from one side.
        if slope > 0:
            above = b
        else:
            below = b

        # The step is taken if it stays in the bracket and is less than half of the one before.
        # Else the bracket is halved; while it lacks an end, that end of the range is looked at.
        if below < b + step < above and abs(step) < last_step / 2:
            b = goal
        elif below > 0 and above < math.inf:
            b = math.sqrt(below * above)
        else:
            b = lowest if slope > 0 else highest
        last_step = abs(step)


def _first_guess(logits: Tensor, labels: Tensor) -> float:
    """Where the search for 1/T starts: at that of every 16th row, where there are many.

    From there the whole takes three more steps.
    """
    if len(labels) <= 4096:
        return 1.0
    temperature, _ = least_nll(logits[::16], labels[::16])
    return 1 / temperature


def _newton_step(slope: float, curvature: float) -> float:
    """To where the slope would be 0; without end, downhill, where the NLL is straight."""
    if curvature > 0:
        return -slope / curvature
    return math.copysign(math.inf, -slope)


def _derivatives(logits: Tensor, labels: Tensor, b: float) -> tuple[float, float, float]:
    """The mean NLL of softmax(b z), and its first and second derivative by b."""
    total = torch.zeros(3, dtype=torch.float64)
    for z, y in in_pieces(logits, labels.unsqueeze(1)):
        # A logit of -inf has no weight; as a number its moments are 0 and not NaN.
        z = (z - z.amax(dim=1, keepdim=True)).clamp_(min=-1e150)
        own = z.gather(1, y).squeeze(1)

        # Under the softmax: the mean and the variance of z.
        weight = (b * z).exp_()
        mass = weight.sum(dim=1)
        weight *= z
        mean = weight.sum(dim=1) / mass
        variance = torch.einsum("nk,nk->n", weight, z) / mass - mean.square()

        nll = mass.log() - b * own
        total += torch.stack([nll.sum(), (mean - own).sum(), variance.sum()])
    nll, slope, curvature = (total / len(labels)).tolist()
    return nll, slope, curvature
