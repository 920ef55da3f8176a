import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import functional as TF

from utils.data import NORMALISATION, Split
from utils.data.views import (
    NUM_VIEWS,
    Batch,
    TrainLoader,
    epoch_plan,
    normalise,
    take_views,
    view_windows,
)


def random_images(n, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8))


def random_split(n, size=8):
    return Split(random_images(n, size), torch.arange(n) % 10)


def batches(loader: TrainLoader, epoch: int) -> list[Batch]:
    return [loader.batch(draw) for draw in loader.epoch(epoch)]


@pytest.mark.parametrize("size", [8, 32])
def test_all_views_equal_torchvision_pad_crop_flip(size):
    images = random_images(2, size)
    windows = view_windows(images)
    for i, image in enumerate(images):
        views = take_views(windows, torch.full((NUM_VIEWS,), i), torch.arange(NUM_VIEWS))
        padded = TF.pad(image, 4)
        for v in range(NUM_VIEWS):
            dy, dx, flip = v // 18, v // 2 % 9, v % 2
            expected = TF.crop(padded, dy, dx, size, size)
            assert torch.equal(views[v], TF.hflip(expected) if flip else expected), v


def test_the_162_views_of_an_image_all_differ():
    views = take_views(
        view_windows(random_images(1)), torch.zeros(NUM_VIEWS, dtype=torch.int64), torch.arange(162)
    )
    assert NUM_VIEWS == 162
    assert len({view.numpy().tobytes() for view in views}) == 162


def test_channels_last_input_gives_the_same_views():
    images, (order, views) = random_images(20), epoch_plan(20, 0, 0)
    plain = take_views(view_windows(images), order, views)
    other = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, take_views(view_windows(other), order, views))


def test_windows_are_views_of_one_padded_copy():
    windows = view_windows(random_images(10))
    assert windows.shape == (10, 9, 9, 32, 96)
    assert windows.untyped_storage().nbytes() == 10 * 40 * 40 * 3


def test_plan_is_frozen():
    # These numbers belong to results that were published: a version that changes them is broken.
    order, views = epoch_plan(8, seed=42, epoch=3)
    assert order.tolist() == [3, 1, 2, 7, 0, 5, 4, 6]
    assert views.tolist() == [96, 115, 136, 99, 76, 21, 68, 10]


def test_plan_is_a_permutation_with_a_view_per_image():
    order, views = epoch_plan(1000, 0, 0)
    assert order.dtype == views.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert views.shape == (1000,) and views.min() >= 0 and views.max() < NUM_VIEWS


def test_plan_depends_on_seed_and_epoch_alone():
    np.random.seed(1)
    torch.manual_seed(1)
    plans = {key: epoch_plan(1000, *key) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    np.random.seed(2)
    torch.manual_seed(2)
    for key, plan in plans.items():
        assert all(torch.equal(a, b) for a, b in zip(plan, epoch_plan(1000, *key), strict=True))
    for which in (0, 1):
        assert len({tuple(plan[which].tolist()) for plan in plans.values()}) == 4


def test_views_are_uniform():
    views = torch.cat([epoch_plan(10_000, 42, epoch)[1] for epoch in range(5)])
    assert stats.chisquare(views.bincount(minlength=NUM_VIEWS)).pvalue > 0.01


@pytest.mark.parametrize("name", sorted(NORMALISATION))
def test_normalise_equals_torchvision(name):
    images, (mean, std) = random_images(16), NORMALISATION[name]
    out = normalise(images, mean, std)
    expected = TF.normalize(images.double() / 255, mean, std)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        out, TF.normalize(images.float() / 255, mean, std), rtol=0, atol=1e-6
    )


def test_normalise_takes_lists_and_tells_statistics_apart():
    images = random_images(2)
    first = normalise(images, [0.5] * 3, [0.5] * 3)
    assert torch.equal(first, normalise(images, (0.5,) * 3, (0.5,) * 3))
    assert not torch.equal(first, normalise(images, [0.4] * 3, [0.5] * 3))


def test_loader_follows_the_plan_and_keeps_the_last_batch():
    split = random_split(50)
    loader = TrainLoader(split, batch_size=16, seed=7, device="cpu")
    made = batches(loader, 2)
    assert len(made) == len(loader) == 4
    assert [len(b.labels) for b in made] == [16, 16, 16, 2]
    assert all(b.weight == 1.0 for b in made)
    order, views = epoch_plan(50, 7, 2)
    plan = torch.cat([draw.plan for draw in loader.epoch(2)], dim=1)
    assert torch.equal(plan, torch.stack([order, views, torch.arange(50)]))
    assert torch.equal(torch.cat([b.labels for b in made]), split.labels[order])
    expected = take_views(view_windows(split.images), order, views)
    assert torch.equal(torch.cat([b.images for b in made]), expected)
    assert torch.equal(torch.cat([b.places for b in made]), torch.arange(50))


def test_epochs_can_be_made_again_in_any_order():
    loader = TrainLoader(random_split(20), 8, 0, "cpu")
    later = [b.images for b in batches(loader, 5)]
    list(loader.epoch(0))
    again = batches(TrainLoader(random_split(20), 8, 0, "cpu"), 5)
    assert all(torch.equal(a, b.images) for a, b in zip(later, again, strict=True))


@pytest.mark.parametrize("n, batch, world", [(64, 8, 2), (50, 8, 2), (50, 7, 3), (49, 8, 4)])
def test_ranks_share_the_batch_of_one_process(n, batch, world):
    split = random_split(n)
    single = TrainLoader(split, batch * world, 3, "cpu")
    ranks = [TrainLoader(split, batch, 3, "cpu", rank, world) for rank in range(world)]
    assert {len(loader) for loader in ranks} == {len(single)}
    steps = zip(*(batches(loader, 1) for loader in (single, *ranks)), strict=True)
    for whole, *pieces in steps:
        kept = [piece for piece in pieces if piece.weight > 0]
        assert torch.equal(torch.cat([piece.places for piece in kept]), whole.places)
        assert torch.equal(torch.cat([piece.images for piece in kept]), whole.images)
        sizes = [len(piece.places) for piece in kept]
        assert max(sizes) - min(sizes) <= 1
        # Any per-image value will do for a loss.
        mean = sum(piece.weight * piece.places.double().mean() for piece in pieces) / world
        torch.testing.assert_close(mean, whole.places.double().mean())


def test_weight_is_one_where_the_images_divide_evenly():
    loader = TrainLoader(random_split(64), 8, 0, "cpu", rank=1, world=2)
    assert [b.weight for b in loader.epoch(0)] == [1.0] * 4
    assert type(next(loader.epoch(0)).weight) is float


def test_a_rank_without_a_share_takes_one_image_with_weight_zero():
    # 33 images, 32 in the first step: one is left for four processes.
    ranks = [TrainLoader(random_split(33), 8, 0, "cpu", rank, 4) for rank in range(4)]
    last = [batches(loader, 0)[-1] for loader in ranks]
    assert sorted(b.weight for b in last) == [0.0, 0.0, 0.0, 4.0]
    assert all(len(b.images) == 1 for b in last)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_same_batches_on_the_gpu():
    split = random_split(50, 32)
    pairs = zip(
        batches(TrainLoader(split, 16, 0, "cpu"), 0),
        batches(TrainLoader(split, 16, 0, "cuda"), 0),
        strict=True,
    )
    for cpu, gpu in pairs:
        assert torch.equal(cpu.images, gpu.images.cpu())
        out = [normalise(b.images, *NORMALISATION["cifar10"]).cpu() for b in (cpu, gpu)]
        torch.testing.assert_close(*out, rtol=0, atol=1e-6)
