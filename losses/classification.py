"""Losses of a single prediction: cross entropy, focal loss, label smoothing."""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision becomes float32, also inside autocast; float32 and float64 stay."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, the mean of -log p_y. Logits (B, K), labels (B,) -> scalar."""
    return F.cross_entropy(at_least_float32(logits), labels)


def focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss, the mean of -(1 - p_y)^gamma log p_y; gamma = 0 is cross entropy.

    Logits (B, K), labels (B,) -> scalar. Lin et al., "Focal Loss for Dense Object Detection",
    ICCV 2017, Eq. 4.
    """
    log_p = F.log_softmax(at_least_float32(logits), dim=1)
    log_p = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    # expm1 adds no rounding of its own near p_y = 1. At p_y = 1 the power's derivative is infinite
    # for gamma < 1, and times log p_y = 0 it would be NaN: hence the clamp.
    miss = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
    return -(miss.pow(gamma) * log_p).mean()


def label_smoothing(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Cross entropy against the target (1 - alpha) onehot + alpha / K.

    Logits (B, K), labels (B,) -> scalar. Müller et al., "When Does Label Smoothing Help?",
    NeurIPS 2019, Section 1.1. Other code, that of KD(C) among it, spreads its alpha' over the
    K - 1 other classes only: the same loss with alpha = alpha' K / (K - 1).
    """
    return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=alpha)
