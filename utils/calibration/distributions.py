"""What a net's uncertainty is worth: against known label distributions and on foreign data."""

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from .binning import bin_of
from .metrics import posterior_metrics
from .scores import Array, as_tensor, checked_scores

BINS = 15


def label_distribution_metrics(
    logits: Array, distribution: Array, temperature: float = 1.0
) -> dict[str, float]:
    """Errors of p = softmax(logits / T) against q (N, K), e.g. the votes of many people.

    kl: mean KL(q || p) in nats; tv: mean total variation, half of sum_k |p_k - q_k|;
    calibration_error: mean |p_c - q_c|, c the predicted class;
    soft_ece: ECE with q_c in place of being right, 15 bins (lo, hi] of equal width;
    expected_top1: mean q_c, the accuracy against one label drawn from q;
    entropy, entropy_gap: mean entropy of p, and how much it is above that of q, in nats;
    entropy_correlation: Spearman's, between the entropies of p and q over samples.
    Raises ValueError as `posterior_metrics`. Peterson et al., ICCV 2019 (CIFAR-10H); Baan et al.,
    "Stop measuring calibration when humans disagree", EMNLP 2022 (tv, entropy_gap per sample).
    """
    of_posterior = posterior_metrics(logits, distribution, temperature)
    logits = as_tensor(logits).double()
    target = as_tensor(distribution).double()
    probs = (logits / temperature).softmax(dim=1)

    prediction = logits.argmax(dim=1, keepdim=True)
    confidence = probs.gather(1, prediction).squeeze(1)
    agreement = target.gather(1, prediction).squeeze(1)

    index = bin_of(confidence, BINS)
    gap = torch.bincount(index, weights=agreement - confidence, minlength=BINS)

    own_entropy = entropy(probs)
    true_entropy = entropy(target)
    return {
        "kl": of_posterior["true_kl"],
        "tv": (probs - target).abs().sum(dim=1).mean().item() / 2,
        "calibration_error": of_posterior["true_calibration_error"],
        "soft_ece": gap.abs().sum().item() / len(index),
        "expected_top1": agreement.mean().item(),
        "entropy": own_entropy.mean().item(),
        "entropy_gap": (own_entropy - true_entropy).mean().item(),
        "entropy_correlation": rank_correlation(own_entropy, true_entropy),
    }


def entropy(probs: Tensor) -> Tensor:
    """(N,) in nats, of probabilities (N, K); 0 log 0 = 0."""
    return -torch.special.xlogy(probs, probs).sum(dim=1)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: Pearson's between ranks, equal values sharing theirs. 0 where one is constant."""
    ranks = torch.from_numpy(rankdata([first, second], axis=1))
    return torch.corrcoef(ranks)[0, 1].nan_to_num(0).item()


def ood_metrics(inside: Array, outside: Array, temperature: float = 1.0) -> dict[str, float]:
    """How well confidence and entropy tell the test split (inside) from foreign data (outside).

    Logits (N, K) and (M, K); inside is the positive class of auroc, aupr_in and fpr95, outside
    that of aupr_out. Raises ValueError where there is no sample or a logit is not finite.
    Hendrycks and Gimpel, ICLR 2017; Liang et al. (ODIN), ICLR 2018 (fpr95).
    """
    logits = torch.cat([checked_scores(inside).double(), checked_scores(outside).double()])
    if not logits.isfinite().all():
        raise ValueError("logits should be finite")
    is_inside = np.arange(len(logits)) < len(inside)

    # In the order of their size: summed in another, equal confidences would differ by a rounding.
    ordered = logits.sort(dim=1, descending=True).values
    probs = ((ordered - ordered[:, :1]) / temperature).softmax(dim=1)

    # 1 - max p as the sum of the others: 1 itself would hide how close to it a confidence is.
    scores = {"confidence": -probs[:, 1:].sum(dim=1), "entropy": -entropy(probs)}
    metrics = {}
    for name, score in scores.items():
        false_rate, true_rate, _ = roc_curve(is_inside, score, drop_intermediate=False)
        metrics[f"{name}_auroc"] = float(roc_auc_score(is_inside, score))
        metrics[f"{name}_aupr_in"] = float(average_precision_score(is_inside, score))
        metrics[f"{name}_aupr_out"] = float(average_precision_score(~is_inside, -score))
        metrics[f"{name}_fpr95"] = float(false_rate[true_rate >= 0.95][0])
    return metrics
