"""What a teacher says of a batch: it runs, or what it said before is read."""

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.data import Dataset
from utils.data.views import Batch, epoch_plan
from utils.teachers.cache import LogitFiles, open_cache
from utils.teachers.nets import NetTeacher
from utils.teachers.stored import StoredTeacher


class Answers(Protocol):
    """A teacher's logits (B, K) of a batch, before its temperature.

    Steps in which it `reads_cache` launch other operations than those in which the teacher runs.
    Every step of an epoch lies within `with answers.during_epoch(number):`.
    """

    reads_cache: bool

    def __call__(self, batch: Batch) -> Tensor: ...

    def during_epoch(self, epoch: int) -> AbstractContextManager: ...


class LiveAnswers:
    """Its nets run, and see each image in the view that its student sees."""

    reads_cache = False

    def __init__(self, teacher: NetTeacher, accelerator: Accelerator):
        self.teacher = teacher
        self.accelerator = accelerator

    def __call__(self, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            return self.teacher.logits(batch.images)

    def logits_and_maps(
        self, batch: Batch, layers: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits as above, and maps by the names of the teacher's layers; no cache keeps these."""
        with self.accelerator.autocast():
            return self.teacher.logits_and_maps(batch.images, layers)

    def during_epoch(self, epoch: int) -> AbstractContextManager:
        return nullcontext()


class CachedAnswers:
    """From files where these have an epoch; else its nets run, and what they say is kept."""

    def __init__(self, live: LiveAnswers, files: LogitFiles, accelerator: Accelerator, seed: int):
        self.live = live
        self.files = files
        self.seed = seed
        # Of several processes each sees a part of an epoch.
        self.sees_whole_epochs = accelerator.num_processes == 1
        # Of one epoch, in the order of its plan; a captured step needs it in the same place always.
        self.logits = torch.empty(files.shape, dtype=files.dtype, device=accelerator.device)
        self.reads_cache = False

    def __call__(self, batch: Batch) -> Tensor:
        if self.reads_cache:
            return self.logits[batch.places]
        logits = self.live(batch).to(self.logits.dtype)
        self.logits.index_copy_(0, batch.places, logits)
        return logits

    @contextmanager
    def during_epoch(self, epoch: int):
        """Bring the logits of the whole epoch to the device, or keep them at its end."""
        files = self.files
        plan = epoch_plan(files.shape[0], self.seed, epoch, files.flip)
        name = f"seed={self.seed}_epoch={epoch}_plan={zlib.crc32(plan.numpy()):08x}"
        logits = files.epoch_logits(name, plan)
        self.reads_cache = logits is not None
        if self.reads_cache:
            self.logits.copy_(logits)
        yield
        if not self.reads_cache and self.sees_whole_epochs:
            files.keep(name, self.logits)


class StoredAnswers:
    """From the file that this teacher is; brought to the device by the epoch."""

    reads_cache = True

    def __init__(self, teacher: StoredTeacher, data: Dataset, accelerator: Accelerator, seed: int):
        self.teacher = teacher
        self.seed = seed
        self.flip = data.flip
        # Of one epoch, in the order of its plan; a captured step needs it in the same place always.
        shape = teacher.training.shape[1:]
        self.logits = torch.empty(shape, dtype=torch.float32, device=accelerator.device)

    def __call__(self, batch: Batch) -> Tensor:
        return self.logits[batch.places]

    @contextmanager
    def during_epoch(self, epoch: int):
        order, views = epoch_plan(len(self.logits), self.seed, epoch, self.flip)
        self.logits.copy_(self.teacher.epoch_logits(epoch, order, views))
        yield


def answers_of(
    teacher: NetTeacher,
    data: Dataset,
    accelerator: Accelerator,
    seed: int,
    cache: str | None = None,
) -> Answers:
    """Those of nets, with the folder `cache` for their logits if one is named.

    Raises UserError where no cache can be made there.
    """
    live = LiveAnswers(teacher, accelerator)
    if cache is None:
        return live
    files = open_cache(cache, teacher, data, accelerator)
    return CachedAnswers(live, files, accelerator, seed=seed)
