"""Runs read from their folders: finished ones as records, the others with the reason."""

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import build_model
from utils.data import Dataset
from utils.data.npz import open_npz
from utils.files import read_torch, sha256, write_json
from utils.program import UserError
from utils.runs import is_complete
from utils.tables import printable
from utils.teachers import teacher_of

MARKS = {"result.json", "config.json", ".lock"}  # any of them makes a run folder


@dataclass(eq=False)
class Record:
    """One finished run; `borrowed`: a teacher that is known only from its student's folder."""

    folder: Path
    result: dict
    config: dict
    borrowed: bool = False
    teacher: "Record | None" = None

    def measured(self, epoch: str) -> dict:
        """What the result holds of the "best" or "last" epoch."""
        return self.result["teacher" if self.borrowed else epoch]

    def metrics(self, epoch: str, way: str) -> dict[str, float]:
        """Fractions. `way`: raw, scaled or one of `posthoc`, on test; val: raw, on validation."""
        measured = self.measured(epoch)
        if way in measured["test"]:
            return measured["test"][way]
        return measured["val"] if way == "val" else self.posthoc(epoch)[way]["test"]

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.npz"

    @cached_property
    def written(self) -> dict:
        """What scripts/posthoc.py wrote beside the run; empty if the predictions changed since."""
        found = read_object(self.folder / "posthoc.json") or {}
        known = self.predictions.is_file() and found.get("predictions") == sha256(self.predictions)
        return found if known else {}

    def posthoc(self, epoch: str) -> dict[str, dict]:
        """Further ways of calibration; raw and scaled are in the result itself."""
        methods = self.written.get("teacher" if self.borrowed else epoch, {})
        return {way: methods[way] for way in methods if way not in ("none", "temperature")}

    def stored(self, owner: str, split: str) -> tuple[Tensor, Tensor]:
        """Logits, float32 (N, K), and labels (N,), of predictions.npz. Raises UserError.

        `owner`: best, last or teacher; `split`: val or test.
        """
        try:
            with open_npz(self.predictions) as arrays:
                logits, labels = arrays[f"{owner}_{split}_logits"], arrays[f"{split}_labels"]
        # Any exception: damaged archives raise a dozen kinds, and each means the same to the user.
        except Exception as error:
            raise damaged(self.predictions, error) from None
        fits = logits.shape == (len(labels), self.result["num_classes"]) and len(labels) > 0
        if not fits or not np.isfinite(logits).all():
            fault = f"{split} logits of shape {logits.shape}, or not finite"
            raise damaged(self.predictions, fault)
        return torch.from_numpy(logits), torch.from_numpy(labels)

    def probabilities(self, epoch: str, way: str) -> tuple[Tensor, Tensor] | None:
        """Of the test split: softmax, float64 (N, K), and labels (N,); None without the file."""
        if not self.predictions.is_file():
            return None
        logits, labels = self.stored("teacher" if self.borrowed else epoch, "test")
        temperature = self.measured(epoch)["temperature"] if way == "scaled" else 1.0
        return (logits.double() / temperature).softmax(dim=1), labels

    def history(self) -> list[dict]:
        """The records of its epochs; none of a borrowed teacher."""
        return [] if self.borrowed else read_history(self.folder)

    @property
    def exp_name(self) -> str | None:
        return self.config.get("arguments", {}).get("exp_name")

    @property
    def seeds(self) -> tuple:
        """What tells it from the other runs of its group."""
        if self.borrowed:
            return self.result["seed"], self.result["teacher"]["sha256"]
        return self.result["seed"], self.teacher and self.teacher.seeds

    @cached_property
    def weights(self) -> set[str]:
        """SHA-256 of the files that it can teach from."""
        files = [self.folder / f"model_{which}.pth" for which in ("best", "last")]
        return {sha256(file) for file in files if file.is_file()}

    @cached_property
    def key(self) -> str:
        """Equal for runs that differ only in the seed, their own and their teacher's."""
        result, settings = self.result, self.result["settings"]
        rest = {name: settings[name] for name in settings.keys() - {"seed", "teacher"}}
        names = [result[name] for name in ("dataset", "fingerprint", "model", "label")]
        teacher = self.teacher and self.teacher.key
        return json.dumps([names, self.exp_name, rest, teacher], sort_keys=True)


@dataclass
class Apart:
    """A run that is in no table: why, how many epochs it has done, the last line of its log."""

    folder: Path
    state: str
    progress: str = ""
    last_line: str = ""


def read_runs(roots: list[Path]) -> tuple[list[Record], list[Apart]]:
    """Every run below `roots`. Raises UserError where a root is no folder or holds no run."""
    folders: dict[Path, Path] = {}
    for root in roots:
        if not os.path.isdir(root):  # Path.is_dir raises for a name too long
            raise UserError(f"{root}: no such folder; name a --checkpoint folder or a run folder")
        found = [Path(folder) for folder, _, files in os.walk(root) if MARKS & set(files)]
        if not found:
            raise UserError(f"{root}: no run below it; name a --checkpoint folder or a run folder")
        for folder in found:  # once each, though roots may overlap
            folders.setdefault(folder.resolve(), folder)
    runs = [read_run(folder) for _, folder in sorted(folders.items())]
    finished = [run for run in runs if isinstance(run, Record)]
    return finished, [run for run in runs if isinstance(run, Apart)]


def read_run(folder: Path) -> Record | Apart:
    config = read_object(folder / "config.json") or {}
    result = read_object(folder / "result.json")
    if is_complete(result):
        return Record(folder, result, config)
    state = "running" if is_locked(folder / ".lock") else "stopped"
    if (folder / "result.json").exists():
        state = "result.json is damaged"
    epochs = config.get("settings", {}).get("epochs", "?")
    log = folder / "train_log.txt"
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Apart(folder, state, f"{len(read_history(folder))}/{epochs}", last_line)


def read_object(path: Path) -> dict | None:
    """A JSON object; None where the file is absent or holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_history(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line]
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception | str) -> UserError:
    return UserError(f"{path} cannot be read ({error}); copy it again or take its run away")


def is_locked(lock: Path) -> bool:
    """Whether a process of this machine holds it. Trying to lock could turn a starting run away."""
    table = Path("/proc/locks")
    if not (lock.exists() and table.exists()):
        return False
    return re.search(rf"FLOCK .*:{lock.stat().st_ino} ", table.read_text()) is not None


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
        names = ("path", "loss", "select", "norm", "key", "size", "temperature")
        flags = {"teacher": None} | {f"teacher_{name}": None for name in names}
        flags |= {"teacher_select": "best", "teacher_temperature": 1.0, **given}
        for name in ("teacher", "teacher_path"):  # one, in runs from before there were several
            flags[name] = [flags[name]] if isinstance(flags[name], str) else flags[name]
        try:
            teacher = teacher_of(Namespace(**flags | {"split_seed": result["split_seed"]}), data)
        except UserError as error:
            raise UserError(
                f"{folder}: its teacher is not where its command found it ({error}); put it back, "
                "run in the folder where the student was trained, or leave out --with-teacher"
            ) from None
        if teacher.identity["sha256"] != self.measured["sha256"]:
            raise UserError(
                f"{folder}: {given['teacher_path']} is no longer what it learned from; "
                "put that back or leave out --with-teacher"
            )
        (member,) = teacher.members
        return Net(member.net, member.mean, member.std)


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
