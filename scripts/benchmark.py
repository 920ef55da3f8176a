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

import json
import math
import os
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.benchmark.utils.timer import timer  # waits for a GPU
from tqdm import tqdm

from models import build_model
from scripts.contenders import (
    CLASSES,
    SIDE,
    Pass,
    bare,
    conventional,
    ours,
    random_data,
    random_teacher,
)
from utils.analysis.columns import text_table
from utils.data import Dataset
from utils.program import RunFailed, UserError, one_line_errors
from utils.program.command_line import CommandLine, count, positive, whole
from utils.program.environment import environment, precision_note
from utils.program.processes import start
from utils.settings import Recipe
from utils.steps import MODES, is_captured
from utils.teacher_cache import DTYPES

HEAD = ["images/s", "conventional", "ours", "ratio", "of a bare step", "of the floor"]
EAGER_BARE = "of a bare step, kernel by kernel"  # where ours are graphs
ROUNDS = 3
TEACHER = Path(__file__).parent.parent / "train_teacher.py"
TOGETHER = "resnet8"  # of several runs at once
SECONDS_AT_ONCE = 30  # of each run: starting takes some 8, and they are to overlap
FEWEST_EPOCHS = 6


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
        help="of a pass, roughly (default: 5, or 1.5 with --quick); with --at-once of a run (30)",
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
        help=f"measure only this: the images/s of N runs of {TOGETHER} at once, all together",
    )
    args = parser.parse_args(argv)
    if args.at_once and args.workers is not None:
        raise UserError("--workers has no effect with --at-once; leave it out")
    if args.workers is None:
        args.workers = os.cpu_count()
    if args.seconds is None and args.at_once:
        args.seconds = SECONDS_AT_ONCE
    elif args.seconds is None:
        args.seconds = 1.5 if args.quick else 5
    return args


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    accelerator = start()
    if accelerator.num_processes > 1:
        raise UserError("the benchmark measures one process; launch it with one")
    print(about(accelerator, args.step))
    print(precision_note(accelerator))

    # On a GPU, which is through in a second or two, about CIFAR's training split.
    steps = 350 if accelerator.device.type == "cuda" else max(5, round(8 * min(5, args.seconds)))
    data = random_data(steps * args.batch_size)
    if args.at_once:
        print(runs_at_once(args, data))
        return

    products, copies = device_rates(accelerator)
    has_graphs = is_captured(args.step, accelerator)
    lines = []
    for row in tqdm(QUICK_ROWS if args.quick else ALL_ROWS, "rows", disable=None):
        rates = measure(accelerator, data, row, args)
        floor = floor_of(row, products, copies, DTYPES[accelerator.mixed_precision].itemsize)
        lines.append([row.name, *cells(rates, floor)])
    print(text_table([*HEAD, EAGER_BARE] if has_graphs else HEAD, lines))
    print(
        f"\n{ROUNDS} rounds, median +- half the range; {args.batch_size} images a step, floor: "
        f"{products / 1e9:,.0f} billion operations/s, {copies / 1e9:,.1f} GB/s"
    )


def about(accelerator: Accelerator, mode: str) -> str:
    facts = environment(accelerator)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{time.strftime('%Y-%m-%d')}, {facts['hardware']}, threads: {facts['threads']}\n"
        f"{versions}; precision: {accelerator.mixed_precision}, --step {mode}"
    )


def recipe_of(row: Row, args: Namespace) -> Recipe:
    """A low rate: labels are random, and nothing here is to diverge."""
    return Recipe(model=row.model, epochs=1, lr=0.001, train_batch_size=args.batch_size)


def contenders_of(
    accelerator: Accelerator, data: Dataset, row: Row, args: Namespace, folder: str
) -> dict[str, Pass]:
    """What takes turns in a row; `folder` is that of a teacher's cache."""
    recipe = recipe_of(row, args)
    teacher = random_teacher(row.teacher, data, accelerator) if row.teacher else None
    cache = folder if row.cached else None
    contenders = {
        "conventional": conventional(accelerator, data, recipe, teacher, args.workers),
        "ours": ours(accelerator, data, recipe, args.step, teacher, cache),
        "bare step": bare(accelerator, data, recipe, args.step, teacher, cache),
    }
    if is_captured(args.step, accelerator):
        contenders["bare step, eager"] = bare(accelerator, data, recipe, "eager", teacher, cache)
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
            train(5)  # warms up
            steps_per_second = 5 / seconds_of(train, 5)
            steps[name] = min(max(1, round(steps_per_second * args.seconds)), most_steps)
            rates[name] = []
        for _ in range(ROUNDS):
            for name, train in contenders.items():
                seconds = seconds_of(train, steps[name])
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


def seconds_of(work: Callable, *arguments) -> float:
    began = timer()
    work(*arguments)
    return timer() - began


def device_rates(accelerator: Accelerator) -> tuple[float, float]:
    """Operations per second of large products, bytes per second of a copy: the best of many."""
    device = accelerator.device
    dtype = DTYPES[accelerator.mixed_precision]
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.zeros(side * 2**14, device=device, dtype=dtype)
    target = torch.empty_like(source)
    images = torch.randn(128, 64, 8, 8, device=device, dtype=dtype)
    images = images.to(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3, device=device, dtype=dtype)
    kernel = kernel.to(memory_format=torch.channels_last)

    def rate(amount: int, work: Callable) -> float:
        return amount / min(seconds_of(work) for _ in range(50))

    # A convolution too: on CPUs it may be faster than the product of matrices.
    convolved = 2 * kernel.numel() * images.numel() // 64
    products = max(
        rate(convolved, lambda: nn.functional.conv2d(images, kernel, padding=1)),
        rate(2 * side**3, lambda: matrix @ matrix),
    )
    return products, rate(2 * source.nbytes, lambda: target.copy_(source))


def floor_of(row: Row, products: float, copies: float, number_size: int) -> float:
    """Images/s that a device can at best do, by its operations and bytes per second."""
    operations, numbers = cost(row.model, None if row.cached else row.teacher)
    return 1 / max(operations / products, number_size * numbers / copies)


def cost(model: str, teacher: str | None = None, passes: int = 3) -> tuple[int, int]:
    """Of an image: operations in a net's products, and the numbers that they read and write.

    Gradients of a layer's inputs and of its weights cost as much again as its forward pass: 3
    passes; a teacher has 1. Batch norm, activations, additions and weights count as nothing.
    """
    net = build_model(model, CLASSES)
    operations = 0
    numbers = 0

    def note(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal operations, numbers
        operations += passes * 2 * output.numel() * layer.weight[0].numel()
        numbers += passes * (inputs[0].numel() + output.numel())

    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(note)
    net.eval()(torch.zeros(1, 3, SIDE, SIDE))
    if teacher is None:
        return operations, numbers
    teacher_operations, teacher_numbers = cost(teacher, passes=1)
    return operations + teacher_operations, numbers + teacher_numbers


def runs_at_once(args: Namespace, data: Dataset) -> str:
    """A table: how many images a second N runs of train_teacher.py train on, all together."""
    flags = (
        f"--model {TOGETHER} --lr 0.001 --step {args.step} --train-batch-size {args.batch_size} "
        "--dataset"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "random.npz")
        np.savez(
            file,
            x_train=data.train.images.numpy(),
            y_train=data.train.labels.numpy(),
            x_test=data.test.images.numpy(),
            y_test=data.test.labels.numpy(),
        )
        command = [sys.executable, TEACHER, *flags.split(), file]
        alone = histories([*command, "--epochs", "3"], Path(folder, "alone"), 1)
        epochs = epochs_of(alone[0], args.seconds)
        for number in tqdm(args.at_once, "runs at once", disable=None):
            root = Path(folder, str(number))
            records = histories([*command, "--epochs", str(epochs)], root, number)
            rows.append([str(number), f"{total_rate(records):,.0f}"])
    return text_table(["runs at once", f"{TOGETHER}, images/s"], rows)


def epochs_of(records: list[dict], seconds: float) -> int:
    """As many epochs as make that long a run, judged by the records of a short one."""
    fastest = min(record["seconds"] for record in records[1:])
    return max(FEWEST_EPOCHS, math.ceil(seconds / fastest))


def histories(command: list, root: Path, number: int) -> list[list[dict]]:
    """The epochs' records of that many runs below `root`, all started at once."""
    # Threads that are more than the cores wait for each other.
    environ = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // number))}
    lines = [[*command, "--checkpoint", root, "--seed", str(seed)] for seed in range(number)]
    runs = [subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environ) for line in lines]
    if any([run.wait() for run in runs]):
        raise RunFailed("a run has ended with an error, which stands above; try fewer at once")
    files = root.rglob("metrics.jsonl")
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def total_rate(records: list[list[dict]]) -> float:
    """The sum of the runs' median rates, each in its middle half: there all run side by side."""
    total = 0.0
    for run in records:
        quarter = len(run) // 4
        rates = [record["images_per_second"] for record in run[quarter : len(run) - quarter]]
        total += float(np.median(rates))
    return total


if __name__ == "__main__":
    with one_line_errors("python -m scripts.benchmark"):
        main()
