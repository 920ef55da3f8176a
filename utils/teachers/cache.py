"""Teacher logits on disk, so that a sweep of students runs its teacher once.

In eval mode a teacher is a function of the view, and an image has only 162 of them. A folder, named
after everything that its logits depend on, holds two kinds of files, each written once, atomically:

    resnet56_TEACHER_torch=2.14.1_threads=2_ARITHMETIC/
    seed=42_epoch=7_plan=5e6f7a8b_1a2b3c4d.bin    the logits of an epoch, in the order of its plan
    view=17_1a2b3c4d.bin                          those of all training images in one view

Runs with the same seed see the same views; `python -m scripts.cache_teacher` writes them all, for
any seed. Several teachers' joint logits are kept, before any temperature. A name tells the checksum
of the epoch's plan, and at its end that of the content: a damaged file is found and made anew. No
file is ever changed, so any number of runs may read and add at once, or only read.

TEACHER is a digest of weights, data, split and precision; ARITHMETIC one of what the last bits of a
logit depend on besides. On a CPU these are torch, the processor, the number of threads and whether
batch norms are folded; and because no list is complete, the very bits of some logits. On a GPU,
whose bits may differ from run to run, its generation stands for the processor, and no bits are
compared.

The cache is a help: where nothing can be kept (a full disk, no permission), one line says so, and
the student goes on.
"""

import errno
import hashlib
import json
import math
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from utils.data import Dataset
from utils.data.views import PADDING, view_numbers
from utils.evaluation import DTYPES
from utils.program import RunFailed, UserError
from utils.program.environment import processor
from utils.program.errors import is_first
from utils.program.files import atomic, make_folder
from utils.teachers.nets import PIECE, NetTeacher

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def digest_of(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def teacher_facts(teacher: NetTeacher, data: Dataset, precision: str, device: torch.device) -> dict:
    """What its logits of the training images are a function of, ready for JSON."""
    members = []
    for member in teacher.members:
        identity = member.identity
        del identity["label"], identity["seed"]  # what a net is called changes no logit
        members.append(identity)
    return {
        "members": members,
        "data": data.fingerprint,
        "split_seed": data.split_seed,
        "precision": precision,
        "device": device.type,
        "padding": PADDING,
    }


def probe(teacher: NetTeacher, data: Dataset, precision: str) -> torch.Tensor:
    """Logits (64, K) of the first training images on the CPU, computed as in a student's step."""
    images = data.train.images[:PIECE].cpu()
    half = torch.autocast("cpu", DTYPES[precision], enabled=precision != "no")
    with torch.inference_mode(), half:
        return teacher.logits(images)


def arithmetic_facts(
    teacher: NetTeacher, device: torch.device, probe_logits: torch.Tensor | None
) -> dict:
    """What a logit's last bits depend on besides, ready for JSON; `probe_logits`: on a CPU."""
    facts = {
        "torch": torch.__version__,
        "folded": [member.folded for member in teacher.members],
    }
    if probe_logits is not None:
        facts["threads"] = torch.get_num_threads()
        facts["processor"] = processor()
        bits = probe_logits.contiguous().view(torch.uint8).numpy().tobytes()
        facts["logits"] = hashlib.sha256(bits).hexdigest()
    elif torch.cuda.is_available():
        facts["processor"] = torch.cuda.get_device_capability(device)
    return facts


def open_cache(
    root: str | Path, teacher: NetTeacher, data: Dataset, accelerator: Accelerator
) -> "LogitFiles":
    """The files of a teacher's logits, in a folder below --teacher_cache that is made if missing.

    On a CPU the teacher is run on a few images. Says where logits of its own lie that are not read.
    Raises UserError where `root` is no folder and cannot become one.
    """
    precision = accelerator.mixed_precision
    device = accelerator.device
    probe_logits = probe(teacher, data, precision) if device.type == "cpu" else None
    facts = teacher_facts(teacher, data, precision, device)
    teacher_name = f"{teacher.model}_{digest_of(facts)}"
    arithmetic = arithmetic_facts(teacher, device, probe_logits)
    threads = f"_threads={arithmetic['threads']}" if "threads" in arithmetic else ""
    folder = Path(
        root,
        data.name,
        f"{teacher_name}_torch={arithmetic['torch']}{threads}_{digest_of(arithmetic)}",
    )

    say_what_is_not_read(folder, teacher_name)
    return LogitFiles(
        folder,
        fault=fault_of_folder(folder),
        shape=(len(data.train.labels), data.num_classes),
        # On a CPU the bits are kept as they are: a net may leave autocast before its end.
        dtype=DTYPES[precision] if probe_logits is None else probe_logits.dtype,
        flip=data.flip,
    )


def say_what_is_not_read(folder: Path, teacher_name: str) -> None:
    """A line where this teacher's logits lie in other folders alone."""
    if folder.exists():
        return
    older = sorted(path.name for path in folder.parent.glob(f"{teacher_name}*"))
    if older and is_first():
        tqdm.write(
            f"--teacher_cache: this teacher's logits in {', '.join(older)} (in "
            f"{folder.parent}) are not read. They were made by another version of torch "
            "or of this program, with another number of threads or on another processor, and "
            f"would differ in their last bits from those of {folder.name}. Delete what "
            "you do not need"
        )


def fault_of_folder(folder: Path) -> str | None:
    """Make the folder; None, or why nothing can be kept in it.

    Raises UserError where --teacher_cache is no folder and cannot become one.
    """
    try:
        make_folder(folder, "--teacher_cache")
    except UserError as error:
        reason = error.__cause__  # make_folder's OSError
        root_exists = os.path.isdir(folder.parents[1])
        if not root_exists and reason.errno not in DISK_FULL:
            raise
        return reason.strerror
    return None if os.access(folder, os.W_OK) else "no permission"


class LogitFiles:
    """The files of one teacher, data set, split, precision and arithmetic, in a folder of theirs.

    Each holds, under its name, logits of one `shape` (N, K) and `dtype`. `fault`: why nothing can
    be kept there, or None. `flip`: whether all views of an image are 162, or 81 without a flip.
    """

    def __init__(
        self,
        folder: Path,
        fault: str | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
        flip: bool,
    ):
        self.folder = folder
        self.fault = fault
        self.shape = shape
        self.dtype = dtype
        self.flip = flip
        self.given_up = False  # whether `keep` has said that it keeps no more
        self.verified: dict[str, np.memmap] = {}  # by name, those whose checksum was found right

    def keep(self, name: str, logits: torch.Tensor) -> None:
        """`write` for a run that can do without: where it fails, say so once, and keep no more."""
        if self.given_up:
            return
        fault = self.fault or self.fault_of_writing(name, logits)
        if fault is None:
            return
        self.given_up = True
        tqdm.write(
            f"--teacher_cache: {name} cannot be kept in {self.folder}: {fault}. The run goes "
            "on without: what is not there is computed, and no more is kept"
        )

    def fault_of_writing(self, name: str, logits: torch.Tensor) -> str | None:
        """`write`; None, or why the disk does not take it."""
        try:
            self.write(name, logits)
        except RunFailed as failure:
            return failure.__cause__.strerror  # of the OSError
        return None

    def write(self, name: str, logits: torch.Tensor) -> None:
        """Keep logits (N, K) under that name. Raises RunFailed where the disk does not take it."""
        content = logits.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        with atomic(self.folder / f"{name}_{zlib.crc32(content):08x}.bin") as file:
            file.write(content)

    def rows(self, name: str, index=slice(None)) -> torch.Tensor:
        """Logits (len(index), K) of a name that the folder has."""
        return torch.from_numpy(np.array(self.verified[name][index])).view(self.dtype)

    def verify(self, name: str) -> bool:
        """Whether its logits can be read. Removes a file of the wrong size or checksum, says so."""
        if name in self.verified:
            return True
        for path in self.folder.glob(f"{name}_*.bin"):
            try:
                mapped = self.memory_map(path)
            except FileNotFoundError:  # another run has just removed it
                continue
            except OSError as error:
                tqdm.write(f"{path} cannot be read ({error.strerror}): computed anew")
                continue
            if mapped is not None:
                self.verified[name] = mapped
                return True
            with suppress(OSError):  # removed by another run, or we may not
                path.unlink()
            state = "not removed" if path.exists() else "removed"
            tqdm.write(f"{path} is damaged: {state}, and computed anew")
        return False

    def memory_map(self, path: Path) -> np.memmap | None:
        """What a file holds; None where its size or its checksum is wrong. Raises OSError."""
        size = self.dtype.itemsize
        if path.stat().st_size != math.prod(self.shape) * size:
            return None
        # As whole numbers, for NumPy has no bfloat16.
        mapped = np.memmap(path, f"i{size}", "r", shape=self.shape)
        return mapped if path.stem.endswith(f"_{zlib.crc32(mapped):08x}") else None

    def epoch_logits(self, name: str, plan: torch.Tensor) -> torch.Tensor | None:
        """Logits of an epoch in the order of its plan; None unless it or all views are there."""
        if self.verify(name):
            return self.rows(name)
        if not all(self.verify(f"view={view}") for view in view_numbers(self.flip)):
            return None
        order, views = plan
        logits = torch.empty(self.shape, dtype=self.dtype)
        for view in view_numbers(self.flip):
            places = views == view
            logits[places] = self.rows(f"view={view}", order[places].numpy())
        return logits
