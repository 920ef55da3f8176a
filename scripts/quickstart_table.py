"""The table of docs/quickstart.md: what holds in every seed and on other machines' arithmetic.

    for threads in 1 2; do for seed in 42 43 44; do
        OMP_NUM_THREADS=$threads SEED=$seed bash scripts/quickstart.sh runs/threads-$threads
    done; done
    python -m scripts.quickstart_table runs/threads-1 runs/threads-2

A row for each net, raw and scaled: mean over its runs and, in brackets, the least and the greatest.
Bold: the best of its column among the nets of its architecture, at equal logits, in every
repetition. A repetition is one seed in one folder. Then, for each comparison that the page speaks
of: the first minus the second, and in how many repetitions the first is lower.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/quickstart_table.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from typing import NamedTuple

import numpy as np

from utils.columns import COLUMNS
from utils.program import UserError, one_line_errors
from utils.program.command_line import CommandLine, location
from utils.program.files import files_below, read_json

METRICS = ("top1", "ece", "true_calibration_error")
KINDS = ("raw", "scaled")


class Net(NamedTuple):
    """A net of the quickstart: how the page calls it, and what its runs say of themselves."""

    row: str
    model: str
    label: str
    teacher: str | None = None  # its teacher's label

    @property
    def name(self) -> str:
        """As a comparison calls it."""
        return f"{self.model} of {self.teacher}" if self.teacher else f"{self.model} {self.label}"


CALIBRATED = "FL+MDCA_gamma=1_beta=1"
FL_TEACHER = Net("teacher resnet14, FL+MDCA", "resnet14", CALIBRATED)
FL_STUDENT = Net("↳ its student resnet8", "resnet8", "KD_T=4_Lambda=0.9", CALIBRATED)
NLL_TEACHER = Net("teacher resnet14, NLL", "resnet14", "NLL")
NLL_STUDENT = Net("↳ its student resnet8", "resnet8", "KD_T=4_Lambda=0.9", "NLL")
SCRATCH = Net("resnet8 from scratch, NLL", "resnet8", "NLL")
NETS = (FL_TEACHER, FL_STUDENT, NLL_TEACHER, NLL_STUDENT, SCRATCH)
COMPARISONS = (
    (FL_TEACHER, NLL_TEACHER),
    (FL_STUDENT, NLL_STUDENT),
    (FL_STUDENT, SCRATCH),
    (NLL_STUDENT, SCRATCH),
)
Repetitions = dict[Net, dict[tuple[Path, int], dict]]


def read_repetitions(roots: list[Path]) -> Repetitions:
    """For each net: (folder, seed) -> the last epoch's test metrics, raw and scaled. UserError."""
    repetitions: Repetitions = {net: {} for net in NETS}
    for root in roots:
        for path in files_below(root, "result.json"):
            result = read_json(path, "run the quickstart again")
            for net in NETS:
                if is_run_of(net, result):
                    repetitions[net][root, result["seed"]] = result["last"]["test"]

    # Every net in every repetition, or the rows would be means over different seeds.
    places = [set(repetitions[net]) for net in NETS]
    if not places[0] or any(other != places[0] for other in places):
        counts = ", ".join(str(len(repetitions[net])) for net in NETS)
        raise UserError(
            f"{' '.join(map(str, roots))}: hold {counts} runs of the five nets; each needs one for "
            "each seed; run the quickstart there"
        )
    return repetitions


def is_run_of(net: Net, result: dict) -> bool:
    label, _, _ = result["label"].partition("_from_")
    teacher = result["teacher"]["label"] if "teacher" in result else None
    return (result["model"], label, teacher) == (net.model, net.label, net.teacher)


def values(repetitions: Repetitions, net: Net, kind: str, metric: str) -> np.ndarray:
    """As shown, in the order of the repetitions."""
    tests = repetitions[net]
    fractions = [tests[place][kind][metric] for place in sorted(tests)]
    return COLUMNS[metric].factor * np.array(fractions)


def spread(numbers: np.ndarray) -> str:
    return f"{numbers.mean():.2f} [{numbers.min():.2f}, {numbers.max():.2f}]"


def always_best(repetitions: Repetitions, net: Net, kind: str, metric: str) -> bool:
    """Whether the net is ahead of every other one of its architecture in every repetition."""
    sign = 1 if COLUMNS[metric].best == "min" else -1
    own = sign * values(repetitions, net, kind, metric)
    rivals = [other for other in NETS if other.model == net.model and other != net]
    others = [sign * values(repetitions, other, kind, metric) for other in rivals]
    return all((own < other).all() for other in others)


def table_of_nets(repetitions: Repetitions) -> list[str]:
    heads = [COLUMNS[metric].head for metric in METRICS]
    lines = ["| `synthetic` | logits | " + " | ".join(heads) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(METRICS))
    for net in NETS:
        for kind in KINDS:
            cells = []
            for metric in METRICS:
                text = spread(values(repetitions, net, kind, metric))
                best = always_best(repetitions, net, kind, metric)
                cells.append(f"**{text}**" if best else text)
            name = net.row if kind == "raw" else ""
            lines.append(f"| {name} | {kind} | " + " | ".join(cells) + " |")
    return lines


def lines_of_comparisons(repetitions: Repetitions) -> list[str]:
    lines = []
    for first, second in COMPARISONS:
        names = f"{first.name} - {second.name}"
        for kind in KINDS:
            for metric in METRICS:
                own = values(repetitions, first, kind, metric)
                difference = own - values(repetitions, second, kind, metric)
                lower = f"lower in {(difference < 0).sum()} of {len(difference)}"
                lines.append(
                    f"{names}, {kind}, {COLUMNS[metric].head}: {spread(difference)}, {lower}"
                )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(
        prog="python -m scripts.quickstart_table",
        description="The table of docs/quickstart.md, from its runs.",
    )
    parser.add_argument(
        "roots", nargs="+", type=location, metavar="ROOT", help="quickstart's FOLDER"
    )
    args = parser.parse_args(argv)

    repetitions = read_repetitions(args.roots)
    print(f"{len(repetitions[SCRATCH])} repetitions")
    print("\n".join(table_of_nets(repetitions)))
    print("\n".join(lines_of_comparisons(repetitions)))


if __name__ == "__main__":
    with one_line_errors("python -m scripts.quickstart_table"):
        main()
