"""The four arrays of a data set: a stranger's .npz file, and the checks that any source passes."""

from pathlib import Path

import numpy as np

from utils.files import one_line, open_npz
from utils.program import UserError

Arrays = dict[str, np.ndarray]

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
SMALLEST, LARGEST = 8, 512  # side of an image in pixels


def count_classes(arrays: Arrays) -> int:
    return int(arrays["y_train"].max()) + 1


def read_npz(path: Path, where: str) -> Arrays:
    """The four arrays of an .npz file, checked. `where` begins every message."""
    try:
        with open_npz(path, copies=2) as archive:  # as read, and as split
            arrays = {key: archive[key] for key in ARRAYS if key in archive.files}
    # Any exception: damaged archives raise a dozen kinds, and each means the same to the user.
    except Exception as error:
        raise UserError(
            f"{where}: not a readable .npz file ({type(error).__name__}: {one_line(error)}); "
            f"write it with numpy.savez(file, {', '.join(f'{key}=...' for key in ARRAYS)})"
        ) from error
    return checked(arrays, where)


def checked(arrays: Arrays, where: str) -> Arrays:
    """The arrays as images uint8 (N, H, W, 3) and labels int64 (N,), else a UserError.

    Images may come as (N, H, W), (N, H, W, 1) or (N, C, H, W), labels as (N, 1).
    """

    def require(met: bool, fault: str) -> None:
        if not met:
            raise UserError(f"{where}: {fault}")

    absent = [key for key in ARRAYS if key not in arrays]
    require(not absent, f"has no {', '.join(absent)}; it must hold {', '.join(ARRAYS)}")
    made = {}
    for x, y in (("x_train", "y_train"), ("x_test", "y_test")):
        images, labels = arrays[x], arrays[y]
        require(images.size > 0, f"{x} is empty, its shape is {images.shape}")
        require(
            images.dtype == np.uint8,
            f"{x} is {images.dtype}; images are grey levels from 0 to 255 in uint8: save "
            f"{x}.round().astype('uint8'), of shares (255 * {x})",
        )
        require(
            image_side(images.shape) is not None,
            f"{x} has shape {images.shape}; images are square, {SMALLEST} to {LARGEST} pixels, "
            "(N, H, W, 3), (N, H, W, 1), (N, H, W) or (N, C, H, W)",
        )
        require(labels.dtype.kind in "iu", f"{y} is {labels.dtype}; save labels as integers")
        require(
            labels.shape in ((len(images),), (len(images), 1)),
            f"{y} has shape {labels.shape}; it must be ({len(images)},), a label for each image",
        )
        made |= {x: channels_last(images), y: labels.reshape(-1).astype(np.int64)}
    train, test = made["x_train"].shape, made["x_test"].shape
    require(train[1:] == test[1:], f"x_train has shape {train} and x_test {test}; sizes must agree")
    seen = np.unique(made["y_train"])
    require(len(seen) > 1, f"every label in y_train is {seen[0]}; two classes are needed, 0 and 1")
    require(
        np.array_equal(seen, np.arange(len(seen))),
        f"y_train has {len(seen)} classes, {seen[0]} to {seen[-1]}, not 0 to {len(seen) - 1}; save "
        "numpy.searchsorted(numpy.unique(y_train), y) of y_train and of y_test",
    )
    unseen = np.setdiff1d(made["y_test"], seen)
    require(
        len(unseen) == 0,
        f"class {[*unseen, 0][0]} of y_test has no training image; leave its images out, or move "
        "some to x_train",
    )
    return made


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
    return np.ascontiguousarray(images if images.shape[3] == 3 else images.repeat(3, axis=3))
