"""Calibration terms, added to a classification loss, of logits (B, K) and labels (B,) -> scalar."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.classification import at_least_float32, of_label, of_others, one_hot

KERNEL_WIDTH = 0.4


def mdca(logits: Tensor, labels: Tensor) -> Tensor:
    """Multi-class difference of confidence and accuracy.

    The mean over all K classes, those absent from the batch included, of |mean probability of the
    class - its frequency among the labels|. Hebbalaguppe et al., CVPR 2022, Section 3, L_MDCA.
    """
    probs = at_least_float32(logits).softmax(dim=1)
    return (probs.mean(dim=0) - one_hot(labels, probs).mean(dim=0)).abs().mean()


def mmce(logits: Tensor, labels: Tensor) -> Tensor:
    """Maximum mean calibration error, in its weighted form.

    With confidence c = max p and the kernel k = exp(-|c_i - c_j| / 0.4), the square root of
        the mean over pairs of wrong predictions of c_i c_j k
        + the mean over pairs of right ones of (1 - c_i) (1 - c_j) k
        - 2 times the mean over mixed pairs (i right, j wrong) of (1 - c_i) c_j k,
    where a pair is ordered and may be a sample with itself. 0 where all predictions of the batch
    are right or all are wrong. Kumar, Sarawagi and Jain, ICML 2018, Section 3, MMCE_w. Published
    code divides the three means by their numbers of pairs a second time, which all but removes the
    term, so weights (beta) tuned with it do not carry over.
    """
    confidence, prediction = at_least_float32(logits).softmax(dim=1).max(dim=1)
    right = (prediction == labels).to(confidence.dtype)
    wrong = 1 - right
    n_right = right.sum()
    n_wrong = wrong.sum()

    # The three means are one quadratic form: v_i is c_i / n_wrong or -(1 - c_i) / n_right.
    v = wrong * confidence / n_wrong.clamp_min(1) - right * (1 - confidence) / n_right.clamp_min(1)
    # Products and a sum, not a matmul, which autocast would do in half precision.
    kernel = torch.exp(-(confidence.unsqueeze(1) - confidence).abs() / KERNEL_WIDTH)
    square = (v.unsqueeze(1) * v * kernel).sum()

    # Filled twice: at 0 the root's slope is infinite, and times the outer fill's 0 it would be NaN.
    zero = (n_right == 0) | (n_wrong == 0) | (square <= 0)
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def dca(logits: Tensor, labels: Tensor) -> Tensor:
    """|mean of max p - accuracy| of the batch. Liang et al., BMVC 2020."""
    confidence, prediction = at_least_float32(logits).softmax(dim=1).max(dim=1)
    return (confidence - (prediction == labels).to(confidence.dtype)).mean().abs()


def mbls(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Margin-based label smoothing, the mean over i and k of relu(max_j z_ij - z_ik - margin).

    The labels play no part. Liu et al., CVPR 2022, Section 3, a mean as in their code.
    """
    z = at_least_float32(logits)
    return F.relu(z.amax(dim=1, keepdim=True) - z - margin).mean()


def cpc(logits: Tensor, labels: Tensor, exclusion: float) -> Tensor:
    """Pairwise constraints: 1v1 discrimination + `exclusion` times binary exclusion.

    Discrimination is -mean over k != y of log sigmoid(z_y - z_k). Exclusion is -1/2 mean over
    ordered pairs k != l, both != y, of log sigmoid(z_k - z_l); 0 where there are two classes only.
    By way of B x K x K numbers. Cheng and Vasconcelos, CVPR 2022.
    """
    z = at_least_float32(logits)
    others = of_others(z, labels)
    discrimination = -F.logsigmoid(of_label(z, labels) - others).mean()

    # Over all pairs; those of k = l, of which each is log 2, are taken off again.
    pairs = -F.logsigmoid(others.unsqueeze(2) - others.unsqueeze(1)).sum(dim=(1, 2))
    n = others.shape[1]
    excluded = (pairs - n * math.log(2)).mean() / max(n * (n - 1), 1)
    return discrimination + exclusion * excluded / 2
