"""How far a number could be off because the test split is a sample, and what follows from that.

A metric here is a sum over columns of |mean over images| of a matrix (N, columns): one column, or
for calibration errors one for each bin. So a thousand resamples of it are a matrix product.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor

LEVEL = 0.95  # of intervals


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


def _of_images(values: Callable) -> Callable:
    """A metric that is the mean of values (N,) of the images: (N, 1)."""
    return lambda probs, labels: values(probs.double(), labels).float().unsqueeze(1).numpy()


def _label_prob(probs: Tensor, labels: Tensor) -> Tensor:
    return probs.gather(1, labels[:, None]).squeeze(1)


# Metrics that two nets can be compared in: of probabilities (N, K), labels (N,) to (N, columns).
PAIRED = {
    "top1": _of_images(lambda p, y: p.argmax(dim=1) == y),
    "nll": _of_images(lambda p, y: -_label_prob(p, y).clamp_min(1e-300).log()),
    "brier": _of_images(lambda p, y: 1 - 2 * _label_prob(p, y) + p.square().sum(dim=1)),
    "ece": gaps,
    "adaece": partial(gaps, equal_mass=True),
}


@lru_cache(maxsize=1)
def resample_counts(samples: int, resamples: int) -> np.ndarray:
    """(resamples, samples) float32: how often a resample takes a sample; always the same."""
    rng = np.random.default_rng(0)
    counts = np.empty((resamples, samples), np.float32)
    for row in counts:
        row[:] = np.bincount(rng.integers(0, samples, samples), minlength=samples)
    return counts


def resampled(matrix: np.ndarray, resamples: int = 1000) -> np.ndarray:
    """(resamples,): the metric of one run, by its matrix, on each resample."""
    return np.abs(resample_counts(len(matrix), resamples) @ matrix).sum(axis=1) / len(matrix)


def basic_interval(estimate: float, draws: np.ndarray) -> tuple[float, float]:
    """95 % basic bootstrap interval, over test samples, of an ECE or a mean of ECEs (fractions).

    The ECE of a resample is biased upwards once more than the ECE itself, by the noise in each
    bin: quantiles of the resamples' values (percentile bootstrap) can lie above the truth. Here
    they are mirrored at the estimate, which subtracts the bias; the upper end is raised to the
    estimate where it falls below. In simulations it covers the truth 90 to 95 times in 100, fewer
    where the true ECE is below the noise (perfect calibration: 60). Davison and Hinkley, 1997,
    Section 5.2.
    """
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return max(0.0, float(2 * estimate - high)), float(max(estimate, 2 * estimate - low))


def calibrated_ece(probs: Tensor, draws: int = 1000, bins: int = 15) -> tuple[float, float]:
    """The ECE that a perfectly calibrated net with these probabilities (N, K) would measure.

    Mean over draws of labels from them, and the value that 95 % of the draws stay below: an ECE
    under it is no evidence of miscalibration. The ECE sees only whether a label is the predicted
    one, so a draw is one coin per sample, right with the probability that is its confidence.
    Vaicenavicius et al., AISTATS 2019, Section 5.
    """
    confidence = probs.amax(dim=1).double().sort().values
    inner = torch.searchsorted(confidence, torch.arange(1, bins).double() / bins, right=True)
    starts = F.pad(inner, (1, 0)).unique()
    starts, chance = starts[starts < len(confidence)].numpy(), confidence.numpy()
    expected = np.add.reduceat(chance, starts)
    rng, threshold = np.random.default_rng(0), chance.astype(np.float32)
    errors = np.empty(draws)
    for draw in range(draws):
        right = rng.random(len(chance), dtype=np.float32) < threshold
        hits = np.add.reduceat(right, starts, dtype=np.int64)
        errors[draw] = np.abs(hits - expected).sum() / len(chance)
    return float(errors.mean()), float(np.quantile(errors, LEVEL))


class Difference(NamedTuple):
    """Of two rows in one metric (fractions): first - second, its interval, two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(
    first: list[np.ndarray], second: list[np.ndarray], resamples: int = 1000
) -> Difference:
    """Mean metric of the runs `first` minus that of the runs `second`, on the same test images.

    A run is a matrix (N, columns) of PAIRED. Images are a bootstrap, the same resample for every
    run of both rows. Seeds are too few to be resampled, and one resampling over both would count
    twice what images and seeds do together (Owen, "The pigeonhole bootstrap", Annals of Applied
    Statistics 2007). The variance is that of two crossed factors: what images do to all runs alike
    (the bootstrap's variance less each run's own part) plus s^2/n of each row's n seeds, s^2 the
    variance between runs of a row, both rows' in one; t quantiles by Satterthwaite. Where no row
    has two runs, the interval speaks of these two nets, not of what training again would give.
    """
    rows = first, second
    values = [np.stack([resampled(run, resamples) for run in runs]) for runs in rows]
    measured = [np.array([np.abs(r.mean(0, dtype=float)).sum() for r in runs]) for runs in rows]
    value = measured[0].mean() - measured[1].mean()
    differences = values[0].mean(axis=0) - values[1].mean(axis=0)
    variance, freedom = differences.var(ddof=1), math.inf
    if seeds := len(first) + len(second) - 2:
        share = (1 / len(first) + 1 / len(second)) / seeds
        own = sum((each - each.mean(axis=0)).var(axis=1, ddof=1).sum() for each in values)
        between = share * sum(((each - each.mean()) ** 2).sum() for each in measured)
        # One degree of freedom may see no spread at all: then not less than what images do.
        variance = max(max(variance - share * own, 0) + between, variance * (seeds == 1))
        freedom = seeds * (variance / between) ** 2 if between else math.inf
    width = max(math.sqrt(variance), 1e-300)  # 0 where the rows do not differ in any image
    reach = width * student_t.isf((1 - LEVEL) / 2, freedom)
    p = 2 * student_t.sf(abs(value) / width, freedom)
    return Difference(*map(float, (value, value - reach, value + reach, p)))


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for their number: those <= 0.05 hold jointly at 5 %. Holm, 1979."""
    p = np.asarray(p_values, np.float64)
    order = p.argsort()
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return raised[order.argsort()].tolist()
