"""What a step minimises: the function that turns a batch into a loss, for teachers and students."""

from contextlib import nullcontext

from accelerate import Accelerator
from torch import Tensor, nn

from losses.distillation import Undefined
from utils.data import Dataset
from utils.data.mixing import mixed_loss
from utils.data.views import Batch
from utils.program import UserError
from utils.teacher_cache import CachedTeacher, LogitFiles
from utils.teachers import Teacher


class Objective(nn.Module):
    """A loss of logits and labels. What it learns while training is saved with the run."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits (B, K) of the net that is trained -> scalar."""
        return mixed_loss(lambda labels: self.loss(logits, labels), batch)

    def epoch(self, epoch: int):
        """A context around the epoch's steps; gives their kind: those of one kind launch alike."""
        return nullcontext()

    def after_validation(self, logits: Tensor, labels: Tensor) -> None:
        self.loss.after_validation(logits, labels)


class Distillation(Objective):
    """The teacher is asked about every image, or its answers are read from the cache."""

    def __init__(
        self, loss, teacher: Teacher, data: Dataset, accelerator: Accelerator, seed: int, cache=None
    ):
        super().__init__(loss)
        self.teacher = teacher

        def teach(batch: Batch) -> Tensor:
            with accelerator.autocast():
                return teacher.logits(batch.images)

        files = cache and LogitFiles(cache, teacher, data, accelerator)
        self.cached = CachedTeacher(teach, files, seed) if files else None
        self.teach = self.cached or teach

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        target = self.teacher.tempered(self.teach(batch))
        return mixed_loss(lambda labels: self.of_target(logits, target, labels), batch)

    def of_target(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """The loss of the student's logits and what it learns from (B, K).

        Raises UserError where it has no value, as for classes that a teacher rules out.
        """
        try:
            return self.loss(logits, target, labels)
        except Undefined as undefined:
            raise UserError(
                f"--distill: {undefined}; give --distill KD or another teacher"
            ) from undefined

    def epoch(self, epoch: int):
        self.loss.before_epoch(epoch)
        return self.cached.epoch(epoch) if self.cached else nullcontext()
