"""Runs that differ only in the seed form a group; a student's group belongs below its teacher's."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from utils.analysis.records import LeftOut, Record
from utils.files import safe_name


def same_but_for_seed(record: Record) -> tuple:
    """Equal for runs that differ only in the seed, their own and their teachers'.

    --exp_name is left to `by_exp_name`.
    """
    result = record.result
    names = [result[name] for name in ("dataset", "fingerprint", "model", "label")]
    settings = {
        name: record.settings[name] for name in record.settings.keys() - {"seed", "teacher"}
    }
    teacher = record.teacher and (record.teacher.exp_name, same_but_for_seed(record.teacher))
    return json.dumps([names, settings], sort_keys=True), teacher


def seeds_of(record: Record) -> tuple:
    """What tells a run from the others of its group: its own seed and its teachers'."""
    if record.borrowed:
        return record.result["seed"], record.result["teacher"]["sha256"]
    return record.result["seed"], record.teacher and seeds_of(record.teacher)


def by_exp_name(records: list[Record]) -> dict[str | None, list[Record]]:
    """Runs that are the same but for the seed, by --exp_name, which sets a group apart.

    Not where each --exp_name stands for one teacher's seed and the students' own seeds repeat:
    there it had to tell folders apart that would have had one name.
    """
    named: dict[str | None, list[Record]] = {}
    for record in records:
        named.setdefault(record.exp_name, []).append(record)
    if len(named) > 1 and all(record.teacher for record in records):
        teachers = [{seeds_of(record.teacher) for record in runs} for runs in named.values()]
        own = [{record.result["seed"] for record in runs} for runs in named.values()]
        apart = len(set().union(*teachers)) == len(named) == sum(map(len, teachers))
        if apart and all(seeds == own[0] for seeds in own):
            return {None: records}
    return named


@dataclass(eq=False)
class Group:
    """Runs that differ only in the seed, in its order. `difference` sets it apart by its name."""

    records: list[Record]
    exp_name: str | None = None
    teacher: "Group | None" = None
    difference: str = ""

    @property
    def first(self) -> Record:
        """The run that stands for all where they agree."""
        return self.records[0]

    @property
    def name(self) -> str:
        """`resnet8 KD T=4 Lambda=0.9`, and what sets it apart from others of that name."""
        return " ".join(filter(None, (self.first.name, self.exp_name, self.difference)))

    @property
    def full_name(self) -> str:
        """`resnet8 KD T=4 Lambda=0.9 from resnet56 NLL`: says itself who taught it."""
        return self.name if self.teacher is None else f"{self.name} from {self.teacher.full_name}"

    @property
    def teachers(self) -> list["Group"]:
        """Those that stand above it, the nearest first."""
        return [] if self.teacher is None else [self.teacher, *self.teacher.teachers]

    def values(self, metric: str, epoch: str, logits: str) -> np.ndarray:
        """A metric of every run, as `Record.metrics` has it; empty where it is unknown."""
        measured = [record.metrics(epoch, logits) for record in self.records]
        return np.array([one[metric] for one in measured if metric in one])


def group_runs(records: list[Record]) -> tuple[list[Group], list[LeftOut]]:
    """Groups by data set, nets that teach first, each before its students; and repeated runs.

    A teacher whose own run is not among `records` is known from what its students measured.
    """
    alike: dict[tuple, list[Record]] = {}
    everyone = [*records, *find_teachers(records)]
    for record in sorted(everyone, key=lambda one: natural(one.result["seed"])):
        alike.setdefault(same_but_for_seed(record), []).append(record)
    group_of: dict[Record, Group] = {}
    repeated = []
    for same in alike.values():
        for exp_name, runs in by_exp_name(same).items():
            kept: dict[tuple, Record] = {}
            for record in runs:
                first = kept.setdefault(seeds_of(record), record)
                if first is not record:
                    repeated.append(LeftOut(record.folder, f"repeats {first.folder}"))
            group_of |= dict.fromkeys(runs, Group(list(kept.values()), exp_name))
    groups = list(dict.fromkeys(group_of.values()))
    for group in groups:
        group.teacher = group_of.get(group.first.teacher)
    tell_apart(groups)
    return in_order(groups), repeated


def find_teachers(records: list[Record]) -> list[Record]:
    """Set the teacher of every student; returns those that are known from students, once each.

    A teacher's run is found by its name, and known by its weights where they were not deleted.
    """
    named: dict[tuple, list[Record]] = {}
    for record in records:
        result = record.result
        name = (result["model"], safe_name(result["label"]), result["seed"], result["fingerprint"])
        named.setdefault(name, []).append(record)
    borrowed: dict[str, Record] = {}
    for student in (record for record in records if record.taught_by):
        teacher, data = student.result["teacher"], student.result["fingerprint"]
        name = (teacher["model"], teacher["label"], teacher["seed"], data)
        student.teacher = next(
            (
                record
                for record in named.get(name, [])
                if record is not student and record.can_teach(teacher["sha256"])
            ),
            None,
        )
        if student.teacher is None:
            known = json.dumps([data, student.settings["teacher"]], sort_keys=True)
            student.teacher = borrowed.setdefault(known, student.taught_by)
    return list(borrowed.values())


def tell_apart(groups: Iterable[Group]) -> None:
    """Where groups of one teacher share a name, add the settings that differ between them."""
    namesakes: dict[tuple, list[Group]] = {}
    for group in groups:
        result = group.first.result
        place = (result["dataset"], result["fingerprint"], group.teacher, group.name)
        namesakes.setdefault(place, []).append(group)
    for same in namesakes.values():
        for key in differing([group.first.settings for group in same]):
            for group in same:
                text = str(group.first.settings.get(key)).replace(" ", "")
                text = f"{key}={text if len(text) <= 20 else text[:12]}"
                group.difference = f"{group.difference} {text}".strip()


def differing(settings: list[dict]) -> list[str]:
    """The names of those that are not the same everywhere, but for the seed's."""
    names = sorted(set().union(*settings) - {"seed", "teacher"}) if len(settings) > 1 else []
    return [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]


def in_order(groups: list[Group]) -> list[Group]:
    """By data set; nets that teach first, each before its students; then by name."""
    students: dict[Group | None, list[Group]] = {}
    for group in groups:
        students.setdefault(group.teacher, []).append(group)

    def rank(group: Group) -> tuple:
        result = group.first.result
        data = (natural(result["dataset"]), result["fingerprint"])
        return (data, group not in students, natural(group.name))

    def below(group: Group | None) -> list[Group]:
        own = sorted(students.get(group, []), key=rank)
        return [one for student in own for one in (student, *below(student))]

    return below(None)


def natural(name) -> list[tuple]:
    """A sort key that puts resnet8 before resnet20 and T=1.5 before T=10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(name))
    # A split at numbers leaves them at the odd places.
    return [
        (0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts)
    ]
