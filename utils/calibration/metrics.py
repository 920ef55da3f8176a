"""Accuracy, proper scores and calibration errors of a whole split, summed in float64 on the CPU.

Arguments are numpy arrays or tensors of any device and floating type: probabilities or logits
(N, K), labels (N,). Results are fractions as python floats. ValueError where shapes do not fit, a
label is out of range, there is no sample, a value is NaN, or probabilities do not sum to 1.

Confidence is the probability of the predicted class. Bins are (lo, hi], the first closed below and
the last above: no sample is dropped. An empty bin adds 0, a class that no label has counts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.calibration.scores import (
    Array,
    checked,
    checked_probs,
    checked_scores,
    in_pieces,
    rank_of,
)
from utils.calibration.selective import augrc, aurc, coverage_at_risk, risk_at_coverage
from utils.calibration.temperature import least_nll

COLUMNS_AT_ONCE = 1 << 20  # numbers, float64
GRID = 4096  # cells of the smooth ECE


def ece(probs: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of n_b/N |accuracy_b - confidence_b|."""
    counts, accuracy, confidence = reliability_bins(probs, labels, bins)
    return ((accuracy - confidence).abs() @ counts).item() / len(labels)


def reliability_bins(probs: Array, labels: Array, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, accuracy and mean confidence in bins of equal width, float64 (bins,); 0 if empty."""
    probs, labels = checked(checked_probs(probs), labels)
    confidence, order = probs.amax(dim=1).double().sort()
    right = (probs.argmax(dim=1) == labels)[order]
    counts, hits, values = _of_confidence(confidence, right, bins)[:, 0]
    return counts, hits / counts.clamp_min(1), values / counts.clamp_min(1)


def classification_metrics(
    logits: Array, labels: Array, temperature: float = 1.0, bins: int = 15
) -> dict[str, float]:
    """Every metric of softmax(logits / T), of probabilities p that of log p.

    top1, top5: equal logits rank by class number; top5 is top-min(5, K).
    nll: mean of -log p_y. brier: mean of sum_k (p_k - 1[y = k])^2.
    ece: sum over bins of n_b/N |accuracy_b - confidence_b|, bins of equal width with edges at the
    float64 numbers nearest to i / bins (Guo et al., ICML 2017, Eq. 3). torchmetrics sums it in
    float32 and is off by 1e-9 to 1e-5 at 10,000 samples, and by 1e-4 at a million.
    adaece: the same over bins of equal mass, edges at the i/bins quantiles of the confidences
    (linear interpolation); equal ones share a bin (Mukhoti et al., NeurIPS 2020, Section 2, whose
    code drops the lowest sample).
    sce: for class k, equal-width bins of p_k against the frequency of y = k; mean over classes,
    where code of Kull et al. 2019 sums. ace: the same, bins of equal mass of each class's own p_k
    (both Nixon et al., "Measuring Calibration in Deep Learning", CVPR workshops 2019).
    mce: largest |accuracy_b - confidence_b| of the ECE's bins (Guo et al., Eq. 5);
    smallest_bin: samples in the smallest of these that is not empty. Few, and mce means nothing.
    rmsce: root of sum n_b/N (accuracy_b - confidence_b)^2, the same bins. smece: `smooth_ece`.
    debiased_ece: ECE less the bias that the accuracies' noise gives it, which may leave less than
    0: twice the ECE minus its mean if each accuracy_b were drawn from a normal distribution with
    variance accuracy_b (1 - accuracy_b) / n_b (Kumar et al., NeurIPS 2019, Section 5).
    overconfidence, underconfidence: the parts of the ECE from bins whose confidence is above, and
    below, their accuracy; their sum is the ECE.
    aurc, augrc: areas under risk, and generalised risk, against coverage. risk_at_80_coverage: the
    error rate of the surest 80 %. coverage_at_5_risk: the largest share of samples that a threshold
    on the confidence keeps with at most 5 % errors (all four: `utils.calibration.selective`).
    balanced_accuracy: the mean over classes that have labels of their samples' accuracy.
    refinement, calibration: the two parts of the NLL, what temperature scaling fitted on this very
    split leaves and what it removes, whatever T is (Berta et al., "Rethinking early stopping:
    refine, then calibrate", 2025).
    Raises ValueError also where the softmax is NaN (a logit of +inf) or T is not positive.
    """
    logits, labels = checked(logits, labels)
    if not temperature > 0:
        raise ValueError(f"the temperature should be positive, got {temperature}")
    top, mass, log_prob, rank, square = _softmax_rows(logits, labels, temperature)
    samples = len(labels)
    confidence, order = (1 / mass).sort()
    right = (rank == 0)[order]
    nll = 0.0 - log_prob.mean().item()
    removed = max(0.0, nll - least_nll(logits, labels)[1]) if math.isfinite(nll) else 0.0

    width = _of_confidence(confidence, right, bins)
    counts, hits, values = width[:, 0, width[0, 0] > 0]
    gap = (hits - values).abs()
    sd = (hits * (1 - hits / counts)).sqrt()
    # E|gap + noise|, for normal noise of this standard deviation.
    ratio = torch.where(sd > 0, gap / sd, math.inf) / math.sqrt(2)
    noisy = gap * ratio.erf() + sd * math.sqrt(2 / math.pi) * torch.exp(-ratio.square())
    sce, ace = _classwise(logits, labels, temperature, top, mass, bins)
    return {
        "top1": right.double().mean().item(),
        "top5": (rank < 5).double().mean().item(),
        "nll": nll,
        "brier": square.mean().item(),
        "ece": _error(width),
        "sce": sce,
        "adaece": _error(_of_confidence(confidence, right, bins, _equal_mass)),
        "mce": (gap / counts).max().item(),
        "ace": ace,
        "rmsce": math.sqrt((gap.square() / counts).sum().item() / samples),
        "smece": smooth_ece(confidence, right),
        "debiased_ece": 2 * _error(width) - noisy.sum().item() / samples,
        "overconfidence": (values - hits).clamp_min(0).sum().item() / samples,
        "underconfidence": (hits - values).clamp_min(0).sum().item() / samples,
        "aurc": aurc(confidence, right),
        "augrc": augrc(confidence, right),
        "risk_at_80_coverage": risk_at_coverage(confidence, right, percent=80),
        "coverage_at_5_risk": coverage_at_risk(confidence, right, risk=0.05),
        "balanced_accuracy": _balanced_accuracy(rank == 0, labels),
        "smallest_bin": counts.min().item(),
        "refinement": nll - removed,
        "calibration": removed,
    }


def smooth_ece(confidence: Tensor, right: Tensor) -> float:
    """smECE of confidences (N,) in 0..1 and whether each prediction was right (N,); no bins.

    The residuals right - confidence are smoothed over the confidence by a Gaussian kernel of
    width sigma, reflected at 0 and 1; the mean of |smoothed| falls with sigma, and the value is
    that where it meets sigma, found to 1/1024. Smoothed by the cosine transform on a grid.
    Błasiok and Nakkiran, "Smooth ECE", ICLR 2024. Their package relplot has a mesh of 200 points:
    it differs by up to 2e-3 at 200 samples, 6e-4 at 5,000 and 3e-4 at 10,000, by 1e-5 to 1e-4 in
    the median (360 draws of each size).
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


def posterior_metrics(logits: Array, posterior: Array, temperature=1.0) -> dict[str, float]:
    """Errors against the known posterior (N, K) that the labels were drawn from, without bins.

    true_calibration_error: mean |confidence - true probability of the predicted class|;
    true_kl: mean KL(posterior || softmax(logits / T)) in nats.
    """
    logits, posterior = checked_scores(logits).double(), checked_probs(posterior)
    if logits.shape != posterior.shape:
        raise ValueError(f"logits {tuple(logits.shape)} against posterior {tuple(posterior.shape)}")
    log_probs, posterior = (logits / temperature).log_softmax(dim=1), posterior.double()
    prediction = logits.argmax(dim=1, keepdim=True)
    confidence, truth = log_probs.gather(1, prediction).exp(), posterior.gather(1, prediction)
    # 0 log 0 = 0, also where the net's own probability is 0.
    kl = torch.where(posterior > 0, posterior * (posterior.log() - log_probs), 0).sum(dim=1)
    return {
        "true_calibration_error": (confidence - truth).abs().mean().item(),
        "true_kl": kl.mean().item(),
    }


def _softmax_rows(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Of each row, float64 (5, N): top and mass, with which p_k is exp(z_k / T - top) / mass; log p
    and rank of its label; Brier score."""
    # One tensor for all pieces: small ones, kept between large ones, would scatter the heap.
    rows = torch.empty(5, len(labels), dtype=torch.float64)
    for z, y, place in in_pieces(logits, labels.unsqueeze(1), torch.arange(len(labels))):
        # Classes are ranked by their logits: probabilities that differ may underflow alike.
        rank = rank_of(z, y)
        z = z / temperature
        top = z.amax(dim=1, keepdim=True)
        log_prob = z.gather(1, y) - top
        weight = (z - top).exp_()
        mass = weight.sum(dim=1, keepdim=True)
        log_prob -= mass.log()
        weight /= mass
        weight.scatter_add_(1, y, -torch.ones_like(log_prob))
        square = weight.square_().sum(dim=1, keepdim=True)
        rows[:, place] = torch.cat([top, mass, log_prob, rank.unsqueeze(1), square], dim=1).T
    if rows.isnan().any():
        raise ValueError("the softmax of the logits is NaN: they hold infinite values")
    return rows


def _balanced_accuracy(correct: Tensor, labels: Tensor) -> float:
    """Of predictions that are correct or not (N,), the mean over the classes among the labels."""
    counts = torch.bincount(labels)
    hits = torch.bincount(labels, weights=correct.double())
    return (hits[counts > 0] / counts[counts > 0]).mean().item()


def _classwise(logits, labels, temperature, top, mass, bins: int) -> tuple[float, float]:
    """SCE and ACE, some classes at a time."""
    classes, sce, ace = logits.shape[1], 0.0, 0.0
    step = max(1, COLUMNS_AT_ONCE // len(labels))
    for start in range(0, classes, step):
        probs = logits[:, start : start + step].T.contiguous().double() / temperature
        probs.sub_(top).exp_().div_(mass)
        [members] = torch.where((labels >= start) & (labels < start + step))
        column = labels[members] - start
        own, share = probs[column, members], len(probs) / classes
        probs.numpy().sort(axis=1)  # in place
        sce += share * _error(_binned(probs, _equal_width(probs, bins), column, own))
        ace += share * _error(_binned(probs, _equal_mass(probs, bins), column, own))
    return sce, ace


def _error(found: Tensor) -> float:
    """The mean over columns of sum n_b/N |gap_b|, of what `_binned` found."""
    counts, right, values = found
    return (right - values).abs().sum().item() / counts.sum().item()


def _equal_width(ordered: Tensor, bins: int) -> Tensor:
    """Inner edges (C, bins - 1) of columns (C, N)."""
    return (torch.arange(1, bins).double() / bins).repeat(len(ordered), 1)


def _equal_mass(ordered: Tensor, bins: int) -> Tensor:
    """Inner edges (C, bins - 1) of columns (C, N) in rising order: their quantiles."""
    # Positions in whole numbers: a rounding could put a sample that is an edge on either side.
    last = ordered.shape[1] - 1
    position = torch.arange(1, bins) * last
    below, weight = position // bins, (position % bins).double() / bins
    return torch.lerp(ordered[:, below], ordered[:, (below + 1).clamp_max(last)], weight)


def _binned(ordered: Tensor, edges: Tensor, column: Tensor, hits: Tensor) -> Tensor:
    """Samples, right ones and sum of the values, float64 (3, C, bins), of columns (C, N) in rising
    order; of those that are right, column and value."""
    columns, samples = ordered.shape
    bins = edges.shape[1] + 1
    inner = torch.searchsorted(ordered, edges, right=True)  # an edge belongs to the bin below it
    ends = F.pad(F.pad(inner, (1, 0)), (0, 1), value=samples)
    sums = ordered.cumsum(dim=1).gather(1, (ends - 1).clamp_min(0)).where(ends > 0, 0)
    index = torch.searchsorted(edges[column], hits.unsqueeze(1)).squeeze(1)
    right = torch.bincount(column * bins + index, minlength=columns * bins)
    return torch.stack([ends.diff().double(), right.view(columns, bins).double(), sums.diff()])


def _of_confidence(ordered: Tensor, right: Tensor, bins: int, edges_of=_equal_width) -> Tensor:
    """The same of confidences (N,) in rising order, and whether each is right; C = 1."""
    ordered, hits = ordered.unsqueeze(0), ordered[right]
    return _binned(ordered, edges_of(ordered, bins), torch.zeros_like(hits).long(), hits)
