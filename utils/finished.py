"""The nets of finished runs: the logits that were stored, and the weights for new images."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import build_model
from utils import UserError
from utils.collect import Record, damaged, read_object, read_runs, sha256
from utils.data import Dataset
from utils.runs import read_torch, write_json
from utils.tables import printable
from utils.teachers import load_teacher


class Net(NamedTuple):
    """In eval mode, and the mean and std that its inputs are normalised with."""

    net: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(eq=False)
class Subject:
    """A net that a finished run measured: its own of the best or last epoch, or its teacher.

    `owner` is the key of its part of the result: best, last or teacher.
    """

    record: Record
    owner: str
    title: str

    @property
    def measured(self) -> dict:
        return self.record.result[self.owner]

    @property
    def temperature(self) -> float:
        """The one fitted on the validation logits."""
        return self.measured["temperature"]

    @cached_property
    def val(self) -> tuple[Tensor, Tensor]:
        """Stored logits, float32 (N, K), and labels (N,) of the validation split."""
        return self.record.stored(self.owner, "val")

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """Stored logits, float32 (N, K), and labels (N,) of the test split."""
        return self.record.stored(self.owner, "test")

    def load(self, device: torch.device) -> Net:
        """The net itself. Raises UserError where its weights are gone or damaged."""
        net, mean, std = self.load_teacher() if self.owner == "teacher" else self.load_own()
        return Net(net.to(device), mean, std)

    def load_own(self) -> Net:
        path = self.record.folder / f"model_{self.owner}.pth"
        saved = read_torch(path, "copy it again or train the run again")
        try:
            net = build_model(saved["model"], saved["num_classes"])
            net.load_state_dict(saved["state_dict"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise damaged(path, str(error).splitlines()[0]) from None
        net.to(memory_format=torch.channels_last).eval()
        return Net(net, saved["mean"], saved["std"])

    def load_teacher(self) -> Net:
        """The student's teacher, from where its command found it; checked by its hash."""
        folder, result = self.record.folder, self.record.result
        given = self.record.config.get("arguments", {})
        facts = {name: result[name] for name in ("num_classes", "mean", "std", "fingerprint")}
        # What a teacher is checked against; its images are not needed.
        data = Dataset(result["dataset"], train=None, val=None, test=None, **facts)
        try:
            teacher = load_teacher(
                given.get("teacher_path", ""),
                data,
                result["split_seed"],
                model=given.get("teacher"),
                select=given.get("teacher_select", "best"),
                norm=given.get("teacher_norm"),
            )
        except UserError as error:
            raise UserError(
                f"{folder}: its teacher is not where its command found it ({error}); put it back, "
                "run in the folder where the student was trained, or leave out --with-teacher"
            ) from None
        if teacher.sha256 != self.measured["sha256"]:
            raise UserError(
                f"{folder}: {teacher.path} is no longer the teacher that it learned from; "
                "put that back or leave out --with-teacher"
            )
        return Net(teacher.net, teacher.mean, teacher.std)


def find_subjects(paths: Iterable[Path], epoch: str, with_teacher: bool) -> list[Subject]:
    """The nets of the "best" or "last" epoch of every finished run at or below `paths`.

    Each has its teacher below it where asked for; a teacher that several students share is there
    once. Prints a line for each run that is left out; raises UserError where none is finished.
    """
    records, apart = read_runs(list(paths))
    if not records:
        raise UserError(f"{apart[0].folder}: no finished run ({apart[0].state}); train it first")
    for one in apart:
        print(f"left out: {printable(one.folder)}, {one.state}")
    subjects, seen = [], set()
    for record, title in zip(records, titles(records), strict=True):
        subjects.append(Subject(record, epoch, title))
        teacher = record.result.get("teacher")
        key = teacher and (teacher["sha256"], record.result["fingerprint"])
        if with_teacher and teacher and key not in seen:
            seen.add(key)
            name = f"  teacher {teacher['model']} {teacher['label']}"
            subjects.append(Subject(record, "teacher", printable(name)))
    return subjects


def titles(records: list[Record]) -> list[str]:
    """Folders without the part that they share; of a single run its last two parts."""
    folders = [record.folder.resolve() for record in records]
    alone = len(folders) == 1
    shared = folders[0].parent.parent if alone else os.path.commonpath(folders)
    return [printable(folder.relative_to(shared)) for folder in folders]


def write_beside(record: Record, name: str, about: dict, measured: dict[str, dict]) -> Path:
    """Write a JSON file into the run folder, atomically; `measured` by owner (best, teacher, ...).

    What it held of other owners is kept where it came from the same predictions and `about` is the
    same.
    """
    path = record.folder / name
    about = {"predictions": sha256(record.predictions), **about}
    before = read_object(path) or {}
    same = all(before.get(key) == value for key, value in about.items())
    write_json(path, (before if same else {}) | about | measured)
    return path
