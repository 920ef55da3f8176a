"""Several processes make one run: each image once, the gradients of one process, one writer."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, assert_same_run, command, wait_for, weights, write_npz
from packaging.version import Version
from torch import nn

import train_teacher
from losses import build_loss
from models import build_model
from utils import training
from utils.data import Split, load_dataset, shared
from utils.data.shared import load_data
from utils.data.views import TrainLoader, epoch_plan
from utils.evaluation import predict
from utils.program.processes import start
from utils.settings import DataChoice, Recipe
from utils.split_metrics import evaluate
from utils.tasks import ClassificationTask

NAME = "tiny/resnet8/NLL_seed=42"
SIZES = (1, 2, 3, 40, 41)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def launch(forks):
    """Start a command in several processes at once, as torchrun does."""

    def launch(command, world: int = 2, hook=None, **variables) -> list:
        group = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        group |= {"ACCELERATE_USE_CPU": "true"} | variables
        return [
            forks.start(
                of_rank(command, rank),
                hook=hook and of_rank(hook, rank),
                **{name: str(value) for name, value in group.items()},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]

    return launch


def of_rank(words: list, rank: int) -> list:
    return [
        word if isinstance(word, int) else str(word).replace("{rank}", str(rank)) for word in words
    ]


def wait_for_all(children) -> None:
    assert [child.wait() for child in children] == [0] * len(children), children[0].err


# Evaluation


def logits_of_splits(data: str, file: str) -> None:
    """Write the logits of splits of many sizes."""
    split, accelerator = load_dataset(data, ".").test, Accelerator(cpu=True)
    torch.manual_seed(0)
    net, half = build_model("resnet8", 4), (0.5, 0.5, 0.5)
    logits = {}
    for size in SIZES:
        part = Split(split.images[:size], split.labels[:size])
        logits[size] = predict(net, part, half, half, accelerator, batch_size=16)
    torch.save(logits, file)


@pytest.mark.parametrize("world", [2, 3])
def test_evaluation_counts_each_image_once(launch, tmp_path, world):
    data = write_npz(tmp_path / "data.npz", 4, 20, 41)
    function = "test_processes:logits_of_splits"
    wait_for_all(launch([function, data, tmp_path / "1"], world=1))
    wait_for_all(launch([function, data, tmp_path / f"{world}_{{rank}}"], world))
    one = torch.load(tmp_path / "1")
    labels = load_dataset(str(data), ".").test.labels
    for rank in range(world):
        many = torch.load(tmp_path / f"{world}_{rank}")
        for size in SIZES:
            split = Split(torch.empty(0), labels[:size])
            assert len(one[size]) == size
            assert evaluate(many[size], split) == pytest.approx(
                evaluate(one[size], split), abs=1e-6
            )


# Training


class PlainNet(nn.Sequential):
    """Without batch norm, whose statistics are of one process's images."""

    def __init__(self, name: str, num_classes: int):
        convolution = nn.Conv2d(3, 8, 3, stride=2)
        super().__init__(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(72, num_classes))


class NotingLoader(TrainLoader):
    """Writes down which views of which images a process takes part with."""

    file = None

    def epoch(self, epoch: int):
        for draw in super().epoch(epoch):
            if draw.weight > 0:
                with open(self.file, "a") as notes:
                    pairs = draw.plan[:2].T.tolist()
                    notes.writelines(f"{epoch} {index} {view}\n" for index, view in pairs)
            yield draw


def train_and_note(file: str, *argv: str) -> None:
    NotingLoader.file = file
    shared.TrainLoader = NotingLoader
    train_teacher.build_model = PlainNet
    train_teacher.main(list(argv))


@pytest.mark.parametrize("world", [2, 3])
def test_a_run_is_that_of_one_process_with_the_whole_batch(launch, tiny_npz, tmp_path, world):
    """135 images: the last step of each epoch is shared unevenly."""
    for processes, batch in ((1, 16 * world), (world, 16)):
        root = tmp_path / f"root{processes}"
        flags = command(tiny_npz, root, "--train-batch-size", batch, "--wd", "1e-3")
        notes = tmp_path / f"seen_{processes}_{{rank}}"
        hook = ["note_writes", root, tmp_path / f"writes_{processes}_{{rank}}"]
        line = ["test_processes:train_and_note", notes, *flags]
        wait_for_all(launch(line, processes, hook))

    first, second = (tmp_path / f"root{processes}" / NAME for processes in (1, world))
    torch.testing.assert_close(weights(second), weights(first), rtol=1e-4, atol=1e-6)
    records = ((path / "metrics.jsonl").read_text().splitlines() for path in (first, second))
    for record, other in zip(*records, strict=True):
        record, other = json.loads(record), json.loads(other)
        assert other["train_loss"] == pytest.approx(record["train_loss"], rel=1e-5)
        assert other["train_top1"] == pytest.approx(record["train_top1"])

    seen = [tmp_path / f"seen_{world}_{rank}" for rank in range(world)]
    lines = "".join(file.read_text() for file in seen).splitlines()
    planned = [
        f"{epoch} {index} {view}"
        for epoch in (1, 2, 3)
        for index, view in epoch_plan(135, 42, epoch, True).T.tolist()
    ]
    assert sorted(lines) == sorted(planned)
    assert min(len(file.read_text().splitlines()) for file in seen) > 100

    writers = [(tmp_path / f"writes_{world}_{rank}").exists() for rank in range(world)]
    assert writers == [True] + [False] * (world - 1)


def note_patience(file: str) -> None:
    accelerator = start()
    data = SimpleNamespace(mean=(0.5,) * 3, std=(0.2,) * 3)
    task = ClassificationTask(build_model("resnet8", 10), build_loss("NLL"), data)
    model = training.Trainer(task, Recipe(), accelerator, steps_per_epoch=1).model
    group = torch.distributed.distributed_c10d._get_default_group()
    waits = group._get_backend(accelerator.device).options._timeout
    Path(file).write_text(f"{waits} {model.broadcast_buffers} {model.gradient_as_bucket_view}")


def test_processes_wait_hours_and_exchange_no_buffers(launch, tmp_path):
    """The first one may download and decode for long. It says the device, the others do not."""
    children = launch(["test_processes:note_patience", tmp_path / "{rank}"])
    wait_for_all(children)
    assert (tmp_path / "1").read_text() == "4:00:00 False True"
    assert [child.out.count("device: cpu") for child in children] == [1, 0]


def test_processes_that_are_killed_go_on(launch, tiny_npz, tmp_path):
    for root in ("whole", "cut"):
        line = ["train_teacher.py", *command(tiny_npz, tmp_path / root)]
        if root == "cut":
            hook = ["at_rename", 4, "after", "send", int(signal.SIGTERM)]
            main, other = launch(line, hook=hook)
            assert main.wait() == 128 + signal.SIGTERM
            assert main.err.count("\n") == 1 and "goes on after epoch" in main.err
            assert other.wait(30) != 0  # its partner is gone
        wait_for_all(launch(line))
    assert_same_run(tmp_path / "whole" / NAME, tmp_path / "cut" / NAME)


@pytest.mark.parametrize(
    ("flags", "code", "cause"),
    [
        ("--checkpoint {}/file", 2, "--checkpoint"),
        ("--sync_bn", 2, "--sync_bn"),
        ("--lr 1e9 --wd 1e9 --train-batch-size 16", 1, "the loss is"),
        ("--lr 1e9 --wd 1e9 --train-batch-size 72", 1, "outputs are not finite"),  # the only step
    ],
)
def test_what_ends_all_processes_is_said_once(launch, tmp_path, flags, code, cause):
    data = write_npz(tmp_path / "tiny.npz", 4, 160, 40)
    (tmp_path / "file").touch()
    flags = flags.format(tmp_path).split()
    children = launch(["train_teacher.py", *command(data, tmp_path / "runs", *flags)])
    assert [child.wait() for child in children] == [code, code]
    said = children[0].err + children[1].err
    assert said.count("train_teacher.py: error: ") == said.count("\n") == 1 and cause in said


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_takes_the_other_with_it(launch, tiny_npz, tmp_path, victim):
    line = ["train_teacher.py", *command(tiny_npz, tmp_path, "--epochs", "100000")]
    children = launch(line)
    wait_for(tmp_path / NAME / "checkpoint.pth")
    children[victim].send(signal.SIGKILL)
    left = children[1 - victim]
    assert left.wait(30) == 1 and left.err.count("\n") == 1
    assert re.match("train_teacher.py: error: .*gloo.*the same command goes on", left.err)


class Download:
    """Stands in for torchvision's CIFAR-100: two processes at once would spoil the file."""

    def __init__(self, root, train: bool, download: bool):
        file = Path(root, "downloaded")
        if download and train:
            file.parent.mkdir()
            file.touch(exist_ok=False)
        assert file.exists()
        self.targets = np.arange(200) % 100
        self.data = np.zeros((200, 8, 8, 3), np.uint8)


def download(folder: str) -> None:
    import torchvision

    torchvision.datasets.CIFAR100 = Download
    choice = DataChoice(dataset="cifar100", data_dir=folder)
    data = load_data(choice, Accelerator(cpu=True))
    assert len(data.train.labels) == 180


def test_only_the_main_process_downloads(launch, tmp_path):
    wait_for_all(launch(["test_processes:download", tmp_path / "data"], world=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs it is right")
@pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"),
    reason="accelerate 1.0 makes one run of them, without being told",
)
def test_torchrun_never_starts_two_runs(launch, tiny_npz, tmp_path):
    line = ["train_teacher.py", *command(tiny_npz, tmp_path)]
    children = launch(line, ACCELERATE_USE_CPU="false")
    assert [child.wait() for child in children] == [2, 2]
    said = children[0].err + children[1].err
    assert said.count("train_teacher.py: ") == said.count("say ACCELERATE_USE_CPU=true") == 1
    assert not list(tmp_path.iterdir())


def printed_by(machine: subprocess.Popen) -> str:
    """Of a machine whose run is complete. Seen once in ten runs: torch aborts one process at its
    exit, with all that it had to do done, and the other machine's agent waits for it."""
    try:
        return machine.communicate(timeout=30)[0]
    except subprocess.TimeoutExpired:
        machine.kill()
        return machine.communicate()[0]


@pytest.mark.long
def test_two_machines_make_one_run(launch, tiny_npz, tmp_path):
    """One dies, the other ends and says why; the same commands go on, to one machine's result."""

    def run(root: str) -> list[str]:
        return ["train_teacher.py", *command(tiny_npz, tmp_path / root, "--epochs", "15")]

    def is_listening(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def start() -> list[subprocess.Popen]:
        """The first has the store by which they meet, so that it outlives the second."""
        script, *flags = run("two")
        port = free_port()
        words = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d"
        words = [*words.split(), "--rdzv_endpoint", f"127.0.0.1:{port}"]
        line = [sys.executable, *words, str(ROOT / script), *flags]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        first = subprocess.Popen(line, env=variables, **pipes)
        give_up = time.monotonic() + 60
        while not is_listening(port) and time.monotonic() < give_up:
            time.sleep(0.1)
        return [first, subprocess.Popen(line, env=variables, **pipes)]

    left, dies = start()
    folder = tmp_path / "two" / NAME
    wait_for(folder / "checkpoint.pth")
    process = Path(f"/proc/{dies.pid}/task/{dies.pid}/children").read_text()
    for each in (dies.pid, int(process)):
        os.kill(each, signal.SIGKILL)
    _, errors = left.communicate(timeout=60)
    assert left.returncode != 0
    assert len(re.findall("^train_teacher.py: error: .*goes on", errors, re.M)) == 1
    dies.communicate()

    machines = start()
    wait_for(folder / "result.json", 120)
    said = [printed_by(machine) for machine in machines]
    assert sum(text.count("going on after epoch") for text in said) == 1
    wait_for_all(launch(run("one")))
    assert_same_run(tmp_path / "one" / NAME, folder)
    logits = np.load(folder / "predictions.npz")["last_test_logits"]
    whole = evaluate(torch.tensor(logits), load_dataset(str(tiny_npz), ".").test)
    result = json.loads((folder / "result.json").read_text())
    assert result["last"]["test"]["raw"] == pytest.approx(whole, abs=1e-6)
