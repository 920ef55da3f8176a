"""Distillation losses: student logits, teacher logits (B, K) and labels (B,) -> scalar.

A teacher may rule classes out: a logit of -inf is a probability of 0, and 0 log 0 is 0. Where a
loss has no value for such logits it raises Undefined.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.classification import at_least_float32, of_label, of_others


class Undefined(ValueError):
    """A distillation has no value for a teacher's logits, not even as a limit."""


def refuse_minus_infinity(values: Tensor, reason: str) -> None:
    """Raises Undefined, with the reason, where one of the values is -inf.

    On the CPU alone: on a GPU to look would be to wait in every step, and a captured step cannot.
    There the loss is NaN; a teacher is looked at before training (utils/teachers/settling.py).
    """
    if values.device.type == "cpu" and values.isneginf().any():
        raise Undefined(reason)


def log_softmax(logits: Tensor, T: float) -> Tensor:
    """log softmax(logits / T), in at least float32.

    Above T = 100 in float64: T^2 multiplies how nearly uniform distributions differ, the rounding
    included.
    """
    logits = at_least_float32(logits)
    if T > 100:
        logits = logits.double()
    return F.log_softmax(logits / T, dim=1)


def divergence(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    """KL(teacher || student), summed over classes and averaged over the batch; 0 log 0 = 0."""
    terms = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    impossible = log_teacher == -torch.inf
    return terms.masked_fill(impossible, 0).sum() / len(terms)


def kd(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)).

    T^2 keeps the size of its gradient while T varies; at high T this is half the mean squared
    difference of the centred logits. Hinton, Vinyals and Dean, 2015, Section 2.
    """
    return T**2 * divergence(log_softmax(teacher, T), log_softmax(student, T))


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, T: float, alpha: float, beta: float
) -> Tensor:
    """Decoupled: T^2 (alpha TCKD + beta NCKD), both KL(teacher || student) at T.

    TCKD is that of (p_y, 1 - p_y), NCKD that of the other classes, renormalised; per image KD is
    TCKD + (1 - p_y of the teacher) NCKD. Zhao et al., CVPR 2022, Eq. 7. Their code takes the
    logarithm of p, which is infinite where p rounds to 0. NCKD is not defined for a teacher that
    rules out every class but the label: Undefined.
    """

    def decoupled(logits: Tensor) -> tuple[Tensor, Tensor]:
        """log (p_y, 1 - p_y), and log of the other classes among themselves."""
        log_p = log_softmax(logits, T)
        others = of_others(log_p, labels)
        rest = others.logsumexp(dim=1, keepdim=True)
        return torch.cat([of_label(log_p, labels), rest], dim=1), others - rest

    target_t, others_t = decoupled(teacher)
    target_s, others_s = decoupled(student)
    refuse_minus_infinity(
        target_t[:, 1],
        "DKD compares how the probability is shared among the classes other than the label, and "
        "for some image the teacher rules all of them out",
    )
    tckd = divergence(target_t, target_s)
    nckd = divergence(others_t, others_s)
    return T**2 * (alpha * tckd + beta * nckd)


def lskd(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    """KD after each row of both logits became (z - mean) / (standard deviation + 1e-7).

    The standard deviation divides by K - 1, as in the code of Sun et al., CVPR 2024, Algorithm 1.
    A logit of -inf has neither mean nor standard deviation: Undefined.
    """
    refuse_minus_infinity(
        teacher,
        "LSKD divides logits by their standard deviation, which a logit of -inf (a class that the "
        "teacher rules out) makes infinite",
    )

    def standardised(logits: Tensor) -> Tensor:
        z = at_least_float32(logits)
        return (z - z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + 1e-7)

    return kd(standardised(student), standardised(teacher), labels, T)


def dist(
    student: Tensor, teacher: Tensor, labels: Tensor, T: float, beta: float, gamma: float
) -> Tensor:
    """T^2 (beta (1 - r over the classes) + gamma (1 - r over the images)) of softmax(z / T).

    r is the Pearson correlation of student and teacher: over the classes, averaged over images,
    and over the images, averaged over classes; 0 where one of them is constant, as the probability
    of a class that the teacher always rules out. Huang et al., NeurIPS 2022, Section 4, with the
    T^2 of `kd`.
    """
    p_s = log_softmax(student, T).exp()
    p_t = log_softmax(teacher, T).exp()

    def distance(dim: int) -> Tensor:
        # A correlation is the cosine between deviations from the mean.
        centred_s = p_s - p_s.mean(dim=dim, keepdim=True)
        centred_t = p_t - p_t.mean(dim=dim, keepdim=True)
        return 1 - F.cosine_similarity(centred_s, centred_t, dim=dim, eps=1e-12).mean()

    return T**2 * (beta * distance(dim=1) + gamma * distance(dim=0))
