"""Teacher logits on disk, so that a sweep of students runs its teacher once.

In eval mode a teacher is a function of the view, and an image has only 162 of them. A folder, named
after everything that its logits depend on, holds two kinds of files, each written once, atomically:

    seed=42_epoch=7_plan=5e6f7a8b_1a2b3c4d.bin    the logits of an epoch, in the order of its plan
    view=17_1a2b3c4d.bin                          those of all training images in one view

Runs with the same seed see the same views; `python -m scripts.cache_teacher` writes them all, for
any seed. Several teachers' joint logits are kept, before any temperature. A name tells the checksum
of the epoch's plan, and at its end that of the content: a damaged file is found and made anew. No
file is ever changed, so any number of runs may read and add at once, or only read.
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
from utils.data.views import PADDING, Batch, epoch_plan, view_numbers
from utils.files import atomic, make_folder
from utils.teachers import Teacher

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LogitFiles:
    """The files of one teacher, data set, split and precision."""

    def __init__(self, root: str, teacher: Teacher, data: Dataset, accelerator: Accelerator):
        precision, self.device = accelerator.mixed_precision, accelerator.device
        members = [member.identity for member in teacher.members]
        for said in members:  # what a net is called changes no logit
            del said["label"], said["seed"]
        key = {"members": members, "data": data.fingerprint, "split_seed": data.split_seed}
        key |= {"precision": precision, "device": self.device.type, "padding": PADDING}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(root, data.name, f"{teacher.model}_{digest}")
        make_folder(self.folder, "--teacher_cache")
        self.writable = os.access(self.folder, os.W_OK)
        self.shape, self.dtype = (len(data.train.labels), data.num_classes), DTYPES[precision]
        self.flip = data.flip
        # Each process sees a part of an epoch only.
        self.complete = accelerator.num_processes == 1
        self.sound: dict[str, np.memmap] = {}

    def write(self, name: str, logits: torch.Tensor) -> None:
        """Keep logits (N, K) under that name."""
        content = logits.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        with atomic(self.folder / f"{name}_{zlib.crc32(content):08x}.bin") as file:
            file.write(content)

    def rows(self, name: str, index=slice(None)) -> torch.Tensor:
        """Logits (len(index), K) of a name that the folder has."""
        return torch.from_numpy(np.array(self.sound[name][index])).view(self.dtype)

    def has(self, name: str) -> bool:
        """Map a file of the right size and checksum; remove one where they are not."""
        if name in self.sound:
            return True
        size = self.dtype.itemsize
        for path in self.folder.glob(f"{name}_*.bin"):
            # Another run has just removed it, or we may not.
            with suppress(FileNotFoundError, PermissionError):
                if path.stat().st_size == math.prod(self.shape) * size:
                    # As whole numbers, for NumPy has no bfloat16.
                    mapped = np.memmap(path, f"i{size}", "r", shape=self.shape)
                    if path.stem.endswith(f"_{zlib.crc32(mapped):08x}"):
                        self.sound[name] = mapped
                        return True
                tqdm.write(f"{path} is damaged: removed, and computed anew")
                path.unlink()
        return False

    def epoch(self, name: str, plan: torch.Tensor) -> torch.Tensor | None:
        """Logits of an epoch in the order of its plan; None unless it or all views are there."""
        if self.has(name):
            return self.rows(name)
        if not all(self.has(f"view={view}") for view in view_numbers(self.flip)):
            return None
        (order, views), logits = plan, torch.empty(self.shape, dtype=self.dtype)
        for view in view_numbers(self.flip):
            places = views == view
            logits[places] = self.rows(f"view={view}", order[places].numpy())
        return logits


class CachedTeacher:
    """Teacher logits of a batch: from the files where they have its epoch, else computed and kept.

    Every step of an epoch lies within `with cached.epoch(number):`.
    """

    def __init__(self, forward: Callable[[Batch], torch.Tensor], files: LogitFiles, seed: int):
        self.forward, self.files, self.seed = forward, files, seed
        # Of one epoch, in the order of its plan; a captured step needs it in the same place always.
        self.logits = torch.empty(files.shape, dtype=files.dtype, device=files.device)
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
        files = self.files
        plan = epoch_plan(files.shape[0], self.seed, epoch, files.flip)
        name = f"seed={self.seed}_epoch={epoch}_plan={zlib.crc32(plan.numpy()):08x}"
        logits = files.epoch(name, plan)
        self.known = logits is not None
        if self.known:
            self.logits.copy_(logits)
        yield self.known
        if not self.known and files.complete:
            if files.writable:
                files.write(name, self.logits)
            else:
                tqdm.write(f"{files.folder}: no permission to keep epoch {epoch} there")
