"""One seed gives one run, to the last bit; what is only shown or shared out changes no number."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import assert_same_run, command, weights

import train_student
import train_teacher
from models import build_model
from utils import training
from utils.data import load_dataset
from utils.data.views import TrainLoader
from utils.evaluation import evaluate, predict

NAME = "tiny/resnet8/NLL_seed=42"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_npz) -> Path:
    root = tmp_path_factory.mktemp("teacher")
    train_teacher.main(command(tiny_npz, root))
    return root / NAME


def same_predictions(one: Path, other: Path) -> bool:
    first, second = (np.load(folder / "predictions.npz") for folder in (one, other))
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_two_runs_are_one(teacher, tiny_npz, tmp_path, forks):
    """In this process and in one of its own."""
    assert forks.run(["train_teacher.py", *command(tiny_npz, tmp_path)]).code == 0
    assert_same_run(teacher, tmp_path / NAME)
    assert same_predictions(teacher, tmp_path / NAME)


def test_two_students_are_one(teacher, tiny_npz, tmp_path):
    """With and without the cache, the first to fill it and the second."""
    folders = []
    for name in ("plain", "first", "second"):
        flags = ["--teacher_path", str(teacher)]
        flags += ["--teacher_cache", str(tmp_path / "cache")] if name != "plain" else []
        train_student.main(command(tiny_npz, tmp_path / name, *flags))
        folders.append(next((tmp_path / name).rglob("result.json")).parent)
    assert_same_run(folders[0], folders[1])
    assert_same_run(folders[0], folders[2])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_the_progress_bar_and_how_often_it_moves(teacher, tiny_npz, tmp_path, monkeypatch, seconds):
    """The teacher was trained without a terminal, and so without a bar."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(training, "REPORT_SECONDS", seconds)
        patch.setattr("sys.stderr", terminal)
        train_teacher.main(command(tiny_npz, tmp_path))
    shown = terminal.getvalue()
    assert "epoch 2/3" in shown and ("left of the run" in shown) == (seconds == 0)
    assert_same_run(teacher, tmp_path / NAME)
    assert same_predictions(teacher, tmp_path / NAME)


@pytest.mark.parametrize("size", ["1", "7", "40"])
def test_the_test_batch_size(teacher, tiny_npz, tmp_path, size):
    """Weights to the last bit; metrics up to rounding, for other batches are summed otherwise."""
    train_teacher.main(command(tiny_npz, tmp_path, "--test-batch-size", size))
    one, other = weights(teacher), weights(tmp_path / NAME)
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (
        json.loads((folder / "result.json").read_text())["last"]
        for folder in (teacher, tmp_path / NAME)
    )
    assert second["val"] == pytest.approx(first["val"], abs=1e-5)
    assert second["test"]["raw"] == pytest.approx(first["test"]["raw"], abs=1e-5)


def logits_of(teacher: Path, data: Path, precision: str = "no") -> torch.Tensor:
    """Of the test split, computed anew."""
    data = load_dataset(str(data), ".")
    net = build_model("resnet8", 4)
    net.load_state_dict(weights(teacher))
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    logits = predict(net, data.test, data.mean, data.std, 16, accelerator)
    AcceleratorState._reset_state()
    return logits


def test_the_number_of_threads(teacher, tiny_npz, tmp_path):
    """Up to rounding, for several threads sum in another order; it grows from step to step."""
    one = logits_of(teacher, tiny_npz)
    torch.set_num_threads(2)
    torch.testing.assert_close(logits_of(teacher, tiny_npz), one, rtol=1e-4, atol=1e-5)
    train_teacher.main(command(tiny_npz, tmp_path))
    files = (folder / "metrics.jsonl" for folder in (teacher, tmp_path / NAME))
    first, second = (json.loads(file.read_text().splitlines()[0]) for file in files)
    assert second["train_loss"] == pytest.approx(first["train_loss"], rel=1e-3)


class Enough(Exception):
    pass


def test_what_a_seed_reaches(tiny_npz, tmp_path, monkeypatch):
    """--seed: weights, order and views; --split-seed: the split."""
    seen = []

    def stop(run, accelerator, net, batch_loss, data, args):
        draws = TrainLoader(data.train, 64, args.seed, "cpu").epoch(1)
        plan, split = [draw.plan.tolist() for draw in draws], data.val.images.sum((1, 2, 3))
        seen.append((net.state_dict()["conv1.weight"].tolist(), plan, split.tolist()))
        raise Enough

    monkeypatch.setattr(train_teacher, "fit", stop)
    for flag in ("--lr", "--seed", "--split-seed"):
        with pytest.raises(Enough):
            train_teacher.main(command(tiny_npz, tmp_path / flag, flag, "1"))
    plain, seed, split = seen
    assert [a == b for a, b in zip(plain, seed, strict=True)] == [False, False, True]
    assert [a == b for a, b in zip(plain, split, strict=True)] == [True, True, False]


def test_bfloat16_measures_what_float32_does(teacher, tiny_npz):
    test = load_dataset(str(tiny_npz), ".").test
    whole, half = (logits_of(teacher, tiny_npz, precision) for precision in ("no", "bf16"))
    assert not torch.equal(whole, half)
    whole, half = evaluate(whole, test), evaluate(half, test)
    for name in ("top1", "nll", "brier"):
        assert half[name] == pytest.approx(whole[name], abs=1e-3)
