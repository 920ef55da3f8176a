"""What runs amount to: sections of one data set each, sweeps and what validation chooses.

Nothing here is chosen by a test value.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from utils.analysis.groups import Group, group_runs, grouped_by
from utils.analysis.marks import mark_best
from utils.analysis.record import Record
from utils.analysis.records import LeftOut
from utils.analysis.rows import check_rows, quick_rows_of, rows_of
from utils.analysis.splits import suited_to_test
from utils.columns import COLUMNS, SET_METRICS
from utils.program.bars import progress_bar
from utils.program.files import one_line

SELECT = ("nll", "refinement", "ece", "sce", "adaece", "brier", "top1")
USUAL = ["top1", "ece", "sce", "adaece", "nll", "true_calibration_error"]
TUNED = ("lr", "weight_decay", "momentum")  # a sweep may run over these as over a loss's parameters
DRAWN = 32  # nets in figures: as many as can be told apart
LARGEST = 20  # settings along a side of a heat map


@dataclass(frozen=True)
class ReportChoice:
    """What a report shows of the runs that it read."""

    columns: tuple[str, ...] = ()  # none: the usual ones that are known
    epoch: str = "best"
    select: str = "nll"  # the metric that chooses a sweep's setting, on validation
    resamples: int = 1000  # draws behind an ECE's interval, 0 for none
    test_temperature: bool = False
    nets: int = 100  # rows at most
    classes: bool = False  # also tables class by class

    @property
    def with_sets(self) -> bool:
        return any(metric in SET_METRICS for metric in self.columns)


@dataclass(eq=False)
class Sweep:
    """Groups that differ only in numbers: their loss's parameters, or those in TUNED.

    They are compared on the `seeds` that all of them have (see `seeds_of`), for a seed is luck that
    a setting must not win by. Without one each is judged by its own seeds.
    """

    parameters: list[str]
    places: dict[Group, list[float]]  # the parameters' values
    chosen: Group
    seeds: set[tuple]

    @property
    def name(self) -> str:
        """`resnet8 KD from resnet56 NLL over T and Lambda`."""
        run = self.chosen.first
        teacher = self.chosen.teacher
        origin = f" from {teacher.full_name}" if teacher else ""
        return f"{run.model} {run.loss}{origin} over {' and '.join(self.parameters)}"

    @property
    def values(self) -> list[list[float]]:
        """The values that each parameter takes, in order."""
        return [
            sorted({place[number] for place in self.places.values()})
            for number in range(len(self.parameters))
        ]

    @property
    def is_grid(self) -> bool:
        """Whether a map of it has two sides, not too long, and at least half of its cells."""
        sides = [len(values) for values in self.values]
        cells = math.prod(sides)
        return len(sides) == 2 and max(sides) <= LARGEST and 2 * len(self.places) >= cells

    @property
    def beaten(self) -> list[Group]:
        return [group for group in self.places if group is not self.chosen]

    @property
    def seeds_differ(self) -> bool:
        """Whether a setting has a seed that another one lacks."""
        return any(group.seeds != self.seeds for group in self.places)


@dataclass
class Section:
    """All that is to be said of one data set. `printed`: the groups that tables show."""

    title: str
    choice: ReportChoice
    columns: list[str]
    groups: list[Group]
    sweeps: list[Sweep]
    unchosen: list[list[Group]]  # sweeps that validation says nothing of
    printed: list[Group]

    @property
    def compared(self) -> list[Group]:
        """The printed groups; of each sweep the chosen one alone."""
        beaten = {group for sweep in self.sweeps for group in sweep.beaten}
        return [group for group in self.printed if group not in beaten]

    @property
    def drawn(self) -> list[Group]:
        """The groups in figures: but for those in a heat map, as many as can be told apart."""
        mapped = {group for sweep in self.sweeps if sweep.is_grid for group in sweep.beaten}
        first = self.compared[:DRAWN]
        others = [group for group in self.printed if group not in {*self.compared, *mapped}]
        drawn = {*first, *others[: DRAWN - len(first)]}
        return [group for group in self.printed if group in drawn]


def sections_of(records: list[Record], choice: ReportChoice) -> tuple[list[Section], list[LeftOut]]:
    """One section for each data set; what cannot be read takes its run out of all of them."""
    sections, repeated = unmeasured_sections(records, choice)
    left_out: list[LeftOut] = []
    while unreadable := unreadable_runs(printed_groups(sections), choice):
        left_out += unreadable
        # Others may be shown in their place, and are read then.
        folders = {run.folder for run in left_out}
        readable = [record for record in records if record.folder not in folders]
        sections, repeated = unmeasured_sections(readable, choice)

    for section in sections:
        for group in section.groups:
            group.rows = quick_rows_of(group)
    for group in progress_bar(printed_groups(sections), "measuring"):
        group.rows = rows_of(group, choice.resamples, choice.with_sets)
    for section in sections:
        mark_best(section.compared)
    return sections, left_out + repeated


def unmeasured_sections(
    records: list[Record], choice: ReportChoice
) -> tuple[list[Section], list[LeftOut]]:
    """What each data set's tables will show, by the results alone; and the runs that repeat one."""
    groups, repeated = group_runs(records)
    by_data = grouped_by(groups, lambda group: group.first.data)
    names = [same[0].first.dataset for same in by_data]
    return [section_of(same, names, choice) for same in by_data], repeated


def printed_groups(sections: list[Section]) -> list[Group]:
    return [group for section in sections for group in section.printed]


def unreadable_runs(groups: list[Group], choice: ReportChoice) -> list[LeftOut]:
    """Runs of these groups of which a file that the report needs is damaged, each once."""
    unreadable: dict[Path, LeftOut] = {}
    runs = [run for group in groups for run in group.records]
    for run in progress_bar(runs, "reading predictions"):
        try:
            run.read_history()
            check_rows(run, with_gaps=choice.resamples > 0, with_sets=choice.with_sets)
            if choice.resamples or choice.test_temperature:
                suited_to_test(run)
        except Exception as error:  # whatever it is, it concerns this run alone
            reason = one_line(error).replace(f"{run.folder}/", "")
            unreadable[run.folder] = LeftOut(run.folder, reason)
    return list(unreadable.values())


def section_of(groups: list[Group], names: list[str], choice: ReportChoice) -> Section:
    """`names`: of all data sets, to tell apart those of one name."""
    name, fingerprint = groups[0].first.data
    measured = {metric for group in groups for metric in group.first.measured["test"]["raw"]}
    usual = [metric for metric in USUAL if metric in measured]
    sweeps, unchosen = find_sweeps(groups, choice.select)
    section = Section(
        title=name if names.count(name) == 1 else f"{name} ({fingerprint[:8]})",
        choice=choice,
        columns=list(choice.columns) or usual,
        groups=groups,
        sweeps=sweeps,
        unchosen=unchosen,
        printed=groups,
    )
    if len(groups) > choice.nets:  # the best by validation, and their teachers
        ranked = sorted(section.compared, key=lambda group: validation_loss(group, choice.select))
        kept = set()
        for group in ranked[: choice.nets]:
            kept.update([group, *group.teachers])
        section.printed = [group for group in groups if group in kept]
    return section


def validation_loss(group: Group, metric: str, seeds: set[tuple] | None = None) -> float:
    """The mean of a metric, raw, on validation, with the sign that makes less the better.

    Over the runs of these `seeds` where some are given; infinite where it is unknown.
    """
    values = group.validation(metric, seeds)
    if not len(values):
        return math.inf
    sign = -1 if COLUMNS[metric].best == "max" else 1
    return sign * values.mean()


def numbers_of(group: Group) -> dict[str, float]:
    """What a sweep may run over."""
    run = group.first
    numbers = dict(run.parameters)
    for name in TUNED:
        value = run.settings.get(name)
        if isinstance(value, int | float):
            numbers[name] = value
    return numbers


def same_but_for_numbers(group: Group) -> tuple:
    """Equal for groups of one sweep."""
    run = group.first
    numbers = numbers_of(group)
    free = {"seed", "teacher", "label", *numbers}
    settings = {key: value for key, value in run.settings.items() if key not in free}
    fixed = [run.model, run.loss, group.exp_name, sorted(numbers), settings]
    return json.dumps(fixed, sort_keys=True), group.teacher


def find_sweeps(groups: list[Group], select: str) -> tuple[list[Sweep], list[list[Group]]]:
    """Two or more groups that differ only in numbers, and the one that validation prefers.

    `select`: the metric that it prefers by, of raw logits. Then those of which none has it: nothing
    is chosen from them, and they are compared as others are.
    """
    sweeps = []
    unchosen = []
    for same in grouped_by(groups, same_but_for_numbers):
        numbers = {group: numbers_of(group) for group in same}
        varied = [
            name
            for name in numbers[same[0]]
            if len({values[name] for values in numbers.values()}) > 1
        ]
        if not varied:
            continue
        seeds = same[0].seeds
        for group in same:
            seeds = seeds & group.seeds
        losses = {group: validation_loss(group, select, seeds) for group in same}
        if math.isinf(min(losses.values())):
            unchosen.append(same)
            continue
        sweep = Sweep(
            parameters=varied,
            places={group: [numbers[group][name] for name in varied] for group in same},
            chosen=min(losses, key=losses.get),
            seeds=seeds,
        )
        sweeps.append(sweep)
    return sweeps, unchosen
