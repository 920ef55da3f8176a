"""Metrics as columns, and tables as text."""

import re
from typing import NamedTuple

ANSI = re.compile(r"\033\[\d*m")


class Column(NamedTuple):
    """How a metric is shown: its head with the unit, the factor from a file's value to it.

    One that is not `usual` is left out of the table that a run prints at its end.
    """

    head: str
    factor: float
    decimals: int
    best: str = "min"
    usual: bool = True

    def text(self, value: float) -> str:
        return f"{self.factor * value:.{self.decimals}f}"


COLUMNS = {
    "top1": Column("top-1 %", 100, 2, "max"),
    "top5": Column("top-5 %", 100, 2, "max"),
    "ece": Column("ECE %", 100, 2),
    "sce": Column("SCE %", 100, 3),
    "adaece": Column("AdaECE %", 100, 2),
    "mce": Column("MCE %", 100, 2),
    "nll": Column("NLL", 1, 4),
    "brier": Column("Brier", 1, 4),
    "true_calibration_error": Column("true cal. error %", 100, 2),
    "true_kl": Column("true KL", 1, 4),
    "ace": Column("ACE %", 100, 3, usual=False),
    "rmsce": Column("RMSCE %", 100, 2, usual=False),
    "smece": Column("smECE %", 100, 2, usual=False),
    "debiased_ece": Column("debiased ECE %", 100, 2, usual=False),
    "aurc": Column("AURC %", 100, 3, usual=False),
    "refinement": Column("refinement", 1, 4, usual=False),
    "calibration": Column("calibration", 1, 4, usual=False),
}


def printable(text) -> str:
    """One line without control characters, whatever a name or a log holds."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""

    def width(cell: str) -> int:
        return len(ANSI.sub("", cell))

    widths = [max(map(width, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for line in [head, ["-" * wide for wide in widths], *rows]:
        gaps = [" " * (wide - width(cell)) for cell, wide in zip(line, widths, strict=True)]
        first, *others = zip(line, gaps, strict=True)
        cells = ["".join(first), *(gap + cell for cell, gap in others)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def result_table(result: dict) -> str:
    """The test metrics of a finished run: best and last epoch, its teacher, raw and scaled."""
    owners = {name: result[name] for name in ("best", "last", "teacher") if name in result}
    shown = result["best"]["test"]["raw"]
    known = [name for name, column in COLUMNS.items() if column.usual and name in shown]
    rows = []
    for name, measured in owners.items():
        for way, temperature in (("raw", 1.0), ("scaled", measured["temperature"])):
            cells = [COLUMNS[metric].text(measured["test"][way][metric]) for metric in known]
            rows.append([f"{name}, {way}", str(measured.get("epoch", "")), f"{temperature:.3f}"])
            rows[-1] += cells
    head = ["test split", "epoch", "T", *(COLUMNS[metric].head for metric in known)]
    lines = [text_table(head, rows)]
    if any(measured["temperature_at_bound"] for measured in owners.values()):
        lines.append("A fitted temperature lies at the bound of its range: do not trust that row.")
    return "\n".join(lines)
