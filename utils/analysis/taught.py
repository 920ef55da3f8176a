"""Who taught whom: a student's teacher is the very net, at the very epoch, that it learned from.

A student's result says of its teacher what it is called, where its weights lay, their SHA-256, and
what they measured on the student's data. By these its run is found among those that were read.
"""

from contextlib import suppress
from typing import NamedTuple

from utils.analysis.record import Record
from utils.analysis.teacher_identity import EPOCHS
from utils.program import files
from utils.run_files import temperature_suffix

# Relative, of two NLLs of the same weights: bf16 and folded batch norms have moved one by 2e-3.
ROUNDING = 0.01
# The same of one that a student's run measured, where the run's own logits are to stand for it.
SAME_LOGITS = 1e-3
SEEDED = ("seed", "teacher")  # of a run's settings, what changes with the seed


def find_teachers(records: list[Record]) -> None:
    """Set every student's teacher: the run that trained it, at the epoch that taught it.

    Where that is not among `records`, or was fed with images of another size or divided by a
    temperature, it is `taught_by`, with the settings of the runs that its members come from.
    """
    runs = Runs(records)
    students = [record for record in records if record.taught_by]
    while students:
        for student in students:
            find_teacher(student, runs)
        # The epoch that taught, where records hold the other one, has a teacher of its own.
        students = runs.students_met()


def find_teacher(student: Record, runs: "Runs") -> None:
    """`find_teachers` of one student."""
    teacher = student.taught_by
    members = teacher.identity.get("members") or [teacher.identity]
    trained = [runs.find(member, teacher) for member in members]

    if len(members) == 1 and trained[0] is not None:
        teacher.run_with_logits = run_with_logits_of(teacher, trained[0])
    if taught_as_trained(teacher, trained):
        student.teacher = trained[0]
    else:
        student.teacher = teacher
        teacher.settings = {**teacher.settings, **joined_settings(trained)}


def taught_as_trained(teacher: Record, trained: list[Record | None]) -> bool:
    """Whether a teacher is one net whose run was found, fed and read as when it was trained."""
    if len(trained) > 1 or trained[0] is None:
        return False
    return "size" not in teacher.identity and "teacher_temperature" not in teacher.identity


def run_with_logits_of(teacher: Record, run: Record) -> Record | None:
    """The run, where its predictions stand for those that its student measured."""
    is_same = run.nll_distance(teacher, run.epoch) <= SAME_LOGITS
    return run if is_same and run.predictions.exists() else None


def joined_settings(runs: list[Record | None]) -> dict:
    """The settings of the runs that were found: a value, or all that differ in one text."""
    settings_of_runs = [run.settings for run in runs if run is not None]
    keys = {key for settings in settings_of_runs for key in settings}
    joined = {}
    for key in sorted(keys.difference(SEEDED)):
        values = [settings.get(key) for settings in settings_of_runs]
        texts = sorted({str(value) for value in values})
        joined[key] = values[0] if len(texts) == 1 else "+".join(texts)
    return joined


class Runs:
    """The runs that were read, by name, each at any epoch."""

    def __init__(self, records: list[Record]):
        self.named: dict[tuple, list[Record]] = {}
        for run in records:
            name = (run.model, files.safe_name(run.label), run.seed, run.fingerprint)
            self.named.setdefault(name, []).append(run)
        self.at_epoch = {(run.folder, run.epoch): run for run in records}
        self.met: list[Record] = []

    def find(self, member: dict, teacher: Record) -> Record | None:
        """The run of a teacher's member, at the epoch that taught, or None.

        `member` is what the student's result says of it.
        """
        if member["seed"] is None:  # a third party's weights
            return None
        # Runs that are called as the teacher was, on the same images.
        label = files.safe_name(label_as_trained(member))
        runs = self.named.get((member["model"], label, member["seed"], teacher.fingerprint), [])

        # What the student measured is of the whole teacher, at the size that it was fed with.
        is_measured = member is teacher.identity and "size" not in member
        candidates = []
        for run in runs:
            fitting = epochs_that_fit(run, member["sha256"], teacher, is_measured)
            for epoch, fit in fitting.items():
                candidates.append(Candidate(fit, run, epoch))
        # The likeliest that can be read.
        for candidate in sorted(candidates, key=lambda candidate: candidate.fit):
            with suppress(Exception):  # of a damaged result only the epoch asked for is whole
                return self.run_at(candidate.run, candidate.epoch)
        return None

    def run_at(self, run: Record, epoch: str) -> Record:
        """A run at an epoch: the same record whenever it is asked for, so that it is one row."""
        if (run.folder, epoch) not in self.at_epoch:
            other = run.at(epoch)
            self.at_epoch[run.folder, epoch] = other
            if other.taught_by:
                self.met.append(other)
        return self.at_epoch[run.folder, epoch]

    def students_met(self) -> list[Record]:
        """Records made since the last call that have a teacher."""
        met = self.met
        self.met = []
        return met


class Fit(NamedTuple):
    """How unlikely an epoch of a run is to have taught: the least first."""

    weights_are_gone: bool
    is_not_named: bool
    distance: float


class Candidate(NamedTuple):
    fit: Fit
    run: Record
    epoch: str


def label_as_trained(member: dict) -> str:
    """A member's label without the temperature that divided its logits for the student.

    That stands in the label of a single net; of several it stands in that of the whole.
    """
    suffix = temperature_suffix(member.get("teacher_temperature", 1))
    return member["label"].removesuffix(suffix)


def epochs_that_fit(run: Record, sha256: str, teacher: Record, is_measured: bool) -> dict[str, Fit]:
    """The epochs of a run that may be a teacher with weights of that hash.

    Weights that are there decide. Where they were deleted the NLL that the student measured does
    (`is_measured`), and the name of the file that it read.
    """
    hashes = run.weight_hashes
    fitting = {}
    for epoch in EPOCHS:
        is_named = teacher.epoch == epoch
        distance = run.nll_distance(teacher, epoch) if is_measured else 0.0
        if epoch in hashes:
            fits = hashes[epoch] == sha256
        elif hashes:  # those of the other epoch alone were kept
            fits = is_named and distance < ROUNDING
        else:
            fits = distance < ROUNDING
        if fits:
            fitting[epoch] = Fit(
                weights_are_gone=epoch not in hashes,
                is_not_named=not is_named,
                distance=distance,
            )
    return fitting
