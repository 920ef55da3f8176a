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

from utils.analysis import shift
from utils.analysis.corruptions import OWN, PUBLISHED, SOURCES
from utils.analysis.figures import severity_boxes
from utils.analysis.records import finished_nets, write_beside
from utils.analysis.splits import comparison
from utils.data import dataset_label
from utils.program import UserError, one_line_errors
from utils.program.command_line import CommandLine, checked, count, location, path, whole
from utils.program.files import atomic

KNOWN = dict.fromkeys(SOURCES, PUBLISHED) | {"corruptions": tuple(OWN)}
STORED = ("cifar10h", "synthetic")  # no net is run
EVALUATIONS = dict.fromkeys(KNOWN, shift.under_corruptions) | {"svhn": shift.out_of_distribution}
EVALUATIONS |= dict.fromkeys(STORED, shift.against_labels)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    stored = args.on in STORED
    packed = stored and not args.write
    nets = finished_nets(args.runs, args.epoch, args.with_teacher or stored, packed)
    table, measured = EVALUATIONS.get(args.on, shift.out_of_distribution)(nets, args)
    print(table)
    for net in nets:
        if net.measured["temperature_at_bound"] and not net.third_party:
            title = net.title.strip()
            print(f"{title}: T lies at the bound of its range, do not trust its scaled rows")
    for sentence in comparison(nets, with_temperatures=False):
        print(f"{sentence} T was fitted on validation, which the scaled rows pay for.")
    if args.out is not None:
        with atomic(args.out) as file:
            severity_boxes([net.title.strip() for net in nets], measured, file)
        print(f"written: {args.out}")
    if args.write:
        about = {"on": args.on, "corruptions": args.corruptions, "seed": args.seed}
        file = f"evaluation_{dataset_label(args.on)}.json"
        for net, one in zip(nets, measured, strict=True):
            one = {"temperature": net.measured["temperature"], **one}
            print(f"written: {write_beside(net, file, about, one)}")


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(prog="python -m scripts.evaluate", description=__doc__.splitlines()[0])
    on = "cifar10c, cifar100c: the published corruptions; corruptions: our own; svhn or an .npz "
    on += "file (its x_test): out of distribution; cifar10h, synthetic: human and true posteriors"
    data_dir = Path(os.environ.get("KD_DATA") or "data")
    where = "where CIFAR-10-C/, cifar10h/, SVHN and the runs' data lie ($KD_DATA sets the default)"
    runs = "run folders, or folders above them; cifar10h, synthetic: or what report --pack wrote"
    teacher = "also each student's teacher, where its command found it, unless its run is named"
    names = dict.fromkeys((*OWN, *PUBLISHED))
    add = parser.add_argument
    add("runs", nargs="+", type=location, metavar="RUN", help=runs)
    add("--on", required=True, type=checked(target), metavar="WHAT", help=on)
    add("--data_dir", type=location, default=data_dir, help=where)
    add("--dataset", type=path, help="the runs' data set where it is no longer in its place")
    add("--epoch", choices=("best", "last"), default="best", help="best: by validation top-1")
    add("--with-teacher", action="store_true", help=teacher)
    add("--test-batch-size", type=count, help="images per step (default: 1000, on a CPU 128)")
    add("--write", action="store_true", help="also write evaluation_*.json into the run folders")
    add = parser.add_argument_group("corruptions").add_argument
    ours = f"only these; ours are {', '.join(OWN)}"
    add("--corruptions", nargs="+", choices=names, metavar="NAME", help=ours)
    add("--seed", type=whole, help="--on corruptions: of the noise (default: 0)")
    add("--out", type=location, metavar="FILE.png", help="a box plot by severity")
    args = parser.parse_args(argv)
    known = KNOWN.get(args.on)
    read = {"seed": args.on == "corruptions", "corruptions": known, "out": known}
    for flag, is_read in (read | {"dataset": args.on not in STORED}).items():
        if getattr(args, flag) is not None and not is_read:
            raise UserError(f"--{flag} has no effect with --on {args.on}; leave it out")
    if known:
        args.corruptions, args.seed = list(dict.fromkeys(args.corruptions or known)), args.seed or 0
        for one in set(args.corruptions).difference(known):
            raise UserError(f"--corruptions {one}: --on {args.on} has {', '.join(known)}")
    if args.out and (args.out.suffix != ".png" or not os.path.isdir(args.out.absolute().parent)):
        raise UserError(f"--out {args.out}: give a .png file in a folder that exists")
    return args


def target(text: str) -> str:
    if text in EVALUATIONS or (text.endswith(".npz") and os.path.isfile(os.path.expanduser(text))):
        return text
    known = ", ".join(EVALUATIONS)
    raise ValueError(f"{text!r}: check the path, or give one of {known}, or an .npz file")


if __name__ == "__main__":
    with one_line_errors("python -m scripts.evaluate"):
        main()
