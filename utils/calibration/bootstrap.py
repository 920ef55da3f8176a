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
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr
from scipy.stats import binomtest
from torch import Tensor

from .binning import equal_width

LEVEL = 0.95  # of intervals
TAIL = (1 - LEVEL) / 2
TINY = 1e-30  # in the place of a divisor that is 0
FEW_WRONG = 20  # wrong predictions, or right ones: fewer show too little of the noise
# Of `debiased`. Noise of SPLIT * sd, added to a gap, makes it as noisy as one that was measured on
# 1 / (1 + SPLIT**2) of the images, which is four fifths. Its independent counterpart is that of the
# other fifth.
SPLIT = 0.5


def gaps(
    probs: Tensor,
    labels: Tensor,
    bins: int = 15,
    edges_of: Callable[[Tensor, int], Tensor] = equal_width,
) -> np.ndarray:
    """(N, bins) float32: correctness - confidence of a sample in the column of its bin, else 0.

    The ECE of probabilities (N, K) is the sum over columns of |their mean|; with `equal_mass` of
    binning.py it is the adaptive ECE.
    """
    confidence = probs.amax(dim=1).double()
    gap = (probs.argmax(dim=1) == labels).double() - confidence

    ordered = confidence.sort().values.unsqueeze(0)
    [edges] = edges_of(ordered, bins)
    columns = torch.bucketize(confidence, edges)

    matrix = torch.zeros(len(gap), bins)
    matrix.scatter_(1, columns.unsqueeze(1), gap.float().unsqueeze(1))
    return matrix.numpy()


class Bins(NamedTuple):
    """The gaps of a row's runs: float64 (runs, bins) each, but for `noise`.

    `mean`: of a bin, over all images. `sd`: of the noise in it. `chance`: what `sd` would be if the
    net were calibrated. `noise`: (draws, runs, bins) float32, normal draws of it, with the
    covariance between bins and runs that the images show. `wrong` (runs,) of so many `images` were
    predicted wrongly.
    """

    mean: np.ndarray
    sd: np.ndarray
    chance: np.ndarray
    noise: np.ndarray
    wrong: np.ndarray
    images: int

    @property
    def show_little(self) -> bool:
        """Whether the predictions of a run are nearly all right, or nearly all wrong."""
        return any(shows_little(wrong, self.images) for wrong in self.wrong)


def bins_of(runs: list[np.ndarray], draws: int = 1000) -> Bins:
    """Gaps and their noise, from matrices (N, bins) of `gaps` of runs on the same images.

    The draws are always the same.

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
        wrong=np.array([wrong_predictions(run) for run in runs]),
        images=samples,
    )


def shows_little(wrong: int, images: int) -> bool:
    """Whether so many wrong predictions show too little of the noise, or the right ones do."""
    return bool(min(wrong, images - wrong) < FEW_WRONG)


def wrong_predictions(run: np.ndarray) -> int:
    """How many there are in a matrix (N, bins) of `gaps`: a confidence is above 0."""
    return int((run < 0).any(axis=1).sum())


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

    Where nearly all predictions are right, their gaps show hardly any noise. Then it is at least
    that of a calibrated net, and the upper end at least what the accuracy's exact limits allow.
    """
    estimate = float(measured_error(bins.mean))
    least = estimate
    if bins.show_little:
        least = max(estimate, error_by_accuracy(bins))
        bins = with_noise_of_chance(bins)

    square = (bins.mean**2 - bins.sd**2).clip(min=0)
    low = true_error(bins, np.sign(bins.mean) * np.sqrt(square), estimate, 1 - TAIL)
    high = true_error(bins, bins.sd, estimate, TAIL)
    return min(low, estimate), max(high, least)


def with_noise_of_chance(bins: Bins) -> Bins:
    """These bins, with noise that is no smaller in any bin than that of a calibrated net."""
    ratio = np.divide(bins.chance, bins.sd, out=np.ones_like(bins.sd), where=bins.sd > 0)
    ratio = ratio.clip(min=1)
    return bins._replace(sd=ratio * bins.sd, noise=bins.noise * ratio.astype(np.float32))


def error_by_accuracy(bins: Bins) -> float:
    """The ECE that may be, for |accuracy - mean confidence| is at most the ECE: mean over runs.

    By the limits of the accuracy of Clopper and Pearson (Biometrika, 1934), at 95 %.
    """
    largest = []
    for wrong, gap in zip(bins.wrong, bins.mean.sum(axis=1), strict=True):
        right = int(bins.images - wrong)
        confidence = right / bins.images - gap
        accuracy = binomtest(right, bins.images).proportion_ci(LEVEL, method="exact")
        largest.append(max(confidence - accuracy.low, accuracy.high - confidence))
    return float(np.mean(largest))


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
    |gap|; in between it is too low, at most by 0.38 sd of a bin. It can be negative.
    """
    score = gap / np.maximum(SPLIT * sd, TINY)
    density = np.exp(-(score**2) / 2) / math.sqrt(2 * math.pi)
    # The mean of the sign of one part times the gap, and times the noise of the other part.
    signed_gap = gap * (2 * ndtr(score) - 1)
    signed_noise = 2 / SPLIT * sd * density
    return (signed_gap - signed_noise).sum(axis=-1)
