"""mixup and CutMix: each image of a step is mixed with a partner, drawn as all views are.

As in both papers' own code, every step is mixed, by one share, Beta(a, a), and in CutMix one box.
The partner is any image of the epoch in its view of that epoch, so mixtures are the same on any
number of processes. The draws have a stream of their own: order and views are as without a mix.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STREAM = 1  # beside that of order and views


def mixup(images: Tensor, others: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """share * images + (1 - share) * others: grey levels in float32. Zhang et al., ICLR 2018."""
    share = drawn[0].view(torch.float64).float()
    return torch.lerp(others.float(), images.float(), share), share


def boxes(shares: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Top, bottom, left and right of boxes of 1 - share of the area, cut off at the edge."""
    centre = rng.integers(side, size=(2, len(shares)))
    half = (side * np.sqrt(1 - shares)).astype(np.int64) // 2
    (top, left), (bottom, right) = ((centre + sign * half).clip(0, side) for sign in (-1, 1))
    return np.stack([top, bottom, left, right])


def cutmix(images: Tensor, others: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """A box of each image is its partner's; the share is the rest's. Yun et al., ICCV 2019."""
    top, bottom, left, right = drawn
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    return torch.where(inside, others, images), 1 - inside.float().mean()


class Mix(NamedTuple):
    numbers: int  # whole ones, that a step draws
    draw: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
    # Images uint8 (B, 3, H, W), their partners, the numbers: mixed images, share of the first
    apply: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


MIXES = {
    # The bits of float64, for a plan holds whole numbers.
    "mixup": Mix(1, lambda shares, *_: shares[None].view(np.int64), mixup),
    "cutmix": Mix(4, boxes, cutmix),
}


def mix_plan(
    kind: str, alpha: float, plan: Tensor, step: int, seed: int, epoch: int, side: int
) -> Tensor:
    """What `plan` (2, N), order and views of an epoch, needs besides: int64 (rows, N) on the CPU.

    For each place its partner's index and view, then the numbers that its step drew. `step`: images
    of a step, of all processes together; `side`: of an image, in pixels.
    """
    rng, images = np.random.default_rng([seed, epoch, STREAM]), plan.shape[1]
    partners = plan[:2, torch.from_numpy(rng.permutation(images))]
    shares = rng.beta(alpha, alpha, -(-images // step))
    drawn = torch.from_numpy(MIXES[kind].draw(shares, side, rng))
    return torch.cat([partners, drawn.repeat_interleave(step, dim=1)[:, :images]])


def mixed_loss(loss: Callable[[Tensor], Tensor], batch) -> Tensor:
    """share * loss(labels) + (1 - share) * loss(partners); loss(labels) where nothing is mixed.

    `loss` may be whatever is measured of labels: `utils.steps` has the share of right predictions.
    """
    if batch.partners is None:
        return loss(batch.labels)
    return batch.share * loss(batch.labels) + (1 - batch.share) * loss(batch.partners)
