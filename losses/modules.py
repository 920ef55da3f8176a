"""What is minimised: a classification loss with its term, a distillation with the labels' share.

And a term on features, which is added to a distillation.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from losses.classification import at_least_float32, nll
from losses.features import LayerPairs


class ClassificationLoss(nn.Module):
    """base + beta * term, of logits (B, K) and labels (B,)."""

    def __init__(self, base: Callable, term: Callable | None = None, beta: float = 0.0):
        super().__init__()
        self.base = base
        self.term = term
        self.beta = beta

    def parts(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scalars whose sum is the loss: `labels`, and with a term `calibration`."""
        parts = {"labels": self.base(logits, labels)}
        if self.term is not None:
            parts["calibration"] = self.beta * self.term(logits, labels)
        return parts

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sum_of(self.parts(logits, labels))

    def after_validation(self, logits: Tensor, labels: Tensor) -> None:
        """After each epoch, in every process, with the whole validation split."""
        for module in self.children():
            module.after_validation(logits, labels)


class DistillationLoss(nn.Module):
    """Lambda * distillation + ce_weight * NLL, of both logits (B, K) and labels (B,).

    `ramp`: over so many epochs the distillation's weight rises to Lambda; 0: it is Lambda at once.
    """

    def __init__(self, distil: Callable, Lambda: float, ce_weight: float, ramp: int = 0):
        super().__init__()
        self.distil = distil
        self.Lambda = Lambda
        self.ce_weight = ce_weight
        self.ramp = ramp
        if ramp:  # in a tensor, so that a captured step follows it
            self.register_buffer("share", torch.ones(()))

    def parts(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scalars whose sum is the loss: `distillation` and `labels`."""
        distillation = self.Lambda * self.distil(student, teacher, labels)
        if self.ramp:
            distillation = distillation * self.share
        return {"distillation": distillation, "labels": self.ce_weight * nll(student, labels)}

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return sum_of(self.parts(student, teacher, labels))

    def before_epoch(self, epoch: int) -> None:
        """Before each epoch, the first of which is 1."""
        if self.ramp:
            self.share.fill_(min(epoch / self.ramp, 1))

    def after_validation(self, logits: Tensor, labels: Tensor) -> None:
        """Nothing here learns from the validation split."""


class FeatureTerm(nn.Module):
    """weight * term, of what layers of student and teacher make of a batch.

    `term` compares two lists of maps, and may have weights of its own, which are trained. `pairs`
    are the layers that are compared.
    """

    def __init__(self, term: Callable, weight: float, pairs: LayerPairs):
        super().__init__()
        self.term = term
        self.weight = weight
        self.student_layers = [student for student, _ in pairs]
        self.teacher_layers = [teacher for _, teacher in pairs]

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The weighted term of maps, by the names of their layers; in at least float32."""
        student_maps = [at_least_float32(student[layer]) for layer in self.student_layers]
        teacher_maps = [at_least_float32(teacher[layer]) for layer in self.teacher_layers]
        return self.weight * self.term(student_maps, teacher_maps)


def sum_of(parts: Mapping[str, Tensor]) -> Tensor:
    total, *others = parts.values()
    for part in others:
        total = total + part
    return total
