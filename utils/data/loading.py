"""From a name, a file or a folder to a Dataset: reading, splitting, and what is said of both.

A data set is four arrays x_train, y_train, x_test, y_test, from torchvision, an .npz file, a folder
of images, or made on the spot (`synthetic`). It may bring x_val and y_val, which then validate.
Else a tenth of the training images does, by --split-seed alone, so that a student validates on
images that its teacher never saw.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.data.dataset import NORMALISATION, Dataset, Split, Statistics, pixel_statistics
from utils.data.images import read_folder
from utils.data.names import CLASS_NAMES
from utils.data.npz import ARRAYS, CLASSES, OWN_VALIDATION, Arrays, has_validation, read_npz
from utils.data.published import SOURCES, from_torchvision
from utils.data.synthetic import make_synthetic
from utils.program import UserError

DATA_OF_DIGITS = {"svhn", "svhn_extra"}  # whose mirror images are no digits
NAMES = (*SOURCES, "tiny_imagenet", "synthetic")
MOST_NAMED = 10  # classes in a message


def load_dataset(
    name: str,
    data_dir: str | Path,
    split_seed: int = 0,
    is_main: bool = True,
    flip: bool | None = None,
    image_size: int | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Load one of NAMES, or the .npz file or the folder of images that `name` is the path of.

    A file `<name>.npz` in `data_dir` goes before torchvision's copy and its download. `is_main`: of
    several processes the one that downloads, and says what is to be said. `flip`: whether mirrored
    views are drawn, by default unless the images are digits. `image_size` and `skip_unreadable` are
    for folders of images. Raises UserError, in one line, for everything that can be wrong with a
    name or a file.
    """
    arrays = read_arrays(
        name,
        Path(data_dir),
        is_main=is_main,
        image_size=image_size,
        skip_unreadable=skip_unreadable,
    )
    train, val, test = splits_of(arrays, split_seed, name)

    num_classes = int(arrays["y_train"].max()) + 1
    names = class_names(name, arrays, num_classes)
    if is_main:
        say_notes(name, arrays)
        seed = "" if has_validation(arrays) else f", --split-seed {split_seed}"
        say_absent_classes(train, val, names, where=f"--dataset {name}{seed}")

    # How a net is to see them.
    mean, std = statistics_of(name, train)
    if flip is None:
        flip = name not in DATA_OF_DIGITS
    return Dataset(
        name=dataset_label(name),
        num_classes=num_classes,
        train=train,
        val=val,
        test=test,
        mean=mean,
        std=std,
        fingerprint=fingerprint(arrays),
        split_seed=split_seed,
        flip=flip,
        class_names=names,
    )


def statistics_of(name: str, train: Split) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation that a data set is normalised with: published, or its own."""
    # A folder may be called like a normalisation, and has its own statistics all the same.
    if name in NAMES and name in NORMALISATION:
        return NORMALISATION[name]
    return pixel_statistics(train.images)


def read_arrays(
    name: str, data_dir: Path, is_main: bool, image_size: int | None, skip_unreadable: bool
) -> Arrays:
    """The arrays from wherever the name leads. Raises UserError."""
    where = f"--dataset {name}"  # begins every message
    if name == "synthetic":
        refuse_folder_flags(image_size, skip_unreadable)
        return make_synthetic()

    is_known = name in NAMES
    path = data_dir / f"{name}.npz" if is_known else Path(name)
    # os.path and not Path's methods: those raise for a name that is too long.
    if os.path.isfile(path):
        refuse_folder_flags(image_size, skip_unreadable)
        # A file called like a known data set stands in for it.
        return read_npz(path, f"--data_dir {data_dir}, file {path.name}" if is_known else where)

    if name == "tiny_imagenet":
        path = tiny_imagenet_folder(data_dir, where)
    if os.path.isdir(path):
        return read_folder(path, data_dir, where, image_size, skip_unreadable)

    refuse_folder_flags(image_size, skip_unreadable)
    if name in SOURCES:
        return from_torchvision(name, data_dir, download=is_main)
    close = difflib.get_close_matches(name.lower(), NAMES, n=1)
    hint = f"did you mean {close[0]}? It" if close else "check the path; it"
    raise UserError(
        f"{where}: there is none; {hint} is one of {', '.join(NAMES)}, or the path of an .npz file "
        "or of a folder of images"
    )


def tiny_imagenet_folder(data_dir: Path, where: str) -> Path:
    """Where its archive was unpacked. Raises UserError."""
    folder = data_dir / "tiny-imagenet-200"
    if not os.path.isdir(folder):
        raise UserError(
            f"{where}: no {folder.name} in --data_dir {data_dir}; unpack "
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip there"
        )
    return folder


def refuse_folder_flags(image_size: int | None, skip_unreadable: bool) -> None:
    """Raise UserError for a flag that was given and is read for a folder of images alone."""
    if image_size or skip_unreadable:
        flag = "--image_size" if image_size else "--skip_unreadable"
        raise UserError(f"{flag}: has an effect on a folder of images only; leave it out")


def splits_of(arrays: Arrays, split_seed: int, name: str) -> tuple[Split, Split, Split]:
    """Training, validation and test split of a data set.

    Where it brings x_val and y_val, they validate and all of x_train trains: then no seed decides
    anything, and any but the default is refused. Raises UserError.
    """
    everything = slice(None)
    test = take(arrays, "test", everything)
    if has_validation(arrays):
        if split_seed != 0:
            raise UserError(
                f"--split-seed {split_seed}: has no effect on --dataset {name}, which brings "
                "validation images of its own; leave it out"
            )
        return take(arrays, "train", everything), take(arrays, "val", everything), test
    training, validation = split_indices(len(arrays["y_train"]), split_seed)
    return take(arrays, "train", training), take(arrays, "train", validation), test


def split_indices(n: int, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and of the validation split: a tenth of `n`, at least one."""
    order = np.random.default_rng(split_seed).permutation(n)
    size = max(1, n // 10)
    return np.sort(order[size:]), np.sort(order[:size])


def take(arrays: Arrays, split: str, index: np.ndarray | slice) -> Split:
    """Those images of `train`, `val` or `test`, with their labels and their posterior, if any."""
    images = torch.from_numpy(arrays[f"x_{split}"][index])
    labels = torch.from_numpy(arrays[f"y_{split}"][index])
    posterior = None
    if f"posterior_{split}" in arrays:
        posterior = torch.from_numpy(arrays[f"posterior_{split}"][index])
    rows = torch.from_numpy(index) if isinstance(index, np.ndarray) else None
    # (N, 3, H, W), in memory with the channels last, as they came and as convolutions like them.
    return Split(images.permute(0, 3, 1, 2), labels, posterior, rows)


def class_names(name: str, arrays: Arrays, num_classes: int) -> tuple[str, ...] | None:
    """Those that the data bring, or the known ones of a known data set."""
    if CLASSES in arrays:
        return tuple(arrays[CLASSES].tolist())
    names = CLASS_NAMES.get(name, ())
    return names if len(names) == num_classes else None


def say_notes(name: str, arrays: Arrays) -> None:
    """The lines that came with the arrays: what is not read, or otherwise than one may expect."""
    for note in arrays.get("notes", ()):
        tqdm.write(f"--dataset {name}: {note}")


def say_absent_classes(train: Split, val: Split, names: Sequence[str] | None, where: str) -> None:
    """A line for classes that have no image in one of the two splits."""
    trained = set(train.labels.unique().tolist())
    validated = set(val.labels.unique().tolist())
    num_classes = len(trained | validated)

    only_validated = validated - trained
    if only_validated:
        tqdm.write(
            f"{where}: all training images of {len(only_validated)} of {num_classes} classes lie "
            "in the validation split"
        )
    never_validated = sorted(trained - validated)
    if never_validated:
        first = never_validated[:MOST_NAMED]
        shown = ", ".join(names[label] if names else str(label) for label in first)
        more = ", ..." if len(never_validated) > MOST_NAMED else ""
        tqdm.write(
            f"{where}: there is no validation image of {len(never_validated)} of {num_classes} "
            f"classes (class {shown}{more})"
        )


def dataset_label(name: str) -> str:
    """The name as a part of a path: a known name itself, of a file or folder its safe name."""
    if name not in NAMES:
        name = os.path.basename(os.path.abspath(name)).removesuffix(".npz")
    return re.sub(r"[^A-Za-z0-9+=.,_-]", "_", name).lstrip(".-")[:80] or "data"


def fingerprint(arrays: Arrays) -> str:
    """sha256 of all images and labels."""
    keys = (*ARRAYS, *OWN_VALIDATION) if has_validation(arrays) else ARRAYS
    digest = hashlib.sha256()
    for key in keys:
        digest.update(f"{key} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key]))
    return digest.hexdigest()
