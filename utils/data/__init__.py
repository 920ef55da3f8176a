"""Every data set as tensors in memory: where it comes from, how it is split, its statistics.

A data set is four arrays x_train, y_train, x_test, y_test, from torchvision, an .npz file, a folder
of images, or made on the spot (`synthetic`). It may bring x_val and y_val, which then validate.
Else a tenth of the training images does, by --split-seed alone, so that a student validates on
images that its teacher never saw. Images stay uint8: augmentation and normalisation happen on the
device (utils/data/views.py).
"""

import difflib
import hashlib
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.data.images import read_folder
from utils.data.npz import ARRAYS, OWN_VALIDATION, Arrays, checked, has_validation, read_npz
from utils.data.synthetic import make_synthetic
from utils.files import refused, unmade_on_failure
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
    with suppress(ValueError):
        mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
        if len(mean) == len(std) == 3 and all(0 <= x <= 1 for x in mean + std) and all(std):
            return mean, std
    numbers = "mean and std of pixels / 255 as six numbers, such as 0.49,0.48,0.45/0.25,0.24,0.26"
    raise ValueError(f"{text[:80]!r}: give one of {', '.join(NORMALISATION)}, or {numbers}")


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
    """A data set that torchvision reads."""

    reader: str
    files: str  # where it looks for them in --data_dir
    labels: str  # attribute of the reader that holds them
    keyword: str  # of the reader, with a value for each part of the training split, then the test's
    parts: tuple


CIFAR, SVHN = ("targets", "train", (True, False)), ("SVHN", "*_32x32.mat", "labels", "split")
SOURCES = {
    "cifar10": Source("CIFAR10", "cifar-10-batches-py", *CIFAR),
    "cifar100": Source("CIFAR100", "cifar-100-python", *CIFAR),
    "svhn": Source(*SVHN, ("train", "test")),
    "svhn_extra": Source(*SVHN, ("train", "extra", "test")),
}
DIGITS = {"svhn", "svhn_extra"}
NAMES = (*SOURCES, "tiny_imagenet", "synthetic")


def load_dataset(
    name, data_dir, split_seed=0, download=True, flip=None, image_size=None, skip_unreadable=False
) -> Dataset:
    """Load one of NAMES, or the .npz file or the folder of images that `name` is the path of.

    A file `<name>.npz` in `data_dir` goes before torchvision's copy and its download. Of several
    processes one may `download`, and reports. `flip`: whether mirrored views are drawn, by default
    unless the images are digits. `image_size` and `skip_unreadable` are for folders of images.
    Raises UserError, in one line, for everything that can be wrong with a name or a file.
    """
    arrays = read_arrays(name, Path(data_dir), download, image_size, skip_unreadable)
    train, val, test = splits_of(arrays, split_seed, name)
    if download:
        seed = "" if has_validation(arrays) else f", --split-seed {split_seed}"
        say_absent_classes(train, val, f"--dataset {name}{seed}")
    has_constants = name in NAMES and name in NORMALISATION
    mean, std = NORMALISATION[name] if has_constants else pixel_statistics(train.images)
    return Dataset(
        name=dataset_label(name),
        num_classes=int(arrays["y_train"].max()) + 1,
        train=train,
        val=val,
        test=test,
        mean=mean,
        std=std,
        fingerprint=fingerprint(arrays),
        split_seed=split_seed,
        flip=name not in DIGITS if flip is None else flip,
    )


def splits_of(arrays: Arrays, split_seed: int, name: str) -> tuple[Split, Split, Split]:
    """Training, validation and test split of a data set.

    Where it brings x_val and y_val, they validate and all of x_train trains: then no seed decides
    anything, and any but the default is refused. Raises UserError.
    """
    everything = slice(None)
    test = take(arrays, "test", everything)
    if has_validation(arrays):
        if split_seed != 0:
            fault = f"--split-seed {split_seed}: has no effect on --dataset {name}, which brings"
            raise UserError(f"{fault} validation images of its own; leave it out")
        return take(arrays, "train", everything), take(arrays, "val", everything), test
    training, validation = split_indices(len(arrays["y_train"]), split_seed)
    return take(arrays, "train", training), take(arrays, "train", validation), test


def read_arrays(
    name: str, data_dir: Path, download: bool, image_size: int | None, skip_unreadable: bool
) -> Arrays:
    where = f"--dataset {name}"
    path = data_dir / f"{name}.npz" if name in NAMES else Path(name)
    # os.path and not Path's methods: those raise for a name that is too long.
    if name == "tiny_imagenet" and not os.path.isfile(path):
        path = data_dir / "tiny-imagenet-200"
        if not os.path.isdir(path):
            way_out = "unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there"
            raise UserError(f"{where}: no {path.name} in --data_dir {data_dir}; {way_out}")
    if os.path.isdir(path):
        return read_folder(path, data_dir, where, image_size, skip_unreadable)
    if image_size or skip_unreadable:
        flag = "--image_size" if image_size else "--skip_unreadable"
        raise UserError(f"{flag}: has an effect on a folder of images only; leave it out")
    if name == "synthetic":
        return make_synthetic()
    if os.path.isfile(path):
        here = f"--data_dir {data_dir}, file {path.name}"
        return read_npz(path, here if name in NAMES else where)
    if name in SOURCES:
        return from_torchvision(name, data_dir, download)
    close = difflib.get_close_matches(name.lower(), NAMES, 1)
    hint = f"did you mean {close[0]}? It" if close else "check the path; it"
    known = f"one of {', '.join(NAMES)}, or the path of an .npz file or of a folder of images"
    raise UserError(f"{where}: there is none; {hint} is {known}")


def from_torchvision(name: str, data_dir: Path, download: bool) -> Arrays:
    # Imported late: it takes a second that runs on other data need not spend.
    from torchvision import datasets

    source = SOURCES[name]
    reader = getattr(datasets, source.reader)
    fault = f"--dataset {name}: not found in --data_dir {data_dir} and not downloaded"
    wanted = f"{data_dir / name}.npz ({', '.join(ARRAYS)}) or torchvision's"
    way_out = f"put {wanted} {data_dir / source.files} there"
    kinds = (OSError, RuntimeError, ImportError)
    with refused(fault, way_out, kinds), unmade_on_failure(data_dir):
        options = [{source.keyword: part, "download": download} for part in source.parts]
        parts = [reader(data_dir, **each) for each in options]
    images, labels = ([getattr(part, kind) for part in parts] for kind in ("data", source.labels))
    made = (np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1])
    return checked(dict(zip(ARRAYS, map(np.asarray, made), strict=True)), f"--dataset {name}")


def dataset_label(name: str) -> str:
    """The name as a part of a path: a known name itself, of a file or folder its safe name."""
    if name not in NAMES:
        name = os.path.basename(os.path.abspath(name)).removesuffix(".npz")
    return re.sub(r"[^A-Za-z0-9+=.,_-]", "_", name).lstrip(".-")[:80] or "data"


def split_indices(n: int, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and of the validation split: a tenth of `n`, at least one."""
    order = np.random.default_rng(split_seed).permutation(n)
    size = max(1, n // 10)
    return np.sort(order[size:]), np.sort(order[:size])


def say_absent_classes(train: Split, val: Split, where: str) -> None:
    """A line on standard error for classes that have no image in one of the two splits."""
    trained, validated = (set(split.labels.unique().tolist()) for split in (train, val))
    classes = len(trained | validated)
    only_validated = sorted(validated - trained)
    if only_validated:
        fault = f"{len(only_validated)} of {classes} classes have all their training images"
        print(f"{where}: {fault} in the validation split", file=sys.stderr)
    never_validated = sorted(trained - validated)
    if never_validated:
        shown = ", ".join(map(str, never_validated[:10]))
        more = ", ..." if len(never_validated) > 10 else ""
        fault = f"{len(never_validated)} of {classes} classes have no validation image"
        print(f"{where}: {fault} (class {shown}{more})", file=sys.stderr)


def take(arrays: Arrays, part: str, index) -> Split:
    keys = (f"{kind}_{part}" for kind in ("x", "y", "posterior"))
    images, *others = (torch.from_numpy(arrays[key][index]) for key in keys if key in arrays)
    # (N, 3, H, W), in memory with the channels last, as they came and as convolutions like them.
    return Split(images.permute(0, 3, 1, 2), *others)


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
    for key in (*ARRAYS, *(OWN_VALIDATION if has_validation(arrays) else ())):
        digest.update(f"{key} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key]))
    return digest.hexdigest()
