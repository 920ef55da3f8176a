"""Data sets in .npz files: a stranger's, so the headers are checked before anything is unpacked."""

import io
import math
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.files import available_memory, one_line
from utils.program import UserError

Arrays = dict[str, np.ndarray]

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
SMALLEST, LARGEST = 8, 512  # side of an image in pixels
LONGEST_HEADER = 10_000  # bytes of an .npy file that are read before all is known to fit in memory


def count_classes(arrays: Arrays) -> int:
    return int(max(arrays["y_train"].max(), arrays["y_test"].max())) + 1


class Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    complete: bool  # the archive holds as many bytes as the header declares


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
