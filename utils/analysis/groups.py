"""Runs that differ only in the seed form a group; a student's group belongs below its teacher's."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from utils.analysis.records import Apart, Record
from utils.files import safe_name
from utils.runs import number_text


@dataclass(eq=False)
class Group:
    """Runs that differ only in the seed, in its order. `difference` sets it apart by its name."""

    records: list[Record]
    teacher: "Group | None" = None
    difference: str = ""

    @property
    def first(self) -> dict:
        """The result that stands for all where they agree."""
        return self.records[0].result

    @property
    def name(self) -> str:
        """`resnet8 KD T=4 Lambda=0.9`, and what sets it apart from others of that name."""
        parameters = (f"{key}={number_text(x)}" for key, x in self.first["loss_parameters"].items())
        exp_name = self.records[0].exp_name
        words = (self.first["model"], self.first["loss"], *parameters, exp_name, self.difference)
        return " ".join(filter(None, words))

    @property
    def full_name(self) -> str:
        """`resnet8 KD T=4 Lambda=0.9 from resnet56 NLL`: says itself who taught it."""
        return self.name if self.teacher is None else f"{self.name} from {self.teacher.full_name}"

    @property
    def depth(self) -> int:
        """How many teachers stand above it."""
        return 0 if self.teacher is None else 1 + self.teacher.depth

    def values(self, metric: str, epoch: str, way: str) -> np.ndarray:
        """A metric of every run, as `Record.metrics` has it; empty where it is unknown."""
        found = [record.metrics(epoch, way) for record in self.records]
        return np.array([one[metric] for one in found if metric in one])


def group_runs(records: list[Record]) -> tuple[list[Group], list[Apart]]:
    """Groups by data set, nets that teach first, each before its students; and repeated runs.

    A teacher whose own run is not among `records` is known from what its students measured.
    """
    members: dict[str, dict[tuple, Record]] = {}
    repeated = []
    everyone = [*records, *find_teachers(records)]
    for record in sorted(everyone, key=lambda one: natural(one.result["seed"])):
        kept = members.setdefault(record.key, {}).setdefault(record.seeds, record)
        if kept is not record:
            repeated.append(Apart(record.folder, f"repeats {kept.folder}"))
    groups = {key: Group(list(same.values())) for key, same in members.items()}
    for group in groups.values():
        teacher = group.records[0].teacher
        group.teacher = teacher and groups[teacher.key]
    tell_apart(groups.values())
    return in_order(list(groups.values())), repeated


def find_teachers(records: list[Record]) -> list[Record]:
    """Set the teacher of every student; returns those that had to be borrowed, once each."""
    borrowed: dict[str, Record] = {}
    for student in records:
        wanted = student.result["settings"].get("teacher")
        if wanted is not None:
            own = (record for record in records if is_teacher(record, student))
            student.teacher = next(own, None)
            if student.teacher is None:
                known = json.dumps([student.result["fingerprint"], wanted])
                student.teacher = borrowed.setdefault(known, borrow(student))
    return list(borrowed.values())


def is_teacher(record: Record, student: Record) -> bool:
    """Whether it is the same net: by its weights, or by its name where those were deleted."""
    result, wanted = record.result, student.result["settings"]["teacher"]
    named = (
        record is not student
        and result["model"] == wanted["model"]
        and safe_name(result["label"]) == wanted["label"]
        and result["seed"] == wanted["seed"]
        and result["fingerprint"] == student.result["fingerprint"]
    )
    return named and (not record.weights or wanted["sha256"] in record.weights)


def borrow(student: Record) -> Record:
    """The teacher as its student's run describes it. A third party's file stands for itself."""
    teacher = student.result["teacher"]
    settings = {name: teacher[name] for name in ("mean", "std")}
    if teacher["seed"] is None:
        settings["sha256"] = teacher["sha256"]
    result = {name: student.result[name] for name in ("dataset", "num_classes", "fingerprint")}
    result |= {name: teacher[name] for name in ("model", "label", "seed")}
    result |= {"loss": teacher["label"].replace("_", " "), "loss_parameters": {}}
    result |= {"settings": settings, "teacher": teacher}
    return Record(student.folder, result, {}, borrowed=True)


def tell_apart(groups: Iterable[Group]) -> None:
    """Where groups of one teacher share a name, add the settings that differ between them."""
    namesakes: dict[tuple, list[Group]] = {}
    for group in groups:
        place = (group.first["dataset"], group.first["fingerprint"], group.teacher, group.name)
        namesakes.setdefault(place, []).append(group)
    for same in namesakes.values():
        settings = [group.first["settings"] for group in same]
        differing = [
            key
            for key in sorted(set().union(*settings) - {"seed", "teacher"})
            if len({json.dumps(one.get(key)) for one in settings}) > 1
        ]
        for group, own in zip(same, settings, strict=True):
            texts = (f"{key}={short(own.get(key))}" for key in differing)
            group.difference = " ".join(texts)


def short(value) -> str:
    text = str(value).replace(" ", "")
    return text if len(text) <= 20 else text[:12]


def in_order(groups: list[Group]) -> list[Group]:
    """By data set; nets that teach first, each before its students; then by name."""
    students: dict[Group | None, list[Group]] = {}
    for group in groups:
        students.setdefault(group.teacher, []).append(group)

    def rank(group: Group) -> tuple:
        data = (natural(group.first["dataset"]), group.first["fingerprint"])
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
