"""Which value of a column is the best, and which ones may be as good."""

import math

from utils.analysis.groups import Group
from utils.analysis.rows import Statistic
from utils.columns import COLUMNS


def mark_best(groups: list[Group]) -> None:
    """Mark the best of each metric, and those whose difference from it is within the spread.

    Only rows of equal logits are compared, and `groups` has none that a sweep has beaten: a setting
    that validation did not choose must not win by its test value, nor a temperature at the bound of
    its range.
    """
    kinds = dict.fromkeys(kind for group in groups for kind in group.rows)
    for kind in kinds:
        rows = [group.rows[kind] for group in groups if kind in group.rows]
        rows = [row for row in rows if not row.at_bound]
        for metric, column in COLUMNS.items():
            compared = [row.cells for row in rows if metric in row.cells]
            if len(compared) > 1 and column.best:
                mark_column(compared, metric, highest_is_best=column.best == "max")


def mark_column(rows: list[dict[str, Statistic]], metric: str, highest_is_best: bool) -> None:
    """Mark one metric in the cells of rows that may be compared, in place.

    The spread of a difference is the root of the sum of both variances, unknown for single runs. An
    ECE that a calibrated net could have is marked "chance" already; if the lowest is or may be,
    none is best.
    """
    values = [cells[metric] for cells in rows]
    choose = max if highest_is_best else min
    best = choose(values, key=lambda value: value.mean)
    may_be_chance = not best.calibrated and any(value.calibrated for value in values)
    if best.mark == "chance" or may_be_chance:
        return
    for cells in rows:
        value = cells[metric]
        if value.mark:
            continue
        spread = math.hypot(value.sd, best.sd)
        if value.mean == best.mean:
            cells[metric] = value._replace(mark="best")
        elif abs(value.mean - best.mean) <= spread:
            cells[metric] = value._replace(mark="close")
