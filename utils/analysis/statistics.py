"""What runs amount to: mean and spread over seeds, intervals, sweeps and what validation chooses.

A section holds one data set. Nothing here is chosen by a test value. `args` are the flags of
scripts/report.py.
"""

import json
import math
from argparse import Namespace
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from utils.analysis.columns import COLUMNS
from utils.analysis.groups import Group, alike, group_runs, seeds_of
from utils.analysis.records import LOGITS, LeftOut, Record
from utils.analysis.splits import suited_to_test
from utils.calibration import bootstrap
from utils.calibration.bootstrap import PAIRED, Difference
from utils.program import UserError
from utils.program.files import one_line

SELECT = ("nll", "ece", "sce", "adaece", "brier", "top1")
USUAL = ["top1", "ece", "sce", "adaece", "nll", "true_calibration_error"]
TUNED = ("lr", "weight_decay", "momentum")  # a sweep may run over these as over a loss's parameters
DRAWN = 32  # nets in figures: as many as can be told apart
MANY = 30  # runs: above, the spread between them says more than an interval of each
FEW = 20  # test images: the value of a bin with fewer is mostly chance


class Cell(NamedTuple):
    """Mean and sample standard deviation over a group's runs, NaN for one run; fractions.

    `interval`: of the true value of the mean, over test samples. `calibrated`: what the mean ECE of
    as many calibrated nets of the same confidences would be, and what 95 % of draws stay below.
    """

    mean: float
    sd: float
    mark: str = ""
    interval: tuple[float, float] | None = None
    calibrated: tuple[float, float] | None = None


class Row(NamedTuple):
    """A group's raw, scaled, ... logits; a metric that is unknown is absent."""

    cells: dict[str, Cell]
    at_bound: bool
    few: bool  # a bin of confidence holds fewer than FEW test images


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
        run, teacher = self.chosen.first, self.chosen.teacher
        origin = f" from {teacher.full_name}" if teacher else ""
        return f"{run.model} {run.loss}{origin} over {' and '.join(self.parameters)}"

    @property
    def seeds_differ(self) -> bool:
        """Whether a setting has a seed that another one lacks."""
        return any(set(map(seeds_of, group.records)) != self.seeds for group in self.places)


@dataclass
class Section:
    """All that is to be said of one data set. `printed`: the groups that tables show."""

    title: str
    args: Namespace
    columns: list[str]
    groups: list[Group]
    sweeps: list[Sweep]
    printed: list[Group]

    @property
    def compared(self) -> list[Group]:
        """Of a sweep only the chosen group."""
        beaten = {group for one in self.sweeps for group in one.places if group is not one.chosen}
        return [group for group in self.printed if group not in beaten]

    @property
    def drawn(self) -> list[Group]:
        return self.compared[:DRAWN]


def sections_of(records: list[Record], args: Namespace) -> tuple[list[Section], list[LeftOut]]:
    """One section for each data set; what cannot be read takes its run out of all of them."""
    groups, repeated = group_runs(records)
    parts = alike(groups, lambda group: group.first.data)
    names = [part[0].first.dataset for part in parts]
    sections = [section_of(part, names, args) for part in parts]
    printed = dict.fromkeys(group for section in sections for group in section.printed)
    shown = [(group, run) for group in printed for run in group.records]
    unreadable: dict[Path, LeftOut] = {}
    for group, run in tqdm(shown, "measuring", leave=False, disable=None):
        try:
            rows_of(Group([run]), args, len(group.records) <= MANY or run is group.first)
            len(run.history)
            if args.resamples or args.test_temperature:
                suited_to_test(run)
        except Exception as error:  # whatever it is, it concerns this run alone
            reason = one_line(error).replace(f"{run.folder}/", "")
            unreadable[run.folder] = LeftOut(run.folder, reason)
    if unreadable:  # others may be shown in their place
        readable = [run for run in records if run.folder not in unreadable]
        sections, left_out = sections_of(readable, args)
        return sections, [*unreadable.values(), *left_out]
    for section in sections:
        for group in section.groups:
            group.rows = rows_of(group, args, group in printed)
        mark(section)
    return sections, repeated


def section_of(groups: list[Group], names: list[str], args: Namespace) -> Section:
    """`names`: of all data sets, to tell apart those of one name."""
    name, fingerprint = groups[0].first.data
    title = name if names.count(name) == 1 else f"{name} ({fingerprint[:8]})"
    known = set().union(*(group.first.measured["test"]["raw"] for group in groups))
    columns = args.columns or [metric for metric in USUAL if metric in known]
    section = Section(title, args, columns, groups, find_sweeps(groups, args), groups)
    if len(groups) > args.nets:  # the best by validation, and their teachers
        ranked = sorted(section.compared, key=lambda group: validation_loss(group, args))
        kept = {one for group in ranked[: args.nets] for one in (group, *group.teachers)}
        section.printed = [group for group in groups if group in kept]
    return section


def validation_loss(group: Group, args: Namespace, seeds: set[tuple] | None = None) -> float:
    """The mean of the metric that selects, raw, on validation; the lower the better.

    Over the runs of these `seeds` where some are given.
    """
    values = group.validation(args.select, seeds)
    sign = -1 if COLUMNS[args.select].best == "max" else 1
    return sign * values.mean() if len(values) else math.inf


def numbers_of(group: Group) -> dict[str, float]:
    """What a sweep may run over."""
    run = group.first
    tuned = {name: run.settings.get(name) for name in TUNED}
    return run.parameters | {name: x for name, x in tuned.items() if isinstance(x, (int, float))}


def find_sweeps(groups: list[Group], args: Namespace) -> list[Sweep]:
    """Two or more groups that differ only in numbers, and the one that validation prefers."""

    def fixed(group: Group) -> tuple:
        run, numbers = group.first, numbers_of(group)
        free = {"seed", "teacher", "label", *numbers}
        settings = {key: x for key, x in run.settings.items() if key not in free}
        same = [run.model, run.loss, group.exp_name, sorted(numbers), settings]
        return json.dumps(same, sort_keys=True), group.teacher

    sweeps = []
    for same in alike(groups, fixed):
        numbers = [numbers_of(group) for group in same]
        varied = [name for name in numbers[0] if len({one[name] for one in numbers}) > 1]
        if varied:
            values = ([one[name] for name in varied] for one in numbers)
            places = dict(zip(same, values, strict=True))
            seeds = set.intersection(*(set(map(seeds_of, group.records)) for group in same))
            losses = {group: validation_loss(group, args, seeds) for group in same}
            sweeps.append(Sweep(varied, places, chosen=min(losses, key=losses.get), seeds=seeds))
    return sweeps


def with_chance(cell: Cell, records: list[Record], logits: str, draws: int) -> Cell:
    """The ECE of these runs with its interval, and what calibrated nets would measure.

    Without them where a run has no stored predictions, or `draws` is 0.
    """
    predicted = [record.probabilities(logits) for record in records] if draws else []
    if None in predicted or not predicted:
        return cell
    runs = [bootstrap.gaps(*prediction) for prediction in predicted]
    bins = bootstrap.bins_of(runs, draws)
    calibrated = bootstrap.calibrated_error(bins)
    return cell._replace(
        mark="chance" if cell.mean <= calibrated[1] else "",
        interval=bootstrap.error_interval(bins),
        calibrated=calibrated,
    )


def rows_of(group: Group, args: Namespace, in_full: bool) -> dict[str, Row]:
    """One for each kind of logits that all its runs have; `in_full`: with what takes time."""
    records, rows = group.records, {}
    tests = [record.tests if in_full else record.measured["test"] for record in records]
    kinds = (kind for kind in tests[0] if all(kind in test for test in tests))
    for logits in kinds if in_full else [kind for kind in kinds if kind in LOGITS]:
        measured = [test[logits] for test in tests]
        metrics = [name for name in COLUMNS if all(name in one for one in measured)]
        values = np.array([[one[name] for name in metrics] for one in measured])
        spreads = values.std(axis=0, ddof=1) if len(values) > 1 else [math.nan] * len(metrics)
        cells = dict(zip(metrics, map(Cell, values.mean(axis=0), spreads), strict=True))
        if in_full and logits in LOGITS and len(records) <= MANY:
            cells["ece"] = with_chance(cells["ece"], records, logits, args.resamples)
        bounds = (record.measured["temperature_at_bound"] for record in records)
        few = any(one.get("smallest_bin", FEW) < FEW for one in measured)
        rows[logits] = Row(cells, logits == "scaled" and any(bounds), few)
    return rows


def mark(section: Section) -> None:
    """Mark the best of each metric, and those whose difference from it is within the spread.

    Only rows of equal logits are compared, none that a sweep has beaten: a setting that validation
    did not choose must not win by its test value, nor a temperature at the bound of its range. The
    spread of a difference is the root of the sum of both variances, unknown for single runs. An ECE
    that a calibrated net could have is marked "chance"; if the lowest is or may be, none is best.
    """
    rows = [row for group in section.compared for row in group.rows.items()]
    kinds = dict.fromkeys(logits for logits, _ in rows)
    for logits, (metric, column) in product(kinds, COLUMNS.items()):
        alike = [row.cells for kind, row in rows if kind == logits and not row.at_bound]
        family = [cells for cells in alike if metric in cells]
        if len(family) < 2:
            continue
        best_of = max if column.best == "max" else min
        best = best_of((cells[metric] for cells in family), key=lambda cell: cell.mean)
        unknown = not best.calibrated and any(cells[metric].calibrated for cells in family)
        for cells in family if not (best.mark or unknown) else ():
            cell = cells[metric]
            close = abs(cell.mean - best.mean) <= math.hypot(cell.sd, best.sd)
            if cell.mark == "" and (close or cell.mean == best.mean):
                cells[metric] = cell._replace(mark="best" if cell.mean == best.mean else "close")


def find_group(sections: list[Section], name: str) -> tuple[Section, Group]:
    """The row that --against names: with its teacher and data set, or shorter where that is clear.

    Raises UserError.
    """
    places = [(section, group) for section in sections for group in section.groups]
    names = [
        (f"{section.title} {group.full_name}", group.full_name, group.name)
        for section, group in places
    ]
    for length in range(3):  # the longest name first: it is some row's own
        named = [place for place, own in zip(places, names, strict=True) if own[length] == name]
        if len(named) == 1:
            return named[0]
        if named:
            several = [own for own in names if own[length] == name]
            unique = len({own[1] for own in several}) == len(several)
            choices = [repr(own[1] if unique else own[0]) for own in several]
            fault = f"--against {name}: {len(named)} rows have that name"
            raise UserError(f"{fault}; give one of {', '.join(choices)}")
    close = get_close_matches(name, [text for own in names for text in own], 1, 0)
    raise UserError(f"--against {name}: there is no such row; did you mean {''.join(close)}?")


def distinct(section: Section, against: Group) -> list[Group]:
    """The printed groups but for `against`, and for those that repeat the logits of another.

    A teacher whose logits were divided for its students is the same net as its run's row.
    """

    def nets(group: Group) -> frozenset:
        runs = [record.source or record for record in group.records]
        own = [run.measured["sha256"] if run.borrowed else (run.folder, run.owner) for run in runs]
        return frozenset(own)

    first: dict[frozenset, Group] = {nets(against): against}
    for group in sorted(section.printed, key=lambda group: group.first.borrowed):
        first.setdefault(nets(group), group)
    return [group for group in section.printed if group in first.values() and group is not against]


def differences(section: Section, against: Group) -> dict[tuple[Group, str, str], Difference]:
    """Of each printed group from another: by group, kind of logits and metric (fractions).

    p-values are Holm's, for all groups in one metric and kind of logits. A metric that is no mean
    over images or bins, and a run without stored predictions, has none. Nor has a teacher that
    repeats another group's logits, divided for its students: the same test twice is one test.
    """

    def matrices(group: Group, logits: str, metric: str) -> list[np.ndarray] | None:
        predicted = [record.probabilities(logits) for record in group.records]
        return None if None in predicted else [PAIRED[metric](*one) for one in predicted]

    groups = distinct(section, against)
    found, draws = {}, section.args.resamples or 1000
    for logits, metric in product(LOGITS, filter(PAIRED.__contains__, section.columns)):
        base = matrices(against, logits, metric)
        family = {
            (group, logits, metric): bootstrap.paired_difference(own, base, draws)
            for group in groups
            if base and (own := matrices(group, logits, metric))
        }
        adjusted = bootstrap.holm([one.p for one in family.values()])
        for (key, one), p in zip(family.items(), adjusted, strict=True):
            found[key] = one._replace(p=p)
    return found
