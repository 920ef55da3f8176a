"""What the steps of an epoch add up to, and when it ends a run."""

import math

import pytest
import torch

from utils.program import RunFailed
from utils.sums import MOST_SKIPPED, EpochSums

CPU = torch.device("cpu")


def step(loss: float = 1.0, images: int = 4, right: int = 0, skipped: int = 0, **parts) -> dict:
    """The sums of a step with this mean loss, and these means of its parts."""
    values = {"loss": images * loss, "right": right, "images": images, "skipped": skipped}
    for name, part in parts.items():
        values[name] = images * part
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def epoch(*steps: dict, skipped_before: int = 0, rate: float = 0.5) -> EpochSums:
    sums = EpochSums(len(steps), CPU, skipped_before)
    for values in steps:
        sums.add(values, rate)
    return sums


def test_means_are_over_images_not_over_steps():
    sums = epoch(
        step(loss=3, images=3, right=3, labels=1, calibration=2),
        step(loss=7, images=1, right=0, labels=3, calibration=4),
    )
    assert sums.means() == {
        "train_loss": 4,
        "train_top1": 0.75,
        "train_labels": 1.5,
        "train_calibration": 2.5,
    }


def test_a_loss_of_one_part_is_not_said_twice():
    assert epoch(step(labels=1)).means() == {"train_loss": 1, "train_top1": 0}


def test_sums_are_kept_though_a_replay_overwrites_them():
    first = step(loss=1)
    sums = EpochSums(2, CPU)
    sums.add(first, 0.5)
    first["loss"].fill_(99)
    sums.add(first, 0.5)
    assert sums.column("loss") == [4, 99]


def test_skipped_steps_in_a_row_are_counted_over_epochs():
    before = epoch(*[step(skipped=s) for s in (1, 0, 1, 1)])
    assert before.skipped_in_a_row() == [1, 0, 1, 2]
    after = epoch(*[step(skipped=s) for s in (1, 0, 1)], skipped_before=2)
    assert after.skipped_in_a_row() == [3, 0, 1]

    # In several processes each counts its own, and the sum is no longer 1.
    assert epoch(step(skipped=2), step(skipped=2)).skipped_in_a_row() == [1, 2]


def test_so_many_skipped_steps_end_the_run_and_one_less_does_not():
    skipped = [step(skipped=1)] * 3
    epoch(*skipped, skipped_before=MOST_SKIPPED - 4).check(epoch=2)
    with pytest.raises(RunFailed, match=rf"fp16: .*{MOST_SKIPPED} steps in a row.*epoch 2, step 3"):
        epoch(*skipped, skipped_before=MOST_SKIPPED - 3).check(epoch=2)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    sums = epoch(step(loss=2.5), step(loss=loss), step(loss=math.nan), rate=0.25)
    words = rf"the loss is {loss} in epoch 3, step 2, 2\.5 a step before, at a .* rate of 0\.25"
    with pytest.raises(RunFailed, match=words):
        sums.check(epoch=3)


def test_what_has_no_images_counts_for_nothing_unless_it_is_broken():
    """A process without a share of the last step has taken part all the same."""
    epoch(step(), step(images=0)).check(epoch=1)
    broken = step(images=0)
    broken["loss"].fill_(math.nan)
    with pytest.raises(RunFailed, match="step 2"):
        epoch(step(), broken).check(epoch=1)
