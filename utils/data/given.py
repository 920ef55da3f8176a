"""Images that a user names, for a net that takes one size: files, folders, .npy and .npz arrays.

What is larger or of another shape is resized and cropped as --image_size does it in training.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.decoding import counted_remarks, decode, fitted
from utils.data.folders import counted_kinds, images_below
from utils.data.npz import channels_last
from utils.program import UserError
from utils.program.files import open_npz, refused, require_memory

PIECE = 1000  # images in memory at once
KEYS = ("x_test", "x", "images")  # of an .npz file: the first that it has
UNREADABLE = "that cannot be read"


class NamedImages(NamedTuple):
    """Images, uint8 (n, 3, S, S), and what each is called."""

    names: list[str]
    images: Tensor


@dataclass
class Remarks:
    """What is to be said of the files that were named, or that lie in a folder that was."""

    unread: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by kind
    files: list[str] = field(default_factory=list)  # that were decoded
    of_files: list[list[str]] = field(default_factory=list)  # remarks on each of these

    def lines(self) -> list[str]:
        kinds = {kind: paths for kind, paths in self.unread.items() if paths}
        return counted_kinds(kinds) + counted_remarks(self.files, self.of_files)


class ImageFiles:
    """Image files, which are decoded when their turn comes."""

    def __init__(self, files: list[str], remarks: Remarks):
        self.files = files
        self.remarks = remarks

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> list[Path]:
        return [Path(file) for file in self.files]

    def piece(self, start: int, side: int) -> NamedImages:
        """From that file on, with so many pixels a side; unreadable ones are noted."""
        files = self.files[start : start + PIECE]
        images, faults, remarks = decode(files, side)
        readable = np.array([fault is None for fault in faults])
        self.remarks.unread[UNREADABLE] += [fault for fault in faults if fault is not None]
        self.remarks.files += files
        self.remarks.of_files += remarks
        names = [file for file, is_readable in zip(files, readable, strict=True) if is_readable]
        return NamedImages(names, as_tensor(images[readable]))


class ImageArray:
    """The images of an .npy or .npz file, called by the file and their number."""

    def __init__(self, file: Path):
        self.file = file
        self.array = read_array(file)

    def __len__(self) -> int:
        return len(self.array)

    def paths(self) -> list[Path]:
        return [self.file]

    def piece(self, start: int, side: int) -> NamedImages:
        """From that image on, with so many pixels a side."""
        images = self.array[start : start + PIECE]
        names = [f"{self.file}[{start + number}]" for number in range(len(images))]
        return NamedImages(names, as_tensor(resized(images, side)))


class GivenImages:
    """All images that are named, in that order; a folder's by their names, with those below it.

    Raises UserError for what is not there, and for arrays that hold no images.
    """

    def __init__(self, paths: Iterable[Path]):
        self.sources: list[ImageFiles | ImageArray] = []
        self.remarks = Remarks()
        for path in paths:
            if path.is_dir():
                self.add_files(images_below(path, self.remarks.unread))
            elif not path.is_file():
                raise UserError(f"IMAGES {path}: no such file or folder; check the path")
            elif path.suffix in (".npy", ".npz"):
                self.sources.append(ImageArray(path))
            else:
                self.add_files([str(path)])
        if len(self) == 0:
            contents = " ".join(self.notes()) or "the folders are empty"
            raise UserError(
                f"IMAGES: no image among them; {contents}; name image files, folders of them, "
                ".npy or .npz files"
            )

    def add_files(self, files: list[str]) -> None:
        """Those that follow files are decoded with them: a thousand names are one piece."""
        last = self.sources[-1] if self.sources else None
        if isinstance(last, ImageFiles):
            last.files += files
        else:
            self.sources.append(ImageFiles(files, self.remarks))

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def files(self) -> Iterator[Path]:
        """Those that images are read from."""
        for source in self.sources:
            yield from source.paths()

    def pieces(self, side: int) -> Iterator[NamedImages]:
        """The images with so many pixels a side, a piece at a time; unreadable ones are noted."""
        for source in self.sources:
            for start in range(0, len(source), PIECE):
                yield source.piece(start, side)

    def notes(self) -> list[str]:
        """Lines on what was not read, and on what was read otherwise than one may expect."""
        return self.remarks.lines()


def read_array(file: Path) -> np.ndarray:
    """uint8 (N, H, W, 3). Raises UserError."""
    way_out = "save images as uint8 (N, H, W, 3), square; in an .npz file as x"
    with refused(f"IMAGES {file}: no images in it", way_out):
        if file.suffix == ".npy":
            images = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            with open_npz(file) as archive:
                keys = [key for key in KEYS if key in archive.files]
                if not keys:
                    raise ValueError(f"it has {', '.join(archive.files)}")
                images = archive[keys[0]]
        require_memory(images.nbytes)
        return channels_last(images)


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """Images (n, H, W, 3) with so many pixels a side."""
    if images.shape[1:3] == (side, side):
        return images
    return np.stack([np.asarray(fitted(Image.fromarray(pixels), side)) for pixels in images])


def as_tensor(images: np.ndarray) -> Tensor:
    """(n, S, S, 3) as (n, 3, S, S)."""
    writable = np.array(images)  # a file's is not
    return torch.from_numpy(writable).permute(0, 3, 1, 2)
