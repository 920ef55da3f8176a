"""Folders of images, decoded once into an .npz file that later runs read.

utils/data/folders.py says what a folder may hold, utils/data/decoding.py how a file is read.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.data.decoding import counted_remarks, decode, decoder_version
from utils.data.folders import Listing, list_folder
from utils.data.npz import LARGEST, SMALLEST, Arrays, checked_arrays, read_npz
from utils.program import RunFailed, UserError
from utils.program.files import atomic, one_line, open_npz, safe_name


def read_folder(
    folder: Path, data_dir: Path, where: str, image_size: int | None, skip_unreadable: bool
) -> Arrays:
    """The arrays of a folder of images, as `checked_arrays` makes them, and `notes` to be said.

    With `image_size` the shorter side is resized to it and the middle cut out; without, all are
    squares of one size. They are kept in `data_dir`, under a name that depends on the files' paths,
    sizes and dates and on what decodes them. Raises UserError.
    """
    if image_size is not None and not SMALLEST <= image_size <= LARGEST:
        raise UserError(
            f"--image_size {image_size}: the nets here take images of {SMALLEST} to {LARGEST} "
            "pixels a side; give a number between these"
        )
    try:
        listing = list_folder(folder)
        key = content_key(folder, listing, image_size, skip_unreadable)
        cache = data_dir / "decoded" / f"{safe_name(folder.absolute().name)}_{key}.npz"
        if cache.is_file():
            arrays = read_npz(cache, f"{cache} (delete it, and the images are decoded again)")
            with open_npz(cache) as archive:
                notes = archive["notes"].tolist()
        else:
            arrays, notes = decoded(listing, where, image_size, skip_unreadable)
            keep(cache, arrays | {"notes": np.array(notes, dtype=str)}, data_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    return arrays | {"notes": np.array(listing.notes + notes, dtype=str)}


def decoded(
    listing: Listing, where: str, image_size: int | None, skip_unreadable: bool
) -> tuple[Arrays, list[str]]:
    """The arrays of the listed images, and what is to be said of how they were read.

    Raises UserError, and ValueError, whose words stand behind `where`.
    """
    splits = {"train": listing.train, "val": listing.val, "test": listing.test}
    files = [file for listed in splits.values() for _, file in listed]
    images, faults, remarks = decode(files, image_size)
    notes = counted_remarks(files, remarks)
    is_readable = np.array([fault is None for fault in faults])
    if not is_readable.all():
        first = next(fault for fault in faults if fault is not None)
        fault = f"{(~is_readable).sum()} of {len(faults)} images cannot be read, first {first}"
        if not skip_unreadable:
            raise ValueError(f"{fault}; mend or delete them, or give --skip_unreadable")
        notes = [f"{fault}; left out", *notes]

    # The files lie split after split, as they were listed.
    classes = sorted({label for label, _ in listing.train})
    arrays = {}
    start = 0
    for name, listed in splits.items():
        place = slice(start, start + len(listed))
        start += len(listed)
        if not listed:
            continue
        kept = is_readable[place]
        if not kept.any():
            raise ValueError(f"none of the {len(listed)} images of the {name} split can be read")
        labels = np.searchsorted(classes, [label for label, _ in listed])
        arrays[f"x_{name}"] = images[place][kept]
        arrays[f"y_{name}"] = labels[kept]

    untrained = np.setdiff1d(np.arange(len(classes)), arrays["y_train"])
    if len(untrained):
        raise ValueError(f"class {classes[untrained[0]]}: none of its training images can be read")
    return checked_arrays(arrays, where) | {"classes": np.array(classes)}, notes


def keep(cache: Path, arrays: Arrays, data_dir: Path) -> None:
    """Write the cache; a folder that one may only read is enough to go on."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic(cache) as file:
            np.savez(file, **arrays)
    except (OSError, RunFailed) as error:
        tqdm.write(f"--data_dir {data_dir}: the decoded images are not kept ({one_line(error)})")


def content_key(folder: Path, listing: Listing, *settings) -> str:
    """A hash of the files, of how they are read, and of what reads them."""
    digest = hashlib.sha256(repr((decoder_version(), *settings)).encode())
    for name in ("train", "val", "test"):
        for label, file in getattr(listing, name):
            place = f"{name} {label} {file.removeprefix(str(folder))} "
            digest.update(place.encode(errors="surrogateescape"))  # names may be no UTF-8
            with suppress(FileNotFoundError):  # a link to nowhere, which cannot be read either
                stat = os.stat(file)
                digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
