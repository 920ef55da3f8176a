"""Order and augmentation of an epoch, made on the device by a handful of tensor operations.

Padding an image by 4 and cropping it back allows 9 x 9 positions, each mirrored or not: 162 views,
numbered v = (9 dy + dx) 2 + flip, where (dy, dx) is the crop's upper left corner in the padded
image; where none may be mirrored, the even ones are drawn. An epoch is thus two vectors of whole
numbers, an order and a view per image, and the same ones give the same data on any device, after a
resume, and on any number of processes.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from utils.data import Split
from utils.data.mixing import MIXES, mix_plan

PADDING = 4
POSITIONS = 2 * PADDING + 1
NUM_VIEWS = 2 * POSITIONS**2


class Draw(NamedTuple):
    """What one process takes in a step; its images are made by `TrainLoader.batch`.

    The mean over processes of `weight` times the mean loss is the mean over the step's images.
    """

    # int64 (3, B): index into the training split, view, place in the epoch; rows of a mix follow
    plan: torch.Tensor
    weight: float  # 1.0, but in the last step where the images do not divide evenly


class Batch(NamedTuple):
    """One process's share of a step."""

    images: torch.Tensor  # uint8 (B, 3, H, W), augmented; float32 where mixed by mixup
    labels: torch.Tensor  # int64 (B,)
    places: torch.Tensor  # int64 (B,), in the epoch's order
    weight: float
    partners: torch.Tensor | None = None  # int64 (B,), labels of what was mixed in
    share: torch.Tensor | None = None  # float32 (), that of `labels`; 1 - share is the partners'


def view_numbers(flip: bool) -> range:
    """All views that an epoch may draw."""
    return range(0, NUM_VIEWS, 1 if flip else 2)


def epoch_plan(images: int, seed: int, epoch: int, flip: bool) -> torch.Tensor:
    """Order and views of an epoch, int64 (2, N) on the CPU; they depend on the arguments only.

    Column i is the index of an image and the view that is taken of it.
    """
    rng, possible = np.random.default_rng([seed, epoch]), view_numbers(flip)
    order = rng.permutation(images)
    views = rng.integers(len(possible), size=images) * possible.step
    return torch.from_numpy(np.stack([order, views]))


def view_windows(images: torch.Tensor) -> torch.Tensor:
    """All crops of images uint8 (N, 3, H, W), padded once: (N, 9, 9, H, 3 W), not copied.

    A crop's row, channels innermost, is one piece of memory, and views come out channels last.
    """
    height, width = images.shape[2:]
    pad = (0, 0, PADDING, PADDING, PADDING, PADDING)
    rows = F.pad(images.permute(0, 2, 3, 1), pad).contiguous().flatten(2)
    return rows.unfold(1, height, 1).unfold(2, 3 * width, 3)


def take_views(windows: torch.Tensor, index: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """View `views[i]` of image `index[i]`, for every i: uint8 (B, 3, H, W), channels last."""
    position, flip = views // 2, views % 2 == 1
    crops = windows[index, position // POSITIONS, position % POSITIONS]
    images = crops.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def normalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pixels / 255 - mean) / std of images (B, 3, H, W) of grey levels: float32, channels last."""
    shift, scale = shift_and_scale(tuple(mean), tuple(std), images.device)
    return torch.addcmul(shift, images.to(torch.float32, memory_format=torch.channels_last), scale)


@cache  # a copy to the device in every step would make the host wait
def shift_and_scale(mean: tuple, std: tuple, device: torch.device):
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
    return (-mean / std).float().to(device), (1 / (255 * std)).float().to(device)


class TrainLoader:
    """Augmented batches of a training split that lies, padded, on the device.

    A step takes `batch_size` images per process. With several processes each takes its piece of the
    batch that a single one would take with `world` times the batch size. `mix`: a key of MIXES and
    the a of Beta(a, a), or None.
    """

    def __init__(
        self, split: Split, batch_size: int, seed: int, device, rank=0, world=1, flip=True, mix=None
    ):
        self.windows = view_windows(split.images.to(device))
        self.labels = split.labels.to(device)
        self.step = batch_size * world
        self.seed, self.rank, self.world, self.flip, self.mix = seed, rank, world, flip, mix
        self.rows = 5 + MIXES[mix[0]].numbers if mix else 3  # of a draw's plan

    def __len__(self) -> int:
        return -(-len(self.labels) // self.step)

    def epoch(self, epoch: int) -> Iterator[Draw]:
        images, side = len(self.labels), self.windows.shape[3]
        plan = epoch_plan(images, self.seed, epoch, self.flip)
        plan = torch.cat([plan, torch.arange(images)[None]])
        if self.mix:
            plan = torch.cat([plan, mix_plan(*self.mix, plan, self.step, self.seed, epoch, side)])
        plan = plan.to(self.labels.device)  # once: a step then does nothing on the host but slice
        for start in range(0, images, self.step):
            size = min(self.step, images - start)
            first, last = (size * r // self.world for r in (self.rank, self.rank + 1))
            weight = (last - first) * self.world / size
            # A process without a share still has to take part in the step: with weight 0.
            last = max(last, first + 1)
            yield Draw(plan[:, start + first : start + last], weight)

    def batch(self, draw: Draw) -> Batch:
        index, views, places, *mixed = draw.plan
        images = take_views(self.windows, index, views)
        batch = Batch(images, self.labels[index], places, draw.weight)
        if not self.mix:
            return batch
        others = take_views(self.windows, *mixed[:2])
        images, share = MIXES[self.mix[0]].apply(images, others, draw.plan[5:, 0])
        return batch._replace(images=images, partners=self.labels[mixed[0]], share=share)
