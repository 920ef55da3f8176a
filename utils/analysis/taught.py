"""Who taught whom: a student's teacher is the very net, at the very epoch, that it learned from.

A student's result says of its teacher what it is called, where its weights lay, their SHA-256, and
what they measured on the student's data. By these its run is found among those that were read.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from utils.program import files

if TYPE_CHECKING:
    from utils.analysis.records import Record

EPOCHS = ("best", "last")
# Relative, of two NLLs of the same weights: bf16 and folded batch norms have moved one by 2e-3.
ROUNDING = 0.01
SEEDED = ("seed", "teacher")  # of a run's settings, what changes with the seed


def find_teachers(records: list[Record]) -> None:
    """Set every student's teacher: the run that trained it, at the epoch that taught it.

    Where that is not among `records`, or was fed with images of another size or divided by a
    temperature, it is `taught_by`, with the settings of the runs that its members come from.
    """
    runs = Runs(records)
    students = [record for record in records if record.taught_by]
    for student in students:
        own = student.taught_by
        members = own.identity.get("members") or [own.identity]
        trained = [runs.find(member, own) for member in members]
        if len(members) == 1 and trained[0] is not None:
            own.source = stored_alike(trained[0], own)
        if taught_as_trained(own, trained):
            student.teacher = trained[0]
        else:
            student.teacher = own
            own.settings = own.settings | joined_settings(trained)
        # The epoch that taught, where records hold the other one, has a teacher of its own.
        students += runs.students_met()


def taught_as_trained(own: Record, trained: list[Record | None]) -> bool:
    """Whether a teacher is one net whose run was found, fed and read as when it was trained."""
    if len(trained) > 1 or trained[0] is None or "size" in own.identity:
        return False
    # A temperature that its logits were divided by stands in its label alone.
    return files.safe_name(trained[0].label) == files.safe_name(own.label)


def stored_alike(run: Record, own: Record) -> Record | None:
    """The run, where its predictions stand for those that its student measured."""
    return run if run.predictions.exists() and run.measured_alike(own, 1e-3) else None


def joined_settings(runs: list[Record | None]) -> dict:
    """Of the runs that were found: a setting's value, or all that differ in one text."""
    every = [run.settings for run in runs if run is not None]
    joined = {}
    for key in sorted(set().union(*every) - set(SEEDED)):
        values = [settings.get(key) for settings in every]
        texts = sorted({str(value) for value in values})
        joined[key] = values[0] if len(texts) == 1 else "+".join(texts)
    return joined


class Runs:
    """The runs that were read, by name, each at any epoch."""

    def __init__(self, records: list[Record]):
        self.named: dict[tuple, list[Record]] = {}
        for run in records:
            key = run.model, files.safe_name(run.label), run.seed, run.fingerprint
            self.named.setdefault(key, []).append(run)
        self.at_epoch = {(run.folder, run.epoch): run for run in records}
        self.met: list[Record] = []

    def find(self, member: dict, own: Record) -> Record | None:
        """The run of a teacher's member, at the epoch that taught, or None.

        `member` is what the student's result says of it; `own` is the whole teacher.
        """
        if member["seed"] is None:  # other people's weights
            return None
        # As it was trained, or without the temperature that its logits were divided by.
        runs = []
        for label in (member["label"], member["label"].rsplit("_Tcal=", 1)[0]):
            key = member["model"], files.safe_name(label), member["seed"], own.fingerprint
            runs = runs or self.named.get(key, [])
        is_measured = member is own.identity and "size" not in member
        candidates = []
        for run in runs:
            fitting = epochs_that_fit(run, member["sha256"], own, is_measured)
            candidates += [(unlikeliness, run, epoch) for epoch, unlikeliness in fitting.items()]
        for _, run, epoch in sorted(candidates, key=lambda candidate: candidate[0]):
            with suppress(Exception):  # of a damaged result only the epoch asked for is whole
                return self.run_at(run, epoch)
        return None

    def run_at(self, run: Record, epoch: str) -> Record:
        if (run.folder, epoch) not in self.at_epoch:
            other = run.at(epoch)
            self.at_epoch[run.folder, epoch] = other
            if other.taught_by:
                self.met.append(other)
        return self.at_epoch[run.folder, epoch]

    def students_met(self) -> list[Record]:
        """Records made since the last call that have a teacher."""
        met, self.met = self.met, []
        return met


def epochs_that_fit(run: Record, sha256: str, own: Record, is_measured: bool) -> dict[str, tuple]:
    """The epochs of a run that may be a teacher with weights of that hash: how unlikely each is.

    Weights that are there decide. Where they were deleted the NLL that the student measured does
    (`is_measured`), and the name of the file that it read.
    """
    hashes = run.weight_hashes
    fitting = {}
    for epoch in EPOCHS:
        is_named = own.net_epoch == epoch
        distance = run.nll_distance(own, epoch) if is_measured else 0.0
        if epoch in hashes:
            fits = hashes[epoch] == sha256
        elif hashes:  # those of the other epoch alone were kept
            fits = is_named and distance < ROUNDING
        else:
            fits = distance < ROUNDING
        if fits:
            fitting[epoch] = (epoch not in hashes, not is_named, distance)
    return fitting


def epoch_of_files(identity: dict) -> str | None:
    """best or last, where every file that a teacher was read from is that epoch's of a run."""
    paths = identity.get("path")
    names = {Path(path).name for path in (paths if isinstance(paths, list) else [str(paths)])}
    known = {"model_best.pth": "best", "model_last.pth": "last"}
    return known.get(names.pop()) if len(names) == 1 else None


def teacher_settings(identity: dict, recorded: dict) -> dict:
    """All that a student's settings say of its teacher but for the seed, ready for JSON.

    `identity` stands in its result and names the files; `recorded` in its settings. The weights of
    one of our runs follow from its seed; a third party's file stands for itself.
    """
    settings = without_seed(recorded, identity["seed"])
    if identity["seed"] is not None and epoch_of_files(identity) is None:
        settings["epoch"] = "unknown"
    if "members" in recorded:
        members = [without_seed(member, member["seed"]) for member in recorded["members"]]
        settings["members"] = sorted(members, key=lambda one: json.dumps(one, sort_keys=True))
    return settings


def without_seed(identity: dict, seed) -> dict:
    """What stays of a net's identity when its seed changes: not the weights, if it has a seed."""
    changing = {"seed", "path", "loss", "members", *(["sha256"] if seed is not None else [])}
    return {key: value for key, value in identity.items() if key not in changing}
