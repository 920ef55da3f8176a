"""Images that a user names, for a net that takes one size: files, folders, .npy and .npz arrays.

What is larger or of another shape is resized and cropped as --image_size does it in training.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.decoding import counted_remarks, decode, fitted
from utils.data.folders import Part, counted_kinds, images_below
from utils.data.npz import channels_last
from utils.program import UserError
from utils.program.files import open_npz, refused, require_memory

PIECE = 1000  # images in memory at once
KEYS = ("x_test", "x", "images")  # of an .npz file: the first that it has
UNREADABLE = "that cannot be read"


class Named(NamedTuple):
    """Images, uint8 (n, 3, S, S), and what each is called."""

    names: list[str]
    images: Tensor


class GivenImages:
    """All images that are named, in that order; a folder's by their names, with those below it.

    Raises UserError for what is not there, and for arrays that hold no images.
    """

    def __init__(self, places: Iterable[Path]):
        self.sources: list[list[str] | tuple[Path, np.ndarray]] = []
        self.unread: dict[str, list[str]] = defaultdict(list)  # by kind
        self.files: list[str] = []  # that were read, with a list of remarks on each
        self.remarks: list[list[str]] = []
        for place in places:
            if place.is_dir():
                self.add_files(self.below(place))
            elif not place.is_file():
                raise UserError(f"IMAGES {place}: no such file or folder; check the path")
            elif place.suffix in (".npy", ".npz"):
                self.sources.append((place, read_array(place)))
            else:
                self.add_files([str(place)])
        if len(self) == 0:
            contents = " ".join(self.notes()) or "the folders are empty"
            raise UserError(
                f"IMAGES: no image among them; {contents}; name image files, folders of them, "
                ".npy or .npz files"
            )

    def add_files(self, files: list[str]) -> None:
        """Those that follow files are decoded with them: a thousand names are one piece."""
        if self.sources and isinstance(self.sources[-1], list):
            self.sources[-1] += files
        else:
            self.sources.append(files)

    def below(self, folder: Path) -> list[str]:
        part = Part(folder)
        files = images_below(folder, part)
        for kind, paths in part.left_out.items():
            self.unread[kind] += paths
        return files

    def __len__(self) -> int:
        return sum(
            len(source) if isinstance(source, list) else len(source[1]) for source in self.sources
        )

    def pieces(self, side: int) -> Iterator[Named]:
        """The images with so many pixels a side, a piece at a time; unreadable ones are noted."""
        for source in self.sources:
            if isinstance(source, list):
                for start in range(0, len(source), PIECE):
                    yield self.decoded(source[start : start + PIECE], side)
            else:
                file, array = source
                for start in range(0, len(array), PIECE):
                    images = array[start : start + PIECE]
                    names = [f"{file}[{start + place}]" for place in range(len(images))]
                    yield Named(names, as_tensor(resized(images, side)))

    def decoded(self, files: list[str], side: int) -> Named:
        images, faults, remarks = decode(files, side)
        readable = np.array([fault is None for fault in faults])
        self.unread[UNREADABLE] += [fault for fault in faults if fault is not None]
        self.files += files
        self.remarks += remarks
        names = [file for file, is_readable in zip(files, readable, strict=True) if is_readable]
        return Named(names, as_tensor(images[readable]))

    def notes(self) -> list[str]:
        """Lines on what was not read, and on what was read otherwise than one may expect."""
        kinds = {kind: paths for kind, paths in self.unread.items() if paths}
        return counted_kinds(kinds) + counted_remarks(self.files, self.remarks)


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
