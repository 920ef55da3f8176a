"""Runs read from their folders: finished ones as records, the others with the reason.

Run folders may also lie in a .zip file, where zipfile.Path reads them as pathlib.Path does.
"""

import hashlib
import io
import json
import math
import os
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import build_model
from utils.data import Dataset
from utils.data.views import normalise
from utils.files import files_below, one_line, open_npz, read_torch, safe_name, sha256, write_json
from utils.program import UserError
from utils.runs import is_complete, number_text
from utils.tables import printable
from utils.teachers import Teacher, teacher_of

LOGITS = ("raw", "scaled")
MARKS = ("result.json", "config.json", ".lock")  # any of them makes a run folder


@dataclass(eq=False)
class Record:
    """One finished run; `borrowed`: a teacher that is known only from its student's folder."""

    folder: Path
    result: dict
    config: dict
    borrowed: bool = False
    teacher: "Record | None" = None

    def __post_init__(self):
        """Touch what is later taken for granted: what is absent or of another type fails here."""
        result = self.result
        parameters = (f"{key}={number_text(x)}" for key, x in result["loss_parameters"].items())
        self.name = " ".join([result["model"], result["loss"], *parameters])
        safe_name(result["label"] + result["dataset"] + result["fingerprint"])
        hash(result["seed"])
        exp_name = self.config.get("arguments", {}).get("exp_name")
        self.exp_name = exp_name and str(exp_name)
        self.settings: dict = result["settings"]
        for owner in ("teacher",) if self.borrowed else ("best", "last"):
            measured = result[owner]
            float(measured["temperature"] + measured["temperature_at_bound"])
            for metrics in (measured["val"], *map(measured["test"].get, LOGITS)):
                math.fsum([metrics["top1"], metrics["ece"], *metrics.values()])
        self.taught_by = self.borrow_teacher() if self.settings.get("teacher") else None
        self.predictions = self.folder / "predictions.npz"

    def borrow_teacher(self) -> "Record":
        """The teacher as this run describes it. A third party's file stands for itself."""
        teacher = self.result["teacher"]
        settings = {name: teacher[name] for name in ("mean", "std")}
        if teacher["seed"] is None:
            settings["sha256"] = teacher["sha256"]
        own = {name: teacher[name] for name in ("model", "label", "seed")}
        own |= {"loss": teacher["label"].replace("_", " "), "loss_parameters": {}}
        result = self.result | own | {"settings": settings}
        return Record(self.folder, result, {}, borrowed=True)

    def owner(self, epoch: str) -> str:
        """The part of the result, and of predictions.npz, that is this net's."""
        return "teacher" if self.borrowed else epoch

    def measured(self, epoch: str) -> dict:
        """What the result holds of the "best" or "last" epoch."""
        return self.result[self.owner(epoch)]

    def metrics(self, epoch: str, logits: str) -> dict[str, float]:
        """Of `logits` (see `kinds`) on test; fractions."""
        test = self.measured(epoch)["test"]
        return test[logits] if logits in test else self.posthoc(epoch)[logits]["test"]

    def kinds(self, epoch: str) -> list[str]:
        """Of logits that were measured: raw, scaled, a teacher's tempered ones, post-hoc."""
        return list(dict.fromkeys([*LOGITS, *self.measured(epoch)["test"], *self.posthoc(epoch)]))

    @cached_property
    def calibrated(self) -> dict:
        """What scripts/posthoc.py wrote beside the run; empty if the predictions changed since."""
        path = self.folder / "posthoc.json"
        if not (path.exists() and self.predictions.exists()):
            return {}
        with naming(path):
            found = json.loads(path.read_text())
            return found if found["predictions"] == sha256(self.predictions) else {}

    def posthoc(self, epoch: str) -> dict[str, dict]:
        methods = self.calibrated.get(self.owner(epoch), {})
        return {name: methods[name] for name in methods if name not in ("none", "temperature")}

    def notes(self, epoch: str) -> list[str]:
        """What the fits of `posthoc` had to say."""
        methods = self.posthoc(epoch).items()
        return [f"{name}, {note}" for name, found in methods for note in found.get("notes", [])]

    def stored(self, owner: str, split: str) -> tuple[Tensor, Tensor]:
        """Logits, float32 (N, K), and labels (N,), of predictions.npz. Raises UserError.

        `owner`: best, last or teacher; `split`: val or test.
        """
        with naming(self.predictions), self.predictions.open("rb") as file:
            arrays = open_npz(file)
            logits, labels = arrays[f"{owner}_{split}_logits"], arrays[f"{split}_labels"]
            fits = logits.shape == (len(labels), self.result["num_classes"]) and len(labels) > 0
            if not fits or not np.isfinite(logits).all():
                raise ValueError(f"{split} logits of shape {logits.shape}, or not finite")
            return torch.from_numpy(logits).float(), torch.from_numpy(labels)

    def probabilities(self, epoch: str, logits: str) -> tuple[Tensor, Tensor] | None:
        """Of the test split: softmax, float64 (N, K), and labels (N,); None without the file."""
        if not self.predictions.exists():
            return None
        values, labels = self.stored(self.owner(epoch), "test")
        temperature = self.measured(epoch)["temperature"] if logits == "scaled" else 1.0
        return (values.double() / temperature).softmax(dim=1), labels

    @cached_property
    def history(self) -> list[dict]:
        """The lines of its epochs; none of a borrowed teacher."""
        path = self.folder / "metrics.jsonl"
        if self.borrowed or not path.exists():
            return []
        with naming(path):
            return [
                {k: x for k, x in line.items() if isinstance(x, float)}
                | {k: line[k] for k in ("epoch", "val_nll")}
                for line in map(json.loads, path.read_text().splitlines())
            ]

    def can_teach(self, digest: str) -> bool:
        """Whether it has weights of that SHA-256, or none that could tell."""
        files = [self.folder / f"model_{which}.pth" for which in ("best", "last")]
        files = [file for file in files if file.exists()]
        return not files or digest in map(sha256, files)


class LeftOut(NamedTuple):
    """A run that is in no table, and why."""

    folder: Path
    reason: str


@contextmanager
def naming(path: Path):
    """Whatever is wrong with a file, the message says which file it is. Raises UserError."""
    try:
        yield
    # Any exception: damaged files raise a dozen kinds, and each means the same to the user.
    except Exception as error:
        fault = one_line(error) or type(error).__name__
        advice = "copy it again or take its run away"
        raise UserError(f"{path} is damaged ({fault}); {advice}") from None


def read_runs(roots: list[Path]) -> tuple[list[Record], list[LeftOut]]:
    """Every run below `roots`. Raises UserError where there is none below one of them."""
    folders: dict[str, Path] = {}
    for root in roots:
        found = {os.path.realpath(str(folder)): folder for folder in run_folders(root)}
        if not found:
            advice = "name a --checkpoint folder or a run folder"
            raise UserError(f"{root}: no such folder, or no run below it; {advice}")
        folders = found | folders  # once each, though roots may overlap
    ordered = sorted(folders.values(), key=str)
    runs = [read_run(folder) for folder in tqdm(ordered, "reading runs", leave=False, disable=None)]
    finished = [run for run in runs if isinstance(run, Record)]
    return finished, [run for run in runs if isinstance(run, LeftOut)]


def run_folders(root: Path) -> list[Path]:
    """The run folders at or below a folder, also behind symbolic links, or in a .zip file."""
    if not zipfile.is_zipfile(root):
        return [file.parent for mark in MARKS for file in files_below(root, mark)]
    archive = zipfile.ZipFile(root)
    results = [name for name in archive.namelist() if name.endswith("/result.json")]
    return [zipfile.Path(archive, name).parent for name in results]


def read_run(folder: Path) -> Record | LeftOut:
    path, config = folder / "result.json", folder / "config.json"
    if not path.exists():
        last = []
        with suppress(OSError):
            log = (folder / "train_log.txt").read_text(errors="replace")
            last = [f"its log ends: {line.strip()}" for line in log.splitlines() if line.strip()]
        return LeftOut(folder, "; ".join(["unfinished", *last[-1:]]))
    try:
        with naming(path):
            result = json.loads(path.read_text())
            if not is_complete(result):
                raise ValueError("it is not whole")
            Record(folder, result, {})
        with naming(config):
            return Record(folder, result, json.loads(config.read_text()) if config.exists() else {})
    except UserError as error:
        return LeftOut(folder, reason_of(error, folder))


def reason_of(error: Exception, folder: Path) -> str:
    return one_line(error).replace(f"{folder}/", "")


def pack(records: Iterable[Record], epoch: str, file) -> None:
    """Write what a report needs of runs, test logits as float16, as a .zip file for `read_runs`."""
    records = list({record.folder: record for record in records}.values())
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for record, title in zip(records, titles(records), strict=True):
            files = [record.folder / f"{name}.json" for name in ("result", "config")]
            files += [record.folder / "metrics.jsonl"]
            contents = {file.name: file.read_bytes() for file in files if file.exists()}
            if record.predictions.exists():
                arrays = {}
                for owner in {epoch, "teacher"} & record.result.keys():
                    logits, labels = record.stored(owner, "test")
                    arrays[f"{owner}_test_logits"] = logits.numpy().astype(np.float16)
                np.savez(buffer := io.BytesIO(), test_labels=labels.numpy(), **arrays)
                contents["predictions.npz"] = predictions = buffer.getvalue()
                digest = {"predictions": hashlib.sha256(predictions).hexdigest()}
                contents["posthoc.json"] = json.dumps(record.calibrated | digest)
            for name, content in contents.items():
                archive.writestr(f"{title}/{name}", content)


@dataclass(eq=False)
class MeasuredNet:
    """A net that a finished run measured: its own of the best or last epoch, or its teacher.

    `owner` is the key of its part of the result: best, last or teacher. `temperature` was fitted on
    validation logits; `val` and `test` are stored logits, float32 (N, K), and labels (N,).
    """

    record: Record
    owner: str
    title: str

    @property
    def measured(self) -> dict:
        return self.record.result[self.owner]

    @property
    def temperature(self) -> float:
        return self.measured["temperature"]

    @cached_property
    def val(self) -> tuple[Tensor, Tensor]:
        return self.record.stored(self.owner, "val")

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        return self.record.stored(self.owner, "test")

    def forward(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What gives its logits (B, K) of images uint8 (B, 3, H, W) on the device.

        Raises UserError where its weights are gone or damaged.
        """
        if self.owner == "teacher":
            teacher = self.load_teacher()
            teacher.to(device)
            return teacher.logits
        net, mean, std = self.load_own()
        net.to(device)
        return lambda images: net(normalise(images, mean, std))

    def load_own(self) -> tuple[nn.Module, list[float], list[float]]:
        """In eval mode; mean and std that its inputs are normalised with."""
        path = self.record.folder / f"model_{self.owner}.pth"
        saved = read_torch(path, "copy it again or train the run again")
        with naming(path):
            net = build_model(saved["model"], saved["num_classes"])
            net.load_state_dict(saved["state_dict"])
        net.to(memory_format=torch.channels_last).eval()
        return net, saved["mean"], saved["std"]

    def load_teacher(self) -> Teacher:
        """The student's teacher, from where its command found it; checked by its hash."""
        record, given = self.record, self.record.config.get("arguments", {})
        facts = {key: record.result[key] for key in ("num_classes", "mean", "std", "fingerprint")}
        # What a teacher is checked against; its images are not needed.
        data = Dataset(record.result["dataset"], train=None, val=None, test=None, **facts)
        try:
            teacher = teacher_of(Namespace(**given), data)
            if teacher.identity["sha256"] != self.measured["sha256"]:
                raise UserError(f"{given['teacher_path']} is no longer what it learned from")
        except Exception as error:  # also where config.json is not one of this version
            raise UserError(
                f"{record.folder}: its teacher is not where its command found it "
                f"({one_line(error)}); put it back, run in the folder where the student was "
                "trained, or leave out --with-teacher"
            ) from None
        return teacher


def measured_nets(paths: Iterable[Path], epoch: str, with_teacher: bool) -> list[MeasuredNet]:
    """The nets of the "best" or "last" epoch of every finished run at or below `paths`.

    Each has its teacher below it where asked for; a teacher that several students share is there
    once. Prints a line for each run that is left out; raises UserError where none is finished.
    """
    records, left_out = read_runs(list(paths))
    if not records:
        first = left_out[0]
        raise UserError(f"{first.folder}: no finished run ({first.reason}); train it first")
    for one in left_out:
        print(f"left out: {printable(one.folder)}, {printable(one.reason)}")
    nets, seen = [], set()
    for record, title in zip(records, titles(records), strict=True):
        nets.append(MeasuredNet(record, epoch, title))
        teacher = record.result.get("teacher")
        key = teacher and (teacher["sha256"], record.result["fingerprint"])
        if with_teacher and teacher and key not in seen:
            seen.add(key)
            name = f"  teacher {teacher['model']} {teacher['label']}"
            nets.append(MeasuredNet(record, "teacher", printable(name)))
    return nets


def titles(records: list[Record]) -> list[str]:
    """Folders without the part that they share; of a single run its last two parts."""
    folders = [os.path.realpath(record.folder) for record in records]
    alone = len(folders) == 1
    shared = Path(folders[0]).parents[1] if alone else os.path.commonpath(folders)
    return [printable(os.path.relpath(folder, shared)) for folder in folders]


def write_beside(record: Record, name: str, about: dict, measured: dict[str, dict]) -> Path:
    """Write a JSON file into the run folder, atomically; `measured` by owner (best, teacher, ...).

    What it held of other owners is kept where it came from the same predictions and `about` is the
    same.
    """
    path = record.folder / name
    about = {"predictions": sha256(record.predictions), **about}
    kept = {}
    with suppress(Exception):  # absent, or not as it is written here
        before = json.loads(path.read_text())
        kept = before if before.items() >= about.items() else {}
    write_json(path, kept | about | measured)
    return path
