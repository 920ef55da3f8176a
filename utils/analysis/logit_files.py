"""A file of logits and labels as a record: whoever made them, they are a row beside the runs.

The file is an .npz as utils/teachers/logit_file.py reads it, with test_logits (or test_probs) and
test_labels. With val_logits and val_labels too, a temperature is fitted as for a run.
"""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from os.path import isfile
from pathlib import Path

import torch
from torch import Tensor

from utils.analysis.record import NOT_VALIDATED, Record, naming
from utils.data import Split
from utils.program import UserError, files
from utils.run_files import STORED
from utils.split_metrics import metrics_of
from utils.teachers.logit_file import Arrays, labels_in, logits_in, read_stored


@dataclass(eq=False)
class FileRecord(Record):
    """Its `folder` is the file itself. `by_split`: logits (N, K) and labels (N,)."""

    by_split: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def predictions(self) -> Path:
        return self.folder

    @property
    def posthoc_content(self) -> dict:
        return {}

    def stored(self, split: str) -> tuple[Tensor, Tensor]:
        if split not in self.by_split:
            raise UserError(
                f"{self.folder}: has no {split}_logits, which are needed here; add them and "
                f"{split}_labels"
            )
        return self.by_split[split]

    def has_stored(self, split: str) -> bool:
        return split in self.by_split


def is_logit_file(path: Path) -> bool:
    return path.suffix == ".npz" and isfile(path)


def read_logit_file(path: Path, epoch: str, runs: Iterable[Record]) -> FileRecord:
    """The record of a file, on the data set of the run whose test labels it has, if there is one.

    `epoch`: what the user asked for of runs. Raises UserError.
    """
    where = str(path)
    arrays = read_stored(path, where)
    by_split = {}
    for split in ("val", "test"):
        pair = logits_and_labels(arrays, split, where)
        if pair is not None:
            by_split[split] = pair
    if "test" not in by_split:
        raise UserError(f"{where}: has no test_logits or test_probs; add them and test_labels")

    logits = {split: logits for split, (logits, _) in by_split.items()}
    splits = {split: Split(None, labels) for split, (_, labels) in by_split.items()}
    classes = logits["test"].shape[1]
    if any(values.shape[1] != classes for values in logits.values()):
        raise UserError(f"{where}: val and test differ in their classes; save the same for both")

    # A file does not say what it is of: its test labels do.
    dataset, fingerprint = data_of(splits["test"].labels, classes, runs)
    return FileRecord(
        folder=path,
        result={"dataset": dataset, "fingerprint": fingerprint, "num_classes": classes},
        config={},
        part=STORED,
        epoch=None,
        asked_epoch=epoch,
        identity={"model": STORED, "label": path.stem, "seed": None},
        settings={"sha256": files.sha256(path)},
        loss=path.stem,
        parameters={},
        measured={**NOT_VALIDATED, **metrics_of(logits, splits)},
        by_split=by_split,
    )


def logits_and_labels(arrays: Arrays, split: str, where: str) -> tuple[Tensor, Tensor] | None:
    """Logits (N, K) and labels (N,) of a split; None where the file has neither. UserError."""
    logits = logits_in(arrays, split, where)
    labels = labels_in(arrays, split, where)
    if logits is None and labels is None:
        return None
    if logits is None or labels is None:
        raise UserError(
            f"{where}: of {split} it needs both {split}_logits (or {split}_probs) and "
            f"{split}_labels; add what is missing"
        )
    if logits.ndim != 2 or len(logits) != len(labels):
        raise UserError(
            f"{where}: {split} logits have shape {tuple(logits.shape)} and there are "
            f"{len(labels)} labels; save (N, K) and (N,)"
        )
    classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{where}: {split}_labels go from {labels.min()} to {labels.max()}, and the logits "
            f"have {classes} classes; number the labels from 0"
        )
    return logits, labels


def data_of(labels: Tensor, classes: int, runs: Iterable[Record]) -> tuple[str, str]:
    """Name and fingerprint of the data set that has these test labels in this order.

    Of none that a run is on: a name that says how many images there are.
    """
    compared = set()
    for run in runs:
        if run.data in compared or run.result["num_classes"] != classes:
            continue
        with suppress(UserError, OSError):  # a run without predictions, or with damaged ones
            if torch.equal(test_labels(run), labels):
                return run.data
            compared.add(run.data)
    digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    return f"{len(labels)}-images", digest


def test_labels(run: Record) -> Tensor:
    """Those that its predictions have, (N,). Raises UserError, OSError."""
    with run.predictions.open("rb") as file, naming(run.predictions):
        return torch.from_numpy(files.open_npz(file)["test_labels"])
