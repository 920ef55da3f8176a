"""Runs read from their folders: finished ones as records, the others with the reason."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from utils import UserError

MARKS = {"result.json", "config.json", ".lock"}  # any of them makes a run folder
NEEDED = {"model", "dataset", "loss", "label", "loss_parameters", "seed", "settings"}

USED = {"top1", "ece", "nll"}  # of the metrics, wherever the others are


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

    def posthoc(self, epoch: str) -> dict[str, dict]:
        """Further ways of calibration that scripts/posthoc.py has written beside the run.

        None where the predictions have changed since. Raw and scaled are in the result itself.
        """
        written = read_object(self.folder / "posthoc.json") or {}
        path = self.folder / "predictions.npz"
        if not path.is_file() or written.get("predictions") != sha256(path):
            return {}
        methods = written.get("teacher" if self.borrowed else epoch, {})
        return {way: methods[way] for way in methods.keys() - {"none", "temperature"}}

    def probabilities(self, epoch: str, way: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Of the test split: softmax (N, K) in float64 and labels (N,); None without the file."""
        path = self.folder / "predictions.npz"
        if not path.is_file():
            return None
        owner = "teacher" if self.borrowed else epoch
        try:
            with np.load(path) as arrays:
                logits, labels = arrays[f"{owner}_test_logits"], arrays["test_labels"]
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise damaged(path, error) from None
        temperature = self.measured(epoch)["temperature"] if way == "scaled" else 1.0
        return (torch.from_numpy(logits).double() / temperature).softmax(dim=1).numpy(), labels

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
        names = [result["dataset"], result.get("fingerprint"), result["model"], result["label"]]
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
        if not root.is_dir():
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


def is_complete(result: dict | None) -> bool:
    """Whether it is a result of ours: holds all that is read from it here."""
    return (
        result is not None
        and result.keys() >= NEEDED
        and all(
            isinstance(result.get(epoch), dict)
            and result[epoch].keys() >= {"val", "test", "temperature", "temperature_at_bound"}
            and all(result[epoch]["test"].get(way, {}).keys() >= USED for way in ("raw", "scaled"))
            for epoch in ("best", "last")
        )
    )


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_history(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line]
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({error}); copy it again or take its run away")


def is_locked(lock: Path) -> bool:
    """Whether a process of this machine holds it. Trying to lock could turn a starting run away."""
    table = Path("/proc/locks")
    if not (lock.exists() and table.exists()):
        return False
    return re.search(rf"FLOCK .*:{lock.stat().st_ino} ", table.read_text()) is not None
