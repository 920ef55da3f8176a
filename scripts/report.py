"""Tables and pictures of finished runs.

    python -m scripts.report ROOT...                        a table at the terminal
    python -m scripts.report ROOT... --out report           and report.{html,md,csv,tex} in there
    python -m scripts.report ROOT... --columns top1 ece brier --epoch last

Collects every run below the folders ROOT and groups those that differ only in the seed. Teachers
come first, each with its students below it. Settings are chosen on the validation split alone.
"""

import csv
import io
import math
import os
import sys
from pathlib import Path

from utils.analysis.groups import group_runs
from utils.analysis.records import Apart, read_runs
from utils.analysis.statistics import (
    SELECT,
    Row,
    Section,
    apart_table,
    notes,
    sections_of,
    table_of,
)
from utils.analysis.tables import (
    latex_table,
    latex_text,
    markdown_table,
    markdown_text,
    terminal_table,
)
from utils.files import atomic, unmade_on_failure
from utils.options import CommandLine, location, whole
from utils.program import UserError, one_line_errors
from utils.tables import COLUMNS, printable


def options(argv: list[str] | None):
    parser = CommandLine(
        prog="python -m scripts.report",
        description="Tables and pictures of finished runs, those that differ only in the seed "
        "as mean and spread.",
    )
    add = parser.add_argument
    add(
        "roots", nargs="+", type=location, metavar="ROOT", help="run folders, or folders above them"
    )
    add("--out", type=location, metavar="FOLDER", help="also write report.html, .md, .csv and .tex")
    add(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        metavar="METRIC",
        help=f"which and in which order: {', '.join(COLUMNS)}",
    )
    add("--epoch", choices=("best", "last"), default="best", help="best: by validation top-1")
    add(
        "--select",
        choices=SELECT,
        default="nll",
        help="the validation metric that chooses the setting of a sweep",
    )
    add(
        "--resamples",
        type=whole,
        default=1000,
        help="of the bootstrap behind the ECE's interval; 0 leaves it out",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    records, apart = read_runs(args.roots)
    groups, repeated = group_runs(records)
    sections = sections_of(groups, args.columns, args.epoch, args.select, args.resamples)
    apart += repeated
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(terminal(sections, apart, colour))
    if args.out is not None:
        from scripts.report_html import page  # matplotlib takes a second to load

        files = {
            "report.md": markdown(sections, apart),
            "report.csv": csv_text(sections),
            "report.tex": latex(sections),
            "report.html": page(sections, apart, args.roots),
        }
        write(args.out, files)
        print(f"written: {', '.join(str(args.out / name) for name in files)}")


def write(folder: Path, files: dict[str, str]) -> None:
    try:
        with unmade_on_failure(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; name a folder") from None
    for name, content in files.items():
        with atomic(folder / name) as file:
            file.write(content.encode())


def terminal(sections: list[Section], apart: list[Apart], colour: bool) -> str:
    parts = []
    for section in sections:
        sentences = notes(section, {"best": "*", "close": "~"})
        parts.append("\n".join([terminal_table(*table_of(section), colour), *sentences]))
    if apart:
        parts.append(terminal_table(*apart_table(apart, longest=70)))
    return "\n\n".join(parts)


def markdown(sections: list[Section], apart: list[Apart]) -> str:
    parts = ["# Report"]
    for section in sections:
        parts += [f"## {markdown_text(section.title)}", markdown_table(*table_of(section))]
        parts += map(markdown_text, notes(section, {"best": "bold", "close": "≈"}))
    if apart:
        parts += ["## Not in the tables", markdown_table(*apart_table(apart))]
    return "\n\n".join(parts) + "\n"


def latex(sections: list[Section]) -> str:
    r"""One table environment per data set, to \input where booktabs is loaded."""
    parts = []
    for section in sections:
        sentences = " ".join(notes(section, {"best": "bold", "close": "≈"}))
        parts += [
            r"\begin{table}",
            r"\centering",
            latex_table(*table_of(section)),
            rf"\caption{{{latex_text(section.title)}. {latex_text(sentences)}}}",
            r"\end{table}",
            "",
        ]
    return "\n".join(parts)


def csv_text(sections: list[Section]) -> str:
    """Every metric, not only the chosen columns, with all digits; units in the heads."""
    lines = [csv_line(section, row) for section in sections for row in section.rows]
    heads = list(dict.fromkeys(head for line in lines for head in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def csv_line(section: Section, row: Row) -> dict[str, str | int]:
    group = row.group
    chosen = {sweep.chosen for sweep in section.sweeps}
    line = {
        "dataset": section.title,
        "model": group.first["model"],
        "label": group.first["label"],
        "net": printable(group.name),
        "teacher": printable(group.teacher.name) if group.teacher else "",
        "epoch": section.epoch,
        "logits": row.way,
        "n": len(group.records),
        "seeds": " ".join(str(record.result["seed"]) for record in group.records),
        "chosen": "yes" if group in chosen else "",
    }
    for metric, (mean, sd, _, interval) in row.cells.items():
        column = COLUMNS[metric]
        parts = zip(("", " sd", " low", " high"), (mean, sd, *(interval or ())), strict=False)
        for part, value in parts:
            known = not math.isnan(value)
            line[column.head + part] = f"{column.factor * value:.10g}" if known else ""
    return line


if __name__ == "__main__":
    with one_line_errors("python -m scripts.report"):
        main()
