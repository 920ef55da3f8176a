"""Accuracy, proper scores and calibration errors of a whole split, summed in float64 on the CPU.

Arguments are numpy arrays or tensors of any device and floating type: probabilities or logits
(N, K), labels (N,). Results are fractions as python floats. ValueError where shapes do not fit, a
label is out of range, there is no sample, a value is NaN, or probabilities do not sum to 1.

Confidence is the probability of the predicted class. Bins are (lo, hi], the first closed below and
the last above: no sample is dropped. An empty bin adds 0, a class that no label has counts.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .binning import Binned, bins_of_confidence, class_errors, equal_mass
from .scores import Array, checked_pair, checked_probs, checked_scores, in_pieces, rank_of
from .selective import augrc, aurc, coverage_at_risk, risk_at_coverage
from .temperature import least_nll

GRID = 4096  # cells of the smooth ECE


def ece(probs: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of n_b/N |accuracy_b - confidence_b|."""
    counts, accuracy, confidence = reliability_bins(probs, labels, bins)
    return ((accuracy - confidence).abs() @ counts).item() / len(labels)


def adaece(probs: Array, labels: Array, bins: int = 15) -> float:
    """Adaptive ECE: bins of equal mass, as `classification_metrics` has it."""
    confidence, right = _confidence_of_probs(probs, labels)
    return bins_of_confidence(confidence, right, bins, equal_mass).error()


def sce(probs: Array, labels: Array, bins: int = 15) -> float:
    """Static calibration error: the mean over all classes, as `classification_metrics` has it."""
    probs, labels = checked_pair(checked_probs(probs), labels)

    def columns_of(first: int, end: int) -> Tensor:
        # A copy: what is given is not sorted in place.
        return probs[:, first:end].double().T.clone(memory_format=torch.contiguous_format)

    equal_width_error, _ = class_errors(columns_of, probs.shape[1], labels, bins)
    return equal_width_error


def reliability_bins(probs: Array, labels: Array, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, accuracy and mean confidence in bins of equal width, float64 (bins,); 0 if empty."""
    confidence, right = _confidence_of_probs(probs, labels)
    column = bins_of_confidence(confidence, right, bins)
    counts = column.counts[0]
    accuracy = column.hits[0] / counts.clamp_min(1)
    mean_confidence = column.sums[0] / counts.clamp_min(1)
    return counts, accuracy, mean_confidence


def classification_metrics(
    logits: Array, labels: Array, temperature: float = 1.0, bins: int = 15
) -> dict[str, float]:
    """Every metric of softmax(logits / T). Of probabilities, give the logarithms.

    top1, top5: equal logits rank by class number; top5 is top-min(5, K).
    nll: mean of -log p_y. brier: mean of sum_k (p_k - 1[y = k])^2.
    ece: sum over bins of n_b/N |accuracy_b - confidence_b|, bins of equal width with edges at the
    float64 numbers nearest to i / bins (Guo et al., ICML 2017, Eq. 3).
    adaece: the same over bins of equal mass, edges at the i/bins quantiles of the confidences
    (linear interpolation); equal ones share a bin (Mukhoti et al., NeurIPS 2020, Section 2).
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
    on the confidence keeps with at most 5 % errors (all four: selective.py).
    balanced_accuracy: the mean over classes that have labels of their samples' accuracy.
    refinement, calibration: the two parts of the NLL, what temperature scaling fitted on this very
    split leaves and what it removes, whatever T is (Berta et al., "Rethinking early stopping:
    refine, then calibrate", 2025).
    Raises ValueError also where the softmax is NaN (a logit of +inf) or T is not positive.
    """
    logits, labels = checked_pair(logits, labels)
    if not temperature > 0:
        raise ValueError(f"the temperature should be positive, got {temperature}")
    rows = _softmax_rows(logits, labels, temperature)

    # Of the predicted class.
    confidence, right = _confidence_of_rows(rows)
    width = bins_of_confidence(confidence, right, bins)
    mass = bins_of_confidence(confidence, right, bins, equal_mass)
    of_bins = _bin_metrics(width)

    # Of every class.
    static, adaptive = _class_errors(logits, labels, temperature, rows, bins)

    # Subtracted, for where every probability is 1 a mere sign would make it -0.
    nll = 0.0 - rows.log_prob.mean().item()
    removed = _removed_by_scaling(nll, logits, labels)
    return {
        "top1": right.double().mean().item(),
        "top5": (rows.rank < 5).double().mean().item(),
        "nll": nll,
        "brier": rows.square.mean().item(),
        "ece": width.error(),
        "sce": static,
        "adaece": mass.error(),
        "mce": of_bins["mce"],
        "ace": adaptive,
        "rmsce": of_bins["rmsce"],
        "smece": smooth_ece(confidence, right),
        "debiased_ece": of_bins["debiased_ece"],
        "overconfidence": of_bins["overconfidence"],
        "underconfidence": of_bins["underconfidence"],
        "aurc": aurc(confidence, right),
        "augrc": augrc(confidence, right),
        "risk_at_80_coverage": risk_at_coverage(confidence, right, percent=80),
        "coverage_at_5_risk": coverage_at_risk(confidence, right, risk=0.05),
        "balanced_accuracy": _balanced_accuracy(rows.rank == 0, labels),
        "smallest_bin": of_bins["smallest_bin"],
        "refinement": nll if math.isinf(nll) else nll - removed,
        "calibration": removed,
    }


def smooth_ece(confidence: Tensor, right: Tensor) -> float:
    """smECE of confidences (N,) in 0..1 and whether each prediction was right (N,); no bins.

    The residuals right - confidence are smoothed over the confidence by a Gaussian kernel of
    width sigma, reflected at 0 and 1; the mean of |smoothed| falls with sigma, and the value is
    that where it meets sigma, found to 1/1024. Smoothed by the cosine transform on a grid.
    Błasiok and Nakkiran, "Smooth ECE", ICLR 2024.
    """
    cell = (confidence * GRID).long().clamp_(max=GRID - 1)
    residual = torch.bincount(cell, weights=right.double() - confidence, minlength=GRID)
    spectrum = torch.fft.rfft(torch.cat([residual, residual.flip(0)]))
    frequency = math.pi * torch.arange(GRID + 1, dtype=torch.float64)

    def error(sigma: float) -> float:
        smoothed = torch.fft.irfft(spectrum * torch.exp(-((sigma * frequency) ** 2) / 2))
        return smoothed[:GRID].abs().sum().item() / len(cell)

    # Halve the range ten times: 1/1024.
    low = 0.0
    high = 1.0
    for _ in range(10):
        sigma = (low + high) / 2
        if sigma < error(sigma):
            low = sigma
        else:
            high = sigma
    return error(high)


def posterior_metrics(
    logits: Array, posterior: Array, temperature: float = 1.0
) -> dict[str, float]:
    """Errors against the known posterior (N, K) that the labels were drawn from, without bins.

    true_calibration_error: mean |confidence - true probability of the predicted class|;
    true_kl: mean KL(posterior || softmax(logits / T)) in nats.
    """
    logits = checked_scores(logits).double()
    posterior = checked_probs(posterior)
    if not temperature > 0:
        raise ValueError(f"the temperature should be positive, got {temperature}")
    if logits.shape != posterior.shape:
        raise ValueError(f"logits {tuple(logits.shape)} against posterior {tuple(posterior.shape)}")
    posterior = posterior.double()
    log_probs = (logits / temperature).log_softmax(dim=1)

    prediction = logits.argmax(dim=1, keepdim=True)
    confidence = log_probs.gather(1, prediction).exp()
    truth = posterior.gather(1, prediction)

    # 0 log 0 = 0, also where the net's own probability is 0.
    kl = torch.where(posterior > 0, posterior * (posterior.log() - log_probs), 0).sum(dim=1)
    return {
        "true_calibration_error": (confidence - truth).abs().mean().item(),
        "true_kl": kl.mean().item(),
    }


def _confidence_of_probs(probs: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """Confidences, float64 (N,) in rising order, and whether each prediction is right (N,)."""
    probs, labels = checked_pair(checked_probs(probs), labels)
    confidence, order = probs.amax(dim=1).double().sort()
    right = (probs.argmax(dim=1) == labels)[order]
    return confidence, right


class _Rows(NamedTuple):
    """What is known of each image, float64 (N,); p_k is exp(z_k / T - top) / mass."""

    top: Tensor
    mass: Tensor
    log_prob: Tensor  # of the label
    rank: Tensor  # of the label, from 0
    square: Tensor  # sum over classes of (p_k - 1[y = k])^2


def _softmax_rows(logits: Tensor, labels: Tensor, temperature: float) -> _Rows:
    # Made before the pieces: small tensors, kept between large ones, would scatter the heap.
    columns = torch.empty(5, len(labels), dtype=torch.float64)
    rows = _Rows(
        top=columns[0],
        mass=columns[1],
        log_prob=columns[2],
        rank=columns[3],
        square=columns[4],
    )
    for z, y, place in in_pieces(logits, labels.unsqueeze(1), torch.arange(len(labels))):
        # Classes are ranked by their logits: probabilities that differ may underflow alike.
        rows.rank[place] = rank_of(z, y).double()

        z = z / temperature
        top = z.amax(dim=1, keepdim=True)
        log_prob = z.gather(1, y) - top
        weight = (z - top).exp_()
        mass = weight.sum(dim=1, keepdim=True)
        log_prob -= mass.log()
        rows.top[place] = top.squeeze(1)
        rows.mass[place] = mass.squeeze(1)
        rows.log_prob[place] = log_prob.squeeze(1)

        weight /= mass  # the probabilities
        weight.scatter_add_(1, y, -torch.ones_like(log_prob))
        rows.square[place] = weight.square_().sum(dim=1)
    if columns.isnan().any():
        raise ValueError("the softmax of the logits is NaN: they hold infinite values")
    return rows


def _confidence_of_rows(rows: _Rows) -> tuple[Tensor, Tensor]:
    """What `_confidence_of_probs` gives: the largest probability is exp(0) / mass."""
    confidence, order = (1 / rows.mass).sort()
    right = (rows.rank == 0)[order]
    return confidence, right


def _removed_by_scaling(nll: float, logits: Tensor, labels: Tensor) -> float:
    """How much of the NLL a temperature takes that is fitted on this very split.

    NaN of an infinite NLL, which no temperature makes finite.
    """
    if not math.isfinite(nll):
        return math.nan
    _, least = least_nll(logits, labels)
    return max(0.0, nll - least)


def _bin_metrics(width: Binned) -> dict[str, float]:
    """The relatives of the ECE, from the bins of equal width that are not empty."""
    full = width.counts[0] > 0
    counts = width.counts[0, full]
    hits = width.hits[0, full]
    sums = width.sums[0, full]
    samples = int(counts.sum().item())
    gap = (hits - sums).abs()

    # E|gap + noise|, for normal noise of the standard deviation that the accuracies have.
    sd = (hits * (1 - hits / counts)).sqrt()
    ratio = torch.where(sd > 0, gap / sd, math.inf) / math.sqrt(2)
    noisy = gap * ratio.erf() + sd * math.sqrt(2 / math.pi) * torch.exp(-ratio.square())
    return {
        "mce": (gap / counts).max().item(),
        "rmsce": math.sqrt((gap.square() / counts).sum().item() / samples),
        "debiased_ece": 2 * width.error() - noisy.sum().item() / samples,
        "overconfidence": (sums - hits).clamp_min(0).sum().item() / samples,
        "underconfidence": (hits - sums).clamp_min(0).sum().item() / samples,
        "smallest_bin": counts.min().item(),
    }


def _class_errors(
    logits: Tensor, labels: Tensor, temperature: float, rows: _Rows, bins: int
) -> tuple[float, float]:
    """SCE and ACE of softmax(logits / T)."""

    def columns_of(first: int, end: int) -> Tensor:
        columns = logits[:, first:end].T.contiguous().double() / temperature
        return columns.sub_(rows.top).exp_().div_(rows.mass)

    return class_errors(columns_of, logits.shape[1], labels, bins)


def _balanced_accuracy(correct: Tensor, labels: Tensor) -> float:
    """The accuracy of each class among the labels, averaged; `correct`: of each prediction (N,)."""
    counts = torch.bincount(labels)
    hits = torch.bincount(labels, weights=correct.double())
    return (hits[counts > 0] / counts[counts > 0]).mean().item()
