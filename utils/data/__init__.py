"""Every data set as tensors in memory: where it comes from, how it is split, its statistics.

A data set is read as four arrays x_train, y_train, x_test, y_test, from torchvision, from an .npz
file, or made on the spot (`synthetic`). A tenth of the training images becomes the validation
split. Images stay uint8: augmentation and normalisation happen on the device (utils/data/views.py).
"""

import difflib
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from utils.data.npz import ARRAYS, Arrays, count_classes, read_npz
from utils.data.synthetic import make_synthetic
from utils.files import one_line, unmade_on_failure
from utils.program import UserError

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


def normalisation(text: str) -> tuple[Statistics, Statistics]:
    """(mean, std) of a name in NORMALISATION or of six numbers, "0.5,0.5,0.5/0.2,0.2,0.2".

    Raises ValueError, in one line, for any other text.
    """
    if text in NORMALISATION:
        return NORMALISATION[text]
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
        if len(mean) == len(std) == 3 and all(0 <= x <= 1 for x in mean + std) and all(std):
            return mean, std
    except ValueError:
        pass
    raise ValueError(
        f"{text[:80]!r} will not do; give one of {', '.join(NORMALISATION)}, or mean and std of "
        "pixels / 255 (from 0 to 1) as six numbers, such as 0.49,0.48,0.45/0.25,0.24,0.26"
    )


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, 3, H, W), labels int64 (N,), and where it is known the true posterior."""

    images: torch.Tensor
    labels: torch.Tensor
    posterior: torch.Tensor | None = None  # float64 (N, K)


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


def load_dataset(
    name: str, data_dir: str | Path, split_seed: int = 0, download: bool = True
) -> Dataset:
    """Load `cifar10`, `cifar100`, `synthetic` or the .npz file that `name` is the path of.

    A file `<name>.npz` in `data_dir` goes before torchvision's copy and its download.
    Raises UserError, in one line, for everything that can be wrong with a name or a file.
    """
    if name in SOURCES:
        arrays = SOURCES[name](Path(data_dir), download)
    else:
        arrays = read_npz(existing_file(name), f"--dataset {name}")
    train, val = (
        take(arrays, "train", i) for i in split_indices(len(arrays["y_train"]), split_seed)
    )
    test = take(arrays, "test", np.arange(len(arrays["y_test"])))
    mean, std = NORMALISATION[name] if name in NORMALISATION else pixel_statistics(train.images)
    return Dataset(
        name=dataset_label(name),
        num_classes=count_classes(arrays),
        train=train,
        val=val,
        test=test,
        mean=mean,
        std=std,
        fingerprint=fingerprint(arrays),
        split_seed=split_seed,
    )


def dataset_label(name: str) -> str:
    """The name as a part of a path: a known name itself, for an .npz file its safe stem."""
    if name in SOURCES:
        return name
    return re.sub(r"[^A-Za-z0-9+=.,_-]", "_", Path(name).stem).lstrip(".-")[:80] or "data"


def split_indices(n: int, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and of the validation split: a tenth of `n`, at least one.

    They depend on nothing else, so a student validates on images that its teacher never saw.
    """
    order = np.random.default_rng(split_seed).permutation(n)
    size = max(1, n // 10)
    return np.sort(order[size:]), np.sort(order[:size])


def take(arrays: Arrays, part: str, index: np.ndarray) -> Split:
    # Pixels keep their channels last in memory, as they came and as convolutions like them; the
    # tensor's dimensions are nevertheless (N, 3, H, W).
    posterior = arrays.get(f"posterior_{part}")
    return Split(
        images=torch.from_numpy(arrays[f"x_{part}"][index]).permute(0, 3, 1, 2),
        labels=torch.from_numpy(arrays[f"y_{part}"][index]),
        posterior=None if posterior is None else torch.from_numpy(posterior[index]),
    )


def pixel_statistics(images: torch.Tensor) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of pixels / 255 per channel, from counts of grey levels."""
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)])
    share = counts.double() / counts.sum(1, keepdim=True)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ level
    variance = (share * (level - mean[:, None]) ** 2).sum(1)
    # A channel that never varies must not divide by zero.
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp_min(1 / 255).tolist())


def fingerprint(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for key in ARRAYS:
        digest.update(f"{key} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key]))
    return digest.hexdigest()


# CIFAR


def load_cifar(name: str, num_classes: int, data_dir: Path, download: bool) -> Arrays:
    file = data_dir / f"{name}.npz"
    where = f"--data_dir {data_dir}, file {file.name}"
    found = os.path.exists(file)
    arrays = read_npz(file, where) if found else from_torchvision(name, data_dir, download)
    if count_classes(arrays) != num_classes:
        raise UserError(
            f"{where}: its labels make {count_classes(arrays)} classes, {name} has {num_classes}; "
            f"give other data by its path, --dataset {file}"
        )
    return arrays


def from_torchvision(name: str, data_dir: Path, download: bool) -> Arrays:
    # Imported late: it takes a second that runs on other data need not spend.
    from torchvision import datasets

    source = getattr(datasets, name.upper())
    try:
        with unmade_on_failure(data_dir):
            train, test = (
                source(data_dir, train=part, download=download) for part in (True, False)
            )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--dataset {name}: not found in --data_dir {data_dir} and not downloaded "
            f"({one_line(error)}); put {data_dir / name}.npz (x_train, y_train, x_test, y_test) "
            f"or torchvision's folder {data_dir / source.base_folder} there"
        ) from error
    return {
        "x_train": train.data,
        "y_train": np.array(train.targets),
        "x_test": test.data,
        "y_test": np.array(test.targets),
    }


# .npz files: a stranger's, so the headers are checked before anything is unpacked


def existing_file(name: str) -> Path:
    # os.path and not Path's methods: those raise for a name that is too long, or a user unknown.
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return Path(path)
    if name.endswith(".npz"):
        raise UserError(f"--dataset {name}: there is no such file; check the path")
    close = difflib.get_close_matches(name.lower(), SOURCES, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"--dataset {name}: {hint}It is one of {', '.join(SOURCES)}, or the path of an .npz file"
    )


# synthetic


SOURCES: dict[str, Callable[[Path, bool], Arrays]] = {
    "cifar10": partial(load_cifar, "cifar10", 10),
    "cifar100": partial(load_cifar, "cifar100", 100),
    "synthetic": make_synthetic,
}
