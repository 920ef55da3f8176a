"""How far a calibration error could be off because the test split is a sample."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def gaps(probs: Tensor, labels: Tensor, bins: int = 15) -> np.ndarray:
    """(N, bins) float32: correctness - confidence of a sample in the column of its bin, else 0.

    The ECE of probabilities (N, K) is the sum over columns of |their mean|; bins as in
    `reliability_bins`. So the ECE of a resample that takes sample i c_i times is one product with
    this matrix.
    """
    confidence = probs.amax(dim=1)
    column = torch.bucketize(confidence, torch.arange(1, bins).double() / bins)
    gap = (probs.argmax(dim=1) == labels).double() - confidence
    return torch.zeros(len(labels), bins).scatter_(1, column[:, None], gap.float()[:, None]).numpy()


@lru_cache(maxsize=1)
def resample_counts(samples: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, samples) float32: how often a resample takes a sample."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, samples), np.float32)
    for row in counts:
        row[:] = np.bincount(rng.integers(0, samples, samples), minlength=samples)
    return counts


def ece_interval(
    runs: list[np.ndarray], resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Basic bootstrap interval, over test samples, of the mean ECE of `runs` (fractions).

    `runs` holds the `gaps` of nets on one test split; every resample is the same for all of them.
    The ECE of a resample is biased upwards once more than the ECE itself, by the noise in each
    bin, so an interval between quantiles of the resamples' values (percentile bootstrap) can lie
    above the truth. The basic interval [2e - high quantile, 2e - low quantile] mirrors them at the
    estimate e and so subtracts the bias; its upper end is raised to e where it falls below. In
    simulations it covers the truth 90 to 95 times in 100, fewer where the true ECE is below the
    noise (perfect calibration: 60). Davison and Hinkley, "Bootstrap Methods and their
    Application", 1997, Section 5.2.
    """
    samples = len(runs[0])
    counts = resample_counts(samples, resamples, seed)
    estimate = np.mean([np.abs(run.sum(axis=0, dtype=np.float64)).sum() for run in runs]) / samples
    resampled = np.mean([np.abs(counts @ run).sum(axis=1) for run in runs], axis=0) / samples
    return basic_interval(estimate, resampled, level)


def basic_interval(estimate: float, resampled: np.ndarray, level: float = 0.95):
    """[2e - high quantile, 2e - low quantile] of resampled values, as `ece_interval` has it."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return max(0.0, float(2 * estimate - high)), float(max(estimate, 2 * estimate - low))


def calibrated_ece(probs: Tensor, draws: int = 1000, level: float = 0.95, seed: int = 0):
    rng = np.random.default_rng(seed)
    confidence = probs.amax(dim=1).numpy()
    column = np.minimum(np.ceil(confidence * 15).astype(int) - 1, 14)
    order = np.argsort(column, kind="stable")
    edges = np.flatnonzero(np.diff(column[order], prepend=-1))
    c = confidence[order]
    values = []
    for _ in range(draws):
        gap = (rng.random(len(c), np.float32) < c) - c
        values.append(np.abs(np.add.reduceat(gap, edges)).sum() / len(c))
    return float(np.mean(values)), float(np.quantile(values, level))
