"""Post-hoc calibration of finished runs, from their stored logits.

    python -m scripts.posthoc RUN...              a table for each run below the folders RUN
    python -m scripts.posthoc RUN... --write      and posthoc.json beside each

Every map is fitted on the validation split and measured on the test split. No net is run.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/posthoc.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

from argparse import Namespace
from functools import partial

import torch

from utils.analysis.columns import COLUMNS, NO_SCALED_ROW, metrics_table
from utils.analysis.records import finished_nets, write_beside
from utils.calibration.metrics import classification_metrics
from utils.calibration.posthoc import FOLDS, METHODS, Calibration, dirichlet_calibration
from utils.program import one_line_errors
from utils.program.command_line import CommandLine, location, number

FILE = "posthoc.json"
SHOWN = {"temperature": "T", "lambda": "lambda", "mu": "mu"}  # of what a fit found


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(
        prog="python -m scripts.posthoc",
        description="Fit temperature, vector and Dirichlet scaling to the validation split of "
        "runs.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=location,
        metavar="RUN",
        help="run folders, folders above them, or .npz files of val_logits, val_labels, "
        "test_logits and test_labels",
    )
    parser.add_argument(
        "--epoch",
        choices=("best", "last"),
        default="best",
        help="best: by validation top-1",
    )
    parser.add_argument(
        "--with-teacher",
        action="store_true",
        help="also a table for each student's teacher, unless its run is named",
    )
    parser.add_argument(
        "--folds",
        type=number(int, "a whole number above 1", lambda n: n > 1),
        default=FOLDS,
        help="of the cross-validation that chooses how strongly Dirichlet scaling is regularised",
    )
    parser.add_argument(
        "--write", action="store_true", help=f"also write {FILE} into the run folders"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    methods = dict(METHODS)
    methods["Dirichlet ODIR"] = partial(dirichlet_calibration, folds=args.folds)
    nets = finished_nets(args.runs, args.epoch, args.with_teacher, logits_alone=not args.write)
    for net in nets:
        if net.third_party:
            print(f"\n{net.title}\nnothing is fitted: {NO_SCALED_ROW}")
            continue

        val_logits, val_labels = net.stored("val")
        test = net.stored("test")
        fits = {}
        for method, fit in methods.items():
            calibration = fit(val_logits, val_labels)
            fits[method] = measure(calibration, (val_logits, val_labels), test)

        print(f"\n{net.title}\n{table(fits)}")
        for method, fit in fits.items():
            for note in fit["notes"]:
                print(f"{method}: {note}")
        if args.write:
            print(f"written: {write_beside(net, FILE, {'folds': args.folds}, fits)}")


def measure(calibration: Calibration, val: tuple, test: tuple) -> dict:
    """What the fit found, the map itself, and the metrics on both splits (fractions)."""
    weight = calibration.weight
    diagonal = torch.equal(weight, weight.diagonal().diag())
    return {
        **calibration.facts,
        "of_log_probs": calibration.of_log_probs,
        "weight": (weight.diagonal() if diagonal else weight).tolist(),
        "bias": calibration.bias.tolist(),
        "notes": list(calibration.notes),
        "val": classification_metrics(calibration(val[0]), val[1]),
        "test": classification_metrics(calibration(test[0]), test[1]),
    }


def table(fits: dict[str, dict]) -> str:
    """A row of each method, with what `measure` says of it."""
    rows = []
    for method, fit in fits.items():
        chosen = [f"{text} = {fit[key]:.4g}" for key, text in SHOWN.items() if key in fit]
        cells = [method, COLUMNS["nll"].text(fit["val"]["nll"]), ", ".join(chosen)]
        rows.append((cells, fit["test"]))
    return metrics_table(["test split", "val NLL", "chosen"], rows)


if __name__ == "__main__":
    with one_line_errors("python -m scripts.posthoc"):
        main()
