"""Tables and pictures of finished runs.

    python -m scripts.report ROOT...                          a table at the terminal
    python -m scripts.report ROOT... --out report             and report.{html,md,csv,tex}, runs.csv
    python -m scripts.report ROOT... --against "resnet8 NLL"  differences, tested in pairs
    python -m scripts.report RUN --classes                    a table class by class

Runs below the folders ROOT that differ only in the seed are one row. Teachers come first, each with
its students below it. Settings are chosen on the validation split alone.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/report.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

from argparse import Namespace
from os.path import isfile

from utils.analysis.classes import class_tables, classes_csv
from utils.analysis.comparisons import find_group
from utils.analysis.csv_files import groups_csv, runs_csv
from utils.analysis.logit_files import is_logit_file
from utils.analysis.pack import is_pack, pack
from utils.analysis.record import Record
from utils.analysis.records import LeftOut, read_runs
from utils.analysis.rendering import Table, TableCell, render
from utils.analysis.sections import SELECT, ReportChoice, Section, sections_of
from utils.analysis.tables import main_table, paired_table
from utils.columns import COLUMNS, printable
from utils.program import UserError, one_line_errors
from utils.program.command_line import CommandLine, count, location, number
from utils.program.files import atomic, check_writable, make_folder
from utils.program.words import counted


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(
        prog="python -m scripts.report",
        description="Tables and pictures of finished runs, those that differ only in the seed as "
        "one row.",
    )
    parser.add_argument(
        "roots",
        nargs="+",
        type=location,
        metavar="ROOT",
        help="run folders, folders above them, what --pack wrote, or .npz files of test_logits and "
        "test_labels, and if known val_logits and val_labels",
    )
    parser.add_argument(
        "--out",
        type=location,
        metavar="FOLDER",
        help="also write report.html, .md, .csv and .tex, and runs.csv, a line for each run",
    )
    add_choice(parser)
    add_tables(parser)
    parser.add_argument(
        "--pack",
        type=location,
        metavar="FILE.zip",
        help="also write what is printed as a ROOT",
    )
    args = parser.parse_args(argv)

    logit_files = [root for root in args.roots if is_logit_file(root)]
    if args.pack is not None and logit_files:
        raise UserError(
            f"--pack: {logit_files[0]} is no run, and a pack holds runs; leave it out, and name it "
            "beside the pack"
        )
    if args.pack is not None:
        check_writable(args.pack, "--pack")
        if isfile(args.pack) and not is_pack(args.pack):
            raise UserError(f"--pack {args.pack}: this file is no pack; give another name")
    return args


def add_choice(parser: CommandLine) -> None:
    """What the main table shows of the runs."""
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        metavar="METRIC",
        help=f"which and in which order: {', '.join(COLUMNS)}",
    )
    parser.add_argument(
        "--epoch",
        choices=("best", "last"),
        default="best",
        help="best: by validation; a net that taught is shown at the epoch that taught",
    )
    parser.add_argument(
        "--select",
        choices=SELECT,
        default="nll",
        help="on validation, chooses a sweep's setting; refinement: the NLL of scaled logits",
    )
    parser.add_argument(
        "--resamples",
        type=number(int, "a whole number of at least 20, or 0", lambda n: n == 0 or n >= 20),
        default=1000,
        help="draws behind the ECE's interval and the ECE of a calibrated net; 0 leaves both out",
    )
    parser.add_argument(
        "--test-temperature",
        action="store_true",
        help="also the T that the test split would choose, and its ECE; no result: it saw the "
        "labels",
    )
    parser.add_argument(
        "--nets",
        type=count,
        default=100,
        help="print at most so many, by validation's order",
    )


def add_tables(parser: CommandLine) -> None:
    """Tables beside the main one."""
    parser.add_argument(
        "--against",
        action="append",
        metavar="ROW",
        help="also a table of the differences from this row; may be given again for another",
    )
    parser.add_argument(
        "--classes",
        action="store_true",
        help="also a table for each net, class by class; with --out also classes.csv, and a "
        "confusion matrix of up to 100 classes",
    )


def choice_of(args: Namespace) -> ReportChoice:
    return ReportChoice(
        columns=tuple(args.columns or ()),
        epoch=args.epoch,
        select=args.select,
        resamples=args.resamples,
        test_temperature=args.test_temperature,
        nets=args.nets,
        classes=args.classes,
    )


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    records, left_out = read_runs(args.roots, args.epoch)
    sections, unreadable = sections_of(records, choice_of(args))
    left_out += unreadable

    tables = [[main_table(section)] for section in sections]
    if args.classes:
        for section, of_section in zip(sections, tables, strict=True):
            of_section += class_tables(section)
    for row in args.against or ():
        section, group = find_group(sections, row)
        tables[sections.index(section)].append(paired_table(section, group))
    rest = [left_out_table(left_out)] if left_out else []
    for table in [*flat(tables), *rest]:
        print(render(table, "terminal"))

    if args.out is not None:
        roots = ", ".join(map(str, args.roots))
        runs = len({record.folder for record in records})
        about = f"{counted(runs, 'finished run')} below {roots}; not in the tables: {len(left_out)}"
        write_report(args.out, sections, tables, rest, about)
    if args.pack is not None:
        with atomic(args.pack) as file:
            pack(printed_runs(sections, records), file)
        print(
            f"written: {args.pack}; its logits have half precision, so a 95 % interval of few "
            "images may differ a little"
        )


def flat(tables: list[list[Table]]) -> list[Table]:
    """The tables of all sections."""
    return [table for of_section in tables for table in of_section]


def left_out_table(left_out: list[LeftOut]) -> Table:
    rows = [[TableCell(printable(text)) for text in run] for run in left_out]
    return Table(["Not in the tables", "why"], rows, kind="words")


def write_report(
    folder: Path,
    sections: list[Section],
    tables: list[list[Table]],
    rest: list[Table],
    about: str,
) -> None:
    """The files of --out. `tables`: of each section; `rest`: the runs that are in none."""
    from utils.analysis.page import page  # matplotlib takes a second to load

    shown = flat(tables)
    markdown = [render(table, "markdown") for table in [*shown, *rest]]
    files = {
        "report.md": "\n".join(["# Report\n", *markdown]),
        "report.csv": groups_csv(sections),
        "runs.csv": runs_csv(sections),
        "report.tex": "\n".join(render(table, "latex") for table in shown),
        "report.html": page(sections, tables, rest, about),
    }
    if any(section.choice.classes for section in sections):
        files["classes.csv"] = classes_csv(sections)
    make_folder(folder, "--out")
    for name, content in files.items():
        with atomic(folder / name) as file:
            file.write(content.encode())
    print(f"written: {', '.join(str(folder / name) for name in files)}")


def printed_runs(sections: list[Section], records: list[Record]) -> list[Record]:
    """The runs behind what is printed, each at the epochs that are; `records`: all that were read.

    A teacher without a run of its own is kept with a student's, at whatever epoch.
    """
    printed = [group for section in sections for group in section.printed]
    nets = [record for group in printed for record in group.records]
    runs = [net for net in nets if not net.measured_by_student]
    of_teachers_alone = {net.folder for net in nets} - {run.folder for run in runs}
    return runs + [record for record in records if record.folder in of_teachers_alone]


if __name__ == "__main__":
    with one_line_errors("python -m scripts.report"):
        main()
