"""Metrics as columns, and tables as text."""

import math
from typing import NamedTuple

import tabulate

from utils.run_files import is_third_party

tabulate.MIN_PADDING = 0  # a column is as wide as what is in it


class Column(NamedTuple):
    """How a metric is shown: its head with the unit, the factor from a file's value to it.

    `best` is min, max, or nothing where neither is. A metric that is not `usual` is left out of the
    table that a run prints at its end.
    """

    head: str
    factor: float
    decimals: int
    best: str = "min"
    usual: bool = True

    def text(self, value: float) -> str:
        return f"{self.factor * value:.{self.decimals}f}"

    def text_with_spread(self, mean: float, sd: float) -> str:
        """`7.65 ± 0.12`; of a single run, whose spread is NaN, the value alone."""
        return self.text(mean) if math.isnan(sd) else f"{self.text(mean)} ± {self.text(sd)}"


def set_columns(key: str, name: str) -> dict[str, Column]:
    """Columns of one method's conformal sets at 90 %, whose keys and heads begin with these."""
    return {
        f"{key}coverage": Column(f"{name}coverage %", 100, 2, "", usual=False),
        # Small sets are worth nothing where they do not cover, and whoever covers too much covers
        # every class: but for the size at equal coverage none of these is the best.
        f"{key}set_size": Column(f"{name}set size", 1, 2, "", usual=False),
        f"{key}set_size_matched": Column(f"{name}size at 90 % of test", 1, 2, "min", usual=False),
        f"{key}set_singletons": Column(f"{name}singletons %", 100, 2, "", usual=False),
        f"{key}set_empty": Column(f"{name}empty sets %", 100, 2, "", usual=False),
        f"{key}set_worst_class_coverage": Column(
            f"{name}worst class cov. %", 100, 2, "", usual=False
        ),
        f"{key}set_stratified_violation": Column(
            f"{name}stratified violation %", 100, 2, "", usual=False
        ),
    }


SET_COLUMNS = {
    **set_columns(key="", name=""),  # LAC
    **set_columns(key="aps_", name="APS "),
    **set_columns(key="raps_", name="RAPS "),
}
# A result has none of these: a report makes them from validation and test logits.
SET_METRICS = tuple(SET_COLUMNS)

COLUMNS = {
    "top1": Column("top-1 %", 100, 2, "max"),
    "top5": Column("top-5 %", 100, 2, "max"),
    "ece": Column("ECE %", 100, 2),
    "sce": Column("SCE %", 100, 3),
    "adaece": Column("AdaECE %", 100, 2),
    "mce": Column("MCE %", 100, 2, ""),  # of a single bin, often of few images
    "nll": Column("NLL", 1, 4),
    "brier": Column("Brier", 1, 4),
    "true_calibration_error": Column("true cal. error %", 100, 2),
    "true_kl": Column("true KL", 1, 4),
    "ace": Column("ACE %", 100, 3, usual=False),
    "rmsce": Column("RMSCE %", 100, 2, usual=False),
    "smece": Column("smECE %", 100, 2, usual=False),
    "debiased_ece": Column("debiased ECE %", 100, 2, "", usual=False),  # may be below 0
    "aurc": Column("AURC %", 100, 3, usual=False),
    "augrc": Column("AUGRC %", 100, 3, usual=False),
    "risk_at_80_coverage": Column("risk % at 80 % coverage", 100, 2, usual=False),
    "coverage_at_5_risk": Column("coverage % at 5 % risk", 100, 2, "max", usual=False),
    "overconfidence": Column("overconfidence %", 100, 2, usual=False),
    "underconfidence": Column("underconfidence %", 100, 2, usual=False),
    "balanced_accuracy": Column("balanced accuracy %", 100, 2, "max", usual=False),
    "refinement": Column("refinement", 1, 4, usual=False),
    "calibration": Column("calibration", 1, 4, usual=False),
    **SET_COLUMNS,
}

# Errors of calibration, of which a calibrated net measures some, too.
OF_CALIBRATION = {
    "ece",
    "sce",
    "adaece",
    "ace",
    "rmsce",
    "smece",
    "overconfidence",
    "underconfidence",
}

NO_SCALED_ROW = (
    "A third party's net may have been trained on the validation images, on which its temperature "
    "would be fitted."
)


def printable(text) -> str:
    """One line without control characters, whatever a name or a log holds."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    return tabulate.tabulate(
        rows,
        headers=head,
        tablefmt="simple",
        colalign=["left", *["right"] * (len(head) - 1)],
        disable_numparse=True,
        preserve_whitespace=True,
    )


def metrics_table(
    head: list[str], rows: list[tuple[list[str], dict[str, float]]], columns=COLUMNS
) -> str:
    """`rows`: first cells, under `head`, and metrics; those that are usual and in some row show."""
    measured = {metric for _, metrics in rows for metric in metrics}
    shown = {
        metric: column for metric, column in columns.items() if column.usual and metric in measured
    }
    lines = []
    for first_cells, metrics in rows:
        line = list(first_cells)
        for metric, column in shown.items():
            line.append(column.text(metrics[metric]) if metric in metrics else "")
        lines.append(line)
    return text_table([*head, *(column.head for column in shown.values())], lines)


def result_table(result: dict) -> str:
    """The test metrics of a finished run: best and last epoch, its teacher, raw and scaled."""
    rows = []
    notes = []
    for name in ("best", "last", "teacher"):
        measured = result.get(name, {})
        if "test" not in measured:  # no teacher, or logits of the training images alone
            continue
        temperatures = {"raw": 1.0}
        if is_third_party(measured):
            notes.append(f"The teacher has no scaled row. {NO_SCALED_ROW}")
        else:
            temperatures["scaled"] = measured["temperature"]
            if measured["temperature_at_bound"]:
                notes.append(
                    "A fitted temperature lies at the bound of its range: do not trust that row."
                )
        for logits, temperature in temperatures.items():
            cells = [f"{name}, {logits}", str(measured.get("epoch", "")), f"{temperature:.3f}"]
            rows.append((cells, measured["test"][logits]))
    table = metrics_table(["test split", "epoch", "T"], rows)
    return "\n".join([table, *dict.fromkeys(notes)])
