"""One seed gives one run, to the last bit; what is only shown or shared out changes no number."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, command, weights

import train_teacher
from utils import training
from utils.data.views import TrainLoader

NAME = "tiny/resnet8/NLL_seed=42"


def same_predictions(one: Path, other: Path) -> bool:
    first, second = (np.load(folder / "predictions.npz") for folder in (one, other))
    return all(np.array_equal(first[name], second[name]) for name in first)


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


@pytest.mark.parametrize("size", ["1", "40"])
def test_the_test_batch_size(teacher, tiny_npz, tmp_path, size):
    """Weights to the last bit; metrics up to rounding, for other batches are summed otherwise."""
    train_teacher.main(command(tiny_npz, tmp_path, "--test-batch-size", size))
    one, other = weights(teacher), weights(tmp_path / NAME)
    assert all(torch.equal(one[name], other[name]) for name in one)
    files = (folder / "result.json" for folder in (teacher, tmp_path / NAME))
    first, second = (json.loads(file.read_text())["last"] for file in files)
    assert second["val"] == pytest.approx(first["val"], abs=1e-5)
    assert second["test"]["raw"] == pytest.approx(first["test"]["raw"], abs=1e-5)


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
