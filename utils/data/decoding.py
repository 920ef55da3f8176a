"""Image files as arrays of grey levels from 0 to 255: upright, in red, green and blue.

What a viewer shows is what is read. Where an image holds more than that (more than 8 bits, colours
for print, transparency, further frames), a remark says what became of it; where its range is not
known it is refused, for to cut off at 255 would make it white.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffTags, features
from PIL import __version__ as pillow_version

from utils.program.bars import progress_bar
from utils.program.files import one_line, require_memory
from utils.program.words import counted

# To be raised when an image comes to be read otherwise: what was decoded before is decoded anew.
READING = 2
CODECS = ("jpg", "jpg_2000", "zlib", "libtiff")

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNSIGNED = (1,)  # of the TIFF tag SampleFormat
WHITE_IS_ZERO = 0  # of the TIFF tag PhotometricInterpretation
TIFF_TAGS = {tag.name: tag.value for tag in TiffTags.TAGS_V2.values()}

TURNED = "turned upright, as their EXIF orientation says"
DEEPER = "grey with more than 8 bits, scaled to 0 to 255"
FOR_PRINT = "CMYK, converted to RGB without their colour profile"
TRANSPARENT = "partly transparent, read without their transparency"
FRAMES = "of several frames or pages, of which the first is read"


class Decoded(NamedTuple):
    images: np.ndarray  # uint8 (N, S, S, 3)
    faults: list[str | None]  # why an image cannot be read
    remarks: list[list[str]]  # of each file


def decoder_version() -> str:
    """What the pixels of a file depend on besides the file."""
    names = [name for name in CODECS if features.check(name)]
    versions = [f"{name} {features.version(name)}" for name in (*names, "webp", "avif")]
    return ", ".join([f"reading {READING}", f"Pillow {pillow_version}", *versions])


def decode(files: list[str], image_size: int | None) -> Decoded:
    """Read every file; with `image_size` resize the shorter side to it and cut out the middle.

    Raises ValueError where images have different sizes and none is given.
    """
    side = image_size or first_width(files)
    require_memory(2 * 3 * side**2 * len(files))  # as decoded, and as split
    images = np.zeros((len(files), side, side, 3), np.uint8)

    def decode_into_place(number: int) -> tuple[str | None, list[str]]:
        """Fills images[number]; why that file cannot be read, and remarks on it."""
        try:
            pixels, remarks = read_image(files[number])
        # Any exception: damaged images raise a dozen kinds, and each means the same to the user.
        except Exception as error:
            return f"{files[number]} ({one_line(error)})", []
        if image_size:
            pixels = fitted(pixels, side)
        if pixels.size != (side, side):
            raise ValueError(
                f"{files[number]} is {pixels.width} x {pixels.height} pixels, not {side} x {side}; "
                "give --image_size"
            )
        images[number] = np.asarray(pixels)
        return None, remarks

    # Threads: Pillow decodes without holding Python's lock.
    with ThreadPool(os.cpu_count()) as pool:
        outcomes = pool.imap(decode_into_place, range(len(files)), chunksize=64)
        bar = progress_bar(outcomes, "decoding", total=len(files))
        faults, remarks = zip(*bar, strict=True)
    return Decoded(images, list(faults), list(remarks))


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The middle of it, so many pixels a side, with the shorter side resized to that."""
    return ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)


def counted_remarks(files: list[str], remarks: Sequence[list[str]]) -> list[str]:
    """A line for each kind of remark; `remarks` are those of each file."""
    files_of: dict[str, list[str]] = {}
    for file, remarks_of_file in zip(files, remarks, strict=True):
        for remark in remarks_of_file:
            files_of.setdefault(remark, []).append(file)
    return [
        f"{counted(len(remarked), 'image is', 'images are')} {remark} (first {remarked[0]})"
        for remark, remarked in files_of.items()
    ]


def first_width(files: list[str]) -> int:
    for file in files:
        with suppress(Exception), Image.open(file) as image:
            return image.width
    raise ValueError("no image can be read")


def read_image(file: str) -> tuple[Image.Image, list[str]]:
    """An image as RGB, as a viewer shows it, and remarks. Raises almost any Exception."""
    with Image.open(file) as image:
        # To load a TIFF turns it; of a PNG it finds the orientation that stands at the end.
        was_turned = orientation(image) != 1
        image.load()
        left_to_turn = orientation(image)
        remarks = [TURNED] if was_turned or left_to_turn != 1 else []

        pixels = as_rgb(image, remarks)
        if left_to_turn in TURNS:
            pixels = pixels.transpose(TURNS[left_to_turn])
        if has_frames(image):
            remarks.append(FRAMES)
    return pixels, remarks


def orientation(image: Image.Image) -> int:
    """As EXIF has it, 1 to 8; 1, upright, also where the EXIF is damaged."""
    with suppress(Exception):
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in TURNS else 1
    return 1


def has_frames(image: Image.Image) -> bool:
    """Whether there are further pictures that a data set would lose."""
    if image.format == "MPO":  # a camera's JPEG: previews and the other eye
        return False
    with suppress(Exception):
        return bool(getattr(image, "is_animated", False))
    return False


def as_rgb(image: Image.Image, remarks: list[str]) -> Image.Image:
    """The image in mode RGB; adds to `remarks`. Raises ValueError where its range is not known."""
    is_unsigned = tiff_tag(image, "SampleFormat", UNSIGNED)[0] in UNSIGNED
    if not is_unsigned or image.mode == "F":
        raise ValueError(
            "signed or floating-point levels, whose range is not known; save it as unsigned levels "
            "of 8 or 16 bits"
        )
    if image.mode == "I" or image.mode.startswith("I;"):
        remarks.append(DEEPER)
        return eight_bits(image).convert("RGB")
    if image.mode == "CMYK":
        remarks.append(FOR_PRINT)
    if is_transparent(image):
        remarks.append(TRANSPARENT)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of more than 8 bits, the largest possible one becoming 255."""
    largest = largest_level(image)
    levels = np.asarray(image).astype(np.int64)
    if tiff_tag(image, "PhotometricInterpretation", 1) == WHITE_IS_ZERO:  # Pillow turns 8 bits only
        levels = largest - levels
    rounded = (255 * levels + largest // 2) // largest
    return Image.fromarray(rounded.astype(np.uint8))


def largest_level(image: Image.Image) -> int:
    """That an image in one of Pillow's modes I and I;16 can have. Raises ValueError."""
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        return 2 ** tiff_tag(image, "BitsPerSample", (16,))[0] - 1
    if image.format in ("PNG", "PPM", "JPEG2000"):  # Pillow scales fewer bits up to 16
        return 2**16 - 1
    raise ValueError(
        f"grey levels of a {image.format} in mode {image.mode}, whose range is not known; save it "
        "as unsigned levels of 8 or 16 bits"
    )


def tiff_tag(image: Image.Image, name: str, default):
    if image.format != "TIFF":
        return default
    return image.tag_v2.get(TIFF_TAGS[name], default)


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel lets something through."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    alpha = image.convert("RGBA").getchannel("A")
    return alpha.getextrema()[0] < 255
