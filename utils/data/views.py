"""Order and augmentation of an epoch, made on the device by a handful of tensor operations.

Padding an image by 4 and cropping it back allows 9 x 9 positions, each mirrored or not: 162 views,
numbered v = (9 dy + dx) 2 + flip, where (dy, dx) is the crop's upper left corner in the padded
image; where none may be mirrored, the even ones are drawn. An epoch is thus two vectors of whole
numbers, an order and a view per image, and the same ones give the same data on any device, after a
resume, and on any number of processes.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data import Split
from utils.data.cutout import Cutout, blot_out, centres
from utils.data.mixing import MIXES, Mixing, MixPlan, mix_plan

PADDING = 4
POSITIONS = 2 * PADDING + 1
NUM_VIEWS = 2 * POSITIONS**2


class Draw(NamedTuple):
    """What one process takes in a step; its images are made by `TrainLoader.batch`.

    The mean over processes of `weight` times the mean loss is the mean over the step's images.
    """

    # int64 (3, B): for each image its index in the training split, its view, its place in the epoch
    plan: Tensor
    weight: float = 1.0  # another one only in a last step whose images do not divide evenly
    partner_plan: Tensor | None = None  # int64 (2, B): index and view of what is mixed in
    mixture: Tensor | None = None  # float64 (n,): share or box of the step's mixture
    centres: Tensor | None = None  # int64 (2, B): row and column of each blotted square's centre

    @property
    def index(self) -> Tensor:
        return self.plan[0]

    @property
    def views(self) -> Tensor:
        return self.plan[1]

    @property
    def places(self) -> Tensor:
        return self.plan[2]


class Batch(NamedTuple):
    """One process's share of a step."""

    images: Tensor  # uint8 (B, 3, H, W), augmented; float32 where mixed by mixup
    labels: Tensor  # int64 (B,)
    places: Tensor  # int64 (B,), in the epoch's order
    weight: float
    partners: Tensor | None = None  # int64 (B,), labels of what was mixed in
    share: Tensor | None = None  # float32 (), that of `labels`; 1 - share is the partners'


def view_numbers(flip: bool) -> range:
    """All views that an epoch may draw."""
    return range(0, NUM_VIEWS, 1 if flip else 2)


def epoch_plan(images: int, seed: int, epoch: int, flip: bool) -> Tensor:
    """Order and views of an epoch, int64 (2, N) on the CPU; they depend on the arguments only.

    Column i is the index of an image and the view that is taken of it.
    """
    rng = np.random.default_rng([seed, epoch])
    possible = view_numbers(flip)
    order = rng.permutation(images)
    views = rng.integers(len(possible), size=images) * possible.step
    return torch.from_numpy(np.stack([order, views]))


def view_windows(images: Tensor) -> Tensor:
    """All crops of images uint8 (N, 3, H, W), padded once: (N, 9, 9, H, 3 W), not copied.

    A crop's row, channels innermost, is one piece of memory, and views come out channels last.
    """
    height, width = images.shape[2:]
    pad = (0, 0, PADDING, PADDING, PADDING, PADDING)
    rows = F.pad(images.permute(0, 2, 3, 1), pad).contiguous().flatten(2)
    return rows.unfold(1, height, 1).unfold(2, 3 * width, 3)


def take_views(windows: Tensor, index: Tensor, views: Tensor) -> Tensor:
    """View `views[i]` of image `index[i]`, for every i: uint8 (B, 3, H, W), channels last."""
    position = views // 2
    flip = views % 2 == 1
    crops = windows[index, position // POSITIONS, position % POSITIONS]
    images = crops.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels / 255 - mean) / std of images (B, 3, H, W) of grey levels: float32, channels last."""
    shift, scale = shift_and_scale(tuple(mean), tuple(std), images.device)
    return torch.addcmul(shift, images.to(torch.float32, memory_format=torch.channels_last), scale)


@cache  # a copy to the device in every step would make the host wait
def shift_and_scale(mean: tuple, std: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """-mean / std and 1 / (255 std), float32 (3, 1, 1): what is added and what is multiplied by."""
    mean = torch.tensor(mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(std, dtype=torch.float64)[:, None, None]
    shift = -mean / std
    scale = 1 / (255 * std)
    return shift.float().to(device), scale.float().to(device)


def share_of(size: int, rank: int, world: int) -> tuple[int, int]:
    """What one process of `world` takes of a step of `size` images: from the first to the last."""
    return size * rank // world, size * (rank + 1) // world


class TrainLoader:
    """Augmented batches of a training split that lies, padded, on the device.

    A step takes `batch_size` images per process. With several processes (`rank` of `world`) each
    takes its piece of the batch that a single one would take with `world` times the batch size.
    Images are mixed, or a square of each is blotted out, or neither.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        flip: bool = True,
        mixing: Mixing | None = None,
        cutout: Cutout | None = None,
    ):
        if mixing and cutout:
            raise ValueError("images are mixed or blotted out, not both")
        self.windows = view_windows(split.images.to(device))
        self.labels = split.labels.to(device)
        self.images_per_process = batch_size
        self.images_per_step = batch_size * world
        self.seed = seed
        self.rank = rank
        self.world = world
        self.flip = flip
        self.mixing = mixing
        self.cutout = cutout
        if cutout:
            colour = torch.tensor(cutout.colour, dtype=torch.uint8)
            self.colour = colour[:, None, None].to(device)

    def __len__(self) -> int:
        """The steps of an epoch; the last one may be smaller."""
        return math.ceil(len(self.labels) / self.images_per_step)

    def empty_draw(self) -> Draw:
        """A draw of a whole step, of zeros: the place for those that a captured step reads."""
        size = self.images_per_process
        device = self.labels.device
        draw = Draw(torch.zeros(3, size, dtype=torch.int64, device=device))
        if self.mixing:
            draw = draw._replace(
                partner_plan=torch.zeros(2, size, dtype=torch.int64, device=device),
                mixture=torch.zeros(
                    MIXES[self.mixing.kind].numbers, dtype=torch.float64, device=device
                ),
            )
        if self.cutout:
            draw = draw._replace(centres=torch.zeros(2, size, dtype=torch.int64, device=device))
        return draw

    def mixtures(self, epoch: int, order: Tensor, views: Tensor) -> MixPlan:
        """Partners of the images of an epoch, and what each step's mixture draws."""
        return mix_plan(
            self.mixing,
            order,
            views,
            images_per_step=self.images_per_step,
            side=self.windows.shape[3],
            seed=self.seed,
            epoch=epoch,
        )

    def epoch(self, epoch: int) -> Iterator[Draw]:
        """What this process takes in each step of an epoch, the first of which is 1."""
        images = len(self.labels)
        order, views = epoch_plan(images, self.seed, epoch, self.flip)
        # All of it is brought to the device once: a step then does nothing on the host but slice.
        device = self.labels.device
        plan = torch.stack([order, views, torch.arange(images)]).to(device)
        if self.mixing:
            mixtures = self.mixtures(epoch, order, views)
            partner_plan = mixtures.partner_plan.to(device)
            numbers = mixtures.numbers.to(device)
        if self.cutout:
            all_centres = centres(images, self.windows.shape[3], self.seed, epoch).to(device)

        for step, start in enumerate(range(0, images, self.images_per_step)):
            size = min(self.images_per_step, images - start)
            first, last = share_of(size, self.rank, self.world)
            weight = (last - first) * self.world / size
            # A process without a share still has to take part in the step: with weight 0.
            last = max(last, first + 1)

            places = slice(start + first, start + last)
            draw = Draw(plan[:, places], weight)
            if self.mixing:
                draw = draw._replace(partner_plan=partner_plan[:, places], mixture=numbers[step])
            if self.cutout:
                draw = draw._replace(centres=all_centres[:, places])
            yield draw

    def batch(self, draw: Draw) -> Batch:
        """The images of a draw in their views, mixed with their partners' or blotted out."""
        images = take_views(self.windows, draw.index, draw.views)
        if self.cutout:
            images = blot_out(images, draw.centres, self.cutout.size, self.colour)
        labels = self.labels[draw.index]
        if not self.mixing:
            return Batch(images, labels, draw.places, draw.weight)

        partner_index, partner_views = draw.partner_plan
        partners = take_views(self.windows, partner_index, partner_views)
        mixed, share = MIXES[self.mixing.kind].apply(images, partners, draw.mixture)
        return Batch(
            images=mixed,
            labels=labels,
            places=draw.places,
            weight=draw.weight,
            partners=self.labels[partner_index],
            share=share,
        )
