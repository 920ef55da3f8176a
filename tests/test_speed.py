"""Nothing in a step waits for the device, and the benchmark measures what it says."""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from tqdm import tqdm

import train_student
from losses import build_loss, loss_names
from models import build_model
from scripts import benchmark
from utils import training
from utils.data import load_dataset
from utils.data.views import TrainLoader
from utils.evaluation import predict
from utils.options import student_options
from utils.program import RunFailed
from utils.steps import Step
from utils.teachers import Teacher
from utils.training import prepare, train_epoch, untouched

WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")


@contextmanager
def no_waiting():
    """Refuse what would make the host wait: on a GPU torch finds it, on the CPU its callers do."""

    def refuse(*arguments):
        raise AssertionError("the host waits for a tensor")

    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    with pytest.MonkeyPatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, refuse)
        yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


def after_the_first(batches):
    """The first step brings the epoch's plan to the device; no other may wait."""
    yield next(batches)
    with no_waiting():
        yield from batches


def some_epochs(data, loss, args, monkeypatch, watch=after_the_first) -> None:
    batch_loss, around_epoch = loss
    monkeypatch.setattr(training, "REPORT_SECONDS", float("inf"))
    accelerator = Accelerator()
    loader = TrainLoader(data.train, args.train_batch_size, args.seed, accelerator.device)
    net = build_model("resnet8", data.num_classes)
    _, net, optimizer, schedule = prepare(accelerator, net, args, len(loader))
    step = Step(args.step, accelerator, net, optimizer, batch_loss, loader, data)
    for epoch in (1, 1, 2):
        bar = tqdm(watch(loader.epoch(epoch)), total=len(loader), disable=True)
        with around_epoch(epoch) as kind:
            train_epoch(step, kind, schedule, epoch, bar, 0)


@pytest.fixture
def data(tiny_npz):
    return load_dataset(str(tiny_npz), "data")


def test_waiting_is_noticed(data, monkeypatch):
    args = student_options(["--teacher_path", "-", "--train-batch-size", "32"])

    def waits(logits, batch):
        return logits.mean() * (1 if logits.sum() > 0 else 2)

    with pytest.raises((AssertionError, RuntimeError), match="wait|synchroniz"):
        some_epochs(data, (waits, untouched), args, monkeypatch)


@pytest.mark.parametrize("loss", loss_names())
@pytest.mark.parametrize("scheduler", ["multistep", "warmupcosine"])
def test_no_step_of_a_teacher_waits(data, monkeypatch, loss, scheduler):
    flags = ("--epochs", "2", "--train-batch-size", "32", "--scheduler", scheduler)
    args = student_options(["--teacher_path", "-", *flags])
    criterion = build_loss(loss)
    loss = (lambda logits, batch: criterion(logits, batch.labels), untouched)
    some_epochs(data, loss, args, monkeypatch)


@pytest.mark.parametrize("cache", [False, True])
def test_no_step_of_a_student_waits(data, monkeypatch, tmp_path, cache):
    flags = ["--teacher_path", "-", "--epochs", "2", "--train-batch-size", "32"]
    args = student_options(flags + ["--teacher_cache", str(tmp_path)] * cache)
    accelerator = Accelerator()
    teacher = benchmark.random_teacher("resnet8", data, accelerator)

    def epochs(watch) -> None:
        loss = train_student.build_batch_loss(args, teacher, data, accelerator)
        some_epochs(data, loss, args, monkeypatch, watch)

    if cache:
        epochs(watch=iter)  # the end of an epoch that is written waits
        monkeypatch.setattr(Teacher, "logits", None)
    epochs(watch=after_the_first)


@pytest.mark.parametrize("given, most", [(None, {"cpu": 128, "cuda": 300}), (200, 200), (7, 7)])
def test_evaluation_takes_what_suits_the_device_or_what_it_is_told(given, most):
    class Net(torch.nn.Module):
        def forward(self, images):
            sizes.append(len(images))
            return images.mean((2, 3))

    sizes, accelerator, data = [], Accelerator(), benchmark.random_data(10, 300)
    predict(Net(), data.val, data.mean, data.std, given, accelerator)
    assert sum(sizes) == 300
    assert max(sizes) == (most if given else most[accelerator.device.type])


# The benchmark


def test_the_benchmark_runs_what_fit_runs(tmp_path, monkeypatch, capsys):
    size = benchmark.Size(("resnet8",), (("resnet14", "resnet8"),), 0.01, 20, 2)
    monkeypatch.setattr(benchmark, "QUICK", size)
    assert benchmark.train_epoch is training.train_epoch
    file = tmp_path / "speed.json"
    benchmark.main(["--quick", "--batch-size", "32", "--workers", "0", "--json", str(file)])
    rows = {row["row"]: row for row in json.loads(file.read_text())["rows"]}
    contenders = {name: set(row["images_per_second"]) for name, row in rows.items()}
    assert contenders == {
        "resnet8": {"conventional", "ours", "bare step"},
        "resnet14 -> resnet8": {"conventional", "ours", "cached", "student alone"},
        "evaluation of resnet8": {"conventional", "ours"},
    }
    rates = rows["resnet14 -> resnet8"]["images_per_second"]
    assert all(len(each) == 2 for each in rates.values())
    assert max(rates["cached"]) > max(rates["ours"])
    out = capsys.readouterr().out
    assert out.count("resnet14 -> resnet8, cached") == 1
    assert "second student's rate over the first's" in out


def test_several_runs_at_once(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "TOGETHER", ("resnet8",))
    monkeypatch.setattr(benchmark, "EPOCHS", 3)
    benchmark.main(["--at-once", "2", "3", "--batch-size", "8"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "runs at once" in head and "resnet8, images/s" in head
    assert [int(row.split()[0]) for row in rows] == [2, 3]
    assert all(float(row.split()[1].replace(",", "")) > 0 for row in rows)


def test_a_run_at_once_that_fails_is_no_rate(tmp_path):
    with pytest.raises(RunFailed, match="a run has ended with an error"):
        benchmark.total_rate([sys.executable, "-c", "raise SystemExit(2)"], tmp_path, 2)


def test_the_cost_of_a_net():
    """ResNet-20 is known for its 40.8 million multiply-adds; a teacher adds its forward pass."""
    forward, numbers = benchmark.cost("resnet20", backward=False)
    assert forward == pytest.approx(2 * 40.8e6, rel=0.01)
    both, traffic = benchmark.cost("resnet20")
    stem = 2 * 3 * 16 * 9 * 32 * 32  # needs no gradient of the images
    assert both == 3 * forward - stem and traffic == 3 * numbers
    assert benchmark.cost("resnet20", "resnet20") == (both + forward, traffic + numbers)


def test_the_floor_is_the_slower_of_products_and_traffic():
    about = {"precision": "no", "operations_per_second": 100, "bytes_per_second": 100}
    assert benchmark.floor(50, 1, about) == 2
    assert benchmark.floor(1, 50, about) == 0.5
    assert benchmark.floor(1, 50, about | {"precision": "bf16"}) == 1
