"""Finished runs under shift, on foreign data, and against known label distributions.

    python -m scripts.evaluate RUN... --on cifar10c       and more, as --help says

Each net has a raw and a temperature-scaled row; the temperature is the run's own, fitted on its
validation split. Images are run in the precision of the run.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/evaluate.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

import os
from argparse import Namespace

from utils.analysis.corruptions import OWN, PUBLISHED
from utils.analysis.figures import severity_boxes
from utils.analysis.known_labels import against_people, against_posterior
from utils.analysis.nets import add_own_nets, check_own_nets
from utils.analysis.record import Record
from utils.analysis.records import finished_nets, write_beside
from utils.analysis.shift import data_dir_of, out_of_distribution, under_corruptions
from utils.analysis.splits import comparison
from utils.data import dataset_label
from utils.program import UserError, one_line_errors
from utils.program.command_line import CommandLine, checked, count, location, path, whole
from utils.program.files import atomic, check_writable, sha256
from utils.split_metrics import finite_only

# The corruptions that each of these targets has.
CORRUPTIONS = {"cifar10c": PUBLISHED, "cifar100c": PUBLISHED, "corruptions": tuple(OWN)}
# No net is run: stored logits will do.
STORED = {"cifar10h": against_people, "synthetic": against_posterior}
TARGETS = (*CORRUPTIONS, "svhn", *STORED)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    is_stored = args.on in STORED
    nets = finished_nets(
        args.runs,
        args.epoch,
        with_teacher=args.with_teacher or is_stored,
        packed=is_stored and not args.write,
    )
    if not is_stored:
        check_own_nets(nets, args.model or ())
    args.data_dir = data_dir_of(nets, args.data_dir)
    table, measured = evaluate(nets, args)
    print(table)

    for net in nets:
        if net.measured["temperature_at_bound"] and not net.third_party:
            print(
                f"{net.title.strip()}: T lies at the bound of its range, do not trust its scaled "
                "rows"
            )
    for sentence in comparison(nets, with_temperatures=False):
        print(f"{sentence} T was fitted on validation, which the scaled rows pay for.")

    if args.out is not None:
        with atomic(args.out) as file:
            severity_boxes([net.title.strip() for net in nets], measured, file)
        print(f"written: {args.out}")
    if args.write:
        write(nets, measured, args)


def evaluate(nets: list[Record], args: Namespace) -> tuple[str, list[dict]]:
    """The table, and what was measured of each net, ready for JSON. Raises UserError."""
    if args.on in STORED:
        return STORED[args.on](nets, args.data_dir)
    if args.on in CORRUPTIONS:
        return under_corruptions(
            nets,
            on=args.on,
            names=args.corruptions,
            data_dir=args.data_dir,
            dataset=args.dataset,
            seed=args.seed,
            batch_size=args.test_batch_size,
        )
    return out_of_distribution(
        nets,
        on=args.on,
        data_dir=args.data_dir,
        dataset=args.dataset,
        batch_size=args.test_batch_size,
    )


def write(nets: list[Record], measured: list[dict], args: Namespace) -> None:
    """evaluation_*.json into the run folders."""
    about = {"on": args.on, "corruptions": args.corruptions, "seed": args.seed}
    name = f"evaluation_{dataset_label(args.on)}.json"
    if args.on not in TARGETS:
        # Files of one name may hold other images.
        about["sha256"] = sha256(Path(args.on).expanduser())
        name = f"evaluation_{dataset_label(args.on)}_{about['sha256'][:8]}.json"
    for net, metrics in zip(nets, measured, strict=True):
        content = {"temperature": net.measured.get("temperature"), **finite_only(metrics)}
        print(write_beside(net, name, about, content))


def options(argv: list[str] | None) -> Namespace:
    """What the command line asks for, checked as a whole. Raises UserError."""
    parser = CommandLine(prog="python -m scripts.evaluate", description=__doc__.splitlines()[0])
    add_data(parser)
    add_nets(parser)
    parser.add_argument(
        "--write", action="store_true", help="also write evaluation_*.json into the run folders"
    )
    add_corruptions(parser)
    args = parser.parse_args(argv)

    refuse_unread(args)
    if args.on in CORRUPTIONS:
        choose_corruptions(args)
    if args.out is not None:
        if args.out.suffix != ".png":
            raise UserError(f"--out {args.out}: give a .png file")
        check_writable(args.out, "--out")
    return args


def add_data(parser: CommandLine) -> None:
    """The runs, and what they are evaluated on."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=location,
        metavar="RUN",
        help="run folders, or folders above them; cifar10h, synthetic: or what report --pack wrote",
    )
    parser.add_argument(
        "--on",
        required=True,
        type=checked(target),
        metavar="WHAT",
        help="cifar10c, cifar100c: the published corruptions; corruptions: our own; svhn or an "
        ".npz file (its x_test): out of distribution; cifar10h, synthetic: human and true "
        "posteriors",
    )
    parser.add_argument(
        "--data_dir",
        type=location,
        help="where CIFAR-10-C/, cifar10h/, SVHN and the runs' data lie (default: where the first "
        "run found its own, else $KD_DATA, data)",
    )
    parser.add_argument(
        "--dataset", type=path, help="the runs' data set where it is no longer in its place"
    )


def add_nets(parser: CommandLine) -> None:
    """Which nets of the runs, and how they are run."""
    parser.add_argument(
        "--epoch",
        choices=("best", "last"),
        default="best",
        help="best: the one that the run's --select chose on validation",
    )
    parser.add_argument(
        "--with-teacher",
        action="store_true",
        help="also each student's teacher, where its command found it, unless its run is named",
    )
    add_own_nets(parser)
    parser.add_argument(
        "--test-batch-size", type=count, help="images per step (default: 1000, on a CPU 128)"
    )


def add_corruptions(parser: CommandLine) -> None:
    group = parser.add_argument_group("corruptions")
    group.add_argument(
        "--corruptions",
        nargs="+",
        choices=dict.fromkeys((*OWN, *PUBLISHED)),  # each once
        metavar="NAME",
        help=f"only these; ours are {', '.join(OWN)}",
    )
    group.add_argument("--seed", type=whole, help="--on corruptions: of the noise (default: 0)")
    group.add_argument("--out", type=location, metavar="FILE.png", help="a box plot by severity")


def refuse_unread(args: Namespace) -> None:
    """Refuse a flag that the target does not read. Raises UserError."""
    is_read = {
        "seed": args.on == "corruptions",
        "corruptions": args.on in CORRUPTIONS,
        "out": args.on in CORRUPTIONS,
        "dataset": args.on not in STORED,
        "model": args.on not in STORED,
    }
    for flag, read in is_read.items():
        if getattr(args, flag) is not None and not read:
            raise UserError(f"--{flag} has no effect with --on {args.on}; leave it out")


def choose_corruptions(args: Namespace) -> None:
    """All that the target has, or those that are named, each once. Raises UserError."""
    available = CORRUPTIONS[args.on]
    args.corruptions = list(dict.fromkeys(args.corruptions or available))
    args.seed = args.seed or 0
    for name in args.corruptions:
        if name not in available:
            raise UserError(f"--corruptions {name}: --on {args.on} has {', '.join(available)}")


def target(text: str) -> str:
    """A value of --on. Raises ValueError."""
    is_archive = text.endswith(".npz") and os.path.isfile(os.path.expanduser(text))
    if text not in TARGETS and not is_archive:
        raise ValueError(
            f"{text!r}: check the path, or give one of {', '.join(TARGETS)}, or an .npz file"
        )
    return text


if __name__ == "__main__":
    with one_line_errors("python -m scripts.evaluate"):
        main()
