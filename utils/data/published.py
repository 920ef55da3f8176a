"""Data sets that torchvision downloads and reads."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from utils.data.npz import ARRAYS, Arrays, checked_arrays
from utils.program.files import refused, unmade_on_failure


def by_train_flag(name: str, datasets: ModuleType, folder: Path, split: str, download: bool):
    """The `split` train or test of CIFAR10, CIFAR100 and others whose class has `train=`."""
    return getattr(datasets, name)(folder, train=split == "train", download=download)


def svhn(datasets: ModuleType, folder: Path, split: str, download: bool):
    """The `split` train, extra or test."""
    return datasets.SVHN(folder, split=split, download=download)


class Source(NamedTuple):
    """How torchvision reads a data set, in splits, of which the last one tests."""

    read: Callable  # torchvision.datasets, --data_dir, split, download -> its data set
    files: str  # where it looks for them in --data_dir
    labels: str  # attribute of its data set that holds them
    splits: tuple[str, ...] = ("train", "test")


SOURCES = {
    "cifar10": Source(
        partial(by_train_flag, "CIFAR10"), files="cifar-10-batches-py", labels="targets"
    ),
    "cifar100": Source(
        partial(by_train_flag, "CIFAR100"), files="cifar-100-python", labels="targets"
    ),
    "svhn": Source(svhn, files="*_32x32.mat", labels="labels"),
    "svhn_extra": Source(
        svhn, files="*_32x32.mat", labels="labels", splits=("train", "extra", "test")
    ),
}


def from_torchvision(name: str, data_dir: Path, download: bool) -> Arrays:
    """The checked arrays of one of SOURCES. Raises UserError where they cannot be had."""
    # Imported late: it takes a second that runs on other data need not spend.
    from torchvision import datasets

    source = SOURCES[name]
    with (
        refused(
            f"--dataset {name}: not found in --data_dir {data_dir} and not downloaded",
            way_out=f"put {data_dir / name}.npz ({', '.join(ARRAYS)}) or torchvision's "
            f"{data_dir / source.files} there",
            kinds=(OSError, RuntimeError, ImportError),
        ),
        unmade_on_failure(data_dir),
    ):
        splits = [source.read(datasets, data_dir, split, download) for split in source.splits]

    images = [np.asarray(split.data) for split in splits]
    labels = [np.asarray(getattr(split, source.labels)) for split in splits]
    arrays = {
        "x_train": np.concatenate(images[:-1]),
        "y_train": np.concatenate(labels[:-1]),
        "x_test": images[-1],
        "y_test": labels[-1],
    }
    return checked_arrays(arrays, where=f"--dataset {name}")
