"""Image files as arrays: depth, colour modes, orientation, and a cache that knows its decoder."""

import re

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from utils.data import decoding
from utils.data.images import read_folder
from utils.program import UserError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # each grey level once
UPRIGHT = np.zeros((16, 16, 3), np.uint8)
UPRIGHT[:8, :, 0] = UPRIGHT[8:, :, 2] = 255  # red above, blue below
UPRIGHT[:, :4, 1] = 255  # and a green bar on the left


@pytest.fixture
def folder(tmp_path):
    """A folder of images into which `read` puts one more."""
    for part in ("train", "val"):
        for label in "ab":
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            Image.fromarray(RAMP).save(tmp_path / "photos" / part / label / "0.png")
    return tmp_path / "photos"


def load(folder, **options):
    options = {"image_size": None, "skip_unreadable": False} | options
    return read_folder(folder, folder.parent / "data", "--dataset photos", **options)


def read(folder, image, suffix, **options):
    """The image as it is read back, uint8 (16, 16, 3), and the notes."""
    image.save(folder / f"val/a/0{suffix}", **options)
    if suffix != ".png":
        (folder / "val/a/0.png").unlink()
    arrays = load(folder)
    return arrays["x_test"][0], " ".join(arrays["notes"])


def grey(levels):
    return np.asarray(levels)[..., None].repeat(3, axis=2)


def assert_levels(found, expected, tolerance=1):
    assert np.abs(found.astype(int) - expected).max() <= tolerance


# depth


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm", ".jp2"])
def test_sixteen_bit_grey_becomes_eight(folder, suffix):
    image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    found, notes = read(folder, image, suffix)
    assert_levels(found, grey(RAMP))
    assert "1 image is grey with more than 8 bits" in notes


def test_a_pgm_whose_largest_level_is_between_8_and_16_bits(folder):
    levels = RAMP.astype(int) * 1000 // 255
    content = b"P5 16 16 1000\n" + levels.astype(">u2").tobytes()
    (folder / "val/a/0.pgm").write_bytes(content)
    assert_levels(load(folder)["x_test"][0], grey(RAMP))


def test_white_is_zero_in_a_sixteen_bit_tiff(folder):
    # Pillow writes no such file: the tag is changed in one.
    image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    image.save(folder / "val/a/0.tif", tiffinfo={262: 1})
    content = (folder / "val/a/0.tif").read_bytes()
    tag = (262).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    assert content.count(tag + b"\1\0") == 1
    (folder / "val/a/0.tif").write_bytes(content.replace(tag + b"\1\0", tag + b"\0\0"))
    (folder / "val/a/0.png").unlink()
    assert_levels(load(folder)["x_test"][0], grey(255 - RAMP))


def float_tiff(file):
    Image.fromarray(RAMP.astype(np.float32) / 255).save(file)


def integer_tiff(file):
    Image.fromarray(RAMP.astype(np.int32) * 1000).save(file)


def signed_tiff(file):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[339] = 2  # SampleFormat
    Image.fromarray(RAMP).save(file, tiffinfo=tags)


@pytest.mark.parametrize("write", [float_tiff, integer_tiff, signed_tiff])
def test_levels_of_unknown_range_are_refused(folder, write):
    write(folder / "val/a/0.tif")
    with pytest.raises(UserError) as caught:
        load(folder)
    expected = r"1 of 5 images cannot be read, first .*0\.tif \(.*range is not known; save it as"
    assert re.search(expected, str(caught.value))
    arrays = load(folder, skip_unreadable=True)
    assert len(arrays["x_test"]) == 2 and "left out" in arrays["notes"][0]


# modes


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits(folder, bits):
    largest = 2**bits - 1
    levels = RAMP.astype(int) * largest // 255
    image = Image.fromarray(levels.astype(np.uint8), mode="P")
    image.putpalette([level * 255 // largest for level in range(largest + 1) for _ in range(3)])
    found, notes = read(folder, image, ".png", bits=bits)
    assert np.array_equal(found, grey(levels * 255 // largest)) and not notes


def test_one_bit(folder):
    found, notes = read(folder, Image.fromarray(RAMP > 99), ".png")
    assert np.array_equal(found, grey((RAMP > 99) * 255)) and not notes


def test_a_palette(folder):
    image = Image.fromarray(UPRIGHT).convert("P", palette=Image.Palette.ADAPTIVE)
    found, notes = read(folder, image, ".gif")
    assert np.array_equal(found, UPRIGHT) and not notes


def test_transparency_is_said(folder):
    alpha = Image.fromarray(RAMP)
    for mode in ("RGBA", "LA"):
        image = Image.fromarray(grey(RAMP)).convert(mode)
        found, notes = read(folder, image, ".png")
        assert np.array_equal(found, grey(RAMP)) and not notes  # opaque everywhere
        image.putalpha(alpha)
        found, notes = read(folder, image, ".png")
        assert np.array_equal(found, grey(RAMP)) and "1 image is partly transparent" in notes
    found, notes = read(folder, Image.fromarray(RAMP), ".png", transparency=7)
    assert np.array_equal(found, grey(RAMP)) and "partly transparent" in notes


def test_cmyk_is_converted_and_said(folder):
    image = Image.fromarray(UPRIGHT).convert("CMYK")
    found, notes = read(folder, image, ".tif")
    assert np.array_equal(found, UPRIGHT) and "1 image is CMYK" in notes


def test_further_frames_are_said(folder):
    first = Image.fromarray(UPRIGHT).convert("P", palette=Image.Palette.ADAPTIVE)
    others = {"save_all": True, "append_images": [first.transpose(Image.Transpose.ROTATE_90)]}
    found, notes = read(folder, first, ".gif", **others)
    assert np.array_equal(found, UPRIGHT) and "1 image is of several frames" in notes


# orientation: what is stored, so that an image with this orientation is seen upright
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_format_is_read_upright(folder, suffix, orientation):
    image, exif = Image.fromarray(np.ascontiguousarray(STORED[orientation])), Image.Exif()
    exif[0x0112] = orientation
    exact = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}
    found, notes = read(folder, image, suffix, exif=exif, **exact.get(suffix, {}))
    assert_levels(found, UPRIGHT, tolerance=4)
    assert ("1 image is turned upright" in notes) == (orientation != 1)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_impossible_orientation_is_none(folder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found, notes = read(folder, Image.fromarray(UPRIGHT), ".png", exif=exif)
    assert np.array_equal(found, UPRIGHT) and not notes


def test_damaged_exif_turns_nothing(folder):
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff"
    found, notes = read(folder, Image.fromarray(UPRIGHT), ".png", exif=exif)
    assert np.array_equal(found, UPRIGHT) and not notes


# the cache


@pytest.mark.parametrize("name, value", [("READING", 999), ("pillow_version", "0.1")])
def test_what_another_decoder_kept_is_decoded_anew(folder, monkeypatch, name, value):
    load(folder)
    [before] = (folder.parent / "data/decoded").iterdir()
    load(folder)
    assert list((folder.parent / "data/decoded").iterdir()) == [before]
    monkeypatch.setattr(decoding, name, value)
    load(folder)
    assert len(list((folder.parent / "data/decoded").iterdir())) == 2


def test_class_names_and_notes_come_from_the_cache_too(folder):
    read(folder, Image.fromarray(RAMP.astype(np.uint16) * 257), ".png")
    for _ in range(2):
        arrays = load(folder)
        assert arrays["classes"].tolist() == ["a", "b"] and "more than 8" in arrays["notes"][0]
