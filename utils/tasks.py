"""What is trained, and what it minimises: a batch in, a loss out, for teachers and students alike.

A task owns all that an optimiser changes and all that its loss keeps between steps. It does not own
a teacher, which answers and is never trained.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses import DistillationLoss, FeatureTerm, sum_of
from losses.classification import at_least_float32
from losses.distillation import Undefined
from utils.data import Dataset
from utils.data.views import Batch, normalise
from utils.teachers.answers import Answers
from utils.teachers.teacher import Teacher, cannot_teach


class StepOutput(NamedTuple):
    """What a task says of a batch."""

    loss: Tensor  # scalar: what the step minimises
    logits: Tensor  # (B, K) of the net that is trained, at least float32
    parts: dict[str, Tensor]  # scalars without a gradient: the loss' weighted terms, by name


class Task(nn.Module, ABC):
    """A net, its loss, and the normalisation of its inputs.

    Steps of one `variant` launch the same operations: a CUDA graph of one can replay the others.
    """

    variant: Hashable = None

    def __init__(self, net: nn.Module, loss: nn.Module, data: Dataset):
        super().__init__()
        self.net = net
        self.loss = loss
        self.mean = data.mean
        self.std = data.std

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """The loss of a batch, and what it is made of."""

    def logits(self, batch: Batch) -> Tensor:
        """The logits (B, K) of the net that is trained; at least float32, for the losses."""
        return at_least_float32(self.net(normalise(batch.images, self.mean, self.std)))

    def during_epoch(self, epoch: int) -> AbstractContextManager:
        """A context in which all steps of an epoch lie; the first epoch is 1."""
        return nullcontext()

    def after_validation(self, logits: Tensor, labels: Tensor) -> None:
        """After each epoch, in every process, with the whole validation split."""
        self.loss.after_validation(logits, labels)


class ClassificationTask(Task):
    """Learns the labels: how a teacher is trained, and a student's baseline.

    `loss` is a ClassificationLoss.
    """

    def forward(self, batch: Batch) -> StepOutput:
        logits = self.logits(batch)
        with full_precision(logits.device):
            return step_output(logits, batch, lambda labels: self.loss.parts(logits, labels))


class DistillationTask(Task):
    """Learns from a teacher, and from the labels.

    `answers` gives the teacher's logits of a batch before its temperature: it runs, or what it said
    to an earlier student is read. Raises UserError in a step where the loss has no value for
    classes that a teacher rules out. With `features` also from what lies within the teacher, which
    has to run then.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: DistillationLoss,
        teacher: Teacher,
        answers: Answers,
        data: Dataset,
        features: FeatureTerm | None = None,
    ):
        super().__init__(net, loss, data)
        self.teacher = teacher
        self.answers = answers
        self.features = features

    @property
    def variant(self) -> Hashable:
        return self.answers.reads_cache

    def forward(self, batch: Batch) -> StepOutput:
        if self.features is None:
            return self.output(batch, self.logits(batch), self.answers(batch))

        inputs = normalise(batch.images, self.mean, self.std)
        logits, maps = self.net(inputs, keep=self.features.student_layers)
        answer, teacher_maps = self.answers.logits_and_maps(batch, self.features.teacher_layers)
        # Once, also where images are mixed: it has no labels.
        with full_precision(logits.device):
            term = self.features(maps, teacher_maps)
        return self.output(batch, at_least_float32(logits), answer, term)

    def output(
        self, batch: Batch, logits: Tensor, answer: Tensor, term: Tensor | None = None
    ) -> StepOutput:
        """From both logits (B, K), and the term on features if there is one."""
        target = self.teacher.tempered(answer)

        def parts_of(labels: Tensor) -> dict[str, Tensor]:
            try:
                parts = self.loss.parts(logits, target, labels)
            except Undefined as undefined:
                raise cannot_teach(undefined) from undefined
            if term is not None:
                parts["features"] = term
            return parts

        with full_precision(logits.device):
            return step_output(logits, batch, parts_of)

    def during_epoch(self, epoch: int) -> AbstractContextManager:
        self.loss.before_epoch(epoch)
        return self.answers.during_epoch(epoch)


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast: nets run in half precision where that is wanted, losses never."""
    return torch.autocast(device.type, enabled=False)


def step_output(
    logits: Tensor, batch: Batch, parts_of: Callable[[Tensor], dict[str, Tensor]]
) -> StepOutput:
    """The sum of the loss' parts; where images are mixed, that of both labels by their shares.

    `parts_of` gives the parts for labels (B,). mixup's and CutMix's papers weigh the losses so.
    """
    parts = parts_of(batch.labels)
    loss = sum_of(parts)
    if batch.partners is not None:
        partner_parts = parts_of(batch.partners)
        loss = batch.share * loss + (1 - batch.share) * sum_of(partner_parts)
        parts = {
            name: batch.share * part + (1 - batch.share) * partner_parts[name]
            for name, part in parts.items()
        }
    return StepOutput(loss, logits, {name: part.detach() for name, part in parts.items()})
