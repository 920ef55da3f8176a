"""--ema and --patience: what is averaged, when a run stops, and that both resume exactly."""

import json
import re
from pathlib import Path

import cuda_graphs
import numpy as np
import pytest
import torch
from conftest import assert_same_run, command, fails, folder_of, weights
from torch import nn

import train_student
import train_teacher
from utils.averaging import WeightAverage
from utils.options import teacher_options
from utils.program import UserError
from utils.runs import Run
from utils.settings import Recipe

EMA = ("--ema", "0.75")


class Killed(BaseException):
    """Stands in for SIGKILL within the process: nothing in the project catches it."""


def killed_after(epochs: int, monkeypatch, line: list[str], main=train_teacher.main) -> None:
    """Run a command that does not live longer."""
    save = Run.save

    def save_and_die(self, checkpoint, improved):
        save(self, checkpoint, improved)
        if len(checkpoint["history"]) == epochs:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", save_and_die)
        main(line)


def records_of(folder: Path) -> list[dict]:
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def timeless(records: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in record.items() if "second" not in name}
        for record in records
    ]


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pth", weights_only=True)


# The average


@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_it_is_the_formula(decay):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = WeightAverage(net, decay)
    seen = []
    for step in range(1, 8):
        with torch.no_grad():
            for weight in net.parameters():
                weight.copy_(torch.randn(weight.shape))
        net(torch.randn(4, 3).double())  # changes the statistics
        average.update(net)
        seen.append([weight.detach().numpy().copy() for weight in net.parameters()])

        factors = [decay ** (step - i) for i in range(1, step + 1)]
        for k, averaged in enumerate(average.net.parameters()):
            total = sum(f * weights[k] for f, weights in zip(factors, seen, strict=True))
            np.testing.assert_allclose(averaged, total / sum(factors), rtol=1e-6, atol=1e-7)
    average.copy_buffers(net)
    for own, buffer in zip(average.net.buffers(), net.buffers(), strict=True):
        assert torch.equal(own, buffer)
    assert not any(weight.requires_grad for weight in average.net.parameters())


def test_the_average_is_kept_and_training_is_as_without(teacher, tiny_npz, tmp_path):
    train_teacher.main(command(tiny_npz, tmp_path, *EMA))
    folder = folder_of(tmp_path)
    saved = checkpoint_of(folder)
    plain = weights(teacher)
    kept = weights(folder)
    for name, value in plain.items():
        assert torch.equal(saved["task"][f"net.{name}"], value)
        assert torch.equal(saved["average"][f"net.{name}"], kept[name])
    assert not torch.equal(plain["fc.weight"], kept["fc.weight"])
    assert [record["train_loss"] for record in records_of(folder)] == [
        record["train_loss"] for record in records_of(teacher)
    ]
    assert records_of(folder)[-1]["val_nll"] != records_of(teacher)[-1]["val_nll"]
    settings = json.loads((folder / "result.json").read_text())["settings"]
    assert settings["ema"] == 0.75


def test_the_kept_net_is_the_one_that_was_measured(tiny_npz, tmp_path):
    from models import build_model
    from utils.data import load_dataset
    from utils.data.views import normalise

    train_teacher.main(command(tiny_npz, tmp_path, *EMA))
    folder = folder_of(tmp_path)
    saved = torch.load(folder / "model_last.pth", weights_only=True)
    net = build_model("resnet8", 4)
    net.load_state_dict(saved["state_dict"])
    data = load_dataset(str(tiny_npz), "data", saved["split_seed"])
    with torch.inference_mode():
        logits = net.eval()(normalise(data.test.images, saved["mean"], saved["std"]))
    stored = np.load(folder / "predictions.npz")["last_test_logits"]
    np.testing.assert_allclose(logits, stored, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_average_resumes_exactly(teacher, tiny_npz, tmp_path, monkeypatch, epochs):
    flags = (*EMA, "--teacher_path", str(teacher))
    train_student.main(command(tiny_npz, tmp_path / "whole", *flags))
    line = command(tiny_npz, tmp_path / "cut", *flags)
    killed_after(epochs, monkeypatch, line, train_student.main)
    train_student.main(line)
    assert_same_run(folder_of(tmp_path / "whole"), folder_of(tmp_path / "cut"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph may choose other kernels")
def test_a_captured_average_is_an_eager_one(tiny_npz, tmp_path, monkeypatch):
    # A power of two, which is the same number for the host and in a tensor.
    flags = (*EMA, "--lr", "0.0625", "--schedule-steps", "1", "2", "--lr-decay-factor", "0.5")
    flags = (*flags, "--train-batch-size", "32")
    train_teacher.main(command(tiny_npz, tmp_path / "eager", *flags, "--step", "eager"))
    monkeypatch.setattr("utils.steps.can_capture", lambda accelerator: True)
    graphs = cuda_graphs.emulate(monkeypatch)
    train_teacher.main(command(tiny_npz, tmp_path / "graph", *flags))
    assert [graph.replays for graph in graphs] == [4 * 3 - 3]
    assert_same_run(folder_of(tmp_path / "eager"), folder_of(tmp_path / "graph"))


# Early stopping


@pytest.fixture(scope="module")
def all_epochs(tiny_npz, tmp_path_factory) -> Path:
    """A run of twelve epochs that nothing stops."""
    root = tmp_path_factory.mktemp("all")
    train_teacher.main(command(tiny_npz, root, "--epochs", "12"))
    return folder_of(root)


def end_of(records: list[dict], metric: str, sign: int, patience: int) -> int:
    """The epoch after which no better one has come for `patience` epochs."""
    values = [sign * record[metric] for record in records]
    for epoch in range(1, len(values) + 1):
        if epoch - (1 + int(np.argmax(values[:epoch]))) >= patience:
            return epoch
    return len(values)


@pytest.mark.parametrize(
    ("select", "metric", "sign"),
    [("top1", "val_top1", 1), ("nll", "val_nll", -1), ("refinement", "val_refinement", -1)],
)
def test_a_run_stops_where_nothing_gets_better(
    all_epochs, tiny_npz, tmp_path, capsys, select, metric, sign
):
    records = records_of(all_epochs)
    patience = 2
    end = end_of(records, metric, sign, patience)
    assert end < 12, "a test of nothing"
    line = command(tiny_npz, tmp_path, "--epochs", "12", "--patience", "2", "--select", select)
    train_teacher.main(line)
    folder = folder_of(tmp_path)
    assert timeless(records_of(folder)) == timeless(records[:end])
    result = json.loads((folder / "result.json").read_text())
    assert result["last"]["epoch"] == end and result["best"]["epoch"] == end - patience
    assert torch.load(folder / "model_last.pth", weights_only=True)["epoch"] == end
    assert f"stopped after epoch {end} of 12; since epoch {end - 2}" in capsys.readouterr().out
    train_teacher.main(line)
    shown = capsys.readouterr().out
    assert f"by --patience 2 it stopped after epoch {end} of 12" in shown


@pytest.mark.parametrize("before_the_end", [0, 1])
def test_a_stopped_run_resumes_exactly(all_epochs, tiny_npz, tmp_path, monkeypatch, before_the_end):
    """Also where it was killed after its last epoch: it trains no further one."""
    end = end_of(records_of(all_epochs), "val_top1", 1, 2)
    flags = ("--epochs", "12", "--patience", "2")
    train_teacher.main(command(tiny_npz, tmp_path / "whole", *flags))
    line = command(tiny_npz, tmp_path / "cut", *flags)
    killed_after(end - before_the_end, monkeypatch, line)
    train_teacher.main(line)
    assert_same_run(folder_of(tmp_path / "whole"), folder_of(tmp_path / "cut"))
    assert len(records_of(folder_of(tmp_path / "cut"))) == end


# Flags


def test_settings_of_runs_without_them_are_as_before():
    assert not {"ema", "patience"} & Recipe().settings().keys()
    assert Recipe(ema=0.9, patience=3).settings().items() >= {"ema": 0.9, "patience": 3}.items()


@pytest.mark.parametrize("flags", ["--ema 1", "--ema 0", "--ema nan", "--patience 0"])
def test_values_that_mean_nothing_are_refused(flags):
    with pytest.raises(UserError, match="will not do; give"):
        teacher_options(flags.split())


def test_patience_that_cannot_stop_a_run(tiny_npz, tmp_path, capsys):
    line = command(tiny_npz, tmp_path, "--patience", "2")
    error = fails(capsys, tmp_path, train_teacher.main, line)
    assert "--patience 2: cannot stop a run of --epochs 3 before its end" in error
    assert teacher_options(["--epochs", "3", "--patience", "1"]).recipe.patience == 1


def test_another_patience_is_another_run(tiny_npz, tmp_path, capsys):
    train_teacher.main(command(tiny_npz, tmp_path))
    line = command(tiny_npz, tmp_path, "--patience", "1", *EMA)
    error = fails(capsys, tmp_path, train_teacher.main, line)
    assert "ema was None and is 0.75; patience was None and is 1" in error


OWN = """
import threading
from torch import nn

def net(num_classes):
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, num_classes))
    net.lock = threading.Lock()
    return net
"""


def test_a_net_that_cannot_be_copied(tiny_npz, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    line = command(tiny_npz, tmp_path / "runs", "--model", f"{own}:net", *EMA)
    error = fails(capsys, tmp_path, train_teacher.main, line)
    assert re.search("--ema 0.75: .*own.py:net cannot be copied .*lock.*leave it out", error)
