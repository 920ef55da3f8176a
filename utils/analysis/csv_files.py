"""Tables for other programs: every metric, not only the chosen columns, with all digits."""

import csv
import io
import math
from dataclasses import replace

from utils.analysis.groups import Group
from utils.analysis.record import Record
from utils.analysis.rows import Statistic, quick_rows_of
from utils.analysis.sections import Section
from utils.analysis.splits import COLUMNS_OF_TEST, columns_of_test, own_temperatures
from utils.columns import COLUMNS, Column, printable


def groups_csv(sections: list[Section]) -> str:
    """A line for each group and kind of logits."""
    lines = []
    for section in sections:
        chosen = {sweep.chosen for sweep in section.sweeps}
        for group in section.groups:
            lines += lines_of(section, group, is_chosen=group in chosen)
    return csv_text(lines)


def runs_csv(sections: list[Section]) -> str:
    """A line for each run and kind of logits, with the run's folder.

    Those of raw logits also have the metrics on validation, by which settings are chosen.
    """
    lines = []
    for section in sections:
        chosen = {sweep.chosen for sweep in section.sweeps}
        for group in section.groups:
            for record in group.records:
                alone = replace(group, records=[record], rows={})
                alone.rows = quick_rows_of(alone)
                for line in lines_of(section, alone, is_chosen=group in chosen):
                    line["folder"] = printable(record.folder)
                    if line["logits"] == "raw":
                        line.update(validation_entries(record))
                    lines.append(line)
    return csv_text(lines)


def csv_text(lines: list[dict[str, str | int]]) -> str:
    """The heads are those of all lines; what a line has not is empty."""
    heads = list(dict.fromkeys(head for line in lines for head in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def lines_of(section: Section, group: Group, is_chosen: bool) -> list[dict[str, str | int]]:
    """A line for each kind of logits: values by head, which holds the unit.

    `is_chosen`: whether its sweep's validation values have chosen it.
    """
    lines = []
    for kind, row in group.rows.items():
        line = {
            "dataset": section.title,
            "model": group.first.model,
            "label": group.first.label,
            "net": printable(group.name),
            "teacher": printable(group.teacher.full_name) if group.teacher else "",
            "epoch": group.first.epoch or "",
            "logits": kind,
            "n": len(group.records),
            "seeds": " ".join(str(record.seed) for record in group.records),
            "chosen": "yes" if is_chosen else "",
        }
        if kind == "scaled":
            measure = columns_of_test if section.choice.test_temperature else own_temperatures
            for key, values in measure(group.records).items():
                column = COLUMNS_OF_TEST[key]
                line[column.head] = digits(values.mean(), column)
        for metric, value in row.cells.items():
            line.update(entries_of(value, COLUMNS[metric]))
        lines.append(line)
    return lines


def validation_entries(record: Record) -> dict[str, str]:
    """By head: what a run measured on validation; nothing of a file of logits without it."""
    measured = record.measured["val"]
    return {
        f"validation {column.head}": digits(measured[metric], column)
        for metric, column in COLUMNS.items()
        if metric in measured
    }


def entries_of(value: Statistic, column: Column) -> dict[str, str]:
    """By head: the mean, its spread, and what else is known of it."""
    head = column.head
    entries = {head: digits(value.mean, column), f"{head} sd": digits(value.sd, column)}
    if value.interval:
        low, high = value.interval
        entries[f"{head} low"] = digits(low, column)
        entries[f"{head} high"] = digits(high, column)
    if value.calibrated:
        mean, limit = value.calibrated
        entries[f"{head} of a calibrated net"] = digits(mean, column)
        entries[f"{head} of a calibrated net 95 %"] = digits(limit, column)
    return entries


def digits(value: float, column: Column) -> str:
    """Empty where it is unknown."""
    return "" if math.isnan(value) else f"{column.factor * value:.10g}"
