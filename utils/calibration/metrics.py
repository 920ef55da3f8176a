"""Accuracy and calibration of a whole split, in float64 on the CPU.

Arguments are numpy arrays or tensors of any device and floating type: probabilities or logits
(N, K), labels (N,). Results are fractions as python floats. Every function raises ValueError where
shapes do not fit, a label is out of range, there is no sample, or a value is NaN.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray | Tensor


class ReliabilityBins(NamedTuple):
    """Per confidence bin, float64 (bins,): 0 in an empty bin."""

    counts: Tensor
    accuracy: Tensor
    confidence: Tensor


def ece(probs: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of n_b/N |accuracy_b - confidence_b|.

    Bins as in `reliability_bins`. Guo et al., "On Calibration of Modern Neural Networks",
    ICML 2017, Eq. 3.
    """
    confidence, right = _top_label(*_checked_probs(probs, labels))
    return _gap(confidence, right, _equal_width(confidence, bins), bins)


def adaece(probs: Array, labels: Array, bins: int = 15) -> float:
    """ECE over bins of equal mass: edges at the i/bins quantiles of the confidences.

    Quantiles interpolate linearly (numpy's default), bins are (lo, hi], the first closed below and
    the last above, so no sample is dropped. Equal confidences share a bin, which makes the value
    independent of the order of the samples. Interpolated quantiles depend on N: duplicating every
    sample moves an edge by less than one sample, so where confidences are distinct the value
    changes by at most 2 (bins - 1) / N, and by nothing where N - 1 is a multiple of `bins`.
    Mukhoti et al., "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020, Section 2.
    """
    confidence, right = _top_label(*_checked_probs(probs, labels))
    return _gap(confidence, right, _equal_mass(confidence, bins), bins)


def sce(probs: Array, labels: Array, bins: int = 15) -> float:
    """Classwise ECE: for class k, bins of p_k against the frequency of y = k; mean over classes.

    A class that no label has counts like any other. Nixon et al., "Measuring Calibration in Deep
    Learning", CVPR workshops 2019 (static calibration error).
    """
    return _classwise_gap(*_checked_probs(probs, labels), bins)


def mce(probs: Array, labels: Array, bins: int = 15) -> float:
    """Maximum calibration error: the largest |accuracy_b - confidence_b| of a non-empty bin.

    Guo et al., ICML 2017, Eq. 5.
    """
    confidence, right = _top_label(*_checked_probs(probs, labels))
    return _largest_gap(_bin_means(confidence, right, _equal_width(confidence, bins), bins))


def brier(probs: Array, labels: Array) -> float:
    """Brier score, summed over classes: mean over samples of sum_k (p_k - 1[y = k])^2."""
    return _brier(*_checked_probs(probs, labels))


def nll(probs: Array, labels: Array) -> float:
    """Mean of -log p_y; infinite where a label was given probability 0."""
    probs, labels = _checked_probs(probs, labels)
    return -_of_label(probs, labels).log().mean().item()


def top_k(probs: Array, labels: Array, k: int) -> float:
    """Share of samples whose label is among the k most probable classes (all, where k >= K).

    Among equals the class of the lower number comes first, as in argmax. Logits serve as well.
    """
    return _top_k(*as_float64(probs, labels), k)


def reliability_bins(probs: Array, labels: Array, bins: int = 15) -> ReliabilityBins:
    """Counts, accuracy and mean confidence of the top label in bins (lo, hi] of equal width.

    The first bin is closed at 0. Edges are the float64 numbers nearest to i / bins.
    """
    confidence, right = _top_label(*_checked_probs(probs, labels))
    return _bin_means(confidence, right, _equal_width(confidence, bins), bins)


def classification_metrics(
    logits: Array, labels: Array, temperature: float = 1.0, bins: int = 15
) -> dict[str, float]:
    """top1, top5 (top-min(5, K)), nll, brier, ece, sce, adaece, mce of softmax(logits / T).

    Raises ValueError also where the softmax is NaN (a logit of +inf) or T is not positive.
    """
    logits, labels = as_float64(logits, labels)
    log_probs = _log_softmax(logits, temperature)
    probs = log_probs.exp()
    # Classes are ranked by their logits: far apart, probabilities that differ underflow alike.
    confidence, right = probs.amax(dim=1), _is_right(logits, labels)
    width = _equal_width(confidence, bins)
    return {
        "top1": _top_k(logits, labels, 1),
        "top5": _top_k(logits, labels, 5),
        "nll": -_of_label(log_probs, labels).mean().item(),
        "brier": _brier(probs, labels),
        "ece": _gap(confidence, right, width, bins),
        "sce": _classwise_gap(probs, labels, bins),
        "adaece": _gap(confidence, right, _equal_mass(confidence, bins), bins),
        "mce": _largest_gap(_bin_means(confidence, right, width, bins)),
    }


def posterior_metrics(
    logits: Array, posterior: Array, temperature: float = 1.0
) -> dict[str, float]:
    """Errors against the known posterior (N, K) that the labels were drawn from, without bins.

    true_calibration_error: mean |confidence - true probability of the predicted class|;
    true_kl: mean KL(posterior || softmax(logits / T)) in nats.
    """
    logits, posterior = _to_float64(logits), _to_float64(posterior)
    if logits.shape != posterior.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and posterior {tuple(posterior.shape)} differ in shape"
        )
    _check_range(posterior, "posterior")
    if (posterior.sum(dim=1) - 1).abs().max() > 1e-5:
        raise ValueError("the rows of the posterior do not sum to 1")
    log_probs = _log_softmax(logits, temperature)
    prediction = logits.argmax(dim=1)
    confidence = _of_label(log_probs, prediction).exp()
    # 0 log 0 = 0, also where the net's own probability is 0.
    kl = torch.where(posterior > 0, posterior * (posterior.log() - log_probs), 0).sum(dim=1)
    gap = (confidence - _of_label(posterior, prediction)).abs()
    return {
        "true_calibration_error": gap.mean().item(),
        "true_kl": kl.mean().item(),
    }


def as_float64(scores: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """Scores (N, K) as float64 and labels (N,) as int64, both on the CPU, or ValueError."""
    scores, labels = _to_float64(scores), _as_tensor(labels)
    if labels.shape != scores.shape[:1]:
        raise ValueError(
            f"labels should be ({scores.shape[0]},) for scores {tuple(scores.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels should be integers, got {labels.dtype}")
    labels = labels.long()
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"labels should lie in 0..{scores.shape[1] - 1}, "
            f"got {labels.min().item()}..{labels.max().item()}"
        )
    return scores, labels


def _as_tensor(array: Array) -> Tensor:
    # numpy's copy is contiguous and writable, as torch wants it.
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    return tensor.detach().cpu()


def _to_float64(scores: Array) -> Tensor:
    scores = _as_tensor(scores).double()
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"scores should be (N, K) and not empty, got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError("scores hold NaN")
    return scores


def _check_range(probs: Tensor, what: str) -> None:
    # Some softmaxes overshoot 1 by a rounding.
    if probs.min() < 0 or probs.max() > 1 + 1e-6:
        raise ValueError(f"{what} should lie in 0..1; are these logits?")


def _checked_probs(probs: Array, labels: Array) -> tuple[Tensor, Tensor]:
    probs, labels = as_float64(probs, labels)
    _check_range(probs, "probabilities")
    return probs, labels


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"the temperature should be positive, got {temperature}")
    log_probs = F.log_softmax(logits / temperature, dim=1)
    if log_probs.isnan().any():
        raise ValueError("the softmax of the logits is NaN: they hold infinite values")
    return log_probs


def _of_label(scores: Tensor, labels: Tensor) -> Tensor:
    return scores.gather(1, labels.unsqueeze(1)).squeeze(1)


def _is_right(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(dim=1) == labels).double()


def _top_label(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return probs.amax(dim=1), _is_right(probs, labels)


def _top_k(scores: Tensor, labels: Tensor, k: int) -> float:
    own = scores.gather(1, labels.unsqueeze(1))
    earlier = torch.arange(scores.shape[1]) < labels.unsqueeze(1)
    rank = ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
    return (rank < k).double().mean().item()


def _brier(probs: Tensor, labels: Tensor) -> float:
    ones = torch.ones(len(labels), 1, dtype=probs.dtype)
    error = probs.scatter_add(1, labels.unsqueeze(1), -ones)
    return error.square().sum(dim=1).mean().item()


def _equal_width(values: Tensor, bins: int) -> Tensor:
    # bucketize(right=False) puts a value that equals an edge into the bin below it.
    return torch.bucketize(values, torch.arange(1, bins, dtype=torch.float64) / bins)


def _equal_mass(confidence: Tensor, bins: int) -> Tensor:
    ordered, last = confidence.sort().values, len(confidence) - 1
    # Positions of the quantiles in whole numbers: a rounding could put a sample that is itself an
    # edge on either side of it.
    position = torch.arange(1, bins) * last
    below = position // bins
    above = (below + 1).clamp_max(last)
    return torch.bucketize(
        confidence, torch.lerp(ordered[below], ordered[above], (position % bins).double() / bins)
    )


def _gap(confidence: Tensor, right: Tensor, index: Tensor, bins: int) -> float:
    gap = torch.bincount(index, weights=right - confidence, minlength=bins)
    return gap.abs().sum().item() / len(index)


def _classwise_gap(probs: Tensor, labels: Tensor, bins: int) -> float:
    samples, classes = probs.shape
    index = _equal_width(probs, bins) + bins * torch.arange(classes)
    confidence = torch.bincount(index.flatten(), probs.flatten(), minlength=bins * classes)
    frequency = torch.bincount(_of_label(index, labels), minlength=bins * classes)
    return (frequency - confidence).abs().sum().item() / (samples * classes)


def _bin_means(confidence: Tensor, right: Tensor, index: Tensor, bins: int) -> ReliabilityBins:
    counts = torch.bincount(index, minlength=bins).double()
    accuracy = torch.bincount(index, weights=right, minlength=bins) / counts.clamp_min(1)
    mean = torch.bincount(index, weights=confidence, minlength=bins) / counts.clamp_min(1)
    return ReliabilityBins(counts, accuracy, mean)


def _largest_gap(reliability: ReliabilityBins) -> float:
    return (reliability.accuracy - reliability.confidence).abs().max().item()
