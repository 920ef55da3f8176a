"""Every data set as tensors in memory: where it comes from, how it is split, its statistics.

A data set is read as four arrays x_train, y_train, x_test, y_test, from torchvision, from an .npz
file, from a folder of images, or made on the spot (`synthetic`). A tenth of the training images
becomes the validation split. Images stay uint8: augmentation and normalisation happen on the device
(utils/data/views.py).
"""

import difflib
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.data.images import read_folder
from utils.data.npz import ARRAYS, Arrays, checked, count_classes, read_npz
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
    flip: bool = True  # whether mirrored views are drawn


class Source(NamedTuple):
    """A data set that torchvision reads; keywords of its class make each part."""

    reader: str
    classes: int
    labels: str  # attribute of the class that holds them
    train: list[dict]
    test: dict
    files: str  # where it looks for them in --data_dir
    flip: bool = True


CIFAR = {"train": [{"train": True}], "test": {"train": False}, "labels": "targets"}
SVHN = {"test": {"split": "test"}, "labels": "labels", "files": "*_32x32.mat", "flip": False}
SOURCES = {
    "cifar10": Source("CIFAR10", 10, files="cifar-10-batches-py", **CIFAR),
    "cifar100": Source("CIFAR100", 100, files="cifar-100-python", **CIFAR),
    "svhn": Source("SVHN", 10, train=[{"split": "train"}], **SVHN),
    "svhn_extra": Source("SVHN", 10, train=[{"split": "train"}, {"split": "extra"}], **SVHN),
}
TINY_IMAGENET = "tiny-imagenet-200"
NAMES = (*SOURCES, "tiny_imagenet", "synthetic")


def load_dataset(
    name: str,
    data_dir: str | Path,
    split_seed: int = 0,
    download: bool = True,
    flip: bool | None = None,
    image_size: int | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Load one of NAMES, or the .npz file or the folder of images that `name` is the path of.

    A file `<name>.npz` in `data_dir` goes before torchvision's copy and its download. Of several
    processes one may `download`, and reports. `flip`: whether mirrored views are drawn, by default
    unless the images are digits. `image_size` and `skip_unreadable` are for folders of images.
    Raises UserError, in one line, for everything that can be wrong with a name or a file.
    """
    arrays = read_arrays(name, Path(data_dir), download, image_size, skip_unreadable)
    train, val = (
        take(arrays, "train", i) for i in split_indices(len(arrays["y_train"]), split_seed)
    )
    test = take(arrays, "test", slice(None))
    mean, std = NORMALISATION[name] if name in NORMALISATION else pixel_statistics(train.images)
    classes = count_classes(arrays)
    unseen = classes - len(train.labels.unique())
    if unseen and download:
        print(
            f"--split-seed {split_seed}: {unseen} of {classes} classes have all their training "
            "images in the validation split",
            file=sys.stderr,
        )
    return Dataset(
        name=dataset_label(name),
        num_classes=classes,
        train=train,
        val=val,
        test=test,
        mean=mean,
        std=std,
        fingerprint=fingerprint(arrays),
        split_seed=split_seed,
        flip=(name not in SOURCES or SOURCES[name].flip) if flip is None else flip,
    )


def read_arrays(
    name: str, data_dir: Path, download: bool, image_size: int | None, skip_unreadable: bool
) -> Arrays:
    path, where = locate(name, data_dir)
    if path is not None and path.is_dir():
        return read_folder(path, data_dir, where, image_size, skip_unreadable)
    if image_size or skip_unreadable:
        flag = "--image_size" if image_size else "--skip_unreadable"
        raise UserError(f"{flag}: has an effect on a folder of images only; leave it out")
    if name == "synthetic":
        return make_synthetic()
    arrays = read_npz(path, where) if path else from_torchvision(name, data_dir, download)
    if name in SOURCES and count_classes(arrays) != SOURCES[name].classes:
        raise UserError(
            f"{where}: its labels make {count_classes(arrays)} classes, {name} has "
            f"{SOURCES[name].classes}; give other data by its path, --dataset {path}"
        )
    return arrays


def locate(name: str, data_dir: Path) -> tuple[Path | None, str]:
    """The file or folder that holds a data set, and how messages name it.

    None for one that torchvision reads or that is made.
    """
    where, stored = f"--dataset {name}", data_dir / f"{name}.npz"
    if name not in NAMES:
        return existing(name), where
    # os.path and not Path's methods: those raise for a name that is too long.
    if name != "synthetic" and os.path.exists(stored):
        return stored, f"--data_dir {data_dir}, file {stored.name}"
    if name != "tiny_imagenet":
        return None, where
    folder = data_dir / TINY_IMAGENET
    if not os.path.isdir(folder):
        raise UserError(
            f"{where}: neither {stored.name} nor the folder {folder.name} is in --data_dir "
            f"{data_dir}; unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there"
        )
    return folder, where


def existing(name: str) -> Path:
    if os.path.isfile(name) or os.path.isdir(name):
        return Path(name)
    if name.endswith(".npz"):
        raise UserError(f"--dataset {name}: there is no such file; check the path")
    close = difflib.get_close_matches(name.lower(), NAMES, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"--dataset {name}: {hint}It is one of {', '.join(NAMES)}, or the path of an .npz file or "
        "of a folder of images"
    )


def from_torchvision(name: str, data_dir: Path, download: bool) -> Arrays:
    # Imported late: it takes a second that runs on other data need not spend.
    from torchvision import datasets

    source = SOURCES[name]
    reader = getattr(datasets, source.reader)
    try:
        with unmade_on_failure(data_dir):
            *train, test = (
                reader(data_dir, **part, download=download) for part in (*source.train, source.test)
            )
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(
            f"--dataset {name}: not found in --data_dir {data_dir} and not downloaded "
            f"({one_line(error)}); put {data_dir / name}.npz (x_train, y_train, x_test, y_test) "
            f"or torchvision's {data_dir / source.files} there"
        ) from error
    arrays = {
        "x_train": np.concatenate([part.data for part in train]),
        "y_train": np.concatenate([getattr(part, source.labels) for part in train]),
        "x_test": test.data,
        "y_test": np.array(getattr(test, source.labels)),
    }
    return checked(arrays, f"--dataset {name}")


def dataset_label(name: str) -> str:
    """The name as a part of a path: a known name itself, of a file or folder its safe name."""
    if name not in NAMES:
        name = os.path.basename(os.path.abspath(name)).removesuffix(".npz")
    return re.sub(r"[^A-Za-z0-9+=.,_-]", "_", name).lstrip(".-")[:80] or "data"


def split_indices(n: int, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and of the validation split: a tenth of `n`, at least one.

    They depend on nothing else, so a student validates on images that its teacher never saw.
    """
    order = np.random.default_rng(split_seed).permutation(n)
    size = max(1, n // 10)
    return np.sort(order[size:]), np.sort(order[:size])


def take(arrays: Arrays, part: str, index) -> Split:
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
