"""mixup and CutMix: each image of a step is mixed with a partner, drawn as all views are.

Every step is mixed, by one share, Beta(a, a), and in CutMix one box, as in both papers' own code;
but that of CutMix leaves half of the steps of CIFAR as they are (--cutmix_prob 0.5).
The partner is any image of the epoch in its view of that epoch, so mixtures are the same on any
number of processes. The draws have a stream of their own: order and views are as without a mix.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STREAM = 1  # beside that of order and views


class Mix(NamedTuple):
    """How images are mixed: what a step draws, and what is made of it."""

    numbers: int  # that a step draws
    # Shares (steps,), an image's side in pixels, a generator -> float64 (steps, numbers)
    draw: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
    # Images uint8 (B, 3, H, W), their partners, a step's numbers -> mixed images, the first's share
    apply: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Mixing(NamedTuple):
    """What the images of a run are mixed by: a key of MIXES, and the a of Beta(a, a)."""

    kind: str
    alpha: float


class MixPlan(NamedTuple):
    """What an epoch's mixtures are made of, on the CPU."""

    # int64 (2, N): index and view of the partner, for each place of the epoch
    partner_plan: Tensor
    numbers: Tensor  # float64 (steps, numbers): what each step has drawn


def draw_mixup(shares: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """The share alone."""
    return shares[:, None]


def mixup(images: Tensor, partners: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """share * images + (1 - share) * partners: grey levels in float32. Zhang et al., ICLR 2018."""
    share = numbers[0].float()
    # From the partner, `share` of the way to the image.
    return torch.lerp(partners.float(), images.float(), share), share


def draw_cutmix(shares: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Top, bottom, left and right of boxes of 1 - share of the area, cut off at the edge."""
    centre = rng.integers(side, size=(2, len(shares)))
    half = (side * np.sqrt(1 - shares)).astype(np.int64) // 2
    top, left = (centre - half).clip(0, side)
    bottom, right = (centre + half).clip(0, side)
    return np.stack([top, bottom, left, right], axis=1).astype(np.float64)


def cutmix(images: Tensor, partners: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """A box of each image is its partner's; the share is the rest's. Yun et al., ICCV 2019."""
    top, bottom, left, right = numbers
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    inside = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    return torch.where(inside, partners, images), 1 - inside.float().mean()


MIXES = {
    "mixup": Mix(numbers=1, draw=draw_mixup, apply=mixup),
    "cutmix": Mix(numbers=4, draw=draw_cutmix, apply=cutmix),
}


def mix_plan(
    mixing: Mixing,
    order: Tensor,
    views: Tensor,
    images_per_step: int,
    side: int,
    seed: int,
    epoch: int,
) -> MixPlan:
    """The mixtures of an epoch whose places have these images (N,) in these views (N,).

    `images_per_step`: of all processes together; `side`: of an image, in pixels.
    """
    rng = np.random.default_rng([seed, epoch, STREAM])
    partner_places = torch.from_numpy(rng.permutation(len(order)))
    steps = math.ceil(len(order) / images_per_step)
    shares = rng.beta(mixing.alpha, mixing.alpha, steps)
    numbers = MIXES[mixing.kind].draw(shares, side, rng)
    return MixPlan(
        partner_plan=torch.stack([order, views])[:, partner_places],
        numbers=torch.from_numpy(numbers),
    )
