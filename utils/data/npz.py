"""The arrays of a data set: a stranger's .npz file, and the checks that any source passes."""

from pathlib import Path

import numpy as np

from utils.files import open_npz, refused
from utils.program import UserError

Arrays = dict[str, np.ndarray]
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# A data set may bring them. They then validate, and all of x_train trains.
OWN_VALIDATION = ("x_val", "y_val")


def read_npz(path: Path, where: str) -> Arrays:
    """The arrays of an .npz file, checked. `where` begins every message."""
    way_out = f"write it with numpy.savez(file, {', '.join(f'{key}=...' for key in ARRAYS)})"
    # Two copies: as read, and as split.
    with refused(f"{where}: not a readable .npz file", way_out), open_npz(path, 2) as archive:
        read = [key for key in (*ARRAYS, *OWN_VALIDATION) if key in archive.files]
        arrays = {key: archive[key] for key in read}
    return checked(arrays, where)


def checked(arrays: Arrays, where: str) -> Arrays:
    """The arrays as images uint8 (N, H, W, 3) and labels int64 (N,), else a UserError.

    Images may come as `channels_last` takes them, labels as (N, 1).
    """
    wanted = OWN_VALIDATION if has_validation(arrays) else ()
    absent = [key for key in (*ARRAYS, *wanted) if key not in arrays]
    if absent:
        must = f"it must hold {', '.join(ARRAYS)}, and may hold {' and '.join(OWN_VALIDATION)}"
        raise UserError(f"{where}: has no {', '.join(absent)}; {must}")
    made = {}
    for part in ("train", "test", "val") if wanted else ("train", "test"):
        images, labels = checked_part(arrays, part, where)
        made[f"x_{part}"], made[f"y_{part}"] = images, labels
        if images.shape[1:] != made["x_train"].shape[1:]:
            shapes = f"x_train has shape {made['x_train'].shape} and x_{part} {images.shape}"
            raise UserError(f"{where}: {shapes}; sizes must agree")
    check_classes(made, where)
    return made


def has_validation(arrays: Arrays) -> bool:
    """Whether a data set brings a validation split of its own, or at least a part of one."""
    return any(key in arrays for key in OWN_VALIDATION)


def checked_part(arrays: Arrays, part: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 3) and labels int64 (N,) of `train`, `val` or `test`. UserError."""
    try:
        images = channels_last(arrays[f"x_{part}"])
    except ValueError as error:
        raise UserError(f"{where}: x_{part} {error}") from None
    labels = arrays[f"y_{part}"]
    if labels.dtype.kind not in "iu":
        raise UserError(f"{where}: y_{part} is {labels.dtype}; save labels as integers")
    if labels.shape not in ((len(images),), (len(images), 1)):
        wanted = f"it must be ({len(images)},), a label for each image"
        raise UserError(f"{where}: y_{part} has shape {labels.shape}; {wanted}")
    return images, labels.reshape(-1).astype(np.int64)


def check_classes(arrays: Arrays, where: str) -> None:
    """Refuse labels that are not 0 to K - 1, and classes that have no training image."""
    seen = np.unique(arrays["y_train"])
    if len(seen) == 1:
        fault = f"every label in y_train is {seen[0]}; two classes are needed, 0 and 1"
        raise UserError(f"{where}: {fault}")
    if not np.array_equal(seen, np.arange(len(seen))):
        fault = f"y_train has {len(seen)} classes, {seen[0]} to {seen[-1]}, not 0 to"
        way_out = "save numpy.searchsorted(numpy.unique(y_train), y) of y_train and of y_test"
        raise UserError(f"{where}: {fault} {len(seen) - 1}; {way_out}")
    for key in ("y_test", "y_val"):
        unseen = np.setdiff1d(arrays.get(key, seen), seen)
        if len(unseen):
            way_out = "leave its images out, or move some to x_train"
            fault = f"class {unseen[0]} of {key} has no training image"
            raise UserError(f"{where}: {fault}; {way_out}")


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
