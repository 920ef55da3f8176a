"""The four arrays of a data set: a stranger's .npz file, and the checks that any source passes."""

from pathlib import Path

import numpy as np

from utils.files import open_npz, refused
from utils.program import UserError

Arrays = dict[str, np.ndarray]
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path, where: str) -> Arrays:
    """The four arrays of an .npz file, checked. `where` begins every message."""
    way_out = f"write it with numpy.savez(file, {', '.join(f'{key}=...' for key in ARRAYS)})"
    # Two copies: as read, and as split.
    with refused(f"{where}: not a readable .npz file", way_out), open_npz(path, 2) as archive:
        arrays = {key: archive[key] for key in ARRAYS if key in archive.files}
    return checked(arrays, where)


def checked(arrays: Arrays, where: str) -> Arrays:
    """The arrays as images uint8 (N, H, W, 3) and labels int64 (N,), else a UserError.

    Images may come as `channels_last` takes them, labels as (N, 1).
    """

    def require(met: bool, fault: str) -> None:
        if not met:
            raise UserError(f"{where}: {fault}")

    absent = [key for key in ARRAYS if key not in arrays]
    require(not absent, f"has no {', '.join(absent)}; it must hold {', '.join(ARRAYS)}")
    made = {}
    for x, y in (("x_train", "y_train"), ("x_test", "y_test")):
        try:
            images, labels = channels_last(arrays[x]), arrays[y]
        except ValueError as error:
            raise UserError(f"{where}: {x} {error}") from None
        require(labels.dtype.kind in "iu", f"{y} is {labels.dtype}; save labels as integers")
        wanted = f"it must be ({len(images)},), a label for each image"
        fits = labels.shape in ((len(images),), (len(images), 1))
        require(fits, f"{y} has shape {labels.shape}; {wanted}")
        made |= {x: images, y: labels.reshape(-1).astype(np.int64)}
    train, test = made["x_train"].shape, made["x_test"].shape
    require(train[1:] == test[1:], f"x_train has shape {train} and x_test {test}; sizes must agree")
    seen = np.unique(made["y_train"])
    require(len(seen) > 1, f"every label in y_train is {seen[0]}; two classes are needed, 0 and 1")
    fault = f"y_train has {len(seen)} classes, {seen[0]} to {seen[-1]}, not 0 to {len(seen) - 1}"
    way_out = "save numpy.searchsorted(numpy.unique(y_train), y) of y_train and of y_test"
    require(np.array_equal(seen, np.arange(len(seen))), f"{fault}; {way_out}")
    unseen = np.setdiff1d(made["y_test"], seen)
    if len(unseen):
        way_out = "leave its images out, or move some to x_train"
        raise UserError(f"{where}: class {unseen[0]} of y_test has no training image; {way_out}")
    return made


def channels_last(images: np.ndarray) -> np.ndarray:
    """Images uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3, as (N, H, W, 3).

    Raises ValueError, which says what is wrong with them.
    """
    if images.dtype != np.uint8:
        way_out = "save them .round().astype('uint8'), those from 0 to 1 times 255"
        raise ValueError(f"is {images.dtype}; images are grey levels from 0 to 255: {way_out}")
    made = images[..., None] if images.ndim == 3 else images
    if made.ndim == 4 and made.shape[3] not in (1, 3):
        made = made.transpose(0, 2, 3, 1)
    square = made.ndim == 4 and made.shape[1] == made.shape[2]
    if not (square and len(made) and made.shape[3] in (1, 3) and 8 <= made.shape[1] <= 512):
        shapes = "(N, H, W, 3), (N, H, W, 1), (N, H, W) or (N, C, H, W)"
        raise ValueError(f"has shape {images.shape}; images are square, 8 to 512 pixels, {shapes}")
    return np.ascontiguousarray(made if made.shape[3] == 3 else made.repeat(3, axis=3))
