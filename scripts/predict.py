"""What a finished run says of one's own images: class, confidence, conformal set.

    python -m scripts.predict RUN photos/ --out predictions.csv      a run folder, net.onnx, or
                                                                     net.safetensors
    python -m scripts.predict RUN a.png b.jpg images.npy             a table at the terminal

Images are resized and cropped to the size that the net was trained on. docs/predict.md says what
the columns mean.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/predict.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

import os
import re
from argparse import Namespace
from itertools import compress

from torch import Tensor

from scripts.deployment.predictors import LEVEL, Predictor, file_predictor, run_predictor
from utils.analysis.csv_files import csv_text
from utils.analysis.nets import add_own_nets, own_files
from utils.columns import printable, text_table
from utils.data.given import GivenImages
from utils.program import UserError, one_line_errors
from utils.program.bars import progress_bar
from utils.program.command_line import CommandLine, count, location, number
from utils.program.files import atomic, check_not_input, check_writable
from utils.program.words import counted

HIGHEST = 5  # classes of an image
SHOWN = 20  # images at the terminal
SHOWN_CLASSES = 5  # of a set, there
BETWEEN = "|"  # the classes of a set in the file

Row = dict[str, str | list[str]]  # by column; a set as the names of its classes


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    given = GivenImages(args.images)
    predictor = predictor_of(args)
    if args.out is not None:
        inputs = [*predictor.files, *own_files(args.model or ()), *given.files()]
        check_not_input(args.out, "--out", inputs)

    rows: list[Row] = []
    rounded = 0
    with progress_bar(title="images", total=len(given)) as bar:
        for piece in given.pieces(predictor.side):
            if piece.names:
                logits = predictor.logits(piece.images).double()
                rows += rows_of(
                    predictor, files=piece.names, logits=logits, level=args.level or LEVEL
                )
                rounded += logits.isneginf().any(dim=1).sum().item()
            bar.update(len(piece.names))

    # What the reader has to know of the table, or why there is none.
    notes = [*given.notes(), *predictor.notes]
    if rounded:
        notes.append(
            f"{args.run} rounds a probability of {counted(rounded, 'image')} to 0: raw_confidence, "
            "and the order of such classes, are left empty; --format safetensors keeps them"
        )
    if not rows:
        raise UserError(f"IMAGES: none of {len(given)} can be read; {' '.join(notes)}")

    # Notes come last, where a long table has not scrolled them away.
    if args.out is None:
        print(table_of(rows))
    else:
        with atomic(args.out, "w") as file:
            file.write(csv_text([row_of_file(row) for row in rows]))
    for note in notes:
        print(printable(note))
    if args.out is not None:
        print(f"written: {args.out}, {counted(len(rows), 'image')}")


def options(argv: list[str] | None) -> Namespace:
    """What the command line asks for, checked as a whole. Raises UserError."""
    parser = CommandLine(prog="python -m scripts.predict", description=__doc__.splitlines()[0])
    parser.add_argument(
        "run",
        type=location,
        metavar="RUN",
        help="a run folder, one above it, or an ONNX or safetensors file of scripts.export",
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=location,
        metavar="IMAGES",
        help="image files, folders of them, .npy, or .npz (x_test, x or images)",
    )
    parser.add_argument(
        "--out", type=location, metavar="FILE.csv", help="write all images there; else 20 are shown"
    )
    parser.add_argument(
        "--level",
        type=number(float, "a number between 0 and 1", lambda x: 0 < x < 1),
        help=f"with which chance a set is to hold the true class (default: {LEVEL})",
    )
    parser.add_argument(
        "--epoch",
        choices=("best", "last"),
        help="of a run; best: the one that its --select chose on validation (default: best)",
    )
    add_own_nets(parser)
    parser.add_argument(
        "--image_size",
        type=count,
        metavar="PIXELS",
        help="of a run of an older version, which does not say it: the side of its images",
    )
    parser.add_argument(
        "--test-batch-size", type=count, help="images per step (default: 1000, on a CPU 128)"
    )
    args = parser.parse_args(argv)
    check_options(args)
    return args


def check_options(args: Namespace) -> None:
    """Refuse what cannot be written, and flags of runs for an exported net. Raises UserError."""
    if args.out is not None:
        check_writable(args.out, "--out")
    if os.path.isfile(args.run):
        for flag in ("epoch", "image_size"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} has no effect with {args.run}; leave it out")


def predictor_of(args: Namespace) -> Predictor:
    """Raises UserError where RUN is neither a finished run nor an exported net."""
    if not os.path.exists(args.run):
        raise UserError(f"{args.run}: it is not there; name a run folder or an exported net")
    if os.path.isfile(args.run):
        return file_predictor(args.run, args.level, args.test_batch_size, own_nets=args.model or ())
    return run_predictor(
        args.run,
        epoch=args.epoch or "best",
        level=args.level or LEVEL,
        side=args.image_size,
        batch_size=args.test_batch_size,
        own_nets=args.model or (),
    )


def rows_of(predictor: Predictor, files: list[str], logits: Tensor, level: float) -> list[Row]:
    """A row for each image: fractions, and names of classes.

    `logits`: the predictor's (N, K), float64. What follows from one of -inf alone stays empty.
    """
    is_rounded = logits.isneginf()
    raw = logits.softmax(dim=1)
    probabilities = (logits / predictor.temperature).softmax(dim=1)
    by_rank = logits.argsort(dim=1, descending=True, stable=True)
    members = None
    if predictor.sets:
        # A set always holds the predicted class: that can only add coverage.
        members = predictor.sets(logits, never_empty=True)

    rows = []
    for place, file in enumerate(files):
        labels = by_rank[place]
        names = [predictor.classes[label] for label in labels.tolist()]
        values = [f"{value:.6f}" for value in probabilities[place, labels[:HIGHEST]].tolist()]
        row = {"file": printable(file), "class": names[0], "confidence": values[0]}
        if predictor.is_tempered:
            is_exact = not is_rounded[place].any()
            row["raw_confidence"] = f"{raw[place].max():.6f}" if is_exact else ""
        if members is not None:
            inside = members[place, labels].tolist()
            row[f"set_at_{level:g}"] = list(compress(names, inside))
        for rank, (name, value) in enumerate(zip(names, values, strict=False), start=1):
            row[f"class_{rank}"] = "" if is_rounded[place, labels[rank - 1]] else name
            row[f"probability_{rank}"] = value
        rows.append(row)
    return rows


def row_of_file(row: Row) -> dict[str, str]:
    """Each set in one cell; a backslash in front of what a name itself has of | and backslashes."""
    cells = {}
    for head, value in row.items():
        if isinstance(value, list):
            value = BETWEEN.join(re.sub(r"([\\|])", r"\\\1", name) for name in value)
        cells[head] = value
    return cells


def table_of(rows: list[Row]) -> str:
    """The first rows for a terminal, and how many more there are."""
    heads = [head for head in rows[0] if not head.startswith(("class_", "probability_"))]
    lines = [[cell(row[head]) for head in heads] for row in rows[:SHOWN]]
    table = text_table(heads, lines)
    more = len(rows) - SHOWN
    return f"{table}\nand {more} more; --out FILE.csv writes all" if more > 0 else table


def cell(value: str | list[str]) -> str:
    if isinstance(value, str):
        return printable(value)
    more = f" and {len(value) - SHOWN_CLASSES} more" if len(value) > SHOWN_CLASSES else ""
    return printable(", ".join(value[:SHOWN_CLASSES]) + more)


if __name__ == "__main__":
    with one_line_errors("python -m scripts.predict"):
        main()
