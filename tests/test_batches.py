"""The order and the views of an epoch: frozen, the same on any number of processes; mixing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import command
from scipy import stats
from torch import nn
from torchvision.transforms import functional as TF

import train_teacher
from losses import build_loss
from utils.data import NORMALISATION, Dataset, Split
from utils.data.mixing import MIXES, Mixing, draw_cutmix, mix_plan
from utils.data.shared import train_loader
from utils.data.views import (
    NUM_VIEWS,
    Batch,
    TrainLoader,
    epoch_plan,
    normalise,
    take_views,
    view_numbers,
    view_windows,
)
from utils.tasks import ClassificationTask, step_output
from utils.training import train_step


def random_images(n, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8))


def random_split(n, size=8):
    return Split(random_images(n, size), torch.arange(n) % 10)


LOADED = (random_split(50), 16, 7, "cpu")  # 50 images, 16 in a step, seed 7


def batches(loader: TrainLoader, epoch: int) -> list[Batch]:
    return [loader.batch(draw) for draw in loader.epoch(epoch)]


@pytest.mark.parametrize("size", [8, 32])
def test_all_views_equal_torchvision_pad_crop_flip(size):
    images = random_images(2, size)
    windows = view_windows(images)
    for i, image in enumerate(images):
        views = take_views(windows, torch.full((NUM_VIEWS,), i), torch.arange(NUM_VIEWS))
        for v, view in enumerate(views):
            expected = TF.crop(TF.pad(image, 4), v // 18, v // 2 % 9, size, size)
            assert torch.equal(view, TF.hflip(expected) if v % 2 else expected), v


def test_windows_are_views_of_one_padded_copy():
    windows = view_windows(random_images(10))
    assert windows.shape == (10, 9, 9, 32, 96)
    assert windows.untyped_storage().nbytes() == 10 * 40 * 40 * 3


def test_plan_is_frozen():
    # These numbers belong to results that were published: a version that changes them is broken.
    order, views = epoch_plan(8, seed=42, epoch=3, flip=True)
    assert order.tolist() == [3, 1, 2, 7, 0, 5, 4, 6]
    assert views.tolist() == [96, 115, 136, 99, 76, 21, 68, 10]


def test_plan_depends_on_seed_and_epoch_alone():
    plans = {key: epoch_plan(1000, *key, True) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    np.random.seed(2)
    torch.manual_seed(2)
    for key, plan in plans.items():
        assert torch.equal(plan, epoch_plan(1000, *key, True)) and plan.dtype == torch.int64
        assert torch.equal(plan[0].sort().values, torch.arange(1000))
    assert len({tuple(row.tolist()) for plan in plans.values() for row in plan}) == 8


@pytest.mark.parametrize("flip", [True, False])
def test_views_are_uniform_and_even_without_flip(flip):
    plans = [epoch_plan(10_000, 42, epoch, flip) for epoch in range(5)]
    counts = torch.cat([views for _, views in plans]).bincount(minlength=NUM_VIEWS)
    possible = list(view_numbers(flip))
    assert possible == list(range(162) if flip else range(0, 162, 2))
    assert counts[possible].sum() == counts.sum()
    assert stats.chisquare(counts[possible]).pvalue > 0.01
    assert torch.equal(plans[0][0], epoch_plan(10_000, 42, 0, True)[0])


@pytest.mark.parametrize("name", sorted(NORMALISATION))
def test_normalise_equals_torchvision(name):
    images, (mean, std) = random_images(16), NORMALISATION[name]
    out = normalise(images, mean, std)
    expected = TF.normalize(images.double() / 255, mean, std)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flip", [True, False])
def test_loader_follows_the_plan_and_keeps_the_last_batch(flip):
    split, loader = LOADED[0], TrainLoader(*LOADED, flip=flip)
    list(loader.epoch(0))  # epochs can be made in any order
    made = batches(loader, 2)
    assert [len(b.labels) for b in made] == [16, 16, 16, 2] and len(loader) == 4
    assert all(b.weight == 1.0 for b in made)
    order, views = epoch_plan(50, 7, 2, flip)
    plan = torch.cat([draw.plan for draw in loader.epoch(2)], dim=1)
    assert torch.equal(plan, torch.stack([order, views, torch.arange(50)]))
    assert torch.equal(torch.cat([b.labels for b in made]), split.labels[order])
    expected = take_views(view_windows(split.images), order, views)
    assert torch.equal(torch.cat([b.images for b in made]), expected)
    assert torch.equal(torch.cat([b.places for b in made]), torch.arange(50))


@pytest.mark.parametrize("mixing", [None, *(Mixing(kind, 0.7) for kind in MIXES)])
@pytest.mark.parametrize("n, batch, world", [(64, 8, 2), (50, 7, 3), (33, 8, 4)])
def test_ranks_share_the_batch_of_one_process(n, batch, world, mixing):
    split = random_split(n)
    single = TrainLoader(split, batch * world, 3, "cpu", mixing=mixing)
    ranks = [
        TrainLoader(split, batch, 3, "cpu", rank, world, mixing=mixing) for rank in range(world)
    ]
    assert {len(loader) for loader in ranks} == {len(single)}
    steps = zip(*(batches(loader, 1) for loader in (single, *ranks)), strict=True)
    for whole, *pieces in steps:
        kept = [piece for piece in pieces if piece.weight > 0]
        assert torch.equal(torch.cat([piece.places for piece in kept]), whole.places)
        assert torch.equal(torch.cat([piece.images for piece in kept]), whole.images)
        if mixing:
            assert torch.equal(torch.cat([piece.partners for piece in kept]), whole.partners)
            assert all(piece.share == whole.share for piece in pieces)
        sizes = [len(piece.places) for piece in kept]
        assert max(sizes) - min(sizes) <= 1
        # Any per-image value will do for a loss.
        mean = sum(piece.weight * piece.places.double().mean() for piece in pieces) / world
        torch.testing.assert_close(mean, whole.places.double().mean())


def test_what_a_seed_reaches(tiny_npz, tmp_path, monkeypatch):
    """--seed: weights, order and views; --split-seed: the split."""
    seen = []

    def stop(run, task):
        draws = train_loader(run.data, run.experiment.recipe, run.accelerator).epoch(1)
        plan, split = [draw.plan.tolist() for draw in draws], run.data.val.images.sum((1, 2, 3))
        seen.append((task.net.state_dict()["conv1.weight"].tolist(), plan, split.tolist()))
        raise InterruptedError

    monkeypatch.setattr(train_teacher, "fit", stop)
    for flag in ("--lr", "--seed", "--split-seed"):
        with pytest.raises(InterruptedError):
            train_teacher.main(command(tiny_npz, tmp_path / flag, flag, "1"))
    plain, seed, split = seen
    assert [a == b for a, b in zip(plain, seed, strict=True)] == [False, False, True]
    assert [a == b for a, b in zip(plain, split, strict=True)] == [True, True, False]


@pytest.fixture(params=sorted(MIXES))
def mixing(request):
    return Mixing(request.param, 0.7)


def test_a_mix_changes_neither_order_nor_views(mixing):
    plain, mixed = TrainLoader(*LOADED), TrainLoader(*LOADED, mixing=mixing)
    for one, other in zip(plain.epoch(3), mixed.epoch(3), strict=True):
        assert torch.equal(one.plan, other.plan) and len(other.partner_plan) == 2
        assert len(other.mixture) == MIXES[mixing.kind].numbers
        assert torch.equal(plain.batch(one).labels, mixed.batch(other).labels)
    assert plain.batch(one).partners is None and plain.batch(one).share is None


def test_partners_are_views_of_the_epoch(mixing):
    def partners(epoch):
        draws = TrainLoader(*LOADED, mixing=mixing).epoch(epoch)
        return torch.cat([draw.partner_plan for draw in draws], dim=1)

    # A permutation of the epoch: each image is a partner once, in its own view.
    epoch_of_views = epoch_plan(50, 7, 3, True)
    assert sorted(partners(3).T.tolist()) == sorted(epoch_of_views.T.tolist())
    assert torch.equal(partners(3), partners(3)) and not torch.equal(partners(3), partners(4))
    order, _ = epoch_of_views
    assert not torch.equal(partners(3)[0], order[order])  # the draws that made the order once more


def test_mixup_is_the_weighted_sum_of_both_views():
    loader = TrainLoader(*LOADED, mixing=Mixing("mixup", 0.7))
    for draw in loader.epoch(1):
        batch = loader.batch(draw)
        a = take_views(loader.windows, draw.index, draw.views).double()
        b = take_views(loader.windows, *draw.partner_plan).double()
        share = draw.mixture.item()
        expected = share * a + (1 - share) * b
        torch.testing.assert_close(batch.images.double(), expected, rtol=0, atol=1e-3)
        assert batch.share == np.float32(share)
        assert torch.equal(batch.partners, loader.labels[draw.partner_plan[0]])


def test_cutmix_pastes_one_box_into_every_image_of_a_step():
    loader = TrainLoader(random_split(400, 32), 4, 0, "cpu", mixing=Mixing("cutmix", 1.0))
    for draw in loader.epoch(1):
        batch = loader.batch(draw)
        expected = take_views(loader.windows, *draw.plan[:2]).clone()
        top, bottom, left, right = map(int, draw.mixture)
        partner = take_views(loader.windows, *draw.partner_plan)
        expected[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
        assert torch.equal(batch.images, expected)
        area = (bottom - top) * (right - left) / 32**2
        torch.testing.assert_close(batch.share.item(), 1 - area, rtol=0, atol=1e-6)


def numbers_of(mixing):
    """What the 2,000 steps of an epoch draw, (steps, numbers)."""
    order, views = epoch_plan(64_000, 5, 2, True)
    plan = mix_plan(mixing, order, views, images_per_step=32, side=32, seed=5, epoch=2)
    assert torch.equal(plan.partner_plan[0].sort().values, torch.arange(64_000))
    return plan.numbers


def test_shares_follow_their_distribution():
    shares = numbers_of(Mixing("mixup", 0.4))[:, 0].numpy()
    assert len(shares) == 2000 and stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 0.01
    top, bottom, left, right = numbers_of(Mixing("cutmix", 1.0)).T
    assert top.min() == left.min() == 0 and bottom.max() == right.max() == 32
    inside = (top > 0) & (left > 0) & (bottom < 32) & (right < 32)  # boxes that no edge cuts
    height, width = (bottom - top)[inside], (right - left)[inside]
    assert torch.equal(height, width)

    # A quarter of the area is half a side.
    boxes = draw_cutmix(np.full(500, 0.75), side=32, rng=np.random.default_rng(1))
    top, bottom, left, right = boxes.T
    inside = (top > 0) & (left > 0) & (bottom < 32) & (right < 32)
    assert set((bottom - top)[inside]) == {16}


def test_the_loss_of_a_mix_is_the_weighted_sum(mixing):
    loader = TrainLoader(*LOADED, mixing=mixing)
    batch = loader.batch(next(loader.epoch(1)))
    logits = torch.randn(16, 10, dtype=torch.float64)
    own, others = (F.one_hot(labels, 10) for labels in (batch.labels, batch.partners))
    shares = batch.share * own + (1 - batch.share) * others

    def parts_of(labels):
        return {"labels": F.cross_entropy(logits, labels), "calibration": logits.mean() / 2}

    output = step_output(logits, batch, parts_of)
    labels = F.cross_entropy(logits, shares.double())
    torch.testing.assert_close(output.loss, labels + logits.mean() / 2)
    torch.testing.assert_close(output.parts["labels"], labels)
    torch.testing.assert_close(output.parts["calibration"], logits.mean() / 2)
    alone = step_output(logits, batch._replace(partners=None, share=None), parts_of)
    assert alone.loss == F.cross_entropy(logits, batch.labels) + logits.mean() / 2


def test_train_top1_of_a_mix_counts_the_label_of_the_larger_share(mixing):
    """And not the first label alone."""
    split = random_split(50, 32)
    data = Dataset("d", 10, split, split, split, (0.5,) * 3, (0.5,) * 3, "f")
    loader = TrainLoader(split, 16, 7, "cpu", mixing=mixing)
    net = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(12, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    accelerator = Accelerator(cpu=True)
    task = ClassificationTask(net, build_loss("NLL"), data)
    first_is_smaller = 0
    for epoch in range(1, 5):
        for draw in loader.epoch(epoch):
            batch = loader.batch(draw)
            with torch.no_grad():
                predicted = net(normalise(batch.images, data.mean, data.std)).argmax(dim=1)
            labels = batch.labels if batch.share >= 0.5 else batch.partners
            sums = train_step(task, batch, optimizer, accelerator)
            assert sums["right"] == (predicted == labels).sum()
            assert sums["images"] == len(predicted)
            first_is_smaller += bool(batch.share < 0.5)
    assert first_is_smaller


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_same_batches_on_the_gpu():
    loaders = [TrainLoader(random_split(50, 32), 16, 0, device) for device in ("cpu", "cuda")]
    for cpu, gpu in zip(*(batches(loader, 0) for loader in loaders), strict=True):
        assert torch.equal(cpu.images, gpu.images.cpu())
        out = [normalise(b.images, *NORMALISATION["cifar10"]).cpu() for b in (cpu, gpu)]
        torch.testing.assert_close(*out, rtol=0, atol=1e-6)
