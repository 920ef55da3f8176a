"""What a task owns, and what it says of a batch that its loss has no value for."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from losses import build_distillation
from utils.data import Dataset, Split
from utils.data.views import Batch
from utils.program import UserError
from utils.tasks import DistillationTask
from utils.teachers.nets import NetTeacher

IMAGES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
LABELS = torch.tensor([0, 0, 0, 0])
SPLIT = Split(IMAGES, LABELS)
DATA = Dataset(
    name="d",
    num_classes=3,
    train=SPLIT,
    val=SPLIT,
    test=SPLIT,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    fingerprint="f",
)
BATCH = Batch(IMAGES, LABELS, places=torch.arange(4), weight=1.0)


class SameAnswer:
    """A teacher that gives all images the same logits."""

    reads_cache = False

    def __init__(self, *logits: float):
        self.logits = torch.tensor(logits)

    def __call__(self, batch: Batch) -> torch.Tensor:
        return self.logits.expand(len(batch.labels), -1)


def distillation(name: str, *logits: float) -> DistillationTask:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    loss = build_distillation(name)
    return DistillationTask(net, loss, NetTeacher(members=[]), SameAnswer(*logits), DATA)


def test_a_task_owns_what_is_trained_and_what_its_loss_keeps():
    task = distillation("DKD", 1.0, 2.0, 3.0)
    assert list(task.parameters()) == list(task.net.parameters())
    assert set(task.state_dict()) == {"net.1.weight", "net.1.bias", "loss.share"}


def test_a_distillation_is_told_of_its_epoch():
    """DKD's weight rises over 20 of them."""
    task = distillation("DKD", 1.0, 2.0, 3.0)
    task.answers.during_epoch = lambda epoch: nullcontext()
    with task.during_epoch(5):
        assert task.loss.share == 5 / 20


@pytest.mark.parametrize(
    "distill, logits", [("DKD", (1.0, -torch.inf, -torch.inf)), ("LSKD", (1.0, 0.5, -torch.inf))]
)
def test_a_step_without_a_value_names_the_flag_and_the_way_out(distill, logits):
    """The validation images, which are looked at before training, may not show it."""
    with pytest.raises(UserError, match=f"--distill: {distill} .*give --distill KD"):
        distillation(distill, *logits)(BATCH)
    assert distillation("KD", *logits)(BATCH).loss.isfinite()
