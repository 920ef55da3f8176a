"""The numbers of a row: mean and spread of each metric over the runs of a group."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils.analysis.conformal import sets_of
from utils.analysis.groups import Group
from utils.analysis.record import KINDS, Record
from utils.calibration import bootstrap
from utils.columns import COLUMNS, SET_METRICS

MANY = 30  # runs: above, the spread between them says more than an interval of each
FEW = 20  # test images: the value of a bin with fewer is mostly chance


class Statistic(NamedTuple):
    """Mean and sample standard deviation over a group's runs, NaN for one run; fractions.

    `interval`: of the true value of the mean, over test samples. `calibrated`: what the mean ECE of
    as many calibrated nets of the same confidences would be, and what 95 % of draws stay below.
    `mark`: best, close, chance, or nothing (see utils/analysis/marks.py).
    """

    mean: float
    sd: float
    mark: str = ""
    interval: tuple[float, float] | None = None
    calibrated: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A group's raw, scaled, ... logits; a metric that is unknown is absent."""

    cells: dict[str, Statistic]
    at_bound: bool
    few: bool  # a bin of confidence holds fewer than FEW test images


def statistic(values: np.ndarray) -> Statistic:
    """Mean and spread of one value for each run."""
    sd = values.std(ddof=1) if len(values) > 1 else math.nan
    return Statistic(mean=values.mean(), sd=sd)


def rows_of(group: Group, resamples: int, with_sets: bool = False) -> dict[str, Row]:
    """One row for each kind of logits that all runs of a group have, with all that takes time.

    `resamples`: draws behind the interval of an ECE, 0 for none. `check_rows` has found the runs'
    files sound.
    """
    tests = [record.tests for record in group.records]
    rows = rows_from(group.records, tests)
    for kind in KINDS:
        if kind not in rows:
            continue
        cells = rows[kind].cells
        if resamples and len(group.records) <= MANY:
            cells["ece"] = with_chance(cells["ece"], group.records, kind, resamples)
        if with_sets:
            cells.update(set_statistics(group.records, kind))
    return rows


def check_rows(record: Record, with_gaps: bool, with_sets: bool) -> None:
    """Read what `rows_of` needs of a run. Raises almost any Exception where that is damaged.

    `with_gaps`: also what intervals are drawn from; nothing is drawn yet.
    """
    rows = rows_of(Group([record]), resamples=0, with_sets=with_sets)
    for kind in KINDS:
        if kind not in rows:
            continue
        if "ece" not in rows[kind].cells:
            raise ValueError(f"the ECE of {kind} logits is absent")
        if with_gaps:
            gaps_of(record, kind)


def quick_rows_of(group: Group) -> dict[str, Row]:
    """Raw and scaled alone, of what stands in the results."""
    tests = [record.measured["test"] for record in group.records]
    rows = rows_from(group.records, tests)
    return {kind: row for kind, row in rows.items() if kind in KINDS}


def rows_from(records: list[Record], tests: list[dict[str, dict[str, float]]]) -> dict[str, Row]:
    """`tests`: of each run its metrics, by kind of logits."""
    rows = {}
    for kind in tests[0]:
        if not all(kind in test for test in tests):
            continue
        measured = [test[kind] for test in tests]
        cells = {}
        for metric in COLUMNS:
            if all(metric in metrics for metrics in measured):
                cells[metric] = statistic(np.array([metrics[metric] for metrics in measured]))
        any_at_bound = any(record.measured["temperature_at_bound"] for record in records)
        rows[kind] = Row(
            cells=cells,
            at_bound=kind == "scaled" and any_at_bound,
            few=any(metrics.get("smallest_bin", FEW) < FEW for metrics in measured),
        )
    return rows


def with_chance(cell: Statistic, records: list[Record], kind: str, draws: int) -> Statistic:
    """The ECE of these runs with its interval, and what calibrated nets would measure.

    Without them where a run has no stored predictions.
    """
    gaps = [gaps_of(record, kind) for record in records]
    if any(gap is None for gap in gaps):
        return cell
    bins = bootstrap.bins_of(gaps, draws)
    calibrated = bootstrap.calibrated_error(bins)
    return cell._replace(
        mark="chance" if cell.mean <= calibrated[1] else "",
        interval=bootstrap.error_interval(bins),
        calibrated=calibrated,
    )


def gaps_of(record: Record, kind: str) -> np.ndarray | None:
    """The (N, bins) of `bootstrap.gaps`; None without stored predictions.

    Raises UserError where these are damaged, ValueError where the temperature is.
    """
    predicted = record.probabilities(kind)
    if predicted is None:
        return None
    gaps = bootstrap.gaps(*predicted)
    if not np.isfinite(gaps).all():
        temperature = record.temperatures[kind]
        raise ValueError(f"logits divided by the temperature {temperature} are not finite")
    return gaps


def set_statistics(records: list[Record], kind: str) -> dict[str, Statistic]:
    """What the conformal sets of these runs are worth; empty where one of them has none."""
    measured = [sets_of(record, kind) for record in records]
    if any(metrics is None for metrics in measured):
        return {}
    return {
        metric: statistic(np.array([metrics[metric] for metrics in measured]))
        for metric in SET_METRICS
    }
