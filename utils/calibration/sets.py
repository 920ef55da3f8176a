"""Conformal sets: not one class, but classes among which the true one is with chance 1 - alpha.

Fitted on the validation split, measured on the test split (split conformal prediction). A method
gives each class of an image a score; the set is made of the classes whose score is at most that of
the ceil((n + 1) (1 - alpha))-th of the n validation labels, in rising order. If validation and test
images come from one source (are exchangeable), the mean coverage over such splits is 1 - alpha or
more, however badly the net is calibrated. This is exact for validation images that had no part in
training; the epoch and the temperature that were chosen on them move it a little.

LAC   1 - p_y. The smallest mean size (Sadinle, Lei and Wasserman, JASA 2019).
APS   sum of the p_k that are larger than p_y, and a random part of p_y (Romano, Sesia and Candes,
      NeurIPS 2020).
RAPS  the same + PENALTY max(0, rank of y - FREE_RANKS), ranks from 1: no long tails (Angelopoulos,
      Bates, Malik and Jordan, ICLR 2021). The paper tunes both numbers on a part of the validation
      split. Here they are fixed, lambda = 0.01 and k_reg = 5, as in the example notebook of its
      authors: no image is spent on them, and runs stay comparable. Up to 5 classes it is APS.

The random part is one number per image, a hash of its logits. So the same logits give the same
sets, wherever the image stands, and over splits it averages out as fresh random numbers do.
`randomised=False` takes all of p_y instead: sets are larger on average. Classes rank by logit,
equal ones by number.

A set can be empty, by any method: no class is likely enough. The papers' sets are so, and
`set_empty` is their share. `never_empty=True` puts the predicted class in, which can only add
coverage. A set that is not empty always holds the predicted class.

Temperature scaling with T > 1 makes the sets of APS and RAPS of usual nets larger (Dabah and Tirer,
"On temperature scaling and conformal prediction of deep classifiers", ICML 2025). A ResNet-20 on
CIFAR-100, T = 1.44: APS from 4.4 to 5.5 classes, RAPS from 3.5 to 4.4, LAC from 3.1 to 3.0.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .scores import Array, as_tensor, checked_pair, checked_scores, in_pieces, rank_of

ALPHA = 0.1
PENALTY = 0.01  # lambda of RAPS
FREE_RANKS = 5  # k_reg of RAPS
STRATA = (2, 4, 11, 101)  # sizes 0-1, 2-3, 4-10, 11-100, 101 and more: as in the RAPS paper


# Scores are kept as conformity, 1 - score: a confident net's scores are so near to 1 that their
# order would be lost in rounding. Probabilities (n, K) of an image are in rising order, and so is
# the conformity. `left_out` (n, 1) is the part of a class's own probability that does not count.


def lac(probs: Tensor, left_out: Tensor) -> Tensor:
    """A class's own probability. Sadinle et al., JASA 2019."""
    return probs


def aps(probs: Tensor, left_out: Tensor) -> Tensor:
    """The mass of all less likely classes and `left_out` of its own. Romano et al., 2020."""
    less_likely = F.pad(probs.cumsum(dim=1)[:, :-1], (1, 0))
    return less_likely + left_out * probs


def raps(probs: Tensor, left_out: Tensor) -> Tensor:
    """APS less PENALTY for each rank beyond FREE_RANKS. Angelopoulos et al., ICLR 2021."""
    ranks = torch.arange(probs.shape[1], 0, -1)
    return aps(probs, left_out) - PENALTY * (ranks - FREE_RANKS).clamp_min(0)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"LAC": lac, "APS": aps, "RAPS": raps}
PREFIX = {"LAC": "", "APS": "aps_", "RAPS": "raps_"}  # of the names of their metrics


@dataclass(frozen=True)
class ConformalSets:
    """Fitted sets: a class is in if its conformity is at least `threshold`; LAC's is p_k."""

    method: str
    threshold: float
    temperature: float = 1.0
    randomised: bool = True

    def __call__(self, logits: Array, never_empty: bool = False) -> Tensor:
        """The sets of images with logits (N, K): bool (N, K). ValueError as `fit_sets`."""
        logits = checked_scores(logits)
        members = torch.zeros(logits.shape, dtype=torch.bool)
        for z, member in in_pieces(logits, members):
            left_out = _left_out(z, self.randomised)
            conformity = METHODS[self.method](_rising_probs(z, self.temperature), left_out)
            inside = (conformity >= self.threshold).flip(1)
            inside[:, 0] |= never_empty
            order = z.argsort(dim=1, descending=True, stable=True)
            member.scatter_(1, order, inside)
        return members


def fit_sets(
    logits: Array,
    labels: Array,
    method: str = "LAC",
    alpha: float = ALPHA,
    temperature: float = 1.0,
    randomised: bool = True,
) -> ConformalSets:
    """Sets at level 1 - alpha from validation logits (N, K), divided by T, and labels (N,).

    Raises ValueError as the metrics do, where alpha is not between 0 and 1, where T is not positive
    or where N < 1/alpha - 1, for then every set would have to hold every class.
    """
    conformity = _of_labels(logits, labels, temperature, randomised, methods=(method,))
    threshold = conformal_threshold(conformity[method], alpha)
    return ConformalSets(method, threshold, temperature, randomised)


def set_metrics(
    val_logits: Array,
    val_labels: Array,
    test_logits: Array,
    test_labels: Array,
    temperature: float = 1.0,
    alpha: float = ALPHA,
    randomised: bool = True,
) -> dict[str, float]:
    """What the sets of all methods are worth: fitted on validation, measured on test.

    The keys, without a prefix for LAC, with aps_ and raps_ for the others (shares are fractions):
    coverage: share of sets that hold the label. set_size: mean number of classes.
    set_size_matched: the same with the threshold at which 1 - alpha of the test sets hold their
    label. It has seen these labels, and so is no result of the net; but a net that covers less than
    another has smaller sets by that alone, and here all nets cover the same.
    set_singletons, set_empty: shares of sets with one class and with none.
    set_worst_class_coverage: the least coverage of the images of a class, over classes with images.
    set_stratified_violation: the largest |coverage - (1 - alpha)| over sets of about the same size,
    sizes 0-1, 2-3, 4-10, 11-100, 101 and more (SSCV of Angelopoulos et al., ICLR 2021);
    set_smallest_stratum: sets in the smallest of these that is not empty. With few, the violation
    means nothing.
    Raises ValueError as `fit_sets`, and where the splits do not have the same number of classes.
    """
    if val_logits.shape[1:] != test_logits.shape[1:]:
        raise ValueError(
            f"validation logits {tuple(val_logits.shape)} and test logits "
            f"{tuple(test_logits.shape)} should have the same number of classes"
        )
    conformity = _of_labels(val_logits, val_labels, temperature, randomised)
    thresholds = {
        method: conformal_threshold(values, alpha) for method, values in conformity.items()
    }
    sizes, covered = _measured(test_logits, test_labels, temperature, randomised, thresholds)
    matched_sizes = _matched_sizes(test_logits, test_labels, temperature, alpha, randomised)
    labels = as_tensor(test_labels).long()
    metrics = {}
    for method in METHODS:
        worth = _worth(sizes[method], covered[method], labels, alpha)
        worth["set_size_matched"] = matched_sizes[method]
        for name, value in worth.items():
            metrics[PREFIX[method] + name] = value
    return metrics


def conformal_threshold(conformity: Tensor, alpha: float) -> float:
    """The ceil((n + 1) (1 - alpha))-th largest of the conformities (n,) of validation labels."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha should lie between 0 and 1, got {alpha}")
    samples = len(conformity)
    # Rounded first: (n + 1) (1 - alpha) may lie a rounding above the whole number that it is.
    rank = math.ceil(round((samples + 1) * (1 - alpha), 9))
    if rank > samples:
        needed = math.ceil(round(1 / alpha - 1, 9))
        raise ValueError(
            f"sets at level {1 - alpha:g} need {needed} validation samples or more, got {samples}: "
            "with fewer, each set would hold every class; take a lower level"
        )
    return conformity.sort(descending=True).values[rank - 1].item()


def _matched_sizes(
    logits: Array, labels: Array, temperature: float, alpha: float, randomised: bool
) -> dict[str, float]:
    """By method, the mean size of sets of which a share of 1 - alpha, or just above, holds these
    labels."""
    thresholds = {}
    for method, values in _of_labels(logits, labels, temperature, randomised).items():
        # Of these labels themselves; that of `conformal_threshold` is for new ones.
        rank = math.ceil(round(len(values) * (1 - alpha), 9))
        thresholds[method] = values.sort(descending=True).values[rank - 1].item()
    sizes, _ = _measured(logits, labels, temperature, randomised, thresholds)
    return {method: values.double().mean().item() for method, values in sizes.items()}


def _worth(sizes: Tensor, covered: Tensor, labels: Tensor, alpha: float) -> dict[str, float]:
    """The metrics of sets: their sizes (N,), whether each holds its label (N,), the labels (N,)."""
    classes, _ = _mean_by(labels, covered)
    stratum = torch.bucketize(sizes, torch.tensor(STRATA), right=True)
    strata, counts = _mean_by(stratum, covered)
    return {
        "coverage": covered.double().mean().item(),
        "set_size": sizes.double().mean().item(),
        "set_singletons": (sizes == 1).double().mean().item(),
        "set_empty": (sizes == 0).double().mean().item(),
        "set_worst_class_coverage": classes.min().item(),
        "set_stratified_violation": (strata - (1 - alpha)).abs().max().item(),
        "set_smallest_stratum": float(counts.min().item()),
    }


def _mean_by(group: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage and number of the images of each group (N,) that has any."""
    counts = torch.bincount(group)
    hits = torch.bincount(group, weights=covered.double())
    full = counts > 0
    return hits[full] / counts[full], counts[full]


def _of_labels(
    logits: Array,
    labels: Array,
    temperature: float,
    randomised: bool,
    methods: Iterable[str] = METHODS,
) -> dict[str, Tensor]:
    """By method, the conformity (N,) of the validation labels."""
    logits, labels = checked_pair(logits, labels)
    pieces = {method: [] for method in methods}
    for probs, left_out, place in _pieces(logits, labels, temperature, randomised):
        for method, of_method in pieces.items():
            conformity = METHODS[method](probs, left_out)
            of_method.append(conformity.gather(1, place).squeeze(1))
    return {method: torch.cat(of_method) for method, of_method in pieces.items()}


def _measured(
    logits: Array, labels: Array, temperature: float, randomised: bool, thresholds: dict[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By method, the sizes (N,) of the sets, and whether they hold the label (N,)."""
    logits, labels = checked_pair(logits, labels)
    sizes = {method: [] for method in thresholds}
    covered = {method: [] for method in thresholds}
    for probs, left_out, place in _pieces(logits, labels, temperature, randomised):
        for method, threshold in thresholds.items():
            inside = METHODS[method](probs, left_out) >= threshold
            sizes[method].append(inside.sum(dim=1))
            covered[method].append(inside.gather(1, place).squeeze(1))
    return (
        {method: torch.cat(pieces) for method, pieces in sizes.items()},
        {method: torch.cat(pieces) for method, pieces in covered.items()},
    )


def _pieces(
    logits: Tensor, labels: Tensor, temperature: float, randomised: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Piece by piece: probabilities (n, K) in rising order, what is left out, and the place of the
    label in that order (n, 1)."""
    for z, y in in_pieces(logits, labels.unsqueeze(1)):
        place = z.shape[1] - 1 - rank_of(z, y)
        yield _rising_probs(z, temperature), _left_out(z, randomised), place.unsqueeze(1)


def _rising_probs(logits: Tensor, temperature: float) -> Tensor:
    """softmax(z / T) of float64 logits (n, K), each row in rising order."""
    if not temperature > 0:
        raise ValueError(f"the temperature should be positive, got {temperature}")
    probs = logits / temperature
    probs.numpy().sort(axis=1)  # in place
    probs.sub_(probs[:, -1:].clone()).exp_()
    probs.div_(probs.sum(dim=1, keepdim=True))
    if probs[:, -1].isnan().any():
        raise ValueError("the softmax of the logits is NaN: they hold infinite values")
    return probs


def _left_out(logits: Tensor, randomised: bool) -> Tensor:
    """The part of a class's own probability that does not count, in [0, 1), of each image: (n, 1).

    Of float64 logits (n, K).
    """
    if not randomised:
        return torch.zeros(len(logits), 1, dtype=torch.float64)
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=6).digest() for row in logits.numpy()]
    numbers = [int.from_bytes(digest) / 2**48 for digest in hashes]
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)
