"""How fast training is: a conventional loop against ours, in one run on one machine.

    python -m scripts.benchmark --quick                     minutes on a quiet CPU
    accelerate launch --cpu --mixed_precision bf16 -m scripts.benchmark --quick
    python -m scripts.benchmark --at-once 1 2 4 8           what several runs on one device yield

The conventional loop is what this field publishes, ours the code that train_teacher.py and
train_student.py run, a bare step that without the loop, on one batch, launched like ours; where
ours are CUDA graphs, it is measured kernel by kernel as well. Images are random bytes of CIFAR's
shape. The contenders of a row take turns, so that whatever else a machine does slows all of
them alike; a ratio is the median over the rounds. docs/performance.md says more.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/benchmark.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

import os
import tempfile
import time
from argparse import Namespace
from functools import partial
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from scripts.benchmarking.contenders import (
    Job,
    Pass,
    bare,
    conventional,
    ours,
    random_data,
    random_teacher,
    recipe_of,
)
from scripts.benchmarking.floor import device_rates, floor_rate, seconds_of, training_cost
from scripts.benchmarking.runs_at_once import MODEL, SECONDS, runs_at_once
from utils.columns import text_table
from utils.data import Dataset
from utils.program import UserError, one_line_errors
from utils.program.bars import progress_bar
from utils.program.command_line import CommandLine, count, positive, whole
from utils.program.environment import environment, precision_note
from utils.program.processes import start
from utils.steps import MODES, is_captured

HEAD = ["images/s", "conventional", "ours", "ratio", "of a bare step", "of the floor"]
EAGER_BARE = "of a bare step, kernel by kernel"  # where ours are graphs
ROUNDS = 3
WARM_UP = 5  # steps
# Images are made for passes of at most so many steps: on a GPU about CIFAR's training split.
GPU_STEPS = 350
CPU_STEPS_PER_SECOND = 8
CPU_SECONDS = 5


class Row(NamedTuple):
    """A net that is trained, by a teacher if there is one, whose logits may be cached."""

    model: str
    teacher: str | None = None
    cached: bool = False

    @property
    def name(self) -> str:
        name = f"{self.teacher} -> {self.model}" if self.teacher else self.model
        return f"{name}, cached" if self.cached else name


QUICK_ROWS = (
    Row("resnet8"),
    Row("resnet20"),
    Row("resnet56"),
    Row("resnet8", "resnet56"),
    Row("resnet8", "resnet56", cached=True),
)
ALL_ROWS = (
    Row("resnet8"),
    Row("resnet20"),
    Row("resnet56"),
    Row("resnet110"),
    Row("wrn_40_2"),
    Row("resnet8", "resnet56"),
    Row("resnet8", "resnet56", cached=True),
    Row("wrn_16_2", "wrn_40_2"),
    Row("wrn_16_2", "wrn_40_2", cached=True),
)


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(
        prog="python -m scripts.benchmark",
        description="Images per second of a conventional training loop and of ours.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few nets and short passes: minutes on a CPU"
    )
    parser.add_argument("--batch-size", type=count, default=128, help="images per training step")
    parser.add_argument(
        "--seconds",
        type=positive,
        help="of a pass, roughly (default: 5, or 1.5 with --quick); "
        f"with --at-once of a run ({SECONDS})",
    )
    parser.add_argument(
        "--workers",
        type=whole,
        help="of the DataLoader (default: as many as there are cores)",
    )
    parser.add_argument(
        "--step", choices=MODES, default="auto", help="how ours launches a step; see the scripts"
    )
    parser.add_argument(
        "--at-once",
        type=count,
        nargs="+",
        metavar="N",
        help=f"measure only this: the images/s of N runs of {MODEL} at once, all together",
    )
    args = parser.parse_args(argv)
    if args.at_once and args.workers is not None:
        raise UserError("--workers has no effect with --at-once; leave it out")
    if args.workers is None:
        args.workers = os.cpu_count()
    if args.seconds is None and args.at_once:
        args.seconds = SECONDS
    elif args.seconds is None:
        args.seconds = 1.5 if args.quick else 5
    return args


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    accelerator = start()
    if accelerator.num_processes > 1:
        raise UserError(
            f"accelerate launch --num_processes {accelerator.num_processes}: the benchmark "
            "measures one process; give 1"
        )
    print(about(accelerator, args.step))
    note = precision_note(accelerator)
    if note:
        print(note)
    print()

    data = random_data(most_steps(accelerator, args.seconds) * args.batch_size)
    if args.at_once:
        print(runs_at_once(args.at_once, data, args.batch_size, args.step, args.seconds))
    else:
        print(contest(accelerator, data, args))


def most_steps(accelerator: Accelerator, seconds: float) -> int:
    """How many steps a pass has that is to last so long."""
    if accelerator.device.type == "cuda":  # it would be through with a CPU's in no time
        return GPU_STEPS
    return max(WARM_UP, round(CPU_STEPS_PER_SECOND * min(CPU_SECONDS, seconds)))


def contest(accelerator: Accelerator, data: Dataset, args: Namespace) -> str:
    """The table of all rows, and under it how it was made."""
    device = device_rates(accelerator)
    lines = []
    for row in progress_bar(QUICK_ROWS if args.quick else ALL_ROWS, "rows"):
        rates = measure(accelerator, data, row, args)
        cost = training_cost(row.model, None if row.cached else row.teacher)
        floor = floor_rate(device, cost, accelerator.mixed_precision)
        loop, own, ratio, *rest = cells(rates, floor)
        lines.append([row.name, loop, own, ratio, *rest])
        # Now, too: what was measured is not lost where the time ends before the last row.
        tqdm.write(f"{row.name}: {loop} images/s conventional, {own} ours, ratio {ratio}")

    has_graphs = is_captured(args.step, accelerator)
    table = text_table([*HEAD, EAGER_BARE] if has_graphs else HEAD, lines)
    return (
        f"{table}\n\n"
        f"{ROUNDS} rounds, median +- half the range; {args.batch_size} images a step, floor: "
        f"{device.products / 1e9:,.0f} billion operations/s, {device.copies / 1e9:,.1f} GB/s"
    )


def about(accelerator: Accelerator, mode: str) -> str:
    facts = environment(accelerator)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{time.strftime('%Y-%m-%d')}, {facts['hardware']}, threads: {facts['threads']}\n"
        f"{versions}; precision: {accelerator.mixed_precision}, --step {mode}"
    )


def contenders_of(
    accelerator: Accelerator, data: Dataset, row: Row, args: Namespace, folder: str
) -> dict[str, Pass]:
    """What takes turns in a row; `folder` is that of a teacher's cache."""
    job = Job(
        accelerator,
        data,
        recipe=recipe_of(row.model, args.batch_size),
        teacher=random_teacher(row.teacher, data, accelerator) if row.teacher else None,
        cache=folder if row.cached else None,
    )
    contenders = {
        "conventional": conventional(job, args.workers),
        "ours": ours(job, args.step),
        "bare step": bare(job, args.step),
    }
    if is_captured(args.step, accelerator):
        contenders["bare step, eager"] = bare(job, "eager")
    return contenders


def measure(accelerator: Accelerator, data: Dataset, row: Row, args: Namespace) -> dict:
    """Images/s of each contender in each round, all of which take about the same time."""
    accelerator.free_memory()
    most_steps = len(data.train.labels) // args.batch_size
    steps: dict[str, int] = {}
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders = contenders_of(accelerator, data, row, args, folder)
        if row.cached:
            contenders["ours"](most_steps)  # a whole epoch fills it
        for name, train in contenders.items():
            train(WARM_UP)
            # As many steps as last that long, judged by a few; no more than there are images for.
            seconds_per_step = seconds_of(partial(train, WARM_UP)) / WARM_UP
            wanted = max(1, round(args.seconds / seconds_per_step))
            steps[name] = min(wanted, most_steps)
            rates[name] = []
        for _ in range(ROUNDS):
            for name, train in contenders.items():
                seconds = seconds_of(partial(train, steps[name]))
                rates[name].append(steps[name] * args.batch_size / seconds)
    return rates


def cells(rates: dict[str, list[float]], floor: float) -> list[str]:
    arrays = {name: np.array(values) for name, values in rates.items()}
    loop = arrays["conventional"]
    own = arrays["ours"]
    row = [
        spread(loop, ",.0f"),
        spread(own, ",.0f"),
        spread(own / loop, ".2f"),
        spread(own / arrays["bare step"], ".2f"),
        f"{100 * np.median(own) / floor:.1f} %",
    ]
    if "bare step, eager" in arrays:
        row.append(spread(own / arrays["bare step, eager"], ".2f"))
    return row


def spread(values: np.ndarray, form: str) -> str:
    """The median, and half the range in percent of it."""
    median = np.median(values)
    return f"{median:{form}} +- {50 * np.ptp(values) / median:.0f} %"


if __name__ == "__main__":
    with one_line_errors("python -m scripts.benchmark"):
        main()
