"""Run folders and third parties' files with weights, and how tests load them."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from models import build_model
from utils.data import Dataset, Split
from utils.program import UserError
from utils.settings import TeacherSource
from utils.teachers.loading import load_teacher
from utils.teachers.nets import Member, NetTeacher

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
LABEL = "FL+MDCA_gamma=3_beta=1"


def make_dataset(**changes) -> Dataset:
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), None)
    facts = {"name": "cifar10", "num_classes": 10, "mean": MEAN, "std": STD, "val": split}
    return Dataset(**{"train": split, "test": split, "fingerprint": "f" * 64} | facts | changes)


def checkpoint(**changes) -> dict:
    torch.manual_seed(5)
    facts = {"state_dict": build_model("resnet8").state_dict(), "model": "resnet8", "epoch": 12}
    facts |= {"dataset": "cifar10", "num_classes": 10, "mean": list(MEAN), "std": list(STD)}
    facts |= {"loss": "FL+MDCA", "label": LABEL, "seed": 42, "split_seed": 3}
    return facts | {"fingerprint": "f" * 64} | changes


def make_run(folder: Path, finished=True, **changes) -> Path:
    folder.mkdir(parents=True)
    for which in ("best", "last"):
        torch.save(checkpoint(**changes), folder / f"model_{which}.pth")
    if finished:
        (folder / "result.json").write_text("{}")
    return folder


def third_party(tmp_path, model="resnet8", change=lambda state: state, **options):
    """A file as another code base saves it; the net whose weights it holds."""
    torch.manual_seed(6)
    net = build_model(model, **options).eval()
    file = tmp_path / "their net,v1.pth"
    torch.save(change(net.state_dict()), file)
    return file, net


def renamed(*changes):
    def change(state):
        for pattern, replacement in changes:
            state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
        return state

    return change


def load_all(*paths, dataset=None, split_seed=3, model=None, **flags) -> NetTeacher:
    source = TeacherSource(paths=paths, models=(model,), **flags)
    dataset = dataclasses.replace(dataset or make_dataset(), split_seed=split_seed)
    return load_teacher(source, dataset)


def load(path, **options) -> Member:
    (member,) = load_all(path, **options).members
    return member


def refused(path, *words, **options) -> None:
    """One line refuses `path`; it has all the words."""
    with pytest.raises(UserError) as caught:
        load_all(path, **options)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    for word in ("--teacher", *words):
        assert word in message, message


def same_net(net, other):
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
