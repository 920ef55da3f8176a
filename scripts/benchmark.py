"""How fast training is: a conventional loop against ours, in one run on one machine.

    python -m scripts.benchmark --quick                     on a CPU, at most 3 minutes
    python -m scripts.benchmark --json speed.json           on a GPU, all rows
    accelerate launch --mixed_precision bf16 -m scripts.benchmark
    python -m scripts.benchmark --at-once 1 2 4 8           what several runs on one device yield

The conventional loop is what this field publishes: PIL images through torchvision's transforms in
the workers of a DataLoader, loss and accuracy read back in every step, the teacher run for every
student. Ours is the code that train_teacher.py and train_student.py run. Images are random bytes
of CIFAR's shape. The contenders of a row take turns, so that whatever else a machine does slows all
of them alike; a ratio is the median over the rounds. docs/performance.md says what the floor is.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from losses import build_distillation, build_loss, distillation_loss
from models import build_model
from utils.data import NORMALISATION, Dataset, Split
from utils.data.views import TrainLoader, normalise
from utils.environment import environment
from utils.evaluation import evaluate, predict
from utils.files import atomic
from utils.objectives import Distillation, Objective
from utils.options import CommandLine, count, location, student_options, whole
from utils.program import RunFailed, UserError, one_line_errors
from utils.steps import MODES, Step
from utils.tables import text_table
from utils.teacher_cache import DTYPES
from utils.teachers import Member, Teacher
from utils.training import prepare, start, train_epoch


class Size(NamedTuple):
    """How much is measured."""

    nets: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]  # teacher, student
    seconds: float  # of a pass of ours, roughly
    evaluated: int  # images
    rounds: int


FULL = Size(
    ("resnet8", "resnet20", "resnet56", "resnet110", "wrn_40_2"),
    (("resnet56", "resnet8"), ("wrn_40_2", "wrn_16_2")),
    5,
    10_000,
    5,
)
QUICK = Size(("resnet8", "resnet20"), (("resnet56", "resnet8"),), 1.5, 2000, 3)
TEACHER = Path(__file__).parent.parent / "train_teacher.py"
TOGETHER, EPOCHS = ("resnet8", "resnet20"), 6  # of several runs at once
SMALLEST = "resnet8"  # where a loop's own costs weigh most
MOST_IMAGES = 45_000  # CIFAR's training split
CLASSES, SIDE = 10, 32
Pass = Callable[[], None]


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(
        prog="python -m scripts.benchmark",
        description="Images per second of a conventional training loop and of ours.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few nets and short passes: minutes on a CPU")
    add("--batch-size", type=count, default=128, help="images per training step")
    add("--rounds", type=count, help="passes of each contender (default: 5, or 3 with --quick)")
    add("--workers", type=whole, nargs="+", help="of the DataLoader: the fastest of these is taken")
    add(
        "--processor-time",
        action="store_true",
        help="measure this process's processor time, which other jobs disturb less: on a CPU, with "
        "one thread and without workers",
    )
    add("--step", choices=MODES, default="auto", help="how ours launches a step; see the scripts")
    add(
        "--at-once",
        type=count,
        nargs="+",
        metavar="N",
        help="measure only this: the images/s of N runs at once, all together, each a process",
    )
    add("--json", type=location, metavar="FILE", help="also write all measurements here")
    args = parser.parse_args(argv)
    if args.processor_time and (torch.cuda.is_available() or args.workers not in (None, [0])):
        raise UserError("--processor-time sees neither a GPU nor workers; leave it or them out")
    others = ("quick", "rounds", "workers", "processor_time", "json")
    unread = [name for name in others if args.at_once and getattr(args, name)]
    if unread:
        flag = unread[0].replace("_", "-")
        raise UserError(f"--{flag} has no effect with --at-once; leave it out")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json}: give a file in a folder that exists")
    return args


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    began = time.perf_counter()
    accelerator = start()
    if accelerator.num_processes > 1:
        raise UserError("the benchmark measures one process; launch it with one")
    if args.at_once:
        print(runs_at_once(args, accelerator))
        return
    size = QUICK if args.quick else FULL
    args.rounds = args.rounds or size.rounds
    bench = Bench(accelerator, args, size.seconds)
    found = [bench.training(net) for net in size.nets]
    found += [bench.training(student, teacher) for teacher, student in size.pairs]
    found.append(bench.evaluation(SMALLEST, size.evaluated))
    about = environment(accelerator) | {
        "precision": accelerator.mixed_precision,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "clock": "processor time" if args.processor_time else "wall time",
        "workers": bench.workers,
        "operations_per_second": bench.operation_rate,
        "bytes_per_second": bench.byte_rate,
        "seconds": time.perf_counter() - began,
    }
    print(report(found, about))
    if args.json:
        with atomic(args.json, "w") as file:
            json.dump({"about": about, "rows": found}, file, indent=2)


# The contenders


class Conventional:
    """The loop of this field's published trainers, for training and for evaluation."""

    def __init__(self, bench: "Bench", model: str, data: Dataset, teacher: Teacher | None = None):
        self.bench = bench
        # A copy, in the layout that such a loop leaves it in.
        net = teacher and teacher.members[0].net
        self.teacher = net and deepcopy(net).to(memory_format=torch.contiguous_format)
        self.net = build_model(model, CLASSES)
        optimizer = torch.optim.SGD(
            self.net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.net, self.optimizer = bench.accelerator.prepare(self.net, optimizer)
        self.loader = pil_loader(data, bench.args.batch_size, bench.workers, train=True)
        self.test_loader = pil_loader(data, 1000, bench.workers, train=False)

    def train(self) -> None:
        accelerator = self.bench.accelerator
        self.net.train()
        for images, labels in self.loader:
            images = images.to(accelerator.device, non_blocking=True)
            labels = labels.to(accelerator.device, non_blocking=True)
            logits = self.net(images)
            if self.teacher is None:
                loss = F.cross_entropy(logits, labels)
            else:
                with torch.no_grad(), accelerator.autocast():
                    target = self.teacher(images)
                loss = distillation_loss(logits, target, labels, 4.0, 0.9)
            self.optimizer.zero_grad()
            accelerator.backward(loss)
            self.optimizer.step()
            loss.item(), (logits.argmax(1) == labels).float().mean().item()

    @torch.no_grad()
    def evaluate(self) -> None:
        self.net.eval()
        for images, labels in self.test_loader:
            logits = self.net(images.to(self.bench.accelerator.device)).cpu()
            F.cross_entropy(logits, labels).item()
            (logits.argmax(1) == labels).float().mean().item()


def pil_loader(data: Dataset, batch_size: int, workers: int, train: bool) -> DataLoader:
    from PIL import Image
    from torchvision import transforms

    steps = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    if train:
        steps = [transforms.RandomCrop(SIDE, 4), transforms.RandomHorizontalFlip(), *steps]
    transform = transforms.Compose(steps)
    split = data.train if train else data.val
    arrays = split.images.permute(0, 2, 3, 1).numpy()
    labels = split.labels.tolist()

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(labels)

        def __getitem__(self, i):
            return transform(Image.fromarray(arrays[i])), labels[i]

    return DataLoader(
        Images(),
        batch_size,
        shuffle=train,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def ours(bench: "Bench", model: str, data: Dataset, objective: Objective) -> Pass:
    """An epoch as `fit` runs it."""
    args, accelerator = bench.training_args, bench.accelerator
    loader = TrainLoader(data.train, args.train_batch_size, args.seed, accelerator.device)
    net = build_model(model, CLASSES)
    _, net, optimizer, schedule = prepare(accelerator, net, args, len(loader))
    step = Step(args.step, accelerator, net, optimizer, objective, loader, data)

    def one_pass() -> None:
        bar = tqdm(loader.epoch(1), total=len(loader), disable=True)
        with objective.epoch(1) as kind:
            train_epoch(step, kind, schedule, 1, bar, 0)

    return one_pass


def bare_steps(bench: "Bench", model: str, data: Dataset) -> Pass:
    """Forward, backward and optimiser on one fixed batch: what no loop can be faster than."""
    args, accelerator = bench.training_args, bench.accelerator
    _, net, optimizer, _ = prepare(accelerator, build_model(model, CLASSES), args, 1)
    images = data.train.images[: args.train_batch_size].to(accelerator.device)
    images = normalise(images, data.mean, data.std)
    labels = data.train.labels[: args.train_batch_size].to(accelerator.device)

    def one_pass() -> None:
        net.train()
        for _ in range(len(data.train.labels) // args.train_batch_size):
            accelerator.backward(F.cross_entropy(net(images), labels))
            optimizer.step()
            optimizer.zero_grad()

    return one_pass


# Measuring


class Bench:
    """Rows of the table, measured on one accelerator."""

    def __init__(self, accelerator: Accelerator, args: Namespace, seconds: float):
        self.accelerator, self.args, self.seconds = accelerator, args, seconds
        self.device = accelerator.device
        batch = ("--train-batch-size", str(args.batch_size))
        # A low rate: labels are random, and nothing here is to diverge.
        self.training_args = student_options(
            ["--teacher_path", "-", "--epochs", "1", "--lr", "0.001", "--step", args.step, *batch]
        )
        self.operation_rate = self.byte_rate = 0.0
        self.workers = self.best_workers()

    def best_workers(self) -> int:
        """Those with which the conventional loop trains the smallest net fastest."""
        cores = 0 if self.args.processor_time else os.cpu_count()
        candidates = self.args.workers or sorted({0, cores // 2, cores})
        rates, data = {}, random_data(4 * self.args.batch_size)
        for self.workers in candidates if len(candidates) > 1 else ():
            contender = {"conventional": Conventional(self, SMALLEST, data).train}
            rates[self.workers] = self.rounds(contender, data.train, 1)["conventional"][0]
        return max(rates, key=rates.get, default=candidates[0])

    def training(self, model: str, teacher_model: str | None = None) -> dict:
        self.accelerator.free_memory()
        data = random_data(2 * self.args.batch_size)
        teacher = teacher_model and random_teacher(teacher_model, data, self.accelerator)
        trial = {"ours": ours(self, model, data, self.loss(data, teacher))}
        rate = self.rounds(trial, data.train, 1)["ours"][0]
        steps = round(min(self.seconds * rate, MOST_IMAGES) / self.args.batch_size)
        data = random_data(max(steps, 4) * self.args.batch_size)

        contenders = {
            "conventional": Conventional(self, model, data, teacher).train,
            "ours": ours(self, model, data, self.loss(data, teacher)),
        }
        costs = {"ours": cost(model)}
        with tempfile.TemporaryDirectory() as folder:
            if teacher is None:
                contenders["bare step"] = bare_steps(self, model, data)
            else:
                contenders["cached"] = ours(self, model, data, self.loss(data, teacher, folder))
                contenders["student alone"] = ours(self, model, data, self.loss(data, None))
                costs = {"ours": cost(model, teacher_model), "cached": cost(model)}
            name = f"{teacher_model} -> {model}" if teacher else model
            return self.row(name, contenders, data.train, costs)

    def loss(self, data: Dataset, teacher: Teacher | None, cache: str | None = None) -> Objective:
        """What the entry scripts hand to `fit`."""
        if teacher is None:
            return Objective(build_loss("NLL"))
        loss = build_distillation("KD").to(self.device)
        return Distillation(loss, teacher, data, self.accelerator, 42, cache)

    def evaluation(self, model: str, images: int) -> dict:
        """A whole split: logits and, in ours, every metric."""
        self.accelerator.free_memory()
        data = random_data(self.args.batch_size, images)
        net = build_model(model, CLASSES).to(self.device, memory_format=torch.channels_last)

        def all_metrics() -> None:
            logits = predict(net, data.val, data.mean, data.std, None, self.accelerator)
            evaluate(logits, data.val)

        contenders = {
            "conventional": Conventional(self, model, data).evaluate,
            "ours": all_metrics,
        }
        costs = {"ours": cost(model, backward=False)}
        return self.row(f"evaluation of {model}", contenders, data.val, costs)

    def row(self, name: str, contenders: dict[str, Pass], split: Split, costs: dict) -> dict:
        rates = self.rounds(contenders, split, self.args.rounds)
        self.measure_device()
        return {
            "row": name,
            "images": len(split.labels),
            "images_per_second": rates,
            "cost": costs,
            "peak_bytes": {which: self.peak_memory(contenders[which]) for which in costs},
        }

    def rounds(
        self, contenders: dict[str, Pass], split: Split, rounds: int
    ) -> dict[str, list[float]]:
        """Images per second of each contender in each round, after a pass to warm up."""
        rates = {name: [] for name in contenders}
        for turn in range(rounds + 1):
            for name, one_pass in contenders.items():
                seconds = self.seconds_of(one_pass)
                if turn > 0:
                    rates[name].append(len(split.labels) / seconds)
        return rates

    def seconds_of(self, work: Pass) -> float:
        clock = time.process_time if self.args.processor_time else time.perf_counter
        self.wait()
        began = clock()
        work()
        self.wait()
        return clock() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_memory(self, one_pass: Pass) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        one_pass()
        return torch.cuda.max_memory_allocated()

    def measure_device(self) -> None:
        """Operations per second of large products, bytes per second of a copy: the best so far."""
        dtype = DTYPES[self.accelerator.mixed_precision]
        side = 8192 if self.device.type == "cuda" else 1024
        matrix = torch.randn(side, side, device=self.device, dtype=dtype)
        images = torch.randn(128, 64, 8, 8, device=self.device, dtype=dtype)
        kernel = torch.randn(64, 64, 3, 3, device=self.device, dtype=dtype)
        images, kernel = (x.to(memory_format=torch.channels_last) for x in (images, kernel))
        source = torch.zeros(side * 65536, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)

        def rate(amount: int, work: Pass) -> float:
            return amount / min(self.seconds_of(work) for _ in range(20))

        # A convolution too: on CPUs it may be faster than the product of matrices.
        operations = 2 * kernel.numel() * images.numel() // 64
        self.operation_rate = max(
            self.operation_rate,
            rate(2 * side**3, lambda: matrix @ matrix),
            rate(operations, lambda: F.conv2d(images, kernel, padding=1)),
        )
        copy = rate(2 * len(source), lambda: target.copy_(source))
        self.byte_rate = max(self.byte_rate, copy)


def cost(model: str, teacher: str | None = None, backward: bool = True) -> tuple[int, int]:
    """Of an image: operations in a net's products, and the numbers that they read and write.

    Batch norm, activations, additions, weights and the optimiser count as nothing.
    """
    net, traffic = build_model(model, CLASSES), []

    def note(layer, inputs, output):
        traffic.append(inputs[0].numel() + output.numel())

    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = net(torch.zeros(2, 3, SIDE, SIDE))
        if backward:
            logits.sum().backward()
    # The gradients of a layer's inputs and of its weights each read and write as much again.
    numbers = sum(traffic) * (3 if backward else 1)
    own = (counter.get_total_flops() // 2, numbers // 2)
    more = cost(teacher, backward=False) if teacher else (0, 0)
    return own[0] + more[0], own[1] + more[1]


def random_data(images: int, val: int = 10) -> Dataset:
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        pixels = torch.from_numpy(rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8))
        labels = torch.from_numpy(rng.integers(0, CLASSES, n))
        return Split(pixels.permute(0, 3, 1, 2), labels)

    parts = [split(n) for n in (images, val, 10)]
    return Dataset("random", CLASSES, *parts, *NORMALISATION["cifar10"], f"random {images}")


def random_teacher(model: str, data: Dataset, accelerator: Accelerator) -> Teacher:
    net = build_model(model, data.num_classes).eval().requires_grad_(False)
    net.to(accelerator.device, memory_format=torch.channels_last)
    known = (model, data.mean, data.std)
    return Teacher([Member(net, *known, label="random", sha256="random", path=Path(model))])


# Several runs on one device


def runs_at_once(args: Namespace, accelerator: Accelerator) -> str:
    """A table: how many images a second N runs of train_teacher.py train on, all together."""
    images = MOST_IMAGES if accelerator.device.type == "cuda" else 50 * args.batch_size
    rates = {model: [] for model in TOGETHER}
    bar = tqdm(total=len(args.at_once) * len(TOGETHER), desc="runs at once", disable=None)
    with tempfile.TemporaryDirectory() as folder, bar:
        data = random_data(images)
        arrays = {"x_train": data.train.images, "y_train": data.train.labels}
        arrays |= {"x_test": data.test.images, "y_test": data.test.labels}
        file = Path(folder, "random.npz")
        np.savez(file, **{name: array.numpy() for name, array in arrays.items()})
        for model in TOGETHER:
            for number in args.at_once:
                root = Path(folder, f"{model} {number}")
                flags = f"--model {model} --epochs {EPOCHS} --lr 0.001 --step {args.step}"
                flags += f" --train-batch-size {args.batch_size}"
                command = [sys.executable, TEACHER, *flags.split()]
                command += ["--dataset", file, "--checkpoint", root]
                rates[model].append(total_rate(command, root, number))
                bar.update()
    rows = [
        [str(number), *(f"{rates[model][i]:,.0f}" for model in TOGETHER)]
        for i, number in enumerate(args.at_once)
    ]
    return text_table(["runs at once", *(f"{model}, images/s" for model in TOGETHER)], rows)


def total_rate(command: list, root: Path, number: int) -> float:
    """Start a command that many times; the sum of the runs' rates, without their first epoch."""
    # Threads that are more than the cores wait for each other.
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // number))}
    running = [
        subprocess.Popen(
            [*command, "--seed", str(seed)], stdout=subprocess.DEVNULL, env=os.environ | threads
        )
        for seed in range(number)
    ]
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    if any(codes):
        raise RunFailed("a run has ended with an error, which stands above; try fewer at once")
    rates = []
    for file in root.rglob("metrics.jsonl"):
        _, *later = map(json.loads, file.read_text().splitlines())
        rates.append(median(epoch["images_per_second"] for epoch in later))
    return sum(rates)


# The report


def report(found: list[dict], about: dict) -> str:
    head = ["images/s", "conventional", "ours", "ratio", "peak MB", "of the floor"]
    rows = [cells(row, which, about) for row in found for which in row["cost"]]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    notes = [
        f"{about['hardware']}, threads: {about['threads']}, precision: {about['precision']}",
        f"{versions}; workers of the conventional loop: {about['workers']}",
        f"floor: {about['operations_per_second'] / 1e9:,.0f} billion operations/s, "
        f"{about['bytes_per_second'] / 1e9:,.1f} GB/s",
        f"{about['clock']}, median of {about['rounds']} rounds +- half their range; "
        f"{about['seconds']:.0f} s in all",
    ]
    return "\n".join([text_table(head, rows), "", *targets(found), *notes])


def cells(row: dict, which: str, about: dict) -> list[str]:
    rates, peak = row["images_per_second"], row["peak_bytes"][which]
    return [
        row["row"] + (", cached" if which == "cached" else ""),
        spread(rates["conventional"]),
        spread(rates[which]),
        spread(ratios(rates[which], rates["conventional"]), "{:.2f}"),
        f"{peak / 1e6:,.0f}" if peak else "-",
        f"{100 * median(rates[which]) / floor(*row['cost'][which], about):.1f} %",
    ]


def floor(operations: int, numbers: int, about: dict) -> float:
    """Images per second of a device that did nothing but the products and their traffic."""
    size = 4 if about["precision"] == "no" else 2
    busy = operations / about["operations_per_second"], size * numbers / about["bytes_per_second"]
    return 1 / max(busy)


def targets(found: list[dict]) -> list[str]:
    lines = []
    for row in found:
        rates = row["images_per_second"]
        if "bare step" in rates:
            share = spread(ratios(rates["ours"], rates["bare step"]), "{:.2f}")
            lines.append(f"{row['row']}: an epoch's rate over the bare step's: {share}")
        if "cached" in rates:
            second = spread(ratios(rates["cached"], rates["ours"]), "{:.2f}")
            alone = spread(ratios(rates["student alone"], rates["cached"]), "{:.2f}")
            lines.append(f"{row['row']}: second student's rate over the first's: {second}")
            lines.append(f"{row['row']}: a cached step over the student's alone: {alone}")
    return lines


def ratios(one: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def spread(values: list[float], form: str = "{:,.0f}") -> str:
    half = 50 * (max(values) - min(values)) / median(values)
    return f"{form.format(median(values))} +- {half:.0f} %"


if __name__ == "__main__":
    with one_line_errors("python -m scripts.benchmark"):
        main()
