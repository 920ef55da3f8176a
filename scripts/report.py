"""Tables and pictures of finished runs.

    python -m scripts.report ROOT...                          a table at the terminal
    python -m scripts.report ROOT... --out report             and report.{html,md,csv,tex}, runs.csv
    python -m scripts.report ROOT... --against "resnet8 NLL"  differences, tested in pairs

Runs below the folders ROOT that differ only in the seed are one row. Teachers come first, each with
its students below it. Settings are chosen on the validation split alone.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/report.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from utils.analysis.columns import COLUMNS, printable
from utils.analysis.groups import Group
from utils.analysis.records import Record, pack, read_runs
from utils.analysis.splits import COLUMNS_OF_TEST, columns_of_test
from utils.analysis.statistics import SELECT, Section, find_group, rows_of, sections_of
from utils.analysis.tables import Entry, Table, main_table, paired_table, render
from utils.program import one_line_errors
from utils.program.command_line import CommandLine, count, location, whole
from utils.program.files import atomic, make_folder


def options(argv: list[str] | None):
    about = "Tables and pictures of finished runs, those that differ only in the seed as one row."
    parser = CommandLine(prog="python -m scripts.report", description=about)
    add = parser.add_argument
    roots = "run folders, folders above them, or what --pack wrote"
    add("roots", nargs="+", type=location, metavar="ROOT", help=roots)
    out = "also write report.html, .md, .csv and .tex, and runs.csv, a line for each run"
    add("--out", type=location, metavar="FOLDER", help=out)
    columns = f"which and in which order: {', '.join(COLUMNS)}"
    add("--columns", nargs="+", choices=COLUMNS, metavar="METRIC", help=columns)
    epoch = "best: by validation; a net that taught is shown at the epoch that taught"
    add("--epoch", choices=("best", "last"), default="best", help=epoch)
    add("--select", choices=SELECT, default="nll", help="on validation, chooses a sweep's setting")
    draws = "draws behind the ECE's interval and the ECE of a calibrated net; 0 leaves both out"
    add("--resamples", type=whole, default=1000, help=draws)
    of_test = (
        "also the T that the test split would choose, and its ECE; no result: it saw the labels"
    )
    add("--test-temperature", action="store_true", help=of_test)
    add("--nets", type=count, default=100, help="print at most so many, by validation's order")
    against = "also a table of the differences from this row; may be given again for another"
    add("--against", action="append", metavar="ROW", help=against)
    add("--pack", type=location, metavar="FILE.zip", help="also write what is printed as a ROOT")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    records, left_out = read_runs(args.roots, args.epoch)
    sections, unreadable = sections_of(records, args)
    left_out += unreadable
    tables = [[main_table(section)] for section in sections]
    for row in args.against or ():
        section, group = find_group(sections, row)
        tables[sections.index(section)].append(paired_table(section, group))
    shown = [table for own in tables for table in own]
    reasons = [[Entry(printable(text)) for text in one] for one in left_out]
    rest = [Table(["Not in the tables", "why"], reasons, kind="words")] if left_out else []
    for table in shown + rest:
        print(render(table, "terminal"))
    if args.out is not None:
        from utils.analysis.page import page  # matplotlib takes a second to load

        roots = ", ".join(map(str, args.roots))
        runs = len({record.folder for record in records})
        about = f"{runs} finished runs below {roots}; not in the tables: {len(left_out)}"
        markdown = [render(one, "markdown") for one in shown + rest]
        files = {
            "report.md": "\n".join(["# Report\n", *markdown]),
            "report.csv": csv_text((one, group) for one in sections for group in one.groups),
            "runs.csv": csv_text(runs_alone(sections)),
            "report.tex": "\n".join(render(one, "latex") for one in shown),
            "report.html": page(sections, tables, rest, about),
        }
        make_folder(args.out, "--out")
        for name, content in files.items():
            with atomic(args.out / name) as file:
                file.write(content.encode())
        print(f"written: {', '.join(str(args.out / name) for name in files)}")
    if args.pack is not None:
        with atomic(args.pack) as file:
            pack(printed_runs(sections, records), file)
        print(f"written: {args.pack}")


def printed_runs(sections: list[Section], records: list[Record]) -> list[Record]:
    """The runs behind what is printed, each at the epochs that are; `records`: all that were read.

    A teacher without a run of its own is kept with a student's, at whatever epoch.
    """
    printed = [group for section in sections for group in section.printed]
    nets = [record for group in printed for record in group.records]
    runs = [net for net in nets if not net.borrowed]
    places = {net.folder for net in nets} - {run.folder for run in runs}
    return runs + [record for record in records if record.folder in places]


def runs_alone(sections: list[Section]) -> Iterator[tuple[Section, Group]]:
    """Every run as a group of its own."""
    for section in sections:
        for group in section.groups:
            for record in group.records:
                rows = rows_of(Group([record]), section.args, in_full=False)
                yield section, replace(group, records=[record], rows=rows)


def csv_text(groups: Iterable[tuple[Section, Group]]) -> str:
    """Every metric, not only the chosen columns, with all digits; units in the heads."""
    lines = [csv_line(*one, logits) for one in groups for logits in one[1].rows]
    heads = list(dict.fromkeys(head for line in lines for head in line))
    writer = csv.DictWriter(text := io.StringIO(), heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def csv_line(section: Section, group: Group, logits: str) -> dict[str, str | int]:
    line = {
        "dataset": section.title,
        "model": group.first.model,
        "label": group.first.label,
        "net": printable(group.name),
        "teacher": printable(group.teacher.full_name) if group.teacher else "",
        "epoch": group.first.net_epoch or "",
        "logits": logits,
        "n": len(group.records),
        "seeds": " ".join(str(record.seed) for record in group.records),
        "chosen": "yes" if any(sweep.chosen is group for sweep in section.sweeps) else "",
    }
    if logits == "scaled" and section.args.test_temperature:
        for key, values in columns_of_test(group.records).items():
            line[COLUMNS_OF_TEST[key].head] = f"{COLUMNS_OF_TEST[key].factor * values.mean():.10g}"
    for metric, cell in group.rows[logits].cells.items():
        column = COLUMNS[metric]
        values = {"": cell.mean, " sd": cell.sd}
        values |= zip((" low", " high"), cell.interval or (), strict=False)
        values |= zip((" calibrated", " calibrated 95 %"), cell.calibrated or (), strict=False)
        for part, value in values.items():
            known = not math.isnan(value)
            line[column.head + part] = f"{column.factor * value:.10g}" if known else ""
    return line


if __name__ == "__main__":
    with one_line_errors("python -m scripts.report"):
        main()
