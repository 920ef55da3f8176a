"""Folders of images: what is read, what is left out and said, and what is refused."""

import os
import re
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from utils.data import load_dataset
from utils.program import UserError

CLASSES = ("cat", "dog")


def write_part(folder, classes=CLASSES, count=6, suffix=".png", seed=0):
    rng = np.random.default_rng(seed)
    for label in classes:
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}{suffix}")


@pytest.fixture
def photos(tmp_path):
    """Six images of two classes to train, and six to test."""
    for seed, part in enumerate(("train", "val")):
        write_part(tmp_path / "photos" / part, seed=seed)
    return tmp_path / "photos"


def load(folder, **options):
    return load_dataset(str(folder), folder.parent / "data", **options)


def refusal(folder, **options):
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images_of(data):
    return len(data.train.labels) + len(data.val.labels), len(data.test.labels)


# a validation split that a folder brings


def test_val_beside_test_validates_and_all_of_train_trains(photos, capsys):
    without = load(photos).fingerprint
    write_part(photos / "test", count=2, seed=2)
    capsys.readouterr()
    data = load(photos)
    assert [len(split.labels) for split in (data.train, data.val, data.test)] == [12, 12, 4]
    assert "12 images of val/ validate, and all of train/ trains" in capsys.readouterr().out
    assert data.fingerprint != without
    assert "--split-seed 1: has no effect" in refusal(photos, split_seed=1)


@pytest.mark.parametrize("unlabelled", ["unknown/0.png", "images/0.png", "0.png"])
def test_images_without_labels_do_not_stand_in_for_labelled_ones(photos, capsys, unlabelled):
    labelled = load(photos)
    (photos / "test" / unlabelled).parent.mkdir(parents=True)
    shutil.copy(photos / "val/cat/0.png", photos / "test" / unlabelled)
    capsys.readouterr()
    data = load(photos)
    assert data.fingerprint == labelled.fingerprint and len(data.val.labels) == 1
    assert "test/ has no class of train/: it is not read, and val/" in capsys.readouterr().out
    shutil.rmtree(photos / "val")
    assert re.search("no .*label|and 0 in", refusal(photos))


def test_the_real_archive_of_tiny_imagenet(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    write_part(folder / "train", ("n01", "n02"), suffix=".JPEG")
    for label in ("n01", "n02"):
        (folder / "train" / label / f"{label}_boxes.txt").write_text("0.JPEG\t0\t0\t62\t62\n")
    for part in ("val", "test"):
        write_part(folder / part, ["images"], suffix=".JPEG")
    rows = [f"{k}.JPEG\tn0{k % 2 + 1}\t0\t0\t62\t62\n" for k in range(6)]
    (folder / "val/val_annotations.txt").write_text("".join(rows))
    data = load_dataset("tiny_imagenet", tmp_path)
    assert data.test.labels.tolist() == [0, 1] * 3 and data.class_names == ("n01", "n02")


# what is left out is said


def rename_all(suffix):
    def change(folder):
        for file in folder.glob("*.png"):
            file.rename(file.with_suffix(suffix))

    return change


def dangling(folder):
    shutil.rmtree(folder)
    folder.symlink_to("/nowhere/cat")


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def only_hidden(folder):
    for file in folder.glob("*.png"):
        file.rename(folder / f".{file.name}")


@pytest.mark.parametrize(
    "change, found",
    [
        (rename_all(".heic"), r"6 \*.heic"),
        (rename_all(""), "6 without a suffix"),
        (dangling, "a link to nowhere"),
        (emptied, "it is empty"),
        (only_hidden, "6 hidden"),
    ],
)
def test_a_class_without_a_readable_image(photos, capsys, change, found):
    write_part(photos / "test")
    change(photos / "val/cat")  # which may be left out, but not in silence
    assert len(load(photos).val.labels) == 6
    assert "class folders without an image (first val/cat)" in capsys.readouterr().out
    change(photos / "train/cat")
    assert re.search(rf"class cat has no image in train/cat/ .*\({found}\)", refusal(photos))


def test_one_line_counts_what_is_not_read(photos, capsys):
    folder = photos / "train/cat"
    for name in ("0.png", "1.png"):
        (folder / name).rename((folder / name).with_suffix(""))
    (folder / "2.png").rename(folder / "2.HEIC")
    for name in (".DS_Store", "Thumbs.db", "._3.png"):
        (folder / name).write_text("no image")
    for hidden in (".ipynb_checkpoints", "@eaDir"):  # both hold copies of images
        (folder / hidden).mkdir()
        shutil.copy(folder / "3.png", folder / hidden / "3-checkpoint.png")
    shutil.copy(folder / "3.png", photos / "train")
    shutil.copytree(photos / "val", photos / "validation")
    data = load(photos)
    assert images_of(data) == (9, 12)
    [line] = (line for line in capsys.readouterr().out.splitlines() if "not read" in line)
    for count in (
        "1 folders beside train/, val/ and test/ (first validation)",
        "5 hidden (first train/cat/",
        "2 without a suffix (first train/cat/0)",
        "1 *.HEIC (first train/cat/2.HEIC)",
        "1 in no class folder (first train/3.png)",
    ):
        assert count in line, line


def test_images_that_no_annotation_names_are_counted(photos, capsys):
    shutil.rmtree(photos / "val")
    write_part(photos / "val", ["images"])
    rows = photos / "val/val_annotations.txt"
    rows.write_text("0.png\tcat\n\n1.png\tdog\n")
    assert images_of(load(photos)) == (12, 2)
    assert "4 not in val_annotations.txt (first val/images/2.png)" in capsys.readouterr().out
    rows.write_text("0.png\tcat\n1.png dog\n")
    assert "val_annotations.txt line 2: a file name, a tab and a class" in refusal(photos)
    rows.write_text("0.png\tcat\nabsent.png\tdog\n")
    assert "1 of 14 images cannot be read, first" in refusal(photos)


def test_links_are_followed_and_none_twice(photos, tmp_path):
    write_part(tmp_path / "elsewhere", ["more"], count=3, seed=5)
    (photos / "train/cat/more").symlink_to(tmp_path / "elsewhere/more")
    (photos / "train/cat/loop").symlink_to(photos / "train/cat")
    assert images_of(load(photos)) == (15, 12)
    (photos / "train/cat/gone.png").symlink_to("/nowhere/gone.png")
    assert "1 of 28 images cannot be read, first" in refusal(photos)
    assert images_of(load(photos, skip_unreadable=True)) == (15, 12)


def test_what_was_left_out_is_said_again_when_the_cache_serves(photos, capsys):
    (photos / "train/cat/0.png").write_bytes(b"damaged")
    for _ in range(2):
        assert images_of(load(photos, skip_unreadable=True)) == (11, 12)
        assert "1 of 24 images cannot be read" in capsys.readouterr().out


def test_a_class_whose_training_images_are_all_damaged(photos):
    for file in (photos / "train/dog").iterdir():
        file.write_bytes(b"damaged")
    assert "class dog: none of its training" in refusal(photos, skip_unreadable=True)
    shutil.rmtree(photos / "train/dog")
    shutil.copytree(photos / "train/cat", photos / "train/dog")
    for file in photos.glob("val/*/*"):
        file.write_bytes(b"damaged")
    assert "none of the 12 images of the test split can be read" in refusal(
        photos, skip_unreadable=True
    )


# names of classes


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_a_class_in_two_unicode_spellings_is_one(photos, forms):
    for part, form in zip(("train", "val"), forms, strict=True):
        (photos / part / "cat").rename(photos / part / unicodedata.normalize(form, "café"))
    data = load(photos)
    assert data.class_names == ("café", "dog") and data.test.labels.tolist() == [0] * 6 + [1] * 6


def test_two_folders_of_one_class_are_said(photos, capsys):
    (photos / "train/cat").rename(photos / "train" / unicodedata.normalize("NFC", "café"))
    write_part(photos / "train", [unicodedata.normalize("NFD", "café")], count=2)
    (photos / "val/cat").rename(photos / "val/café")
    data = load(photos)
    assert data.num_classes == 2 and images_of(data) == (14, 12)
    assert "2 folders of train/ are called café" in capsys.readouterr().out


def test_a_class_that_differs_in_case_is_told_by_its_other_name(photos):
    (photos / "val/cat").rename(photos / "val/Cat")
    assert "class Cat of val/ (one of 1) has no training image; train/ has 'cat'" in refusal(photos)


def test_file_names_that_are_no_utf8(photos):
    os.rename(photos / "train/cat/0.png", os.fsencode(photos / "train/cat") + b"/caf\xe9.png")
    assert images_of(load(photos)) == (12, 12)


# statistics


@pytest.mark.parametrize("name", ["half", "imagenet", "cifar10_old"])
def test_a_folder_named_like_a_normalisation_has_its_own(photos, monkeypatch, name):
    photos.rename(photos.parent / name)
    monkeypatch.chdir(photos.parent)
    data = load_dataset(name, "data")
    pixels = data.train.images.double() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3), correction=0), rtol=1e-12)
