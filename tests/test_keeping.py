"""Epochs are measured and written while the next one trains, and nothing is lost by that."""

import json
import threading

import pytest
import torch
from conftest import command
from torch import nn

import train_teacher
from utils import training
from utils.keeping import on_cpu
from utils.program import RunFailed
from utils.runs import Run


def test_the_next_epoch_trains_meanwhile(tiny_npz, tmp_path, monkeypatch):
    """The first epoch is not written before the second has trained."""
    second_has_trained = threading.Event()
    train_epoch, save = training.train_epoch, Run.save

    def trained(trainer, step, loader, epoch):
        record = train_epoch(trainer, step, loader, epoch)
        if epoch == 2:
            second_has_trained.set()
        return record

    def saved(run, checkpoint, improved):
        assert second_has_trained.wait(timeout=60)
        save(run, checkpoint, improved)

    monkeypatch.setattr(training, "train_epoch", trained)
    monkeypatch.setattr(Run, "save", saved)
    train_teacher.main(command(tiny_npz, tmp_path, "--epochs", "2"))
    [log] = tmp_path.rglob("metrics.jsonl")
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2]


def test_what_is_kept_is_the_epochs_own(tiny_npz, tmp_path, monkeypatch):
    """Steps of the next epoch change the net while it is written, and not what is written."""
    states = []
    save = Run.save

    def saved(run, checkpoint, improved):
        save(run, checkpoint, improved)
        states.append(torch.load(run.folder / "checkpoint.pth", weights_only=True)["task"])

    monkeypatch.setattr(Run, "save", saved)
    train_teacher.main(command(tiny_npz, tmp_path / "two", "--epochs", "2"))
    train_teacher.main(command(tiny_npz, tmp_path / "one", "--epochs", "1"))
    first, second, alone = states
    assert first.keys() == alone.keys()
    assert all(torch.equal(first[name], alone[name]) for name in first)
    assert not all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_failure_to_write_ends_the_run(tiny_npz, tmp_path, monkeypatch, capsys, epoch):
    """Of the last epoch, too; and the same command goes on from what is whole."""
    save = Run.save

    def saved(run, checkpoint, improved):
        if len(checkpoint["history"]) == epoch:
            raise RunFailed("the disk is full")
        save(run, checkpoint, improved)

    words = command(tiny_npz, tmp_path, "--epochs", "2")
    with monkeypatch.context() as full:
        full.setattr(Run, "save", saved)
        with pytest.raises(RunFailed, match="the disk is full"):
            train_teacher.main(words)
    assert not list(tmp_path.rglob("result.json"))
    train_teacher.main(words)
    said = capsys.readouterr().out
    assert ("going on after epoch 1" in said) == (epoch == 2)
    assert list(tmp_path.rglob("result.json"))


def test_copies_are_no_views():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    states = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "list": [1, "text"]}
    copied = on_cpu(states)
    before = copied["net"]["0.weight"].clone()
    assert copied["list"] == [1, "text"]
    assert copied["net"]._metadata == states["net"]._metadata
    assert copied["net"]["0.weight"].stride() == net[0].weight.stride()
    momentum = copied["optimizer"]["state"][0]["momentum_buffer"].clone()
    with torch.no_grad():
        for tensor in (
            *net.state_dict().values(),
            optimizer.state[net[0].weight]["momentum_buffer"],
        ):
            tensor.add_(1)
    assert torch.equal(copied["net"]["0.weight"], before)
    assert torch.equal(copied["optimizer"]["state"][0]["momentum_buffer"], momentum)
    assert copied["net"]["1.num_batches_tracked"] == 1
