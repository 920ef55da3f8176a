"""Logits that a file holds, whoever made them: of a net of another library, a service, or people.

A .npy file is one array, the training images' logits. A .npz file may hold, for each of the splits
train, val and test, `train_logits` or `train_probs`, and `train_labels` for a check of the order.
"""

import zipfile
from os.path import isfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.program import UserError
from utils.program.files import open_npz, refused, require_memory

SPLITS = ("train", "val", "test")
NAMES = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("logits", "probs", "labels"))
SUM_TOLERANCE = 1e-3  # by how much the probabilities of an image may miss 1
NPY_START = b"\x93NUMPY"

Arrays = dict[str, np.ndarray]


def read_stored(path: Path, where: str) -> Arrays:
    """The arrays of a file by their names in NAMES. `where` begins every message. UserError."""
    # os.path and not Path's methods: those raise for a name that is too long.
    if not isfile(path):
        raise UserError(f"{where}: no such file; give an .npz or .npy file of logits")
    way_out = "write it with numpy.save(file, logits) or numpy.savez(file, train_logits=logits)"
    with refused(f"{where}: cannot be read", way_out):
        if zipfile.is_zipfile(path):
            with open_npz(path) as archive:
                arrays = {name: archive[name] for name in archive.files}
        else:
            check_npy(path)
            require_memory(path.stat().st_size)
            arrays = {"train_logits": np.load(path, allow_pickle=False)}

    unread = sorted(arrays.keys() - set(NAMES))
    if unread:
        raise UserError(
            f"{where}: holds {', '.join(unread)}, which nothing reads; it may hold "
            f"{', '.join(NAMES)}"
        )
    return arrays


def check_npy(path: Path) -> None:
    """Raises ValueError: numpy would take any other file for pickled objects."""
    with open(path, "rb") as file:
        start = file.read(len(NPY_START))
    if start != NPY_START:
        raise ValueError("it is neither an .npy nor an .npz file")


def logits_in(arrays: Arrays, split: str, where: str) -> Tensor | None:
    """Logits of a split, float32, of the shape that the file has; None where it holds none.

    Probabilities become their logarithms: a probability of 0 is a logit of -inf. Raises UserError.
    """
    logits = f"{split}_logits"
    probs = f"{split}_probs"
    if logits in arrays and probs in arrays:
        raise UserError(f"{where}: holds {logits} and {probs}; leave one of them out")
    for name in (logits, probs):
        if name in arrays:
            try:
                return as_logits(arrays[name], are_probabilities=name == probs)
            except ValueError as error:
                raise UserError(f"{where}: {name} {error}") from None
    return None


def as_logits(array: np.ndarray, are_probabilities: bool) -> Tensor:
    """Logits (..., K), float32. Raises ValueError, which says what is wrong with the array."""
    wanted = "probabilities" if are_probabilities else "logits"
    if array.dtype.kind in "iub":
        raise ValueError(f"holds {array.dtype}, as labels do; save {wanted}, floats (N, K)")
    if array.dtype.kind != "f":
        raise ValueError(f"holds {array.dtype}; save {wanted}, floats (N, K)")
    if array.ndim < 2 or array.size == 0:
        raise ValueError(f"has shape {array.shape}; save {wanted} (N, K), a row for each image")

    if not are_probabilities:
        refuse_probabilities(array)
    else:
        check_probabilities(array)
        wide = array.astype(np.float32) if array.itemsize < 4 else array
        with np.errstate(divide="ignore"):
            array = np.log(wide)
    with np.errstate(over="ignore"):
        logits = np.ascontiguousarray(array, np.float32)

    largest = logits.max(axis=-1)  # NaN where a row holds one
    refuse_rows(np.isnan(largest), "holds NaN")
    refuse_rows(np.isposinf(largest), "holds a logit that is no finite float32")
    refuse_rows(np.isneginf(largest), "rules every class out (a row of -inf)")
    return torch.from_numpy(logits)


def refuse_probabilities(array: np.ndarray) -> None:
    """Raises ValueError where what should be logits are probabilities, in every row.

    Their softmax would be nearly uniform, with the same top-1.
    """
    if not array.min() >= 0:  # NaN is refused elsewhere
        return
    total = array.sum(axis=-1, dtype=np.float64)
    if np.abs(total - 1).max() <= SUM_TOLERANCE:
        raise ValueError(
            "holds probabilities (every row sums to 1); name them so: numpy.savez(file, "
            "train_probs=probs)"
        )


def check_probabilities(probs: np.ndarray) -> None:
    """Raises ValueError."""
    refuse_rows(np.isnan(probs).any(axis=-1), "holds NaN")
    refuse_rows((probs < 0).any(axis=-1), "holds a probability below 0")
    total = probs.sum(axis=-1, dtype=np.float64)
    refuse_rows(
        np.abs(total - 1) > SUM_TOLERANCE,
        "holds probabilities that do not sum to 1; divide each row by its sum",
    )


def refuse_rows(are_wrong: np.ndarray, fault: str) -> None:
    """Raises ValueError where any row is wrong; it says which image is the first of them."""
    if are_wrong.any():
        first = np.argwhere(are_wrong)[0][-1]
        raise ValueError(f"{fault} (image {first}, {are_wrong.sum()} of {are_wrong.size} rows)")


def labels_in(arrays: Arrays, split: str, where: str) -> Tensor | None:
    """Labels of a split, int64 (N,); None where the file holds none. Raises UserError."""
    name = f"{split}_labels"
    if name not in arrays:
        return None
    labels = arrays[name]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(
            f"{where}: {name} is {labels.dtype} of shape {labels.shape}; save integers (N,)"
        )
    return torch.from_numpy(labels.astype(np.int64))
