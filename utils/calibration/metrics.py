"""Accuracy, proper scores and calibration errors of a whole split, summed in float64 on the CPU.

Arguments are numpy arrays or tensors of any device and floating type: probabilities or logits
(N, K), labels (N,). Results are fractions as python floats. Every function raises ValueError where
shapes do not fit, a label is out of range, there is no sample or no bin, a value is NaN, or the
rows of probabilities do not sum to 1.

Confidence is the probability of the predicted class. Bins are (lo, hi], the first closed below and
the last above: no sample is dropped. An empty bin adds 0, a class that no label has counts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.calibration.scores import Array, checked, checked_probs, checked_scores, in_pieces
from utils.calibration.temperature import least_nll

COLUMNS_AT_ONCE = 1 << 20  # numbers, float64
GRID = 4096  # cells of the smooth ECE


class Bins(NamedTuple):
    """Per column and bin, float64 (C, bins): samples, those that are right, their confidences."""

    counts: Tensor
    right: Tensor
    confidence: Tensor

    @property
    def gap(self) -> Tensor:
        """Sum over the samples of a bin of right - confidence, absolute."""
        return (self.right - self.confidence).abs()


class ReliabilityBins(NamedTuple):
    """Per confidence bin, float64 (bins,): 0 in an empty bin."""

    counts: Tensor
    accuracy: Tensor
    confidence: Tensor


def ece(probs: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of n_b/N |accuracy_b - confidence_b|.

    Bins of equal width, edges at the float64 numbers nearest to i / bins. Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017, Eq. 3. torchmetrics sums it in float32 and
    is off by about 3e-5 at 10,000 samples and 3e-4 at a million.
    """
    confidence, right = _top_label(probs, labels)
    return _of_confidence(confidence, right, _equal_width(bins)).gap.sum().item() / len(right)


def adaece(probs: Array, labels: Array, bins: int = 15) -> float:
    """ECE over bins of equal mass: edges at the i/bins quantiles of the confidences.

    Quantiles interpolate linearly (numpy's default). Equal confidences share a bin, which makes
    the value independent of the order of the samples. Duplicating every sample moves an edge by
    less than one sample: the value changes by at most 2 (bins - 1) / N where confidences are
    distinct. Mukhoti et al., "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020,
    Section 2; their code's bins are open below, so it drops the least confident sample.
    """
    confidence, right = _top_label(probs, labels)
    return _of_confidence(confidence, right, _equal_mass(bins)).gap.sum().item() / len(right)


def sce(probs: Array, labels: Array, bins: int = 15) -> float:
    """Classwise ECE: for class k, bins of p_k against the frequency of y = k; mean over classes.

    Nixon et al., "Measuring Calibration in Deep Learning", CVPR workshops 2019 (static calibration
    error). Kull et al., NeurIPS 2019, write the same mean; code that sums instead is K times it.
    """
    return _classwise(*_columns_of(probs, labels), _equal_width(bins))[0]


def ace(probs: Array, labels: Array, bins: int = 15) -> float:
    """SCE over bins of equal mass, of each class's own probabilities (edges as in `adaece`).

    Nixon et al. 2019 (adaptive calibration error).
    """
    return _classwise(*_columns_of(probs, labels), _equal_mass(bins))[0]


def reliability_bins(probs: Array, labels: Array, bins: int = 15) -> ReliabilityBins:
    """Counts, accuracy and mean confidence of the top label in bins of equal width."""
    found = _of_confidence(*_top_label(probs, labels), _equal_width(bins))
    counts, right, confidence = (part[0] for part in found)
    return ReliabilityBins(counts, right / counts.clamp_min(1), confidence / counts.clamp_min(1))


def classification_metrics(
    logits: Array, labels: Array, temperature: float = 1.0, bins: int = 15
) -> dict[str, float]:
    """Every metric of softmax(logits / T). Logits are read in pieces: little memory, any N and K.

    top1, top5: equal logits rank by class number; top5 is top-min(5, K).
    nll: mean of -log p_y. brier: mean of sum_k (p_k - 1[y = k])^2.
    ece, sce, adaece, ace: the functions of these names.
    mce: largest |accuracy_b - confidence_b| of the ECE's bins (Guo et al. 2017, Eq. 5);
    smallest_bin: samples in the smallest of these that is not empty. Few, and mce means nothing.
    rmsce: root of sum n_b/N (accuracy_b - confidence_b)^2, the same bins.
    debiased_ece: ECE less the bias that the accuracies' noise gives it, which may leave less than
    0: twice the ECE minus its mean if each accuracy_b were drawn from a normal distribution with
    variance accuracy_b (1 - accuracy_b) / n_b. Kumar et al., "Verified Uncertainty Calibration",
    NeurIPS 2019, Section 5; in closed form where their code draws.
    smece: `smooth_ece`.
    aurc: area under risk against coverage, the mean error rate of the i surest samples over all i
    (Geifman et al., "Bias-Reduced Uncertainty Estimation", ICLR 2019).
    refinement, calibration: the two parts of the NLL, what temperature scaling fitted on this very
    split leaves and what it removes (Berta et al. 2025). At any temperature the first is the same.
    Raises ValueError also where the softmax is NaN (a logit of +inf) or T is not positive.
    """
    logits, labels = checked(logits, labels)
    if not temperature > 0:
        raise ValueError(f"the temperature should be positive, got {temperature}")
    rows, squares = _softmax_rows(logits, labels, temperature)
    confidence, right = 1 / rows.mass, rows.rank == 0

    def columns(chosen: slice) -> Tensor:
        scaled = logits[:, chosen].T.contiguous().double() / temperature
        return scaled.sub_(rows.top).exp_().div_(rows.mass)

    order = confidence.argsort()
    confidence, right = confidence[order], right[order]
    width, mass = (_of_confidence(confidence, right, of(bins)) for of in (_equal_width, _equal_mass))
    classwise = _classwise(columns, labels, logits.shape[1], _equal_width(bins), _equal_mass(bins))
    full = width.counts > 0
    counts, gap, accuracy = width.counts[full], width.gap[full], (width.right / width.counts)[full]
    samples, nll = len(labels), -rows.log_prob.mean().item()
    removed = max(0.0, nll - least_nll(logits, labels)[1]) if math.isfinite(nll) else 0.0
    error = gap.sum().item() / samples
    return {
        "top1": right.double().mean().item(),
        "top5": (rows.rank < 5).double().mean().item(),
        "nll": nll,
        "brier": squares / samples,
        "ece": error,
        "sce": classwise[0],
        "adaece": mass.gap.sum().item() / samples,
        "mce": (gap / counts).max().item(),
        "ace": classwise[1],
        "rmsce": math.sqrt((gap.square() / counts).sum().item() / samples),
        "smece": smooth_ece(confidence, right),
        "debiased_ece": 2 * error - _noisy_gap(counts, accuracy, gap).sum().item() / samples,
        "aurc": _aurc(confidence, right),
        "refinement": nll - removed,
        "calibration": removed,
        "smallest_bin": counts.min().item(),
    }


def smooth_ece(confidence: Tensor, right: Tensor) -> float:
    """smECE of confidences (N,) in 0..1 and whether each prediction was right (N,); no bins.

    The residuals right - confidence are smoothed over the confidence by a Gaussian kernel of
    width sigma, reflected at 0 and 1; the mean of |smoothed| falls with sigma, and the value is
    that where it meets sigma, found to 1/1024 as by the authors' package relplot. Smoothed by the
    cosine transform on a grid. Błasiok and Nakkiran, "Smooth ECE", ICLR 2024.
    """
    cell = (confidence * GRID).long().clamp_(max=GRID - 1)
    residual = torch.bincount(cell, weights=right.double() - confidence, minlength=GRID)
    spectrum = torch.fft.rfft(torch.cat([residual, residual.flip(0)]))
    frequency = math.pi * torch.arange(GRID + 1, dtype=torch.float64)

    def error(sigma: float) -> float:
        smoothed = torch.fft.irfft(spectrum * torch.exp(-((sigma * frequency) ** 2) / 2))
        return smoothed[:GRID].abs().sum().item() / len(cell)

    low, high = 0.0, 1.0
    for _ in range(10):
        sigma = (low + high) / 2
        low, high = (sigma, high) if sigma < error(sigma) else (low, sigma)
    return error(high)


def posterior_metrics(
    logits: Array, posterior: Array, temperature: float = 1.0
) -> dict[str, float]:
    """Errors against the known posterior (N, K) that the labels were drawn from, without bins.

    true_calibration_error: mean |confidence - true probability of the predicted class|;
    true_kl: mean KL(posterior || softmax(logits / T)) in nats.
    """
    logits, posterior = checked_scores(logits).double(), checked_probs(posterior, "the posterior")
    if logits.shape != posterior.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and posterior {tuple(posterior.shape)} differ in shape"
        )
    log_probs, posterior = (logits / temperature).log_softmax(dim=1), posterior.double()
    prediction = logits.argmax(dim=1, keepdim=True)
    confidence, truth = log_probs.gather(1, prediction).exp(), posterior.gather(1, prediction)
    # 0 log 0 = 0, also where the net's own probability is 0.
    kl = torch.where(posterior > 0, posterior * (posterior.log() - log_probs), 0).sum(dim=1)
    return {
        "true_calibration_error": (confidence - truth).abs().mean().item(),
        "true_kl": kl.mean().item(),
    }


class _Rows(NamedTuple):
    """Of each row, float64 (N,): p_k = exp(z_k / T - top) / mass; its label's log p and rank."""

    top: Tensor
    mass: Tensor
    log_prob: Tensor
    rank: Tensor


def _softmax_rows(logits: Tensor, labels: Tensor, temperature: float) -> tuple[_Rows, float]:
    """The rows, and the sum over them of the Brier score."""
    parts, squares = [], 0.0
    for z, y in in_pieces(logits, labels.unsqueeze(1)):
        # Classes are ranked by their logits: probabilities that differ may underflow alike.
        own = z.gather(1, y)
        rank = (z > own).sum(dim=1)
        for row in ((z >= own).sum(dim=1) > rank + 1).nonzero().flatten():  # equals of the label
            rank[row] += (z[row, : y[row]] == own[row]).sum()
        z = z / temperature
        top = z.amax(dim=1, keepdim=True)
        log_prob = z.gather(1, y) - top
        weight = (z - top).exp_()
        mass = weight.sum(dim=1, keepdim=True)
        log_prob -= mass.log()
        weight /= mass
        squares += (torch.linalg.vector_norm(weight) ** 2 + (1 - 2 * log_prob.exp()).sum()).item()
        parts.append((top.squeeze(1), mass.squeeze(1), log_prob.squeeze(1), rank))
    rows = _Rows(*(torch.cat(part) for part in zip(*parts, strict=True)))
    if rows.mass.isnan().any():
        raise ValueError("the softmax of the logits is NaN: they hold infinite values")
    return rows, squares


def _top_label(probs: Array, labels: Array) -> tuple[Tensor, Tensor]:
    probs, labels = checked(checked_probs(probs), labels)
    confidence, order = probs.amax(dim=1).double().sort()
    return confidence, (probs.argmax(dim=1) == labels)[order]


def _columns_of(probs: Array, labels: Array) -> tuple[Callable[[slice], Tensor], Tensor, int]:
    probs, labels = checked(checked_probs(probs), labels)

    def columns(chosen: slice) -> Tensor:
        return probs[:, chosen].T.double().clone(memory_format=torch.contiguous_format)

    return columns, labels, probs.shape[1]


Edges = Callable[[Tensor], Tensor]  # of columns (C, N) in rising order: inner edges (C, bins - 1)


def _equal_width(bins: int) -> Edges:
    inner = _numbers(bins).double() / bins
    return lambda ordered: inner.repeat(len(ordered), 1)


def _equal_mass(bins: int) -> Edges:
    def edges(ordered: Tensor) -> Tensor:
        # Positions of the quantiles in whole numbers: a rounding could put a sample that is itself
        # an edge on either side of it.
        last = ordered.shape[1] - 1
        position = numbers * last
        below = position // bins
        weight = (position % bins).double() / bins
        return torch.lerp(ordered[:, below], ordered[:, (below + 1).clamp_max(last)], weight)

    numbers = _numbers(bins)
    return edges


def _numbers(bins: int) -> Tensor:
    if bins < 1:
        raise ValueError(f"there should be at least one bin, got {bins}")
    return torch.arange(1, bins)


def _binned(ordered: Tensor, edges: Tensor, column: Tensor, hits: Tensor) -> Bins:
    """Columns (C, N) in rising order, and those of their values that are right: column, value."""
    columns, samples = ordered.shape
    bins, zero = edges.shape[1] + 1, torch.zeros(columns, 1, dtype=torch.long)
    # An edge belongs to the bin below it.
    inner = torch.searchsorted(ordered, edges, right=True)
    ends = torch.cat([zero, inner, zero + samples], dim=1)
    sums = ordered.cumsum(dim=1).gather(1, (ends - 1).clamp_min(0)).where(ends > 0, 0)
    index = torch.searchsorted(edges[column], hits.unsqueeze(1)).squeeze(1)
    right = torch.bincount(column * bins + index, minlength=columns * bins)
    return Bins(ends.diff().double(), right.view(columns, bins).double(), sums.diff())


def _of_confidence(ordered: Tensor, right: Tensor, edges: Edges) -> Bins:
    """Of confidences (N,) in rising order, and whether each prediction is right."""
    column, hits = torch.zeros(int(right.sum()), dtype=torch.long), ordered[right]
    ordered = ordered.unsqueeze(0)
    return _binned(ordered, edges(ordered), column, hits)


def _classwise(
    columns: Callable[[slice], Tensor], labels: Tensor, classes: int, *edges: Edges
) -> list[float]:
    """The mean gap over classes for each kind of edges; `columns` makes p (C, N) of some classes.

    A million samples are sorted once, for all kinds, a few classes at a time.
    """
    total, samples = [0.0] * len(edges), len(labels)
    step = max(1, COLUMNS_AT_ONCE // samples)
    for start in range(0, classes, step):
        probs = columns(slice(start, start + step))
        [rows] = torch.where((labels >= start) & (labels < start + step))
        column = labels[rows] - start
        hits = probs[column, rows]
        probs.numpy().sort(axis=1)  # numpy's is four times as fast
        for kind, of in enumerate(edges):
            gap = _binned(probs, of(probs), column, hits).gap
            total[kind] += gap.sum().item() / (samples * classes)
    return total


def _aurc(ordered: Tensor, right: Tensor) -> float:
    """Samples of equal confidence share their errors evenly, so their order does not matter."""
    groups, counts = ordered.flip(0).unique_consecutive(return_inverse=True, return_counts=True)[1:]
    shared = torch.bincount(groups, weights=1 - right.flip(0).double()) / counts
    errors = shared.repeat_interleave(counts).cumsum(dim=0)
    return (errors / torch.arange(1, len(errors) + 1)).mean().item()


def _noisy_gap(counts: Tensor, accuracy: Tensor, gap: Tensor) -> Tensor:
    """n_b E|gap_b / n_b + noise| for normal noise of variance accuracy (1 - accuracy) / n_b."""
    sd = (counts * accuracy * (1 - accuracy)).sqrt()
    ratio = torch.where(sd > 0, gap / sd, math.inf) / math.sqrt(2)
    return gap * ratio.erf() + sd * math.sqrt(2 / math.pi) * torch.exp(-ratio.square())
