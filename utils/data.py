"""Every data set as tensors in memory: where it comes from, how it is split, its statistics.

A data set is read as four arrays x_train, y_train, x_test, y_test, from torchvision, from an .npz
file, or made on the spot (`synthetic`). A tenth of the training images becomes the validation
split. Images stay uint8: augmentation and normalisation happen on the device (utils/batches.py).
"""

import difflib
import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from utils import UserError
from utils.folders import unmade_on_failure

Statistics = tuple[float, float, float]
Arrays = dict[str, np.ndarray]

# Mean and standard deviation of pixels / 255, per channel. A teacher is fed with the ones it was
# trained with, whatever the data set: hence `imagenet` and `half`, common in third parties' files.
NORMALISATION: dict[str, tuple[Statistics, Statistics]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
SMALLEST, LARGEST = 8, 512  # side of an image in pixels
LONGEST_HEADER = 10_000  # bytes of an .npy file that are read before all is known to fit in memory

# The synthetic data set. Sharper labels raise the best accuracy that is possible; more noise and
# finer patterns make the blend harder to read.
SYNTHETIC_SEED = 2024
SYNTHETIC_TRAIN = 2000
SYNTHETIC_TEST = 2000
SYNTHETIC_CLASSES = 10
SYNTHETIC_SIZE = 32
SYNTHETIC_GRID = 4  # cells along a pattern's side, before it is smoothed
SYNTHETIC_AMPLITUDE = 45.0  # standard deviation of a pattern, in grey levels
SYNTHETIC_SHARPNESS = 1.0  # 1: the label follows the blend weight; infinite: always the larger part
SYNTHETIC_CONTRAST = 0.2  # contrast is scaled by 1 plus or minus up to this
SYNTHETIC_BRIGHTNESS = 20.0  # grey levels, plus or minus
SYNTHETIC_NOISE = 20  # grey levels, plus or minus, uniform in every pixel


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


def count_classes(arrays: Arrays) -> int:
    return int(max(arrays["y_train"].max(), arrays["y_test"].max())) + 1


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


class Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    complete: bool  # the archive holds as many bytes as the header declares


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


def read_npz(path: Path, where: str) -> Arrays:
    """The four arrays of an .npz file: images uint8 (N, H, W, 3), labels int64 (N,).

    Images may also be (N, H, W), (N, H, W, 1) or (N, C, H, W). `where` begins every message.
    """
    with readable(where):
        headers = read_headers(path)
    check_headers(headers, where)
    with readable(where), open_npz(path) as archive:
        arrays = {key: archive[key] for key in ARRAYS}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = channels_last(arrays[f"x_{part}"])
    check_labels(arrays, where)
    return {
        key: array.astype(np.int64) if key[0] == "y" else array for key, array in arrays.items()
    }


@contextmanager
def readable(where: str):
    # Any exception: damaged archives raise a dozen kinds, and each means the same to the user.
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{where}: not a readable .npz file ({type(error).__name__}: {one_line(error)}); "
            f"write it with numpy.savez(file, {', '.join(f'{key}=...' for key in ARRAYS)})"
        ) from error


def open_npz(path: Path):
    """What np.load makes of an archive whose content fits in memory. Raises almost any Exception.

    Pickled objects, which could run code, are refused when they are read.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist()) / 2**30
    if size > available_memory():
        raise ValueError(f"needs {size:.1f} GiB of memory and {available_memory():.1f} are free")
    return np.load(path, allow_pickle=False)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_headers(path: Path) -> dict[str, Header]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    headers = {}
    with zipfile.ZipFile(path) as archive:
        present = archive.namelist()
        for key in (key for key in ARRAYS if f"{key}.npy" in present):
            with archive.open(f"{key}.npy") as member:
                file = io.BytesIO(member.read(LONGEST_HEADER))
                shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
                size = file.tell() + math.prod(shape) * dtype.itemsize
            headers[key] = Header(shape, dtype, size == archive.getinfo(f"{key}.npy").file_size)
    return headers


def check_headers(headers: dict[str, Header], where: str) -> None:
    def require(met: bool, fault: str) -> None:
        if not met:
            raise UserError(f"{where}: {fault}")

    absent = [key for key in ARRAYS if key not in headers]
    require(not absent, f"has no {', '.join(absent)}; it must hold {', '.join(ARRAYS)}")
    for key, (shape, dtype, complete) in headers.items():
        require(len(shape) > 0 and min(shape) > 0, f"{key} is empty, its shape is {shape}")
        if key[0] == "x":
            require(dtype == np.uint8, f"{key} is {dtype}; save images as uint8, 0 to 255")
            require(
                image_side(shape) is not None,
                f"{key} has shape {shape}; images are square, {SMALLEST} to {LARGEST} pixels, "
                "(N, H, W, 3), (N, H, W, 1), (N, H, W) or (N, C, H, W)",
            )
        else:
            images = headers["x" + key[1:]].shape[0]
            require(dtype.kind in "iu", f"{key} is {dtype}; save labels as integers")
            require(
                shape == (images,),
                f"{key} has shape {shape}; it must be ({images},), a label for each image",
            )
        require(complete, f"{key} is not as long as its header says; write the file again")
    train, test = headers["x_train"].shape, headers["x_test"].shape
    require(train[0] > 1, "x_train holds one image; two are needed, one of them for validation")
    require(train[1:] == test[1:], f"x_train has shape {train} and x_test {test}; sizes must agree")
    # Three channels, and twice: as read, and as split.
    needed = 2 * 3 * image_side(train) ** 2 * (train[0] + test[0]) / 2**30
    require(
        needed < available_memory(),
        f"needs {needed:.1f} GiB of memory and {available_memory():.1f} are free; "
        "use smaller or fewer images",
    )


def image_side(shape: tuple[int, ...]) -> int | None:
    """Height of the square images that an array of this shape holds; None if it holds none."""
    if len(shape) == 4:
        shape = shape[:3] if shape[3] in (1, 3) else shape[:1] + shape[2:] * (shape[1] in (1, 3))
    square = len(shape) == 3 and shape[1] == shape[2] and SMALLEST <= shape[1] <= LARGEST
    return shape[1] if square else None


def channels_last(images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))


def check_labels(arrays: Arrays, where: str) -> None:
    images = len(arrays["y_train"]) + len(arrays["y_test"])
    for key in ("y_train", "y_test"):
        low, high = int(arrays[key].min()), int(arrays[key].max())
        if low < 0 or high >= images:
            raise UserError(
                f"{where}: {key} has label {low if low < 0 else high}; number the classes 0, 1, 2, "
                "... (and no more classes than images)"
            )
    if count_classes(arrays) < 2:
        raise UserError(f"{where}: every label is 0; two classes are needed, 0 and 1")


def available_memory() -> float:
    """Free memory in GiB; all of it where the system does not say how much is free."""
    free = Path("/proc/meminfo")
    if free.exists():
        return int(re.search(r"MemAvailable:\s+(\d+)", free.read_text())[1]) / 2**20
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


# synthetic


def make_synthetic(data_dir: Path, download: bool) -> Arrays:
    """Blends of two class patterns whose labels are drawn from a distribution that is known.

    An image is w P_a + (1 - w) P_b in a random contrast and brightness, plus noise. Its label is a
    with probability w^s / (w^s + (1 - w)^s), s the sharpness, else b. So the best that a net can do
    is to say just this probability, and one that learns the drawn labels by heart says too much.
    """
    rng = np.random.default_rng(SYNTHETIC_SEED)
    patterns = class_patterns(rng)
    arrays = {}
    for part, n in (("train", SYNTHETIC_TRAIN), ("test", SYNTHETIC_TEST)):
        a = rng.integers(SYNTHETIC_CLASSES, size=n)
        b = (a + rng.integers(1, SYNTHETIC_CLASSES, size=n)) % SYNTHETIC_CLASSES
        w = rng.random(n)
        of_a = w**SYNTHETIC_SHARPNESS / (w**SYNTHETIC_SHARPNESS + (1 - w) ** SYNTHETIC_SHARPNESS)
        posterior = np.zeros((n, SYNTHETIC_CLASSES))
        posterior[np.arange(n), a] = of_a
        posterior[np.arange(n), b] = 1 - of_a
        arrays[f"x_{part}"] = blend(patterns, a, b, w, rng)
        arrays[f"y_{part}"] = np.where(rng.random(n) < of_a, a, b)
        arrays[f"posterior_{part}"] = posterior
    return arrays


def class_patterns(rng: np.random.Generator) -> np.ndarray:
    """Smooth random colours, one pattern per class: float64 (K, H, W, 3), mean 0 per channel."""
    coarse = rng.standard_normal((SYNTHETIC_CLASSES, 3, SYNTHETIC_GRID, SYNTHETIC_GRID))
    size = (SYNTHETIC_SIZE, SYNTHETIC_SIZE)
    smooth = F.interpolate(torch.from_numpy(coarse), size, mode="bicubic").numpy()
    smooth -= smooth.mean((2, 3), keepdims=True)
    smooth *= SYNTHETIC_AMPLITUDE / smooth.std((2, 3), keepdims=True)
    return np.ascontiguousarray(smooth.transpose(0, 2, 3, 1))


def blend(
    patterns: np.ndarray, a: np.ndarray, b: np.ndarray, w: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    # In float64, so that rounding to whole grey levels gives the same bytes on every machine.
    n = len(w)
    contrast = rng.uniform(1 - SYNTHETIC_CONTRAST, 1 + SYNTHETIC_CONTRAST, n)
    brightness = rng.uniform(-SYNTHETIC_BRIGHTNESS, SYNTHETIC_BRIGHTNESS, n)
    parts = (contrast * w, contrast * (1 - w), 127.5 + brightness)
    of_a, of_b, level = (part[:, None, None, None] for part in parts)
    images = of_a * patterns[a] + of_b * patterns[b] + level
    images += rng.integers(
        -SYNTHETIC_NOISE, SYNTHETIC_NOISE, images.shape, dtype=np.int16, endpoint=True
    )
    return images.round(out=images).clip(0, 255, out=images).astype(np.uint8)


SOURCES: dict[str, Callable[[Path, bool], Arrays]] = {
    "cifar10": partial(load_cifar, "cifar10", 10),
    "cifar100": partial(load_cifar, "cifar100", 100),
    "synthetic": make_synthetic,
}
