"""Runs read from their folders: finished ones as records, the others with the reason."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils import UserError
from utils.data import open_npz

MARKS = {"result.json", "config.json", ".lock"}  # any of them makes a run folder
NEEDED = {
    **{"model": str, "dataset": str, "fingerprint": str, "loss": str, "label": str},
    **{"num_classes": int, "seed": int, "loss_parameters": dict, "settings": dict},
}
MEASURED = {"val": dict, "test": dict, "temperature": float, "temperature_at_bound": bool}
WAYS = ("raw", "scaled")
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


def is_complete(result: dict | None) -> bool:
    """Whether it is a result of ours: holds all that is read from it here, each of its type."""
    parts = {"best", "last", "teacher"} if result and "teacher" in result else {"best", "last"}
    return holds(result, NEEDED) and all(
        holds(result.get(part), MEASURED)
        and all(map(are_metrics, (result[part]["val"], *map(result[part]["test"].get, WAYS))))
        for part in parts
    )


def holds(content, kinds: dict[str, type]) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(name), kind) for name, kind in kinds.items()
    )


def are_metrics(content) -> bool:
    return holds(content, dict.fromkeys(USED, float)) and all(
        isinstance(value, (int, float)) for value in content.values()
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


def damaged(path: Path, error: Exception | str) -> UserError:
    return UserError(f"{path} cannot be read ({error}); copy it again or take its run away")


def is_locked(lock: Path) -> bool:
    """Whether a process of this machine holds it. Trying to lock could turn a starting run away."""
    table = Path("/proc/locks")
    if not (lock.exists() and table.exists()):
        return False
    return re.search(rf"FLOCK .*:{lock.stat().st_ino} ", table.read_text()) is not None
