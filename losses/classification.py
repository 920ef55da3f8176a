"""Losses that are means over single predictions: what a classifier is trained with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision becomes float32, also inside autocast; float32 and float64 stay."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """Each row's value of its label's class: (B, K) -> (B,)."""
    return values.gather(1, labels.unsqueeze(1)).squeeze(1)


def of_others(values: Tensor, labels: Tensor) -> Tensor:
    """Each row without its label's class: (B, K) -> (B, K - 1)."""
    column = torch.arange(values.shape[1] - 1, device=labels.device)
    return values.gather(1, column + (column >= labels.unsqueeze(1)))


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y (B,), in at least float32."""
    return of_label(F.log_softmax(at_least_float32(logits), dim=1), labels)


def doubt(log_p: Tensor) -> Tensor:
    """1 - p from log p, with finite derivatives of its powers.

    expm1 adds no rounding of its own near p = 1. At p = 1 the derivative of a power below 1 is
    infinite, and times log p = 0 it would be NaN: hence the clamp.
    """
    return (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, the mean of -log p_y. Logits (B, K), labels (B,) -> scalar."""
    return F.cross_entropy(at_least_float32(logits), labels)


def focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss, the mean of -(1 - p_y)^gamma log p_y; gamma = 0 is cross entropy.

    Logits (B, K), labels (B,) -> scalar. Lin et al., "Focal Loss for Dense Object Detection",
    ICCV 2017, Eq. 4.
    """
    log_p = log_probability(logits, labels)
    return -(doubt(log_p).pow(gamma) * log_p).mean()


def label_smoothing(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Cross entropy against the target (1 - alpha) onehot + alpha / K.

    Logits (B, K), labels (B,) -> scalar. Müller et al., "When Does Label Smoothing Help?",
    NeurIPS 2019, Section 1.1. Other code, that of KD(C) among it, spreads its alpha' over the
    K - 1 other classes only: the same loss with alpha = alpha' K / (K - 1).
    """
    return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=alpha)


def flsd(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss whose gamma depends on the sample: 5 where p_y < 0.2, else 3 (FLSD-53).

    Logits (B, K), labels (B,) -> scalar. Mukhoti et al., "Calibrating Deep Neural Networks using
    Focal Loss", NeurIPS 2020, Section 5. Published code computes 1 - p_y with rounding near
    p_y = 1, and looks up each sample's gamma in a loop on the host.
    """
    log_p = log_probability(logits, labels)
    gamma = torch.where(log_p.exp() < 0.2, 5.0, 3.0)
    return -(doubt(log_p).pow(gamma) * log_p).mean()


def dual_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Dual focal loss, the mean of -(1 - p_y + p_j)^gamma log p_y.

    p_j is the largest probability below p_y, 0 where there is none. Logits (B, K), labels (B,) ->
    scalar. Tao, Dong and Xu, "Dual Focal Loss for Calibration", ICML 2023, Eq. 3. As in published
    code the gradient also flows through p_j; classes that tie for j share it here.
    """
    log_probs = F.log_softmax(at_least_float32(logits), dim=1)
    log_p = of_label(log_probs, labels)
    below = log_probs.masked_fill(log_probs >= log_p.unsqueeze(1), -torch.inf)
    return -((doubt(log_p) + below.amax(dim=1).exp()).pow(gamma) * log_p).mean()


class AdaFocal(nn.Module):
    """Focal loss with a gamma for each of 15 bins of confidence, steered by validation.

    A sample takes the gamma of the bin that its p_y falls into: -(1 - p_y)^gamma log p_y, and where
    gamma < 0 the inverse focal loss -(1 + p_y)^|gamma| log p_y. Every gamma starts at 1.
    Logits (B, K), labels (B,) -> scalar. Ghosh, Schaaf and Gormley, "AdaFocal: Calibration-aware
    Adaptive Focal Loss", NeurIPS 2022, Algorithm 1 (with lambda = 1).
    """

    BINS = 15

    def __init__(self):
        super().__init__()
        self.register_buffer("gammas", torch.ones(self.BINS))
        self.register_buffer("edges", torch.linspace(0, 1, self.BINS + 1)[1:-1])  # the inner ones

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = log_probability(logits, labels)
        p = log_p.exp()
        gamma = self.gammas[torch.bucketize(p.detach().float(), self.edges)]
        factor = torch.where(gamma > 0, doubt(log_p), 1 + p).pow(gamma.abs())
        return -(factor * log_p).mean()

    def after_validation(self, logits: Tensor, labels: Tensor) -> None:
        """Move the bins' edges and gammas, given the validation split's logits and labels.

        The bins hold equal numbers of validation confidences. Where the net is too confident by
        `gap` (mean confidence - accuracy), gamma grows by e^gap; a gamma that comes closer to 0
        than 0.2 goes on from 0.2 on the other side; all stay within -2 and 20.
        """
        confidence, prediction = logits.detach().cpu().double().softmax(dim=1).max(dim=1)
        gap = confidence - (prediction == labels.cpu()).double()
        quantiles = torch.linspace(0, 1, self.BINS + 1, dtype=torch.float64)[1:-1]
        edges = confidence.quantile(quantiles)
        bins = torch.bucketize(confidence, edges)
        images = bins.bincount(minlength=self.BINS)
        gap = bins.bincount(gap, minlength=self.BINS) / images.clamp_min(1)
        old = self.gammas.cpu().double()
        new = old * (gap * old.sign()).exp()
        new = torch.where(new.abs() < 0.2, -0.2 * new.sign(), new).clamp(-2, 20)
        self.gammas.copy_(new)
        self.edges.copy_(edges)


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over samples of the sum over k of (p_k - 1[y = k])^2, from 0 to 2.

    Logits (B, K), labels (B,) -> scalar. Brier, "Verification of Forecasts Expressed in Terms of
    Probability", 1950, Eq. 2. Some published code averages over the classes instead: 1/K of this.
    """
    probs = at_least_float32(logits).softmax(dim=1)
    return (probs - F.one_hot(labels, probs.shape[1])).square().sum(dim=1).mean()
