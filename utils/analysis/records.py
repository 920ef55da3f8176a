"""Runs read from their folders: finished ones as records, the others with the reason.

Run folders may also lie in a .zip file, where zipfile.Path reads them as pathlib.Path does.
"""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import build_model
from utils.analysis.columns import printable
from utils.analysis.taught import epoch_of_files, find_teachers, teacher_settings
from utils.data import Dataset
from utils.data.views import normalise
from utils.program import UserError, files
from utils.run_files import is_complete, is_third_party, number_text
from utils.settings import TeacherSource
from utils.teacher_files import load_teacher
from utils.teachers import Teacher

LOGITS = ("raw", "scaled")
# What load_teacher needs of config.json and earlier versions did not write, at its default.
OLDER_ARGUMENTS = {
    "teacher_key": None,
    "teacher_size": None,
    "teacher_temperature": 1.0,
}
LEAST_FLOAT16 = np.finfo(np.float16).min
MARKS = ("result.json", "config.json", ".lock")  # any of them makes a run folder


@dataclass(eq=False)
class Record:
    """A net that a finished run measured: its own of one epoch, or (`borrowed`) its teacher.

    A teacher borrows folder, result and config from its student's run. `teacher` is the run that
    trained the teacher, where one is found, else `taught_by`: the teacher as this run measured it,
    whose `source` is the run that stores the same logits. `asked` is the epoch that the user asked
    for, where a run is shown at another one because that taught.
    """

    folder: Path
    result: dict
    config: dict
    epoch: str  # "best" or "last"
    borrowed: bool = False
    title: str = ""  # the folder, without what those of the other runs share
    teacher: "Record | None" = None
    source: "Record | None" = None
    asked: str = ""

    def __post_init__(self):
        """Touch what is later taken for granted: what is absent or of another type fails here."""
        result = self.result
        # The part of the result, and of predictions.npz, that is this net's.
        self.owner = "teacher" if self.borrowed else self.epoch
        self.asked = self.asked or self.epoch
        self.identity = identity = result["teacher"] if self.borrowed else result
        self.model, self.label, self.seed = (identity[key] for key in ("model", "label", "seed"))
        self.net_epoch = epoch_of_files(identity) if self.borrowed else self.epoch
        self.data = self.dataset, self.fingerprint = result["dataset"], result["fingerprint"]
        files.safe_name(self.label + self.dataset + self.fingerprint)
        hash(self.seed)
        if self.borrowed:  # a third party's file stands for itself
            self.settings = teacher_settings(identity, result["settings"]["teacher"])
            for member in identity.get("members") or [identity]:
                hash((files.safe_name(member["label"]), member["model"], member["seed"]))
                hash(member["sha256"])
            self.loss, self.parameters = self.label.replace("_", " "), {}
            self.exp_name = None
            named = " ".join(filter(None, (self.model, self.label, self.note)))
            self.title = printable(f"  teacher {named}")
        else:
            self.settings = result["settings"]
            self.loss, self.parameters = result["loss"], result["loss_parameters"]
            exp_name = self.config.get("arguments", {}).get("exp_name")
            self.exp_name = exp_name and str(exp_name)
        parameters = (f"{key}={number_text(x)}" for key, x in self.parameters.items())
        self.name = " ".join([self.model, self.loss, *parameters])
        self.measured: dict = result[self.owner]
        self.third_party = is_third_party(self.measured)
        self.temperatures = {"raw": 1.0, "scaled": self.measured["temperature"]}
        float(self.measured["temperature"] + self.measured["temperature_at_bound"])
        for metrics in (self.measured["val"], *map(self.measured["test"].get, LOGITS)):
            math.fsum([metrics["top1"], metrics["ece"], *metrics.values()])
        if self.third_party:  # what was fitted on images that it may know says nothing
            del self.temperatures["scaled"]
            test = {kind: x for kind, x in self.measured["test"].items() if kind != "scaled"}
            self.measured = self.measured | {"test": test}
        self.predictions = self.folder / "predictions.npz"
        self.taught_by = None
        if self.settings.get("teacher"):
            self.taught_by = Record(
                self.folder, result, self.config, self.epoch, borrowed=True, asked=self.asked
            )

    @property
    def note(self) -> str:
        """`best epoch` or `last epoch`, where the user asked for the other one, else nothing."""
        return "" if self.net_epoch in (None, self.asked) else f"{self.net_epoch} epoch"

    def at(self, epoch: str) -> "Record":
        """The net that the same run measured at its other epoch."""
        return Record(
            self.folder, self.result, self.config, epoch, title=self.title, asked=self.asked
        )

    @property
    def tests(self) -> dict[str, dict[str, float]]:
        """Metrics on test (fractions) of raw, scaled, a teacher's tempered and post-hoc logits."""
        test = self.measured["test"]
        first = {logits: test[logits] for logits in self.temperatures}
        return first | test | {name: found["test"] for name, found in self.posthoc.items()}

    @cached_property
    def calibrated(self) -> dict:
        """What scripts/posthoc.py wrote beside the run; empty if the predictions changed since."""
        path = self.folder / "posthoc.json"
        if not (path.exists() and self.predictions.exists()):
            return {}
        with naming(path):
            found = json.loads(path.read_text())
            return found if found["predictions"] == files.sha256(self.predictions) else {}

    @property
    def posthoc(self) -> dict[str, dict]:
        """Of `calibrated`, by method, what is this net's and not in its result already."""
        methods = {} if self.third_party else self.calibrated.get(self.owner, {})
        return {name: methods[name] for name in methods if name not in ("none", "temperature")}

    def stored(self, split: str) -> tuple[Tensor, Tensor]:
        """Logits, float32 (N, K), and labels (N,), of val or test. Raises UserError."""
        with naming(self.predictions), self.predictions.open("rb") as file:
            arrays, name = files.open_npz(file), f"{self.owner}_{split}_logits"
            if self.source and name not in arrays:  # a pack has a teacher's logits once
                return self.source.stored(split)
            logits, labels = arrays[name], arrays[f"{split}_labels"]
            fits = logits.shape == (len(labels), self.result["num_classes"]) and len(labels) > 0
            # A teacher may rule classes out by a logit of -inf, but not all of them.
            if not fits or not np.isfinite(logits.max(axis=1)).all():
                raise ValueError(f"{split} logits of shape {logits.shape}, or not finite")
            return torch.from_numpy(logits).float(), torch.from_numpy(labels)

    def probabilities(self, logits: str) -> tuple[Tensor, Tensor] | None:
        """Of the test split: softmax, float64 (N, K), and labels (N,).

        None without the file, and of the scaled logits of a third party's teacher.
        """
        if logits not in self.temperatures or not self.predictions.exists():
            return None
        values, labels = self.stored("test")
        return (values.double() / self.temperatures[logits]).softmax(dim=1), labels

    def raw_and_scaled(self, metrics: Callable, *data) -> dict[str, dict[str, float]]:
        """`metrics(*data, temperature)` with the temperature 1, and with its own."""
        return {logits: metrics(*data, t) for logits, t in self.temperatures.items()}

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

    @cached_property
    def weight_hashes(self) -> dict[str, str]:
        """SHA-256 of the weights of its best and last epoch, of those that were not deleted."""
        weights = {which: self.folder / f"model_{which}.pth" for which in ("best", "last")}
        return {which: files.sha256(file) for which, file in weights.items() if file.exists()}

    def nll_distance(self, other: "Record", epoch: str) -> float:
        """How far its raw test NLL at an epoch is from the other's, relative to that."""
        nll = self.result[epoch]["test"]["raw"].get("nll")
        others = other.measured["test"]["raw"].get("nll")
        if nll is None or others is None:  # infinite, of a net that rules a label out
            return math.inf
        return abs(nll - others) / max(others, 1e-12)

    def measured_alike(self, other: "Record", tolerance: float) -> bool:
        """Whether its raw test NLL is the other's but for rounding, as of the same weights."""
        return self.nll_distance(other, self.epoch) <= tolerance

    def forward(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What gives its logits (B, K) of images uint8 (B, 3, H, W) on the device.

        Raises UserError where its weights are gone or damaged.
        """
        if self.borrowed:
            return self.load_teacher().to(device).logits
        net, saved = self.load_net()
        net.to(device)
        return lambda images: net(normalise(images, saved["mean"], saved["std"]))

    def load_net(self) -> tuple[nn.Module, dict]:
        """Its own net in eval mode, and what else its file holds."""
        path = self.folder / f"model_{self.owner}.pth"
        saved = files.read_torch(path, "copy it again or train the run again")
        with naming(path):
            net = build_model(saved["model"], saved["num_classes"])
            net.load_state_dict(saved.pop("state_dict"))
        return net.to(memory_format=torch.channels_last).eval(), saved

    def load_teacher(self) -> Teacher:
        """The student's teacher, from where its command found it; checked by its hash."""
        given = OLDER_ARGUMENTS | self.config.get("arguments", {})
        for flag in ("teacher", "teacher_path"):  # before ensembles they were texts
            if isinstance(given.get(flag), str):
                given[flag] = [given[flag]]
        # What a teacher is checked against; its images are not needed.
        data = Dataset(
            name=self.dataset,
            num_classes=self.result["num_classes"],
            train=None,
            val=None,
            test=None,
            mean=self.result["mean"],
            std=self.result["std"],
            fingerprint=self.fingerprint,
            split_seed=self.result["split_seed"],
        )
        way_out = "put it back, run where the student was trained, or leave out --with-teacher"
        fault = f"{self.folder}: its teacher is not where its command found it"
        with files.refused(fault, way_out):  # also where config.json is of another version
            teacher = load_teacher(TeacherSource.of(given), data)
            if teacher.identity["sha256"] != self.measured["sha256"]:
                raise ValueError(f"{given['teacher_path']} is no longer what it learned from")
        return teacher


class LeftOut(NamedTuple):
    """A run that is in no table, and why."""

    folder: Path
    reason: str


def naming(path: Path):
    """Whatever is wrong with a file, the message says which file it is. Raises UserError."""
    return files.refused(f"{path} is damaged", "copy it again or take its run away")


def read_runs(roots: Iterable[Path], epoch: str) -> tuple[list[Record], list[LeftOut]]:
    """The nets of the "best" or "last" epoch of every run below `roots`, and runs that have none.

    Raises UserError where there is no run below one of them.
    """
    folders: dict[str, Path] = {}
    for root in roots:
        found = {os.path.realpath(str(folder)): folder for folder in run_folders(root)}
        if not found:
            advice = "name a --checkpoint folder or a run folder"
            raise UserError(f"{root}: no such folder, or no run below it; {advice}")
        folders = found | folders  # once each, though roots may overlap
    ordered = tqdm(sorted(folders.values(), key=str), "reading runs", leave=False, disable=None)
    runs = [read_run(folder, epoch) for folder in ordered]
    finished = [run for run in runs if isinstance(run, Record)]
    if finished:
        places = [os.path.realpath(str(record.folder)) for record in finished]
        shared = Path(places[0]).parents[1] if len(places) == 1 else os.path.commonpath(places)
        for record, place in zip(finished, places, strict=True):
            record.title = printable(os.path.relpath(place, shared))
    find_teachers(finished)
    return finished, [run for run in runs if isinstance(run, LeftOut)]


def run_folders(root: Path) -> list[Path]:
    """The run folders at or below a folder, also behind symbolic links, or in a .zip file."""
    if not zipfile.is_zipfile(root):
        return [file.parent for mark in MARKS for file in files.files_below(root, mark)]
    archive = zipfile.ZipFile(root)
    results = [name for name in archive.namelist() if name.endswith("/result.json")]
    return [zipfile.Path(archive, name).parent for name in results]


def read_run(folder: Path, epoch: str) -> Record | LeftOut:
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
            Record(folder, result, {}, epoch)
        with naming(config):
            content = json.loads(config.read_text()) if config.exists() else {}
            return Record(folder, result, content, epoch)
    except UserError as error:
        return LeftOut(folder, files.one_line(error).replace(f"{folder}/", ""))


def pack(records: list[Record], file) -> None:
    """Write what a report needs of runs, test logits as float16, as a .zip file for `read_runs`.

    A run whose best and whose last epoch are shown is in `records` twice, and in the file once.
    """
    epochs: dict[Path, list[Record]] = {}
    for record in records:
        epochs.setdefault(record.folder, []).append(record)
    stored = {(record.folder, record.owner) for record in records}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2) as archive:
        for record, *others in epochs.values():
            copied = map(record.folder.joinpath, ("result.json", "config.json", "metrics.jsonl"))
            contents = {file.name: file.read_bytes() for file in copied if file.exists()}
            if record.predictions.exists():
                arrays = {}
                nets = [record, *others, record.taught_by]
                for net in filter(None, nets):
                    # A teacher with a run of its own is in that.
                    if net.source and (net.source.folder, net.source.owner) in stored:
                        continue
                    logits, labels = net.stored("test")
                    arrays[f"{net.owner}_test_logits"] = half_precision(logits)
                np.savez(buffer := io.BytesIO(), test_labels=labels.numpy(), **arrays)
                contents["predictions.npz"] = predictions = buffer.getvalue()
                digest = {"predictions": hashlib.sha256(predictions).hexdigest()}
                contents["posthoc.json"] = json.dumps(record.calibrated | digest)
            for name, content in contents.items():
                archive.writestr(f"{record.title}/{name}", content)


def half_precision(logits: Tensor) -> np.ndarray:
    """Logits (N, K) as float16 (N, K), each row's largest taken off, which no softmax sees.

    So the digits go to the classes that have a probability. What is below float16's range has none
    at any temperature, and becomes the least number.
    """
    values = logits.double()
    below_top = values - values.amax(dim=1, keepdim=True)
    return below_top.clamp_min(LEAST_FLOAT16).numpy().astype(np.float16)


def finished_nets(
    paths: Iterable[Path], epoch: str, with_teacher: bool, packed: bool = False
) -> list[Record]:
    """The nets of the "best" or "last" epoch of every finished run at or below `paths`.

    Each has its teacher below it where asked for, unless its own run is there; a teacher that
    several students share is there once. `packed`: test logits will do, so a .zip file may be
    named. Prints a line for each run that is left out; raises UserError where none is finished.
    """
    for path in paths if not packed else ():
        if zipfile.is_zipfile(path):
            raise UserError(f"{path}: a pack has test logits, and no more; name run folders")
    records, left_out = read_runs(paths, epoch)
    if not records:
        first = left_out[0]
        raise UserError(f"{first.folder}: no finished run ({first.reason}); train it first")
    for one in left_out:
        print(f"left out: {printable(one.folder)}, {printable(one.reason)}")
    nets: dict = {}
    for record in records:
        nets[record.folder] = record
        teacher = record.taught_by
        if with_teacher and teacher and teacher.source not in records:
            nets.setdefault((teacher.measured["sha256"], teacher.fingerprint), teacher)
    return list(nets.values())


def write_beside(net: Record, name: str, about: dict, measured: dict) -> Path:
    """Write what was measured of a net into a JSON file in its run folder, atomically.

    What the file held of other owners (best, teacher, ...) is kept where it came from the same
    predictions and `about` is the same.
    """
    path = net.folder / name
    about = {"predictions": files.sha256(net.predictions), **about}
    kept = {}
    with suppress(Exception):  # absent, or not as it is written here
        before = json.loads(path.read_text())
        kept = before if before.items() >= about.items() else {}
    files.write_json(path, kept | about | {net.owner: measured})
    return path
