"""Which value of a column is the best, and which ones may be as good."""

import math

from utils.analysis.groups import Group
from utils.analysis.record import KINDS
from utils.analysis.rows import Statistic
from utils.columns import COLUMNS, OF_CALIBRATION

Cells = dict[str, Statistic]  # of a row, by metric


def mark_best(groups: list[Group]) -> None:
    """Mark the best of each metric, and those whose difference from it is within the spread.

    Only rows of equal logits are compared, and `groups` has none that a sweep has beaten: a setting
    that validation did not choose must not win by its test value, nor a temperature at the bound of
    its range. No calibration error is the best where the lowest ECE is one that a calibrated net
    could have, or where that is not known: of the logits of post-hoc maps.
    """
    kinds = dict.fromkeys(kind for group in groups for kind in group.rows)
    for kind in kinds:
        rows = [group.rows[kind] for group in groups if kind in group.rows]
        rows = [row.cells for row in rows if not row.at_bound]
        is_chance = kind not in KINDS or lowest_ece_is_chance(rows)
        for metric, column in COLUMNS.items():
            if not column.best or (is_chance and metric in OF_CALIBRATION):
                continue
            compared = [cells for cells in rows if metric in cells]
            if len(compared) > 1:
                mark_column(compared, metric, highest_is_best=column.best == "max")


def lowest_ece_is_chance(rows: list[Cells]) -> bool:
    """Whether the lowest ECE is one that a calibrated net could have, or may be.

    It may be where only other rows have stored predictions, which tell.
    """
    values = [cells["ece"] for cells in rows if "ece" in cells]
    if not values:
        return False
    best = min(values, key=lambda value: value.mean)
    may_be_chance = best.calibrated is None and any(value.calibrated for value in values)
    return best.mark == "chance" or may_be_chance


def mark_column(rows: list[Cells], metric: str, highest_is_best: bool) -> None:
    """Mark one metric in the cells of rows that may be compared, in place.

    The spread of a difference is the root of the sum of both variances; a single run has none, so
    that only the other one's counts. An ECE that is chance keeps that mark.
    """
    values = [cells[metric] for cells in rows]
    choose = max if highest_is_best else min
    best = choose(values, key=lambda value: value.mean)
    for cells in rows:
        value = cells[metric]
        if value.mark:
            continue
        known = [one.sd for one in (value, best) if not math.isnan(one.sd)]
        if value.mean == best.mean:
            cells[metric] = value._replace(mark="best")
        elif abs(value.mean - best.mean) <= math.hypot(*known):
            cells[metric] = value._replace(mark="close")
