"""Bins of confidence, or of a class's probability: what lies in each, and the errors over them.

Bins are (lo, hi], the first closed below and the last above: no sample is dropped. Columns (C, N)
are binned each for itself. They come in rising order, so that a bin is a piece of its column.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS_AT_ONCE = 1 << 20  # numbers, float64


class Binned(NamedTuple):
    """What lies in the bins of columns, float64 (C, bins) each."""

    counts: Tensor
    hits: Tensor  # how many of them are right
    sums: Tensor  # of their values

    def error(self) -> float:
        """The mean over columns of sum n_b/N |accuracy_b - confidence_b|."""
        return (self.hits - self.sums).abs().sum().item() / self.counts.sum().item()


def bin_of(confidence: Tensor, bins: int) -> Tensor:
    """The number of the bin of equal width that each confidence (N,) lies in, int64 (N,)."""
    return torch.bucketize(confidence, inner_edges(bins))


def inner_edges(bins: int) -> Tensor:
    """Of bins of equal width, float64 (bins - 1,)."""
    return torch.arange(1, bins).double() / bins


def equal_width(ordered: Tensor, bins: int) -> Tensor:
    """Inner edges (C, bins - 1) of columns (C, N)."""
    return inner_edges(bins).repeat(len(ordered), 1)


def equal_mass(ordered: Tensor, bins: int) -> Tensor:
    """Inner edges (C, bins - 1) of columns (C, N) in rising order: their quantiles."""
    # Positions in whole numbers: a rounding could put a sample that is an edge on either side.
    last = ordered.shape[1] - 1
    position = torch.arange(1, bins) * last
    below = position // bins
    weight = (position % bins).double() / bins
    return torch.lerp(ordered[:, below], ordered[:, (below + 1).clamp_max(last)], weight)


def binned(ordered: Tensor, edges: Tensor, hit_column: Tensor, hit_value: Tensor) -> Binned:
    """The bins of columns (C, N) in rising order, with inner edges (C, bins - 1).

    Those that are right are named by their column and their value, both (hits,).
    """
    columns, samples = ordered.shape
    bins = edges.shape[1] + 1

    # Where each bin ends in its column. An edge belongs to the bin below it.
    inner = torch.searchsorted(ordered, edges, right=True)
    ends = F.pad(F.pad(inner, (1, 0)), (0, 1), value=samples)

    # The sum of a bin's values is a difference of running sums.
    running = ordered.cumsum(dim=1).gather(1, (ends - 1).clamp_min(0)).where(ends > 0, 0)

    hit_bin = torch.searchsorted(edges[hit_column], hit_value.unsqueeze(1)).squeeze(1)
    hits = torch.bincount(hit_column * bins + hit_bin, minlength=columns * bins)
    return Binned(
        counts=ends.diff().double(),
        hits=hits.view(columns, bins).double(),
        sums=running.diff(),
    )


def bins_of_confidence(
    confidence: Tensor,
    right: Tensor,
    bins: int,
    edges_of: Callable[[Tensor, int], Tensor] = equal_width,
) -> Binned:
    """One column, C = 1, of confidences (N,) in rising order, and whether each is right (N,)."""
    ordered = confidence.unsqueeze(0)
    hits = confidence[right]
    column = torch.zeros_like(hits).long()
    return binned(ordered, edges_of(ordered, bins), column, hits)


def class_errors(
    columns_of: Callable[[int, int], Tensor], classes: int, labels: Tensor, bins: int
) -> tuple[float, float]:
    """SCE and ACE: the means over classes of their errors in bins of equal width and equal mass.

    `columns_of(first, end)` gives the probabilities of these classes, float64 (C, N), which are
    sorted in place. Some classes are taken at a time, for all at once may not fit in memory.
    """
    sce = 0.0
    ace = 0.0
    step = max(1, COLUMNS_AT_ONCE // len(labels))
    for first in range(0, classes, step):
        end = min(first + step, classes)
        probs = columns_of(first, end)

        # The samples whose label is one of these classes are the hits of its column.
        [members] = torch.where((labels >= first) & (labels < end))
        hit_column = labels[members] - first
        hit_value = probs[hit_column, members]

        share = len(probs) / classes
        probs.numpy().sort(axis=1)  # in place
        sce += share * binned(probs, equal_width(probs, bins), hit_column, hit_value).error()
        ace += share * binned(probs, equal_mass(probs, bins), hit_column, hit_value).error()
    return sce, ace
