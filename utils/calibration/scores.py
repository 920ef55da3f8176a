"""What the functions of this folder accept: scores (N, K) and labels (N,), checked.

Arrays or tensors of any device; labels are integers. Scores are read in pieces that a core's cache
holds, each in float64, so no copy of a whole split is made.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor
PIECE = 1 << 16  # numbers


def as_tensor(array: Array) -> Tensor:
    """On the CPU, without its gradient."""
    if isinstance(array, Tensor):
        return array.detach().cpu()
    # A copy: contiguous and writable for torch.
    return torch.from_numpy(np.array(array, order="C"))


def checked_scores(scores: Array) -> Tensor:
    """Scores (N, K) of a floating type on the CPU, or ValueError where they are none or NaN."""
    scores = as_tensor(scores)
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"scores should be (N, K) and not empty, got {tuple(scores.shape)}")
    if scores.amax().isnan():
        raise ValueError("scores hold NaN")
    return scores if scores.is_floating_point() else scores.double()


def checked_pair(scores: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """Scores as they are and labels as int64, both on the CPU, or ValueError."""
    scores = checked_scores(scores)
    labels = as_tensor(labels)
    samples, classes = scores.shape
    if labels.shape != (samples,):
        raise ValueError(f"labels should be ({samples},), got {tuple(labels.shape)}")
    low = labels.min().item()
    high = labels.max().item()
    if labels.is_floating_point() or low < 0 or high >= classes:
        raise ValueError(f"labels should be integers in 0..{classes - 1}, got {low}..{high}")
    return scores, labels.long()


def checked_probs(probs: Array) -> Tensor:
    """Rows (N, K) that are distributions up to rounding, or ValueError."""
    probs = checked_scores(probs)
    row_sums = probs.sum(dim=1, dtype=torch.float64)
    if probs.amin() < 0 or (row_sums - 1).abs().max() > 1e-3:
        raise ValueError("probabilities should lie in 0..1, every row's sum be 1; logits?")
    return probs


def in_pieces(scores: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of float64 scores, and the same rows of the others."""
    rows = max(1, PIECE // scores.shape[1])
    pieces_of_others = [tensor.split(rows) for tensor in others]
    for piece, *parts in zip(scores.split(rows), *pieces_of_others, strict=True):
        yield piece.double(), *parts


def rank_of(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label (n, 1) in scores (n, K): (n,) int64.

    Equal scores rank by class number, so the order of samples does not matter.
    """
    own = scores.gather(1, labels)
    rank = (scores > own).sum(dim=1)

    # Few rows have ties: only these are looked at again.
    [tied] = torch.where((scores >= own).sum(dim=1) > rank + 1)
    earlier = torch.arange(scores.shape[1]) < labels[tied]
    rank[tied] += ((scores[tied] == own[tied]) & earlier).sum(dim=1)
    return rank
