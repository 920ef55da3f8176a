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
from functools import partial
from itertools import islice

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.utils.benchmark.utils.timer import timer  # waits for a GPU
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm
from utils.objectives import Distillation, Objective

from losses import build_distillation, build_loss
from models import build_model
from utils.analysis.columns import text_table
from utils.data import NORMALISATION, Dataset, Split
from utils.data.npz import ARRAYS
from utils.data.views import Draw, TrainLoader, normalise
from utils.options import CommandLine, count, positive, teacher_options, whole
from utils.program import RunFailed, UserError, one_line_errors
from utils.program.environment import environment, precision_note
from utils.steps import MODES, Step, can_capture
from utils.teacher_cache import DTYPES
from utils.teachers import Member, Teacher, ready
from utils.training import prepare, start, train_epoch

NETS = ("resnet8", "resnet20", "resnet56", "resnet110", "wrn_40_2")
PAIRS = (("resnet56", "resnet8"), ("wrn_40_2", "wrn_16_2"))  # teacher, student
QUICK = (NETS[:3], PAIRS[:1])
HEAD = ["images/s", "conventional", "ours", "ratio", "of a bare step", "of the floor"]
EAGER_BARE = "of a bare step, kernel by kernel"  # where ours are graphs
TEACHER = Path(__file__).parent.parent / "train_teacher.py"
TOGETHER = "resnet8"  # of several runs at once
SECONDS_AT_ONCE = 30  # of each run: starting takes some 8, and they are to overlap
FEWEST_EPOCHS = 6
CLASSES, SIDE, ROUNDS = 10, 32, 3
Pass = Callable[[int], None]  # trains for that many steps


def options(argv: list[str] | None) -> Namespace:
    what = "Images per second of a conventional training loop and of ours."
    parser = CommandLine(prog="python -m scripts.benchmark", description=what)
    at_once = f"measure only this: the images/s of N runs of {TOGETHER} at once, all together"
    add = parser.add_argument
    add("--quick", action="store_true", help="few nets and short passes: minutes on a CPU")
    add("--batch-size", type=count, default=128, help="images per training step")
    seconds = "of a pass, roughly (default: 5, or 1.5 with --quick); with --at-once of a run (30)"
    add("--seconds", type=positive, help=seconds)
    add("--workers", type=whole, help="of the DataLoader (default: as many as there are cores)")
    add("--step", choices=MODES, default="auto", help="how ours launches a step; see the scripts")
    add("--at-once", type=count, nargs="+", metavar="N", help=at_once)
    args = parser.parse_args(argv)
    if args.at_once and args.workers is not None:
        raise UserError("--workers has no effect with --at-once; leave it out")
    if args.seconds is None:
        args.seconds = SECONDS_AT_ONCE if args.at_once else 1.5 if args.quick else 5
    args.workers = os.cpu_count() if args.workers is None else args.workers
    # A low rate: labels are random, and nothing here is to diverge.
    training = f"--epochs 1 --lr 0.001 --step {args.step} --train-batch-size {args.batch_size}"
    return Namespace(**vars(teacher_options(training.split())) | vars(args))


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    accelerator = start()
    if accelerator.num_processes > 1:
        raise UserError("the benchmark measures one process; launch it with one")
    about, precision = environment(accelerator), accelerator.mixed_precision
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{time.strftime('%Y-%m-%d')}, {about['hardware']}, threads: {about['threads']}")
    print(f"{versions}; precision: {precision}, --step {args.step}")
    print(precision_note(accelerator))
    # On a GPU, which is through in a second or two, about CIFAR's training split.
    steps = 350 if accelerator.device.type == "cuda" else max(5, round(8 * min(5, args.seconds)))
    data = random_data(steps * args.batch_size)
    if args.at_once:
        return print(runs_at_once(args, data))
    products, copies = device_rates(accelerator)
    nets, pairs = QUICK if args.quick else (NETS, PAIRS)
    rows = [(net, None, False) for net in nets]
    rows += [(student, teacher, known) for teacher, student in pairs for known in (False, True)]
    lines = []
    for model, teacher, cached in tqdm(rows, "rows", disable=None):
        rates = measure(accelerator, data, args, model, teacher, cached)
        operations, numbers = cost(model, None if cached else teacher)
        size = DTYPES[precision].itemsize
        floor = 1 / max(operations / products, size * numbers / copies)  # images/s
        name = (f"{teacher} -> " if teacher else "") + model + ", cached" * cached
        lines.append([name, *cells(rates, floor)])
    has_graphs = args.step != "eager" and can_capture(accelerator)
    print(text_table([*HEAD, EAGER_BARE] if has_graphs else HEAD, lines))
    print(f"\n{ROUNDS} rounds, median +- half the range; {args.batch_size} images a step, ", end="")
    print(f"floor: {products / 1e9:,.0f} billion operations/s, {copies / 1e9:,.1f} GB/s")


def measure(accelerator, data, args, model: str, teacher: str | None, cached: bool) -> dict:
    """Images/s of each contender in each round, all of which take about the same time."""
    accelerator.free_memory()
    most, steps, rates = len(data.train.labels) // args.batch_size, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        objective = Objective(build_loss("NLL"))
        if teacher:
            loss = build_distillation("KD").to(accelerator.device)
            asked, cache = random_teacher(teacher, data, accelerator), folder if cached else None
            objective = Distillation(loss, asked, data, accelerator, args.seed, cache)
        contenders = {"conventional": conventional(accelerator, data, args, model, teacher)}
        contenders |= ours(accelerator, data, args, model, objective)
        if cached:
            contenders["ours"](most)  # a whole epoch fills it
        for name, train in contenders.items():
            train(5)  # warms up
            rate = 5 / seconds_of(train, 5)
            steps[name], rates[name] = min(max(1, round(rate * args.seconds)), most), []
        for name, train in [*contenders.items()] * ROUNDS:
            seconds = seconds_of(train, steps[name])
            rates[name].append(steps[name] * args.batch_size / seconds)
    return rates


def cells(rates: dict[str, list[float]], floor: float) -> list[str]:
    def spread(values, form: str) -> str:
        return f"{np.median(values):{form}} +- {50 * np.ptp(values) / np.median(values):.0f} %"

    rates = {name: np.array(values) for name, values in rates.items()}
    loop, ours = rates["conventional"], rates["ours"]
    row = [
        spread(loop, ",.0f"),
        spread(ours, ",.0f"),
        spread(ours / loop, ".2f"),
        spread(ours / rates["bare step"], ".2f"),
        f"{100 * np.median(ours) / floor:.1f} %",
    ]
    if "bare step, eager" in rates:
        row.append(spread(ours / rates["bare step, eager"], ".2f"))
    return row


def seconds_of(work: Callable, *given) -> float:
    began = timer()
    work(*given)
    return timer() - began


def conventional(accelerator, data: Dataset, args, model: str, teacher: str | None) -> Pass:
    """PIL images through torchvision's transforms in the workers of a DataLoader, loss and accuracy
    read back in every step, the teacher run for every student."""
    device, size, split = accelerator.device, args.batch_size, data.train
    teach = teacher and build_model(teacher, CLASSES).eval().to(device)
    loss_of = (build_distillation("KD") if teach else build_loss("NLL")).to(device)
    net = build_model(model, CLASSES)
    settings = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), **settings))
    augment = [transforms.RandomCrop(SIDE, 4), transforms.RandomHorizontalFlip()]
    scale = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    transform = transforms.Compose(augment + scale)
    pixels, order = split.images.permute(0, 2, 3, 1).numpy(), []

    def read(index: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        images = [transform(Image.fromarray(pixels[i])) for i in index]
        return torch.stack(images), split.labels[index]

    how = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    how |= {"pin_memory": device.type == "cuda", "collate_fn": read}
    # `order` holds the images of a pass.
    loader = DataLoader(range(len(pixels)), size, sampler=order, **how)

    def train(steps: int) -> None:
        order[:] = torch.randperm(steps * size).tolist()
        net.train()
        for batch in loader:
            images, labels = (part.to(device, non_blocking=True) for part in batch)
            logits = net(images)
            with torch.no_grad(), accelerator.autocast():
                known = [teach(images)] if teach else []
            loss = loss_of(logits, *known, labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            loss.item(), (logits.argmax(1) == labels).float().mean().item()

    return train


class BareStep(Step):
    """A step without what surrounds the net: always the same batch, which lies there normalised."""

    def __init__(self, mode, accelerator, net, optimizer, objective, loader, data: Dataset):
        super().__init__(mode, accelerator, net, optimizer, objective, loader, data)
        self.draw = next(loader.epoch(1))
        self.batch = loader.batch(self.draw)
        self.images = normalise(self.batch.images, data.mean, data.std)

    def run(self, draw: Draw) -> torch.Tensor:
        logits = self.compiled(self.images)
        self.accelerator.backward(self.objective(logits, self.batch))
        self.update()
        return self.skipped


def ours(accelerator, data: Dataset, args, model: str, objective: Objective) -> dict[str, Pass]:
    """The steps of an epoch as `fit` runs them, and bare ones, launched likewise and eagerly."""
    loader = TrainLoader(data.train, args.batch_size, args.seed, accelerator.device)

    def step_and_schedule(kind: type[Step], mode: str) -> tuple[Step, object]:
        net = build_model(model, CLASSES)
        _, net, optimizer, schedule = prepare(accelerator, net, args, len(loader))
        return kind(mode, accelerator, net, optimizer, objective, loader, data), schedule

    step, schedule = step_and_schedule(Step, args.step)
    bare, _ = step_and_schedule(BareStep, args.step)

    def train(steps: int) -> None:
        bar = tqdm(islice(loader.epoch(1), steps), total=steps, disable=True)
        with objective.epoch(1) as kind:
            train_epoch(step, kind, schedule, 1, bar, 0)

    def train_bare(bare: BareStep, steps: int) -> None:
        bare.net.train()
        with objective.epoch(1) as kind:
            for _ in range(steps):
                bare(bare.draw, kind)

    passes = {"ours": train, "bare step": partial(train_bare, bare)}
    if step.captured:
        eager, _ = step_and_schedule(BareStep, "eager")
        passes["bare step, eager"] = partial(train_bare, eager)
    return passes


def random_data(images: int) -> Dataset:
    pixels = torch.randint(256, (images, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.arange(images) % CLASSES
    few = Split(pixels[:CLASSES], labels[:CLASSES])
    splits = (Split(pixels, labels), few, few)
    return Dataset("random", CLASSES, *splits, *NORMALISATION["cifar10"], f"random {images}")


def random_teacher(model: str, data: Dataset, accelerator: Accelerator) -> Teacher:
    net = ready(build_model(model, data.num_classes), model)
    member = Member(net, model, data.mean, data.std, "random", "random", Path(model))
    return Teacher([member]).to(accelerator.device)


def device_rates(accelerator: Accelerator) -> tuple[float, float]:
    """Operations per second of large products, bytes per second of a copy: the best of many."""
    where = {"device": accelerator.device, "dtype": DTYPES[accelerator.mixed_precision]}
    side = 8192 if accelerator.device.type == "cuda" else 1024
    matrix, source = torch.randn(side, side, **where), torch.zeros(side * 2**14, **where)
    images, kernel = torch.randn(128, 64, 8, 8, **where), torch.randn(64, 64, 3, 3, **where)
    images, kernel = (x.to(memory_format=torch.channels_last) for x in (images, kernel))
    target = torch.empty_like(source)

    def rate(amount: int, work: Callable) -> float:
        return amount / min(seconds_of(work) for _ in range(50))

    # A convolution too: on CPUs it may be faster than the product of matrices.
    convolved = 2 * kernel.numel() * images.numel() // 64
    products = rate(convolved, lambda: nn.functional.conv2d(images, kernel, padding=1))
    products = max(products, rate(2 * side**3, lambda: matrix @ matrix))
    return products, rate(2 * source.nbytes, lambda: target.copy_(source))


def cost(model: str, teacher: str | None = None, passes: int = 3) -> tuple[int, int]:
    """Of an image: operations in a net's products, and the numbers that they read and write.

    Gradients of a layer's inputs and of its weights cost as much again as its forward pass: 3
    passes; a teacher has 1. Batch norm, activations, additions and weights count as nothing.
    """
    net, counts = build_model(model, CLASSES), []

    def note(layer, inputs, output):
        operations = 2 * output.numel() * layer.weight[0].numel()
        counts.append((operations, inputs[0].numel() + output.numel()))

    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(note)
    net.eval()(torch.zeros(1, 3, SIDE, SIDE))
    operations, numbers = (passes * sum(each) for each in zip(*counts, strict=True))
    more = cost(teacher, passes=1) if teacher else (0, 0)
    return operations + more[0], numbers + more[1]


def runs_at_once(args: Namespace, data: Dataset) -> str:
    """A table: how many images a second N runs of train_teacher.py train on, all together."""
    train, test = data.train, data.test
    arrays = dict(zip(ARRAYS, (train.images, train.labels, test.images, test.labels), strict=True))
    flags = f"--model {TOGETHER} --lr 0.001 --step {args.step}"
    flags += f" --train-batch-size {args.batch_size} --dataset"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "random.npz")
        np.savez(file, **{name: array.numpy() for name, array in arrays.items()})
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
