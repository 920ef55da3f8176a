"""Post-hoc calibration of finished runs, from their stored logits.

    python -m scripts.posthoc RUN...              a table for each run below the folders RUN
    python -m scripts.posthoc RUN... --write      and posthoc.json beside each
    python -m scripts.posthoc RUN... --methods sms svs isotonic ivap     and maps of probmetrics

Every map is fitted on the validation split and measured on the test split. No net is run.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/posthoc.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

from argparse import Namespace
from collections.abc import Callable
from functools import partial

from torch import Tensor

from utils.analysis.records import finished_nets, write_beside
from utils.calibration.metrics import classification_metrics
from utils.calibration.packaged import PACKAGE, PackagedMap, calibrator, is_installed, packaged_map
from utils.calibration.posthoc import FOLDS, METHODS, Calibration, dirichlet_calibration
from utils.columns import COLUMNS, NO_SCALED_ROW, metrics_table
from utils.program import UserError, one_line_errors
from utils.program.command_line import CommandLine, location, number, short_text
from utils.program.files import refused
from utils.split_metrics import finite_only

FILE = "posthoc.json"
RULED_OUT = (
    "logits of -inf, probabilities of 0, have no value under these maps; store the least "
    "probabilities in their place"
)
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
        help="best: the one that the run's --select chose on validation",
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
        "--methods",
        nargs="+",
        type=short_text(80),
        default=[],
        metavar="MAP",
        help=f"further maps, by the names of the package {PACKAGE}, which is installed with pip: "
        "sms and svs (structured matrix and vector scaling), isotonic, ivap (Venn-Abers), ...",
    )
    parser.add_argument(
        "--write", action="store_true", help=f"also write {FILE} into the run folders"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    methods = methods_of(args)
    nets = finished_nets(args.runs, args.epoch, args.with_teacher, logits_alone=not args.write)
    for net in nets:
        if net.third_party:
            print(f"\n{net.title}\nnothing is fitted: {NO_SCALED_ROW}")
            continue
        val = net.stored("val")
        test = net.stored("test")
        if any(logits.isinf().any() for logits, _ in (val, test)):
            print(f"\n{net.title}\nnothing is fitted: {RULED_OUT}")
            continue

        fits = {}
        for method, fit in methods.items():
            fits[method] = measure(fit(*val), val, test)

        print(f"\n{net.title}\n{table(fits)}")
        for method, fit in fits.items():
            for note in fit["notes"]:
                print(f"{method}: {note}")
        if args.write:
            print(write_beside(net, FILE, {"folds": args.folds}, finite_only(fits)))


def methods_of(args: Namespace) -> dict[str, Callable]:
    """Our own maps, then those that --methods names. Raises UserError."""
    methods: dict[str, Callable] = dict(METHODS)
    methods["Dirichlet ODIR"] = partial(dirichlet_calibration, folds=args.folds)
    if args.methods and not is_installed():
        raise UserError(
            f"--methods {' '.join(args.methods)}: the package {PACKAGE} makes these maps and is "
            f"not installed; pip install {PACKAGE}"
        )
    for method in args.methods:
        with refused(
            f"--methods {method}: {PACKAGE} cannot make it",
            "install what it needs with pip, or give sms, svs, isotonic or ivap",
            (ImportError, ValueError),
        ):
            calibrator(method)
        methods[method] = partial(packaged_fit, method)
    return methods


def packaged_fit(method: str, logits: Tensor, labels: Tensor) -> PackagedMap:
    """Raises UserError where the package cannot fit it to these logits, for whatever reason."""
    with refused(f"--methods {method}: it cannot be fitted to this run", "leave it out"):
        return packaged_map(method, logits, labels)


def measure(calibration: Calibration | PackagedMap, val: tuple, test: tuple) -> dict:
    """What the fit found, the map itself, and the metrics on both splits (fractions).

    `val` and `test`: logits (N, K) and labels (N,).
    """
    val_logits, val_labels = val
    test_logits, test_labels = test
    calibrated = calibration(test_logits)
    notes = list(calibration.notes)
    impossible = calibrated.gather(1, test_labels.long().unsqueeze(1)).isinf().sum().item()
    if impossible:
        notes.append(
            f"the NLL is infinite, for the true class of {impossible} of {len(calibrated):,} test "
            "images has probability 0"
        )
    return {
        **calibration.facts,
        **calibration.parameters(),
        "notes": notes,
        "val": classification_metrics(calibration(val_logits), val_labels),
        "test": classification_metrics(calibrated, test_labels),
    }


def table(fits: dict[str, dict]) -> str:
    """A row of each method, with what `measure` says of it."""
    rows = []
    for method, fit in fits.items():
        chosen = [f"{text} = {fit[key]:.4g}" for key, text in SHOWN.items() if key in fit]
        cells = [method, COLUMNS["nll"].text(fit["val"]["nll"]), ", ".join(chosen)]
        rows.append((cells, fit["test"]))
    table = metrics_table(["test split", "val NLL", "chosen"], rows)
    return f"{table}\nval NLL: on the images that the maps were fitted on, so not to be chosen by."


if __name__ == "__main__":
    with one_line_errors("python -m scripts.posthoc"):
        main()
