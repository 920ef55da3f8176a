"""What runs amount to: mean and spread over seeds, intervals, sweeps and what validation chooses.

A section holds one data set. Nothing here is chosen by a test value.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from utils.analysis.groups import Group
from utils.analysis.records import Apart
from utils.analysis.tables import Entry, Rows
from utils.calibration.bootstrap import ece_interval, gaps
from utils.runs import number_text
from utils.tables import COLUMNS, Column, printable

WAYS = ("raw", "scaled")
SELECT = ("nll", "ece", "sce", "adaece", "brier", "top1")
USUAL = ["top1", "ece", "sce", "adaece", "nll", "true_calibration_error"]


class Cell(NamedTuple):
    """Mean and sample standard deviation over the runs of a group; the latter NaN for one run.

    `interval`: of the mean, over test samples, where it was asked for (fractions).
    """

    mean: float
    sd: float
    mark: str = ""
    interval: tuple[float, float] | None = None


class Row(NamedTuple):
    """One way (raw, scaled, ...) of one group; a metric that is unknown is absent."""

    group: Group
    way: str
    cells: dict[str, Cell]


@dataclass
class Sweep:
    """Groups that differ only in the parameters of their loss."""

    groups: list[Group]
    chosen: Group
    parameters: list[str]

    @property
    def name(self) -> str:
        """`resnet8 KD from resnet56 NLL over T and Lambda`."""
        first = self.chosen.first
        teacher = f" from {self.chosen.teacher.full_name}" if self.chosen.teacher else ""
        return f"{first['model']} {first['loss']}{teacher} over {' and '.join(self.parameters)}"

    def values_of(self, parameter: str) -> list[float]:
        """The values of a parameter of the loss, each once, rising."""
        return sorted({group.first["loss_parameters"][parameter] for group in self.groups})

    def grid(self, metric: str, epoch: str) -> tuple[np.ndarray, tuple[int, int]]:
        """Validation means (second parameter, first), NaN without a run; the place chosen.

        With one parameter there is one row. No loss has more than two.
        """
        axes = [self.values_of(name) for name in self.parameters[::-1]]
        means = np.full([len(axis) for axis in axes], np.nan)
        for group in self.groups:
            means[self.place(group)] = group.values(metric, epoch, "val").mean()
        place = self.place(self.chosen)
        return means.reshape(-1, means.shape[-1]), (0, *place)[-2:]

    def place(self, group: Group) -> tuple[int, ...]:
        own = group.first["loss_parameters"]
        return tuple(self.values_of(name).index(own[name]) for name in self.parameters[::-1])


@dataclass
class Section:
    """All that is to be said of one data set, at one epoch ("best" or "last")."""

    title: str
    epoch: str
    select: str
    columns: list[str]
    groups: list[Group]
    rows: list[Row]
    sweeps: list[Sweep]

    @property
    def has_intervals(self) -> bool:
        return any(cell.interval for row in self.rows for cell in row.cells.values())

    def shown(self) -> list[Group]:
        """The groups to compare: of a sweep only the chosen one."""
        swept = {group for sweep in self.sweeps for group in sweep.groups}
        losers = swept - {sweep.chosen for sweep in self.sweeps}
        return [group for group in self.groups if group not in losers]


def sections_of(
    groups: list[Group], columns: list[str] | None, epoch: str, select: str, resamples: int
) -> list[Section]:
    """One section for each data set; `columns` None: the usual ones that are known."""
    parts: dict[tuple, list[Group]] = {}
    for group in groups:
        parts.setdefault((group.first["dataset"], group.first["fingerprint"]), []).append(group)
    names = [name for name, _ in parts]
    made = []
    for (name, fingerprint), part in parts.items():
        title = name if names.count(name) == 1 else f"{name} ({fingerprint[:8]})"
        known = set().union(*(group.records[0].metrics(epoch, "raw") for group in part))
        metrics = [metric for metric in COLUMNS if metric in known]
        chosen = columns or [metric for metric in USUAL if metric in known]
        rows = summarise(part, metrics, epoch, resamples)
        sweeps = find_sweeps(part, epoch, select)
        made.append(Section(title, epoch, select, chosen, part, rows, sweeps))
        mark_best(rows, made[-1].shown(), epoch)
    return made


def summarise(
    groups: Iterable[Group], metrics: list[str], epoch: str, resamples: int = 0
) -> list[Row]:
    """A row for each group and way, unmarked; ways beyond WAYS where all its runs have them."""
    rows = []
    for group in groups:
        first, *others = [record.posthoc(epoch) for record in group.records]
        for way in (*WAYS, *(way for way in first if all(way in other for other in others))):
            rows.append(Row(group, way, cells_of(group, metrics, epoch, way, resamples)))
    return rows


def cells_of(
    group: Group, metrics: list[str], epoch: str, way: str, resamples: int
) -> dict[str, Cell]:
    cells = {}
    for metric in metrics:
        values = group.values(metric, epoch, way)
        if len(values):
            sd = values.std(ddof=1) if len(values) > 1 else math.nan
            cells[metric] = Cell(values.mean(), sd)
    if resamples and "ece" in cells and way in WAYS:
        predicted = [record.probabilities(epoch, way) for record in group.records]
        if None not in predicted:
            interval = ece_interval([gaps(*one) for one in predicted], resamples)
            cells["ece"] = cells["ece"]._replace(interval=interval)
    return cells


def mark_best(rows: list[Row], compared: list[Group], epoch: str) -> None:
    """Mark the best of each metric, and those whose difference from it is within the spread.

    Only rows of the same way are compared, and only the groups `compared`: a setting that
    validation did not choose must not win by its test value, nor a temperature at the bound of its
    range. The spread of a difference is the root of the sum of both variances; it is unknown for
    single runs.
    """
    for way, metric in product({row.way for row in rows}, COLUMNS):
        own = [
            row.cells
            for row in rows
            if row.way == way and row.group in compared and not at_bound(row, epoch)
        ]
        known = [cells for cells in own if metric in cells]
        if len(known) < 2:
            continue
        best_of = max if COLUMNS[metric].best == "max" else min
        best = best_of((cells[metric] for cells in known), key=lambda cell: cell.mean)
        for cells in known:
            cell = cells[metric]
            if cell.mean == best.mean:
                cells[metric] = cell._replace(mark="best")
            elif abs(cell.mean - best.mean) <= math.hypot(cell.sd, best.sd):
                cells[metric] = cell._replace(mark="close")


def at_bound(row: Row, epoch: str) -> bool:
    """Whether a temperature of the row lies at the bound of its range."""
    runs = (record.measured(epoch) for record in row.group.records)
    return row.way == "scaled" and any(run["temperature_at_bound"] for run in runs)


def find_sweeps(groups: list[Group], epoch: str, select: str) -> list[Sweep]:
    """Two or more groups that differ only in their loss's parameters, and the one to take.

    Chosen is the best mean of the metric `select` on the validation split, raw.
    """
    best_of = max if COLUMNS[select].best == "max" else min
    together: dict[str, list[Group]] = {}
    for group in groups:
        together.setdefault(sweep_key(group), []).append(group)
    sweeps = []
    for same in together.values():
        if len(same) > 1:
            chosen = best_of(same, key=lambda group: group.values(select, epoch, "val").mean())
            varied = [
                name
                for name in chosen.first["loss_parameters"]
                if len({group.first["loss_parameters"][name] for group in same}) > 1
            ]
            sweeps.append(Sweep(same, chosen, varied))
    return sweeps


def sweep_key(group: Group) -> str:
    first, parameters = group.first, group.first["loss_parameters"]
    fixed = first["settings"].keys() - {"seed", "teacher", "label", *parameters}
    settings = {name: first["settings"][name] for name in fixed}
    if not parameters:  # nothing to sweep over
        settings["label"] = first["label"]
    place = [first["model"], first["loss"], group.records[0].exp_name, id(group.teacher)]
    return json.dumps([place, sorted(parameters), settings], sort_keys=True)


def sweep_sentence(section: Section, sweep: Sweep) -> str:
    """Which setting validation chose, and what it is worth on test."""
    parameters = sweep.chosen.first["loss_parameters"]
    setting = ", ".join(f"{name} = {number_text(parameters[name])}" for name in sweep.parameters)
    by_way = {row.way: row.cells for row in section.rows if row.group is sweep.chosen}
    values = []
    for metric in section.columns:
        column = COLUMNS[metric]
        texts = [metric_entry(by_way[way].get(metric), column).text for way in WAYS]
        values.append(f"{column.head} {' → '.join(dict.fromkeys(texts))}")
    return (
        f"Sweep of {printable(sweep.name)}, {len(sweep.groups)} settings: {setting} has the best "
        f"validation {COLUMNS[section.select].head.removesuffix(' %')}. "
        f"On test, raw → scaled: {', '.join(values)}."
    )


def table_of(section: Section) -> tuple[list[str], Rows]:
    """Head and rows for `utils.tables`: name, way, number of runs, then the section's columns."""
    heads = [printable(section.title), "logits", "n"]
    for metric in section.columns:
        heads.append(COLUMNS[metric].head)
        if metric == "ece" and section.has_intervals:
            heads.append("95 % interval")
    chosen = {sweep.chosen for sweep in section.sweeps}
    return heads, [table_row(section, row, row.group in chosen) for row in section.rows]


def table_row(section: Section, row: Row, chosen: bool) -> list[Entry]:
    group, opens = row.group, row.way == "raw"
    name = printable(group.name) + (" ←" if chosen else "")
    entries = [
        Entry(name if opens else "", indent=group.depth if opens else 0),
        Entry(row.way + (" †" if at_bound(row, section.epoch) else "")),
        Entry(str(len(group.records)) if opens else ""),
    ]
    for metric in section.columns:
        cell, column = row.cells.get(metric), COLUMNS[metric]
        entries.append(metric_entry(cell, column))
        if metric == "ece" and section.has_intervals:
            interval = cell and cell.interval
            text = "[{}, {}]".format(*map(column.text, interval)) if interval else "–"
            entries.append(Entry(text))
    return entries


def metric_entry(cell: Cell | None, column: Column) -> Entry:
    if cell is None:
        return Entry("–")
    spread = "" if math.isnan(cell.sd) else f" ± {column.text(cell.sd)}"
    return Entry(column.text(cell.mean) + spread, cell.mark)


def legend(section: Section, marks: dict[str, str]) -> list[str]:
    """What a reader needs to know of the table, a sentence each; only what occurs in it.

    `marks` says how the table shows "best" and "close".
    """
    records = [record for group in section.groups for record in group.records]
    sizes = [len(group.records) for group in section.groups]
    found = {row.cells[metric].mark for row in section.rows for metric in row.cells}
    bounded = any(at_bound(row, section.epoch) for row in section.rows)
    select = COLUMNS[section.select].head.removesuffix(" %")
    epoch = {"best": "the epoch of the highest validation top-1", "last": "the last epoch"}
    further = dict.fromkeys(row.way for row in section.rows if row.way not in WAYS)
    said = {
        f"Test split, {epoch[section.epoch]}; scaled: logits divided by the temperature that fits "
        "the validation split best.": True,
        f"{', '.join(further)}: fitted on the validation split by scripts.posthoc.": bool(further),
        "n runs differ only in the seed: mean ± standard deviation over them.": max(sizes) > 1,
        "n = 1: no spread is known.": min(sizes) == 1,
        "95 % interval: of the mean ECE, bootstrap over test images.": section.has_intervals,
        f"{marks['best']}: best of its column among rows of equal logits.": "best" in found,
        f"{marks['close']}: its difference from the best is within the spread.": "close" in found,
        f"←: chosen from its sweep by validation {select}; the sweep's other settings do not take "
        "part in the comparison.": bool(section.sweeps),
        "†: the temperature lies at the bound of its range; do not trust the row.": bounded,
        "A teacher whose own run is elsewhere is shown as its students' runs measured it.": any(
            record.borrowed for record in records
        ),
    }
    return [sentence for sentence, holds in said.items() if holds]


def notes(section: Section, marks: dict[str, str]) -> list[str]:
    """The legend, and what validation chose."""
    return legend(section, marks) + [sweep_sentence(section, sweep) for sweep in section.sweeps]


def apart_table(apart: list[Apart], longest: int | None = None) -> tuple[list[str], Rows]:
    """Head and rows of the runs that are in no other table; a log's line may be cut."""
    head = ["not in the tables", "why", "epochs", "last line of its log"]
    rows = [(one.folder, one.state, one.progress, one.last_line[:longest]) for one in apart]
    return head, [[Entry(printable(text)) for text in row] for row in rows]
