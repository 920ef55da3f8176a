"""What a finished run's files say of one of its nets: its own at one epoch, or its teacher.

Nothing here runs a net (that is utils/analysis/nets.py), and nothing is written.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.analysis.checks import (
    check_identity,
    check_mappings,
    check_measured,
    check_numbers,
    check_texts,
)
from utils.analysis.teacher_identity import EPOCHS, epoch_of_files, teacher_settings
from utils.columns import printable
from utils.program import files
from utils.run_files import STORED, is_third_party, number_text

KINDS = ("raw", "scaled")  # of logits
# What is measured of logits without those of validation.
NOT_VALIDATED = {"val": {}, "temperature_at_bound": False}


@dataclass(eq=False)
class Record:
    """What one net measured in a finished run. `net_of_run` and `teacher_of_run` make it.

    `part` is that of result.json and predictions.npz which is this net's: best, last, or teacher. A
    teacher's record has the folder, result and config of its student's run.

    `epoch` is the one that its weights are of, None where no one knows; `asked_epoch` the one that
    the user asked for, where a run is shown at another one because that taught.

    A student has `taught_by`, its teacher as this run measured it; and `teacher`, which is the run
    that trained the teacher, where one is found, else the same as `taught_by`. A teacher has
    `run_with_logits`, the run that stores the same logits (see utils/analysis/taught.py).
    """

    folder: Path
    result: dict
    config: dict
    part: str
    epoch: str | None
    asked_epoch: str
    # As result.json names the net; of a teacher also where its weights lay, and their hash.
    identity: dict
    settings: dict
    loss: str
    parameters: dict[str, float]  # of the loss
    measured: dict  # this part of the result, without what a third party's net has not
    exp_name: str | None = None
    origin: str = ""  # of a student whose teacher was not measured: `from logits people`
    title: str = ""  # the folder, without what those of the other runs share
    taught_by: "Record | None" = None
    teacher: "Record | None" = None
    run_with_logits: "Record | None" = None

    @property
    def measured_by_student(self) -> bool:
        """Whether it is a teacher as a student's run speaks of it, and not a run."""
        return self.part == "teacher"

    @property
    def model(self) -> str:
        return self.identity["model"]

    @property
    def label(self) -> str:
        return self.identity["label"]

    @property
    def seed(self) -> int | str | None:
        """None of a third party's weights; `42+43` of an ensemble."""
        return self.identity["seed"]

    @property
    def dataset(self) -> str:
        return self.result["dataset"]

    @property
    def fingerprint(self) -> str:
        return self.result["fingerprint"]

    @property
    def data(self) -> tuple[str, str]:
        return self.dataset, self.fingerprint

    @property
    def name(self) -> str:
        """`resnet8 KD T=4 Lambda=0.9`, with its `origin`."""
        values = [f"{key}={number_text(value)}" for key, value in self.parameters.items()]
        if self.settings.get("feature_layer"):
            values.append(f"feature_layer={self.settings['feature_layer']}")
        words = [self.model, self.loss, *values, self.origin]
        return " ".join(word for word in words if word)

    @property
    def note(self) -> str:
        """`best epoch` or `last epoch`, where the user asked for the other one, else nothing."""
        return "" if self.epoch in (None, self.asked_epoch) else f"{self.epoch} epoch"

    @property
    def third_party(self) -> bool:
        return is_third_party(self.measured)

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.npz"

    @property
    def temperatures(self) -> dict[str, float]:
        """What the logits are divided by: raw, and scaled but of a third party's teacher.

        Nor has a file of logits without those of validation a scaled row.
        """
        if self.third_party or "temperature" not in self.measured:
            return {"raw": 1.0}
        return {"raw": 1.0, "scaled": self.measured["temperature"]}

    @property
    def tests(self) -> dict[str, dict[str, float]]:
        """Metrics on test (fractions) of raw, scaled, a teacher's tempered and post-hoc logits."""
        measured = self.measured["test"]
        tests = {kind: measured[kind] for kind in self.temperatures}
        tests.update(measured)
        for method, fit in self.posthoc.items():
            tests[method] = fit["test"]
        return tests

    @cached_property
    def posthoc_content(self) -> dict:
        """What scripts/posthoc.py wrote beside the run; empty if the predictions changed since."""
        path = self.folder / "posthoc.json"
        if not (path.exists() and self.predictions.exists()):
            return {}
        with naming(path):
            content = json.loads(path.read_text())
            is_current = content["predictions"] == files.sha256(self.predictions)
            return content if is_current else {}

    @property
    def posthoc(self) -> dict[str, dict]:
        """By method, what `posthoc_content` has of this net and its result has not."""
        if self.third_party:
            return {}
        fits = self.posthoc_content.get(self.part, {})
        return {name: fits[name] for name in fits if name not in ("none", "temperature")}

    @cached_property
    def history(self) -> list[dict]:
        """What `read_history` gives, read once."""
        return self.read_history()

    def read_history(self) -> list[dict]:
        """The lines of its epochs; none of a teacher. Raises UserError where they are damaged."""
        path = self.folder / "metrics.jsonl"
        if self.measured_by_student or not path.exists():
            return []
        with naming(path):
            return [numbers_of_epoch(line) for line in path.read_text().splitlines()]

    @cached_property
    def weight_hashes(self) -> dict[str, str]:
        """SHA-256 of the weights of its best and last epoch, of those that were not deleted."""
        weights = {epoch: self.folder / f"model_{epoch}.pth" for epoch in EPOCHS}
        return {epoch: files.sha256(file) for epoch, file in weights.items() if file.exists()}

    def stored(self, split: str) -> tuple[Tensor, Tensor]:
        """Logits, float32 (N, K), and labels (N,), of val or test. Raises UserError."""
        name = f"{self.part}_{split}_logits"
        with naming(self.predictions), self.predictions.open("rb") as file:
            arrays = files.open_npz(file)
            if self.run_with_logits and name not in arrays:  # a pack has a teacher's logits once
                return self.run_with_logits.stored(split)
            logits = arrays[name]
            labels = arrays[f"{split}_labels"]
            fits = logits.shape == (len(labels), self.result["num_classes"]) and len(labels) > 0
            # A teacher may rule classes out by a logit of -inf, but not all of them.
            if not fits or not np.isfinite(logits.max(axis=1)).all():
                raise ValueError(f"{split} logits of shape {logits.shape}, or not finite")
            return torch.from_numpy(logits).float(), torch.from_numpy(labels)

    def has_stored(self, split: str) -> bool:
        """Whether logits of val or test are stored; a pack has none of val. Raises UserError."""
        if not self.predictions.exists():
            return False
        with naming(self.predictions), self.predictions.open("rb") as file:
            if f"{self.part}_{split}_logits" in files.open_npz(file):
                return True
        return self.run_with_logits is not None and self.run_with_logits.has_stored(split)

    def probabilities(self, kind: str) -> tuple[Tensor, Tensor] | None:
        """Probabilities, float64 (N, K), and labels (N,) of the test split.

        None without the file, and of the scaled logits of a third party's teacher.
        """
        if kind not in self.temperatures or not self.predictions.exists():
            return None
        values, labels = self.stored("test")
        return (values.double() / self.temperatures[kind]).softmax(dim=1), labels

    def raw_and_scaled(self, metrics: Callable, *data) -> dict[str, dict[str, float]]:
        """`metrics(*data, temperature)` with the temperature 1, and with its own."""
        return {
            kind: metrics(*data, temperature) for kind, temperature in self.temperatures.items()
        }

    def at(self, epoch: str) -> "Record":
        """The net that the same run measured at its other epoch."""
        other = net_of_run(
            self.folder, self.result, self.config, epoch, asked_epoch=self.asked_epoch
        )
        other.title = self.title
        return other

    def nll_distance(self, other: "Record", epoch: str) -> float:
        """How far its run's raw test NLL at an epoch is from the other's, relative to that."""
        own_nll = self.result[epoch]["test"]["raw"].get("nll")
        other_nll = other.measured["test"]["raw"].get("nll")
        if own_nll is None or other_nll is None:  # infinite, of a net that rules a label out
            return math.inf
        return abs(own_nll - other_nll) / max(other_nll, 1e-12)


def net_of_run(
    folder: Path, result: dict, config: dict, epoch: str, asked_epoch: str | None = None
) -> Record:
    """The net that a run trained, at its best or last epoch, and below it the run's teacher.

    Raises almost any Exception where the result is not as a run writes it.
    """
    # A result is a file that anybody may have edited: what is shown of it is checked first.
    measured = result[epoch]
    check_identity(result)
    check_texts(result, ("dataset", "fingerprint", "loss"))
    check_mappings(result, ("loss_parameters", "settings"))
    check_numbers(result["loss_parameters"], tuple(result["loss_parameters"]))
    check_measured(measured)

    exp_name = config.get("arguments", {}).get("exp_name")
    record = Record(
        folder=folder,
        result=result,
        config=config,
        part=epoch,
        epoch=epoch,
        asked_epoch=asked_epoch or epoch,
        identity=result,
        settings=result["settings"],
        loss=result["loss"],
        parameters=result["loss_parameters"],
        measured=measured,
        exp_name=str(exp_name) if exp_name else exp_name,
    )

    if record.settings.get("teacher"):
        teacher = result["teacher"]
        if teacher["model"] == STORED and "test" not in teacher:
            name_unmeasured_teacher(record, teacher)
        else:
            record.taught_by = teacher_of_run(record)
    return record


def name_unmeasured_teacher(student: Record, teacher: dict) -> None:
    """A teacher whose stored logits lack test has no row: the student's name has it."""
    check_texts(teacher, ("label", "sha256"))
    student.origin = f"from {STORED} {teacher['label'].replace('_', ' ')}"
    student.settings = {**student.settings, "logits": teacher["sha256"]}


def teacher_of_run(student: Record) -> Record:
    """The teacher of a student's run, as that run measured it. Raises as `net_of_run`."""
    identity = student.result["teacher"]
    for member in identity.get("members") or [identity]:
        check_identity(member)
        check_texts(member, ("sha256",))
    check_identity(identity)
    check_texts(identity, ("sha256",))
    is_validated = identity["model"] != STORED or "val" in identity
    check_measured(identity, is_validated)
    seen = identity.get("seen") or {}
    check_numbers(seen, tuple(seen))

    measured = identity
    if is_third_party(identity):
        # What was fitted on images that it may know says nothing.
        tests = {name: test for name, test in identity["test"].items() if name != "scaled"}
        measured = {**NOT_VALIDATED, **identity, "test": tests}
    teacher = Record(
        folder=student.folder,
        result=student.result,
        config=student.config,
        part="teacher",
        epoch=epoch_of_files(identity),
        asked_epoch=student.asked_epoch,
        identity=identity,
        settings=teacher_settings(identity, student.result["settings"]["teacher"]),
        loss=identity["label"].replace("_", " "),
        parameters={},
        measured=measured,
    )
    words = [teacher.model, teacher.label, teacher.note]
    teacher.title = printable("  teacher " + " ".join(word for word in words if word))
    return teacher


def numbers_of_epoch(line: str) -> dict:
    """What a line of metrics.jsonl says: epoch, validation NLL, and whatever else is a float.

    Raises almost any Exception where the line is not one of a run.
    """
    values = json.loads(line)
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    numbers["epoch"] = values["epoch"]
    numbers["val_nll"] = values["val_nll"]
    return numbers


def naming(path: Path):
    """Whatever is wrong with a file, the message says which file it is. Raises UserError."""
    return files.refused(f"{path} is damaged", "copy it again or take its run away")
