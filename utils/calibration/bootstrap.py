"""How far a number could be off because the test split is a sample, and what follows from that.

A metric here is a sum over columns of |mean over images| of a matrix (N, columns): one column, or
for calibration errors one for each bin. By the central limit theorem the columns' means of all
runs on the same images are jointly normal, with a covariance that the images show. Draws of their
noise are what a bootstrap with normal multipliers of the images gives, without the images
(Chernozhukov, Chetverikov and Kato, Annals of Statistics 2013, Section 3).

A measured calibration error is biased upwards: noise moves a bin's mean away from 0 in either
direction, and |.| counts both. So a perfectly calibrated net measures a floor, which depends on
its confidences. Nothing here compares errors without it. What each procedure was measured to do
stands in docs/statistics.md.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr
from scipy.stats import t as student_t
from torch import Tensor

LEVEL = 0.95  # of intervals
TAIL = (1 - LEVEL) / 2
TINY = 1e-30  # in the place of a divisor that is 0
SPLIT = 0.5  # see `debiased`: the sign of a bin from four fifths of the images, its size from one


def gaps(probs: Tensor, labels: Tensor, bins: int = 15, equal_mass: bool = False) -> np.ndarray:
    """(N, bins) float32: correctness - confidence of a sample in the column of its bin, else 0.

    The ECE of probabilities (N, K) is the sum over columns of |their mean|; bins of equal width as
    in `reliability_bins`, or of equal mass: the adaptive ECE.
    """
    confidence = probs.amax(dim=1).double()
    edges = torch.arange(1, bins).double() / bins
    if equal_mass:
        edges = torch.from_numpy(np.quantile(confidence.numpy(), edges.numpy()))
    gap = (probs.argmax(dim=1) == labels).double() - confidence
    columns = torch.bucketize(confidence, edges)[:, None]
    return torch.zeros(len(gap), bins).scatter_(1, columns, gap.float()[:, None]).numpy()


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
    "adaece": partial(gaps, equal_mass=True),
}
BINNED = ("ece", "adaece")  # those of them whose measured value is biased, and tested without bias


class Bins(NamedTuple):
    """The gaps of a row's runs: float64 (runs, bins) each, but for `noise`.

    `mean`: of a bin, over all images. `sd`: of the noise in it. `chance`: what `sd` would be if the
    net were calibrated. `noise`: (draws, runs, bins) float32, normal draws of it, with the
    covariance between bins and runs that the images show.
    """

    mean: np.ndarray
    sd: np.ndarray
    chance: np.ndarray
    noise: np.ndarray


def bins_of(runs: list[np.ndarray], draws: int = 1000) -> Bins:
    """Of matrices (N, bins) of `gaps`, of runs on the same images; the draws are always the same.

    Second moments are taken about 0 and not about the mean. So they have no bias where the net is
    calibrated, however few images a bin holds.
    """
    samples, bins = runs[0].shape
    shape = (len(runs), bins)
    gap = np.concatenate(runs, axis=1)  # (N, runs * bins)
    covariance = (gap.T @ gap).astype(np.float64) / samples**2

    # Normal draws that have this covariance.
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(min=0))
    normal = np.random.default_rng(0).standard_normal((draws, len(covariance)), np.float32)
    noise = normal @ root.T.astype(np.float32)

    # A gap is 1 - c of a right prediction and -c of a wrong one: |gap| (1 - |gap|) is c (1 - c).
    size = np.abs(gap)
    chance = np.sqrt((size * (1 - size)).sum(axis=0, dtype=np.float64)) / samples
    return Bins(
        mean=gap.mean(axis=0, dtype=np.float64).reshape(shape),
        sd=np.sqrt(covariance.diagonal()).reshape(shape),
        chance=chance.reshape(shape),
        noise=noise.reshape(draws, *shape),
    )


def measured_error(gap: np.ndarray) -> np.ndarray:
    """Mean over runs of the sum over bins of |gap|, of gaps (..., runs, bins)."""
    return np.abs(gap).sum(axis=-1).mean(axis=-1)


def error_interval(bins: Bins) -> tuple[float, float]:
    """95 % interval, over test samples, of the mean ECE of these very nets (fractions).

    It holds every true error under which the measured one is neither among the highest nor among
    the lowest 2.5 % of draws. A true error can be spread over the bins in many ways, which measure
    differently. For the lower end it is spread as measured, each bin's square less its variance.
    For the upper end it is spread in proportion to the noise: of all ways this measures least, so
    that the end is high enough for any (the derivative of E|gap + noise| is then the same in all
    bins). The upper end is raised to the estimate where it falls below.
    """
    estimate = float(measured_error(bins.mean))
    square = (bins.mean**2 - bins.sd**2).clip(min=0)
    low = true_error(bins, np.sign(bins.mean) * np.sqrt(square), estimate, 1 - TAIL)
    high = true_error(bins, bins.sd, estimate, TAIL)
    return min(low, estimate), max(high, estimate)


def true_error(bins: Bins, profile: np.ndarray, estimate: float, quantile: float) -> float:
    """The true error, spread over (runs, bins) like `profile`, whose draws have this quantile."""
    scale = float(measured_error(profile))

    def measures_less(error: float) -> bool:
        gap = (error / scale * profile).astype(np.float32) + bins.noise
        return np.quantile(measured_error(gap), quantile) < estimate

    low = 0.0
    high = 1.0
    if scale == 0 or not measures_less(low):
        return low
    for _ in range(20):
        middle = (low + high) / 2
        if measures_less(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def calibrated_error(bins: Bins) -> tuple[float, float]:
    """The mean ECE that these runs would measure if their probabilities were calibrated.

    Mean over draws, and the value that 95 % of the draws stay below: an ECE under it is no evidence
    of miscalibration (Vaicenavicius et al., AISTATS 2019, Section 5). A calibrated net is right
    with the probability c that is its confidence, so the variance c (1 - c) of a gap is known. Runs
    share images and labels, so their gaps are correlated; how much, no theory says: it is taken
    from the gaps that were measured.
    """
    ratio = np.divide(bins.chance, bins.sd, out=np.zeros_like(bins.sd), where=bins.sd > 0)
    errors = measured_error(bins.noise * ratio.astype(np.float32))
    return float(errors.mean()), float(np.quantile(errors, LEVEL))


def debiased(gap: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Sum over bins (..., bins) of an estimate of |true gap| without the bias by noise of this sd.

    The sign of a bin is taken from four fifths of the images and its gap from the other fifth; sign
    times gap has mean 0 where the true gap is 0, whatever the noise. This is the mean of that over
    all ways to split the images, in closed form for normal noise: with e standard normal,
    gap + sd e / 2 and gap - 2 sd e are independent. Where the true gap is far above the noise it is
    |gap|; in between it is too low, at most by 0.37 sd of a bin. It can be negative.
    """
    score = gap / np.maximum(SPLIT * sd, TINY)
    density = np.exp(-(score**2) / 2) / math.sqrt(2 * math.pi)
    return (gap * (2 * ndtr(score) - 1) - 2 / SPLIT * sd * density).sum(axis=-1)


class Difference(NamedTuple):
    """Of two rows in one metric (fractions): first - second, its interval, two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(
    first: list[np.ndarray], second: list[np.ndarray], draws: int = 1000
) -> Difference:
    """Mean metric of the runs `first` minus that of the runs `second`, on the same test images.

    A run is a matrix (N, columns) of PAIRED. Calibration errors are compared as `debiased` has
    them, for the floors of two nets of unequal accuracy differ where both are calibrated.

    The variance is that of two crossed factors, images and seeds: what images do to all runs alike
    (the variance over images less each run's own part) plus s^2/n of each row's n seeds, s^2 the
    variance between runs of a row, both rows' in one; t quantiles by Satterthwaite. Few runs
    may agree by luck: with f degrees of freedom it is not less than 1/f of what images do. One
    resampling over both factors would count twice what they do together (Owen, "The pigeonhole
    bootstrap", Annals of Applied Statistics 2007). Where no row has two runs, it is the paired t
    test over images, and speaks of these two nets, not of what training again would give.
    """
    runs = [*first, *second]
    if runs[0].shape[1] == 1:
        values, covariance = _means(runs)
    else:
        values, covariance = _errors(runs, draws)

    # The difference of both rows' means, and its variance by the images.
    weight = np.repeat([1 / len(first), -1 / len(second)], [len(first), len(second)])
    value = float(weight @ values)
    variance = max(weight @ covariance @ weight, 0.0)
    freedom = len(runs[0]) - 1
    if len(runs) > 2:
        variance, freedom = _with_seeds(variance, values, covariance, len(first))

    sd = max(math.sqrt(variance), 1e-300)  # 0 where the rows do not differ in any image
    reach = float(sd * student_t.isf(TAIL, freedom))
    return Difference(
        value=value,
        low=value - reach,
        high=value + reach,
        p=float(2 * student_t.sf(abs(value) / sd, freedom)),
    )


def _with_seeds(
    by_images: float, values: np.ndarray, covariance: np.ndarray, count: int
) -> tuple[float, float]:
    """The variance of a difference by images and seeds, and its degrees of freedom.

    What training again would change, the spread between the runs of a row, comes in the place of
    what the images do to each run alone. `by_images`: the variance by these; of the runs' `values`
    and their `covariance` the first `count` are one row, the others the second.
    """
    repeated = len(values) - 2
    share = (1 / count + 1 / (len(values) - count)) / repeated
    rows = (slice(0, count), slice(count, len(values)))
    own = share * sum(_spread(covariance[row, row]) for row in rows)
    between = share * sum(((values[row] - values[row].mean()) ** 2).sum() for row in rows)
    alike = max(by_images - own, 0.0)  # what images do to all runs alike
    variance = max(alike + between, by_images / repeated)  # few runs may agree by luck
    freedom = repeated * (variance / between) ** 2 if between else math.inf
    return variance, freedom


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
