"""Data sets that torchvision downloads and reads."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.npz import ARRAYS, Arrays, checked
from utils.program.files import refused, unmade_on_failure


class Source(NamedTuple):
    """How torchvision reads a data set, in parts, of which the last one tests."""

    reader: str
    files: str  # where it looks for them in --data_dir
    labels: str  # attribute of the reader that holds them
    keyword: str  # of the reader, with a value for each part
    parts: tuple


SOURCES = {
    "cifar10": Source(
        reader="CIFAR10",
        files="cifar-10-batches-py",
        labels="targets",
        keyword="train",
        parts=(True, False),
    ),
    "cifar100": Source(
        reader="CIFAR100",
        files="cifar-100-python",
        labels="targets",
        keyword="train",
        parts=(True, False),
    ),
    "svhn": Source(
        reader="SVHN",
        files="*_32x32.mat",
        labels="labels",
        keyword="split",
        parts=("train", "test"),
    ),
    "svhn_extra": Source(
        reader="SVHN",
        files="*_32x32.mat",
        labels="labels",
        keyword="split",
        parts=("train", "extra", "test"),
    ),
}


def from_torchvision(name: str, data_dir: Path, download: bool) -> Arrays:
    """The checked arrays of one of SOURCES. Raises UserError where they cannot be had."""
    # Imported late: it takes a second that runs on other data need not spend.
    from torchvision import datasets

    source = SOURCES[name]
    read = getattr(datasets, source.reader)
    with (
        refused(
            f"--dataset {name}: not found in --data_dir {data_dir} and not downloaded",
            way_out=f"put {data_dir / name}.npz ({', '.join(ARRAYS)}) or torchvision's "
            f"{data_dir / source.files} there",
            kinds=(OSError, RuntimeError, ImportError),
        ),
        unmade_on_failure(data_dir),
    ):
        parts = [
            read(data_dir, **{source.keyword: part}, download=download) for part in source.parts
        ]

    images = [np.asarray(part.data) for part in parts]
    labels = [np.asarray(getattr(part, source.labels)) for part in parts]
    arrays = {
        "x_train": np.concatenate(images[:-1]),
        "y_train": np.concatenate(labels[:-1]),
        "x_test": images[-1],
        "y_test": labels[-1],
    }
    return checked(arrays, where=f"--dataset {name}")
