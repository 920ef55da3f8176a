"""Runs that differ only in the seed form a group; a student's group belongs below its teacher's."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import numpy as np

from utils.analysis.record import Record
from utils.analysis.records import LeftOut
from utils.settings import NEWER, Recipe

OPTIONAL = ("size", "key", "epoch")  # settings of a teacher that are there only if given


def grouped_by(items: Iterable, key: Callable) -> list[list]:
    """Those of equal keys together, all in their order."""
    families: dict = {}
    for item in items:
        families.setdefault(key(item), []).append(item)
    return list(families.values())


def same_but_for_seed(record: Record, any_epoch: bool = False) -> tuple:
    """Equal for runs that differ only in the seed, their own and their teachers', or --exp_name.

    At the same epoch, best or last, or at `any_epoch`.
    """
    names = [*record.data, record.model, record.label]
    if not any_epoch:
        names.append(record.epoch)
    settings = {
        key: value for key, value in record.settings.items() if key not in ("seed", "teacher")
    }
    teacher = None
    if record.teacher:
        teacher = (record.teacher.exp_name, same_but_for_seed(record.teacher))
    return json.dumps([names, settings], sort_keys=True), teacher


def seeds_of(record: Record) -> tuple:
    """What tells a run from the others of its group: its own seed and its teachers'."""
    if record.measured_by_student:
        return record.seed, record.measured["sha256"]
    return record.seed, seeds_of_teacher(record)


def seeds_of_teacher(record: Record) -> tuple | None:
    """None of a record without one."""
    return None if record.teacher is None else seeds_of(record.teacher)


def alike_in_weights(records: list[Record]) -> list[list[Record]]:
    """Runs that differ only in the seed; apart by their teacher where one seed of it had two.

    The weights of a run follow from its seed and settings. Where a teacher's run is not here, its
    settings are not known, and other weights at the same seed are those of another teacher.
    """
    pairs = {absent_teacher(record) for record in records}
    seeds = {seed for seed, _ in pairs}
    return [records] if len(seeds) == len(pairs) else grouped_by(records, absent_teacher)


def absent_teacher(record: Record) -> tuple:
    """Seed and SHA-256 of the nearest teacher that has no run here, or of the record if it is one.

    (None, None) where all are runs.
    """
    if record.measured_by_student:
        return record.seed, record.measured["sha256"]
    return (None, None) if record.teacher is None else absent_teacher(record.teacher)


def named_apart(records: list[Record]) -> bool:
    """Whether --exp_name sets runs apart that are otherwise the same but for the seed.

    Not where each --exp_name stands for one teacher's seed: there it only told folders apart.
    """
    pairs = {(record.exp_name, seeds_of_teacher(record)) for record in records}
    names = {name for name, _ in pairs}
    teachers = {teacher for _, teacher in pairs}
    is_one_to_one = len(pairs) == len(names) == len(teachers)
    return None in teachers or not is_one_to_one


@dataclass(eq=False)
class Group:
    """Runs that differ only in the seed, in its order; `first` stands for all where they agree."""

    records: list[Record]
    exp_name: str | None = None
    teacher: "Group | None" = None
    difference: str = ""  # what sets its name apart from another's
    rows: dict = field(default_factory=dict)  # by raw, scaled, ...: its rows.Row

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def seeds(self) -> set[tuple]:
        """What `seeds_of` gives for its runs."""
        return {seeds_of(record) for record in self.records}

    @property
    def name(self) -> str:
        """`resnet8 KD T=4 Lambda=0.9`, and what sets it apart from others of that name."""
        words = [self.first.name, self.first.note, self.exp_name, self.difference]
        return " ".join(word for word in words if word)

    @property
    def full_name(self) -> str:
        """`resnet8 KD T=4 Lambda=0.9 from resnet56 NLL`: says itself who taught it."""
        return self.name if self.teacher is None else f"{self.name} from {self.teacher.full_name}"

    @property
    def teachers(self) -> list["Group"]:
        """Those that stand above it, the nearest first."""
        return [] if self.teacher is None else [self.teacher, *self.teacher.teachers]

    @property
    def has_history(self) -> bool:
        return all(record.history for record in self.records)

    def validation(self, metric: str, seeds: set[tuple] | None = None) -> np.ndarray:
        """A metric of every run, raw, on validation (fractions); empty where one lacks it.

        Of the runs of these `seeds` (see `seeds_of`), where there are some to choose by.
        """
        chosen = [run for run in self.records if not seeds or seeds_of(run) in seeds]
        measured = [run.measured["val"] for run in chosen]
        if not all(metric in values for values in measured):
            return np.array([])
        return np.array([values[metric] for values in measured])


def group_runs(records: list[Record]) -> tuple[list[Group], list[LeftOut]]:
    """Groups by data set, nets that teach first, each before its students; and repeated runs.

    A run that taught stands for itself at the epoch that taught, whichever `records` hold. A
    teacher whose own run is not among them is known from what its students measured.
    """
    nets = nets_to_show(records)
    nets.sort(key=lambda net: natural(net.seed))

    group_of: dict[Record, Group] = {}
    repeated: list[LeftOut] = []
    for runs, exp_name in runs_of_groups(nets):
        group = Group([], exp_name)
        for first, *others in grouped_by(runs, seeds_of):
            group.records.append(first)
            repeated += [LeftOut(run.folder, f"repeats {first.folder}") for run in others]
        group_of.update(dict.fromkeys(runs, group))

    groups = list(dict.fromkeys(group_of.values()))
    for group in groups:
        group.teacher = group_of.get(group.first.teacher)
    tell_apart(groups)
    return in_order(groups), repeated


def runs_of_groups(nets: list[Record]) -> Iterator[tuple[list[Record], str | None]]:
    """The runs of each group, and the --exp_name that sets them apart, where one does."""
    for family in grouped_by(nets, same_but_for_seed):
        for same in alike_in_weights(family):
            if named_apart(same):
                for runs in grouped_by(same, attrgetter("exp_name")):
                    yield runs, runs[0].exp_name
            else:
                yield same, None


def nets_to_show(records: list[Record]) -> list[Record]:
    """The runs, those that taught at the epochs that did, and the teachers that have no run here.

    Students of one such teacher get one record of it, the first that measured it.
    """
    shown = {record.folder for record in records}
    without_run: dict[str, Record] = {}
    trained: dict[Path, list[Record]] = {}  # the runs that taught, at the epochs that did
    for student in with_teachers(records):
        if student.teacher.measured_by_student or student.teacher.folder not in shown:
            measured = student.taught_by
            recorded = [measured.fingerprint, measured.epoch, student.settings["teacher"]]
            key = json.dumps(recorded, sort_keys=True)
            student.teacher = without_run.setdefault(key, measured)
        else:
            epochs = trained.setdefault(student.teacher.folder, [])
            if student.teacher not in epochs:
                epochs.append(student.teacher)

    nets = []
    for record in records:
        nets += trained.get(record.folder, [record])
    return [*nets, *without_run.values()]


def with_teachers(records: list[Record]) -> list[Record]:
    """The students among the records and among their teachers, which may be another epoch's."""
    latest = [record for record in records if record.teacher]
    students = []
    seen = set(latest)
    while latest:
        students += latest
        # Then those of their teachers that were taught themselves.
        teachers = dict.fromkeys(student.teacher for student in latest)
        latest = [teacher for teacher in teachers if teacher.teacher and teacher not in seen]
        seen.update(latest)
    return students


def tell_apart(groups: Iterable[Group]) -> None:
    """Where groups of one teacher share a name, add the settings that differ between them."""
    for same in grouped_by(groups, lambda group: (*group.first.data, group.teacher, group.name)):
        settings = [full_settings(group) for group in same]
        keys = sorted({key for values in settings for key in values} - {"seed", "teacher"})
        of_all = [
            key for key in keys if key in OPTIONAL or all(key in values for values in settings)
        ]
        for key in of_all:
            add_difference(same, key)
        # A teacher whose run is not here lacks most settings: a single further one has to do.
        for key in keys:
            if not are_told_apart(same) and key not in of_all:
                add_difference(same, key)
        # Teachers without a run here that agree in all that is known of them.
        if not are_told_apart(same):
            add_weights(same)


def full_settings(group: Group) -> dict:
    """By name, with the defaults of those that a run leaves out.

    A teacher whose run is not here lacks most.
    """
    record = group.first
    if record.measured_by_student:
        return record.settings
    return {name: getattr(Recipe, name) for name in NEWER} | record.settings


def are_told_apart(groups: list[Group]) -> bool:
    return len({group.difference for group in groups}) == len(groups)


def add_weights(groups: list[Group]) -> None:
    """The beginning of the SHA-256 of a teacher's weights, added to its name."""
    for group in groups:
        if group.first.measured_by_student:
            sha256 = group.first.measured["sha256"][:12]
            group.difference = f"{group.difference} sha256={sha256}".strip()


def add_difference(groups: list[Group], key: str) -> None:
    """A setting added to the groups' names, shortened where that leaves its values different.

    A group without that setting keeps its name.
    """
    values = [full_settings(group).get(key) for group in groups]
    texts = ["" if value is None else str(value).replace(" ", "") for value in values]
    if len(set(texts)) == 1:
        return
    short = [text if len(text) <= 20 else text[:12] for text in texts]
    if len(set(short)) > 1:
        texts = short
    for group, text in zip(groups, texts, strict=True):
        if text:
            group.difference = f"{group.difference} {key}={text}".strip()


def in_order(groups: list[Group]) -> list[Group]:
    """By data set; nets that teach first, each before its students; then by name."""
    students = {same[0].teacher: same for same in grouped_by(groups, attrgetter("teacher"))}

    def rank(group: Group) -> tuple:
        run = group.first
        return natural(run.dataset), run.fingerprint, group not in students, natural(group.name)

    def below(group: Group | None) -> list[Group]:
        ordered = []
        for student in sorted(students.get(group, []), key=rank):
            ordered += [student, *below(student)]
        return ordered

    return below(None)


def natural(name) -> list[tuple]:
    """A sort key that puts resnet8 before resnet20 and T=1.5 before T=10."""
    pairs = re.findall(r"(\D*)(\d+(?:\.\d+)?)?", str(name))
    return [(text, float(number or 0)) for text, number in pairs]
