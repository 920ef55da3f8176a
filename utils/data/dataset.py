"""A data set as training sees it: three splits, their statistics, their normalisation."""

from contextlib import suppress
from dataclasses import dataclass

import torch

Statistics = tuple[float, float, float]

# Mean and standard deviation of pixels / 255, per channel. A teacher is fed with the ones it was
# trained with, whatever the data set: hence those that are common in third parties' files. The std
# of `cifar10_old` is the mean over images of an image's own std.
NORMALISATION: dict[str, tuple[Statistics, Statistics]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10_old": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, 3, H, W), labels int64 (N,), and where it is known the true posterior.

    `rows`: the images' places among all training images of the data set, int64 (N,), where the
    training and the validation split are drawn from these.
    """

    images: torch.Tensor
    labels: torch.Tensor
    posterior: torch.Tensor | None = None  # float64 (N, K)
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set in three splits. `mean` and `std` are of pixels / 255, per channel."""

    name: str
    num_classes: int
    train: Split
    val: Split
    test: Split
    mean: Statistics
    std: Statistics
    fingerprint: str  # sha256 of all images and labels, the same for every split seed
    split_seed: int = 0
    flip: bool = True  # whether mirrored views are drawn
    class_names: tuple[str, ...] | None = None  # in the order of the labels, where they are known

    @property
    def side(self) -> int:
        """The side of an image in pixels: all are squares of one size."""
        return self.train.images.shape[2]


def normalisation(text: str) -> tuple[Statistics, Statistics]:
    """(mean, std) of a name in NORMALISATION or of six numbers, "0.5,0.5,0.5/0.2,0.2,0.2".

    Raises ValueError, in one line, for any other text.
    """
    if text in NORMALISATION:
        return NORMALISATION[text]
    with suppress(ValueError):  # a part that is no number, or not two parts
        mean_text, std_text = text.split("/")
        mean = tuple(map(float, mean_text.split(",")))
        std = tuple(map(float, std_text.split(",")))
        are_three = len(mean) == len(std) == 3
        are_shares = all(0 <= value <= 1 for value in mean + std)
        if are_three and are_shares and all(std):
            return mean, std
    raise ValueError(
        f"{text[:80]!r}: give one of {', '.join(NORMALISATION)}, or mean and std of pixels / 255 "
        "as six numbers, such as 0.49,0.48,0.45/0.25,0.24,0.26"
    )


def pixel_statistics(images: torch.Tensor) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of pixels / 255 per channel, of images uint8 (N, 3, H, W)."""
    # From counts of grey levels: a float64 copy of the images would be eight times as large.
    counts = torch.stack(
        [images[:, channel].flatten().bincount(minlength=256) for channel in range(3)]
    )
    share = counts.double() / counts.sum(1, keepdim=True)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ level
    variance = (share * (level - mean[:, None]) ** 2).sum(1)
    # A channel that never varies must not divide by zero.
    std = variance.sqrt().clamp_min(1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
