"""The arrays of a data set: any .npz file, and the checks that every source passes."""

from pathlib import Path

import numpy as np

from utils.program import UserError
from utils.program.files import open_npz, refused
from utils.program.words import counted

# Pixels a side of images.
SMALLEST = 8
LARGEST = 512
Arrays = dict[str, np.ndarray]
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# A data set may bring them. They then validate, and all of x_train trains.
OWN_VALIDATION = ("x_val", "y_val")
CLASSES = "classes"  # the names of the classes


def read_npz(path: Path, where: str) -> Arrays:
    """The arrays of an .npz file, as `checked_arrays` makes them. `where` begins every message.

    Beside them `notes`, lines to be said; and `classes`, their names, where the file has a text for
    each class. Raises UserError.
    """
    example = ", ".join(f"{key}=..." for key in ARRAYS)
    with (
        refused(
            f"{where}: not a readable .npz file",
            way_out=f"write it with numpy.savez(file, {example})",
        ),
        # Two copies: as read, and as split.
        open_npz(path, copies=2) as archive,
    ):
        keys = [key for key in (*ARRAYS, *OWN_VALIDATION) if key in archive.files]
        stored = {key: archive[key] for key in keys}
        names = texts(archive, CLASSES) if CLASSES in archive.files else None
        unread = sorted(set(archive.files).difference(keys, [CLASSES]))

    arrays = checked_arrays(stored, where)
    notes = []
    if has_validation(arrays):
        images = counted(
            len(arrays["y_val"]), "image of x_val validates", "images of x_val validate"
        )
        notes.append(f"the {images}, and all of x_train trains")
    num_classes = int(arrays["y_train"].max()) + 1
    if names is not None and names.shape == (num_classes,):
        arrays[CLASSES] = names
    elif names is not None:
        notes.append(
            f"{CLASSES} is no array of {num_classes} texts: the classes' names are not kept"
        )
    if unread:
        notes.append(f"not read: {', '.join(unread)}")
    arrays["notes"] = np.array(notes, dtype=str)
    return arrays


def texts(archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    """An array of texts; empty where it holds something else. Pickled objects are not read."""
    no_texts = np.array([], dtype=str)
    try:
        array = archive[key]
    except ValueError:  # pickled
        return no_texts
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8", "replace")
    return array if array.dtype.kind == "U" else no_texts


def checked_arrays(arrays: Arrays, where: str) -> Arrays:
    """The arrays as images uint8 (N, H, W, 3) and labels int64 (N,), else a UserError.

    Images may come as `channels_last` takes them, labels as (N, 1).
    """
    splits = ["train", "test"]
    required = list(ARRAYS)
    if has_validation(arrays):
        splits.append("val")
        required += OWN_VALIDATION
    absent = [key for key in required if key not in arrays]
    if absent:
        raise UserError(
            f"{where}: has no {', '.join(absent)}; it must hold {', '.join(ARRAYS)}, and may hold "
            f"{' and '.join(OWN_VALIDATION)}"
        )

    made = {}
    for split in splits:
        images, labels = checked_split(arrays, split, where)
        made[f"x_{split}"] = images
        made[f"y_{split}"] = labels
        if images.shape[1:] != made["x_train"].shape[1:]:
            raise UserError(
                f"{where}: x_train has shape {made['x_train'].shape} and x_{split} {images.shape}; "
                "sizes must agree"
            )
    check_classes(made, where)
    return made


def has_validation(arrays: Arrays) -> bool:
    """Whether a data set brings a validation split of its own, or at least a part of one."""
    return any(key in arrays for key in OWN_VALIDATION)


def checked_split(arrays: Arrays, split: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 3) and labels int64 (N,) of `train`, `val` or `test`. UserError."""
    try:
        images = channels_last(arrays[f"x_{split}"])
    except ValueError as error:
        raise UserError(f"{where}: x_{split} {error}") from None
    labels = arrays[f"y_{split}"]
    if labels.dtype.kind not in "iu":
        raise UserError(f"{where}: y_{split} is {labels.dtype}; save labels as integers")
    if labels.shape not in ((len(images),), (len(images), 1)):
        raise UserError(
            f"{where}: y_{split} has shape {labels.shape}; it must be ({len(images)},), a label "
            "for each image"
        )
    return images, labels.reshape(-1).astype(np.int64)


def check_classes(arrays: Arrays, where: str) -> None:
    """Refuse labels that are not 0 to K - 1, and classes that have no training image."""
    trained = np.unique(arrays["y_train"])
    if len(trained) == 1:
        raise UserError(
            f"{where}: every label in y_train is {trained[0]}; two classes are needed, 0 and 1"
        )
    if not np.array_equal(trained, np.arange(len(trained))):
        raise UserError(
            f"{where}: y_train has {len(trained)} classes, {trained[0]} to {trained[-1]}, not 0 to "
            f"{len(trained) - 1}; save numpy.searchsorted(numpy.unique(y_train), y) of y_train and "
            "of y_test"
        )
    for key in ("y_test", "y_val"):
        untrained = np.setdiff1d(arrays.get(key, trained), trained)
        if len(untrained):
            raise UserError(
                f"{where}: class {untrained[0]} of {key} has no training image; leave its images "
                "out, or move some to x_train"
            )


def channels_last(images: np.ndarray) -> np.ndarray:
    """Images uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3, as (N, H, W, 3).

    Raises ValueError, which says what is wrong with them.
    """
    if images.dtype != np.uint8:
        raise ValueError(
            f"is {images.dtype}; images are grey levels from 0 to 255: save them "
            ".round().astype('uint8'), those from 0 to 1 times 255"
        )
    made = images[..., None] if images.ndim == 3 else images
    if made.ndim == 4 and made.shape[3] not in (1, 3):
        made = made.transpose(0, 2, 3, 1)
    if not are_square_images(made):
        raise ValueError(
            f"has shape {images.shape}; square images of {SMALLEST} to {LARGEST} pixels a side "
            "with 1 or 3 channels are wanted: (N, H, W, 3), (N, H, W, 1), (N, H, W), (N, 3, H, W) "
            "or (N, 1, H, W)"
        )
    if made.shape[3] == 1:
        made = made.repeat(3, axis=3)
    return np.ascontiguousarray(made)


def are_square_images(images: np.ndarray) -> bool:
    if images.ndim != 4:
        return False
    count, height, width, channels = images.shape
    return count > 0 and height == width and SMALLEST <= height <= LARGEST and channels in (1, 3)
