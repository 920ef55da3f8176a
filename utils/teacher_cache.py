"""Teacher logits on disk, so that a sweep of students runs its teacher once.

In eval mode a teacher is a function of the view, and an image has only 162 of them. A folder, named
after everything that its logits depend on, holds two kinds of files, each written once, atomically:

    seed=42_epoch=7_plan=5e6f7a8b_1a2b3c4d.bin    the logits of an epoch, in the order of its plan
    view=17_1a2b3c4d.bin                          those of all training images in one view

Runs with the same seed see the same views, so a T x Lambda grid, any student and any learning rate
find every epoch of the first run; `python -m scripts.cache_teacher` writes all views, which serve
any seed. Several teachers cost once what one does: their joint logits are kept, and without a
temperature, so that all temperatures share them. A name tells the checksum of the epoch's plan, and
at its end that of the content: a damaged file is found and made anew. Files are never changed, so
any number of runs may read and add at once; a cache that one may not write to is read.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from utils.data import Dataset
from utils.data.views import NUM_VIEWS, Batch, epoch_plan, take_views, view_windows
from utils.files import atomic, unmade_on_failure, write_json
from utils.program import UserError
from utils.teachers import Teacher

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LogitFiles:
    """The files of one teacher, data set, split and precision."""

    def __init__(self, root: str, teacher: Teacher, data: Dataset, accelerator: Accelerator):
        precision = accelerator.mixed_precision
        if precision not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(f"--teacher_cache: no logits in {precision} precision; use {known}")
        members = [member.identity for member in teacher.members]
        for said in members:  # what a net is called changes no logit
            del said["label"], said["seed"]
        key = {"members": members, "data": data.fingerprint, "split_seed": data.split_seed}
        key |= {"precision": precision, "device": accelerator.device.type, "views": views_hash()}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(root, data.name, f"{teacher.model}_{digest}")
        try:
            with unmade_on_failure(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--teacher_cache {root}: {error.strerror}; name a folder") from None
        self.writable = os.access(self.folder, os.W_OK)
        if self.writable:
            write_json(self.folder / "key.json", key)
        self.images, self.classes = len(data.train.labels), data.num_classes
        self.dtype, self.device = DTYPES[precision], accelerator.device
        # Each process sees a part of an epoch only.
        self.complete = accelerator.num_processes == 1
        self.sound: dict[str, np.memmap] = {}

    @property
    def size(self) -> int:
        """Bytes in the folder."""
        return sum(path.stat().st_size for path in self.folder.glob("*.bin"))

    def write(self, name: str, logits: torch.Tensor) -> None:
        """Keep logits (N, K) under that name."""
        content = logits.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        with atomic(self.folder / f"{name}_{zlib.crc32(content):08x}.bin") as file:
            file.write(content)

    def has(self, name: str) -> bool:
        return name in self.sound or self.find(name)

    def rows(self, name: str, index=slice(None)) -> torch.Tensor:
        """Logits (len(index), K) of a name that the folder has."""
        content = np.array(self.sound[name][index])
        return torch.from_numpy(content).view(self.dtype)

    def find(self, name: str) -> bool:
        """Map a file of the right size and checksum; remove one where they are not."""
        shape, size = (self.images, self.classes), self.dtype.itemsize
        for path in self.folder.glob(f"{name}_*.bin"):
            # Another run has just removed it, or we may not.
            with suppress(FileNotFoundError, PermissionError):
                if path.stat().st_size == math.prod(shape) * size:
                    mapped = np.memmap(path, f"i{size}", "r", shape=shape)  # NumPy has no bfloat16
                    if path.stem.endswith(f"_{zlib.crc32(mapped):08x}"):
                        self.sound[name] = mapped
                        return True
                tqdm.write(f"{path} is damaged: removed, and computed anew")
                path.unlink()
        return False


class CachedTeacher:
    """Teacher logits of a batch: from the files where they have its epoch, else computed and kept.

    Every step of an epoch lies within `with cached.epoch(number):`.
    """

    def __init__(self, forward: Callable[[Batch], torch.Tensor], files: LogitFiles, seed: int):
        self.forward, self.files, self.seed = forward, files, seed
        # Of one epoch, in the order of its plan; a captured step needs it in the same place always.
        shape = (files.images, files.classes)
        self.logits = torch.empty(shape, dtype=files.dtype, device=files.device)
        self.known = False

    def __call__(self, batch: Batch) -> torch.Tensor:
        if self.known:
            return self.logits[batch.places]
        logits = self.forward(batch).to(self.logits.dtype)
        self.logits.index_copy_(0, batch.places, logits)
        return logits

    @contextmanager
    def epoch(self, epoch: int):
        """Bring the logits of the whole epoch to the device, or keep them at its end.

        Yields whether they were known, so that the teacher does not run.
        """
        order, views = epoch_plan(self.files.images, self.seed, epoch)
        plan = zlib.crc32(torch.stack([order, views]).numpy())
        name = f"seed={self.seed}_epoch={epoch}_plan={plan:08x}"
        logits = self.files.rows(name) if self.files.has(name) else self.from_views(order, views)
        self.known = logits is not None
        if self.known:
            self.logits.copy_(logits)
        yield self.known
        if not self.known and self.files.complete:
            if self.files.writable:
                self.files.write(name, self.logits)
            else:
                tqdm.write(f"{self.files.folder}: no permission to keep epoch {epoch} there")

    def from_views(self, order: torch.Tensor, views: torch.Tensor) -> torch.Tensor | None:
        """The logits of an epoch from those of all views; None where a view is not there."""
        names = [view_name(view) for view in range(NUM_VIEWS)]
        if not all(map(self.files.has, names)):
            return None
        logits = torch.empty(self.files.images, self.files.classes, dtype=self.files.dtype)
        for view, name in enumerate(names):
            places = views == view
            logits[places] = self.files.rows(name, order[places].numpy())
        return logits


def view_name(view: int) -> str:
    return f"view={view}"


def views_hash() -> str:
    """Of what the views make of a small image: padding, positions and their numbers."""
    windows = view_windows(torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8))
    pixels = take_views(windows, torch.zeros(NUM_VIEWS, dtype=int), torch.arange(NUM_VIEWS))
    return hashlib.sha256(pixels.contiguous().numpy()).hexdigest()
