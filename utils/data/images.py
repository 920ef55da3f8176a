"""Folders of images, decoded once into an .npz file that later runs read.

FOLDER/train/CLASS/**/*.jpg      any format that Pillow reads; classes in the order of their names
FOLDER/test/CLASS/...            or val/, where there is no test/
FOLDER/val/val_annotations.txt   instead of class folders, as in Tiny-ImageNet
"""

import hashlib
import os
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.data.npz import Arrays, checked, read_npz
from utils.files import atomic, one_line, require_memory, safe_name
from utils.program import RunFailed, UserError

Labelled = list[tuple[str, str]]  # class and file of each image


def read_folder(
    folder: Path, data_dir: Path, where: str, image_size: int | None, skip_unreadable: bool
) -> Arrays:
    """The four arrays of a folder of images, as `checked` makes them.

    With `image_size` the shorter side is resized to it and the middle cut out; without, all are
    squares of one size. They are kept in `data_dir`, under a name that depends on the files' paths,
    sizes and dates. Raises UserError.
    """
    try:
        train, test = labelled_images(folder)
        key = content_key(folder, train + test, image_size, skip_unreadable)
        cache = data_dir / "decoded" / f"{safe_name(folder.absolute().name)}_{key}.npz"
        if cache.is_file():
            return read_npz(cache, f"{cache} (delete it, and the images are decoded again)")
        images, faults = decode([file for _, file in train + test], image_size)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    classes, cut = sorted({label for label, _ in train}), len(train)
    labels = np.searchsorted(classes, [label for label, _ in train + test])
    unreadable = [fault for fault in faults if fault]
    if unreadable:
        said = f"{len(unreadable)} of {len(faults)} images cannot be read, first {unreadable[0]}"
        if not skip_unreadable:
            raise UserError(f"{where}: {said}; mend or delete them, or give --skip_unreadable")
        tqdm.write(f"{where}: {said}; left out")
        good = np.array([fault is None for fault in faults])
        images, labels, cut = images[good], labels[good], good[:cut].sum()
    arrays = {"x_train": images[:cut], "y_train": labels[:cut]}
    arrays = checked(arrays | {"x_test": images[cut:], "y_test": labels[cut:]}, where)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic(cache) as file:
            np.savez(file, **arrays)
    except (OSError, RunFailed) as error:  # a folder that one may only read is enough
        tqdm.write(f"--data_dir {data_dir}: the decoded images are not kept ({one_line(error)})")
    return arrays


def labelled_images(folder: Path) -> tuple[Labelled, Labelled]:
    """The training and the test images. Raises OSError and ValueError."""
    train, test, val = (labelled_part(folder / name) for name in ("train", "test", "val"))
    test = test or val
    classes = {label for label, _ in train}
    if len(classes) < 2 or not test:
        found = f"{len(train)} images of {len(classes)} classes in train/CLASS/ and {len(test)} in"
        raise ValueError(f"{found} val/CLASS/ or test/CLASS/; both need images of two classes")
    absent = sorted({label for label, _ in test} - classes)
    if absent:
        way_out = f"put some into train/{absent[0]}/, or leave the class out"
        one = f"class {absent[0]} (one of {len(absent)})"
        raise ValueError(f"{one} has no training image; {way_out}")
    return train, test


def labelled_part(part: Path) -> Labelled:
    annotations = part / "val_annotations.txt"
    if annotations.exists():
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
        return [(label, f"{part}/images/{name}") for name, label in rows]
    known = Image.registered_extensions()
    return [
        (path.name, f"{at}/{name}")
        for path in sorted(path for path in part.glob("[!.]*") if path.is_dir())
        for at, _, names in sorted(os.walk(path))
        for name in sorted(names)
        if name[0] != "." and known.get(os.path.splitext(name)[1].lower()) in Image.OPEN
    ]


def content_key(folder: Path, images: Labelled, *settings) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for label, file in images:
        stat, place = os.stat(file), file.removeprefix(str(folder))
        digest.update(f"{label} {place} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def decode(files: list[str], image_size: int | None) -> tuple[np.ndarray, list[str | None]]:
    """Images uint8 (N, S, S, 3), and of each why it cannot be read, or None. Raises ValueError."""
    side = image_size or first_width(files)
    require_memory(2 * 3 * side**2 * len(files))  # as decoded, and as split
    images = np.empty((len(files), side, side, 3), np.uint8)

    def into(number: int) -> str | None:
        try:
            with Image.open(files[number]) as image:
                pixels = image.convert("RGB")
        # Any exception: damaged images raise a dozen kinds, and each means the same to the user.
        except Exception as error:
            return f"{files[number]} ({one_line(error)})"
        if image_size:
            pixels = ImageOps.fit(pixels, (side, side), Image.Resampling.BILINEAR)
        if pixels.size != (side, side):
            size = "{} x {} pixels, not {} x {}".format(*pixels.size, side, side)
            raise ValueError(f"{files[number]} is {size}; give --image_size")
        images[number] = np.asarray(pixels)

    # Threads: Pillow decodes without holding Python's lock.
    with ThreadPool(os.cpu_count()) as pool:
        work = pool.imap(into, range(len(files)), chunksize=64)
        return images, list(tqdm(work, "decoding", len(files), disable=None, leave=False))


def first_width(files: list[str]) -> int:
    for file in files:
        with suppress(Exception), Image.open(file) as image:
            return image.width
    raise ValueError("no image can be read")
