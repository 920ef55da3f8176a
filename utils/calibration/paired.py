"""Two rows compared on the same test images: differences, their intervals and tests.

A metric that can be tested is a sum over columns of |mean over images| of a matrix (N, columns):
one column, or for calibration errors one for each bin (bootstrap.py has the noise in these).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.linalg import block_diag
from scipy.stats import t as student_t
from torch import Tensor

from .binning import equal_mass
from .bootstrap import TAIL, TINY, bins_of, debiased, gaps


def _is_right(probs: Tensor, labels: Tensor) -> Tensor:
    return probs.argmax(dim=1) == labels


def _nll(probs: Tensor, labels: Tensor) -> Tensor:
    return -_label_prob(probs, labels).log()


def _brier(probs: Tensor, labels: Tensor) -> Tensor:
    return 1 - 2 * _label_prob(probs, labels) + probs.square().sum(dim=1)


def _label_prob(probs: Tensor, labels: Tensor) -> Tensor:
    return probs.gather(1, labels[:, None]).squeeze(1)


def _of_images(value: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], np.ndarray]:
    """A metric that is the mean over images of a value (N,): its matrix (N, 1)."""

    def matrix(probs: Tensor, labels: Tensor) -> np.ndarray:
        return value(probs.double(), labels).float().unsqueeze(1).numpy()

    return matrix


# Metrics that two nets can be compared in: of probabilities (N, K), labels (N,) to (N, columns).
PAIRED = {
    "top1": _of_images(_is_right),
    "nll": _of_images(_nll),
    "brier": _of_images(_brier),
    "ece": gaps,
    "adaece": partial(gaps, edges_of=equal_mass),
}
BINNED = ("ece", "adaece")  # those of them whose measured value is biased, and tested without bias


class Difference(NamedTuple):
    """First minus second row in one metric (fractions), its interval, its two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(
    first: list[np.ndarray],
    second: list[np.ndarray],
    draws: int = 1000,
    teachers: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> Difference:
    """Mean metric of the runs `first` minus that of the runs `second`, on the same test images.

    A run is a matrix (N, columns) of PAIRED. Calibration errors are compared as `debiased` has
    them, for the floors of two nets of unequal accuracy differ where both are calibrated.

    The variance is that of two crossed factors, images and seeds: what images do to all runs alike
    (the variance over images less each run's own part) plus s^2/n of each row's n seeds, s^2 the
    variance between its runs; t quantiles by Satterthwaite. Few runs may agree by luck: with f
    degrees of freedom it is not less than 1/f of what images do. One resampling over both factors
    would count twice what they do together (Owen, "The pigeonhole bootstrap", Annals of Applied
    Statistics 2007). Where no row has two runs, it is the paired t test over images, and speaks of
    these two nets, not of what training again would give.

    `teachers`: who taught each run of either row. Runs of one teacher are alike, so their mean
    counts as one run, unless it taught all of its row: the test then speaks of that teacher.
    """
    runs = [*first, *second]
    values, covariance = _measured(runs, draws)
    counts = len(first), len(second)
    if teachers is not None:
        means = [_means_by_teacher(row) for row in teachers]
        by_teacher = block_diag(means[0], means[1])
        values = by_teacher @ values
        covariance = by_teacher @ covariance @ by_teacher.T
        counts = len(means[0]), len(means[1])

    # The difference of both rows' means, and its variance by the images.
    weight = np.repeat([1 / counts[0], -1 / counts[1]], counts)
    variance = max(weight @ covariance @ weight, 0.0)
    freedom = len(runs[0]) - 1
    if sum(counts) > 2:
        variance, freedom = _with_seeds(variance, values, covariance, counts)
    return _t_test(float(weight @ values), variance, freedom)


def _t_test(value: float, variance: float, freedom: float) -> Difference:
    """The t test of a difference with this variance, known by so many degrees of freedom."""
    sd = max(math.sqrt(variance), 1e-300)  # 0 where the rows do not differ in any image
    reach = float(sd * student_t.isf(TAIL, freedom))
    return Difference(
        value=value,
        low=value - reach,
        high=value + reach,
        p=float(2 * student_t.sf(abs(value) / sd, freedom)),
    )


def _measured(runs: list[np.ndarray], draws: int) -> tuple[np.ndarray, np.ndarray]:
    """The metric of each run, of matrices (N, columns), and the covariance that images give it."""
    if runs[0].shape[1] == 1:
        return _means(runs)
    return _errors(runs, draws)


def _means_by_teacher(teachers: Sequence[Hashable]) -> np.ndarray:
    """(means, runs): makes of the runs' values a mean for each teacher, if there are several."""
    distinct = dict.fromkeys(teachers)
    if len(distinct) == 1:
        return np.eye(len(teachers))
    taught = np.array([[own == teacher for own in teachers] for teacher in distinct], np.float64)
    return taught / taught.sum(axis=1, keepdims=True)


def _with_seeds(
    by_images: float, values: np.ndarray, covariance: np.ndarray, counts: tuple[int, int]
) -> tuple[float, float]:
    """The variance of a difference by images and seeds, and its degrees of freedom.

    What training again would change, the spread between the runs of a row, comes in the place of
    what the images do to each run alone. `by_images`: the variance by these; of the runs' `values`
    and their `covariance` the first counts[0] are one row, the others the second.
    """
    rows = (slice(0, counts[0]), slice(counts[0], None))
    spreads = [((values[row] - values[row].mean()) ** 2).sum() for row in rows]
    spreads_by_images = [_spread(covariance[row, row]) for row in rows]
    repeated = sum(counts) - 2

    # Rows of unequal size have a spread each (Welch, Biometrika 1947). Of equal size, one for both
    # errs no more often and is better known. A single run shows none: it gets the other row's.
    if counts[0] == counts[1] or 1 in counts:
        share = (1 / counts[0] + 1 / counts[1]) / repeated
        shares = [share, share]
        freedom = repeated
    else:
        shares = [1 / (count * (count - 1)) for count in counts]
        freedom = _welch(np.multiply(shares, spreads), counts)

    own = np.dot(shares, spreads_by_images)
    between = np.dot(shares, spreads)
    alike = max(by_images - own, 0.0)  # what images do to all runs alike
    variance = max(alike + between, by_images / freedom)  # few runs may agree by luck
    return variance, freedom * (variance / between) ** 2 if between else math.inf


def _welch(variances: np.ndarray, counts: tuple[int, int]) -> float:
    """Degrees of freedom of the sum of both rows' variances: at most those of all runs."""
    weighted = (variances**2 / (np.array(counts) - 1)).sum()
    return float(variances.sum() ** 2 / weighted) if weighted else float(sum(counts) - 2)


def _means(runs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over images of each run, of matrices (N, 1), and the means' covariance."""
    images = np.concatenate(runs, axis=1).astype(np.float64)
    covariance = np.zeros((len(runs), len(runs)))
    if len(images) > 1:  # one image has no spread
        covariance = np.cov(images, rowvar=False)
    return images.mean(axis=0), covariance / len(images)


def _errors(runs: list[np.ndarray], draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Debiased calibration error of each run, of matrices (N, bins), and the errors' covariance.

    The covariance is that of draws about gaps that are shrunk towards 0, or the noise would count
    twice: once in the gaps that were measured, once in the draws (James and Stein, positive part).
    """
    bins = bins_of(runs, draws)
    score = np.divide(bins.mean, bins.sd, out=np.zeros_like(bins.mean), where=bins.sd > 0)
    used = (bins.sd > 0).sum(axis=1)
    square = (score**2).sum(axis=1)
    kept = (1 - used / np.maximum(square, TINY)).clip(min=0)
    drawn = debiased(kept[:, None] * bins.mean + bins.noise, bins.sd)
    return debiased(bins.mean, bins.sd), np.cov(drawn, rowvar=False)


def _spread(covariance: np.ndarray) -> float:
    """Expected sum of squares about their mean of values that have this covariance."""
    return np.trace(covariance) - covariance.sum() / len(covariance)


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for their number: those <= 0.05 hold jointly at 5 %. Holm, 1979."""
    p = np.asarray(p_values, np.float64)
    order = p.argsort()
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return raised[order.argsort()].tolist()
