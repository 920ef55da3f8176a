"""Losses that are means over single predictions, of logits (B, K) and labels (B,) -> scalar."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision becomes float32, also inside autocast; float32 and float64 stay."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """Each row's value for its label: (B, K) -> (B, 1)."""
    return values.gather(1, labels.unsqueeze(1))


def of_others(values: Tensor, labels: Tensor) -> Tensor:
    """Each row without its label's value: (B, K) -> (B, K - 1)."""
    column = torch.arange(values.shape[1] - 1, device=labels.device)
    return values.gather(1, column + (column >= labels.unsqueeze(1)))


def one_hot(labels: Tensor, probs: Tensor) -> Tensor:
    """1 at each row's label, else 0, like probs (B, K); torch's own inspects the labels."""
    return (labels.unsqueeze(1) == torch.arange(probs.shape[1], device=labels.device)).to(probs)


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y (B, 1)."""
    return of_label(F.log_softmax(at_least_float32(logits), dim=1), labels)


def doubt(log_p: Tensor) -> Tensor:
    """1 - p without a rounding near p = 1; clamped, for at 0 a power below 1 has no derivative."""
    return (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, the mean of -log p_y."""
    return F.cross_entropy(at_least_float32(logits), labels)


def focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss, the mean of -(1 - p_y)^gamma log p_y. Lin et al., ICCV 2017, Eq. 4."""
    log_p = log_probability(logits, labels)
    return -(doubt(log_p).pow(gamma) * log_p).mean()


def label_smoothing(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Cross entropy against the target (1 - alpha) onehot + alpha / K.

    Müller et al., NeurIPS 2019, Section 1.1. The code of KD(C) spreads its alpha' over the K - 1
    other classes only: the same loss with alpha = alpha' K / (K - 1).
    """
    return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=alpha)


def flsd(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss with gamma 5 where p_y < 0.2, else 3. Mukhoti et al., NeurIPS 2020, Section 5."""
    log_p = log_probability(logits, labels)
    gamma = 3 + 2 * (log_p.exp() < 0.2)
    return -(doubt(log_p).pow(gamma) * log_p).mean()


def dual_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Dual focal loss, the mean of -(1 - p_y + p_j)^gamma log p_y.

    p_j is the largest probability below p_y, 0 where there is none. The gradient flows through p_j
    too. Tao, Dong and Xu, ICML 2023, Eq. 3.
    """
    log_probs = F.log_softmax(at_least_float32(logits), dim=1)
    log_p = of_label(log_probs, labels)
    below = log_probs.masked_fill(log_probs >= log_p, -torch.inf)
    p_j = below.amax(dim=1, keepdim=True).exp()
    return -((doubt(log_p) + p_j).pow(gamma) * log_p).mean()


class AdaFocal(nn.Module):
    """Focal loss with a gamma for each of 15 bins of p_y, which validation steers.

    The mean of -(1 - p_y)^gamma log p_y, where gamma < 0 of -(1 + p_y)^|gamma| log p_y; at first
    gamma = 1. Ghosh, Schaaf and Gormley, NeurIPS 2022, Algorithm 1.
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
        """Make bins of equal numbers of validation confidences, and change their gammas.

        With `gap` = mean confidence - accuracy of the bin, gamma becomes gamma e^gap, a negative
        one gamma e^-gap. Closer to 0 than 0.2 it goes on at 0.2 on the other side; from -2 to 20.
        """
        confidence, prediction = logits.detach().cpu().double().softmax(dim=1).max(dim=1)
        gap = confidence - (prediction == labels.cpu()).double()

        edges = confidence.quantile(torch.arange(1, self.BINS).double() / self.BINS)
        bins = torch.bucketize(confidence, edges)
        images = bins.bincount(minlength=self.BINS)
        gap = bins.bincount(gap, minlength=self.BINS) / images.clamp_min(1)

        gammas = self.gammas.cpu().double()
        gammas = gammas * (gap * gammas.sign()).exp()
        gammas = torch.where(gammas.abs() < 0.2, -0.2 * gammas.sign(), gammas).clamp(-2, 20)
        self.gammas.copy_(gammas)  # in place: a captured step reads them at their address
        self.edges.copy_(edges)


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of the sum over k of (p_k - 1[y = k])^2; from 0 to 2. Brier, 1950, Eq. 2."""
    probs = at_least_float32(logits).softmax(dim=1)
    return (probs - one_hot(labels, probs)).square().sum(dim=1).mean()
