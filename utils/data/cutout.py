"""Cutout: a square of every training image is blotted out. DeVries and Taylor, arXiv 1708.04552.

As in the paper's own code, the square's centre is any pixel and the square is cut off at the edge.
(Of an odd size that code blots out a pixel less a side.)
The draws have a stream of their own: order and views are as without it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STREAM = 2  # beside those of order and views, and of mixtures


class Cutout(NamedTuple):
    """A square's side in pixels, and what it is filled with: grey levels of the three channels."""

    size: int
    colour: tuple[int, int, int]


def centres(images: int, side: int, seed: int, epoch: int) -> Tensor:
    """Rows and columns of the squares in an epoch's images, in their order: int64 (2, N)."""
    rng = np.random.default_rng([seed, epoch, STREAM])
    return torch.from_numpy(rng.integers(side, size=(2, images)))


def blot_out(images: Tensor, centres: Tensor, size: int, colour: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W) with a square of `colour` (3, 1, 1) around centres (2, B)."""
    height, width = images.shape[2:]
    top, left = (centres - size // 2).unsqueeze(2)  # (B, 1) each
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    rows = (y >= top) & (y < top + size)
    columns = (x >= left) & (x < left + size)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, colour, images)
