import hashlib
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import given_file
from PIL import Image
from scipy.stats import chi2
from torchvision.transforms import functional as TF

from utils.data import NORMALISATION, load_dataset, pixel_statistics, split_indices
from utils.data import synthetic as synthetic_module
from utils.data.names import CLASS_NAMES as NAMES_OF
from utils.program import UserError


def small_arrays(train=40, test=10, classes=4, size=8, channels=(3,)):
    rng = np.random.default_rng(0)
    shape = (size, size, *channels)
    return {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test) % classes,
    }


@pytest.fixture
def save(tmp_path):
    def write(arrays=None, name="own.npz", compress=False, **changes):
        arrays = {**(arrays or small_arrays()), **changes}
        kept = {key: value for key, value in arrays.items() if value is not None}
        (np.savez_compressed if compress else np.savez)(tmp_path / name, **kept)
        return str(tmp_path / name)

    return write


def as_saved(images):
    """As an .npz file has them, (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).numpy()


def refused(name, data_dir="nowhere", source="--da"):
    """The message of the UserError that loading ends with: one line that names its source."""
    with pytest.raises(UserError) as caught:
        load_dataset(name, data_dir, is_main=False)
    message = str(caught.value)
    assert "\n" not in message and source in message
    return message


# the split


@pytest.mark.parametrize("n", [2, 9, 10, 11, 1000, 5003])
def test_split_is_a_tenth_disjoint_and_complete(n):
    train, val = split_indices(n, 0)
    assert len(val) == max(1, n // 10)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(n))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(val) > 0)


def test_split_is_frozen():
    # A teacher's validation images must stay the same ones in every version of this code.
    assert split_indices(30, 0)[1].tolist() == [2, 11, 26]
    assert split_indices(30, 1)[1].tolist() == [7, 16, 21]


def test_splits_hold_the_images_of_their_indices(save):
    arrays = small_arrays()
    data = load_dataset(save(arrays), "nowhere", split_seed=5)
    for split, index in zip((data.train, data.val), split_indices(40, 5), strict=True):
        assert np.array_equal(as_saved(split.images), arrays["x_train"][index])
        assert np.array_equal(split.labels.numpy(), arrays["y_train"][index])
    assert np.array_equal(as_saved(data.test.images), arrays["x_test"])
    assert data.train.images.shape == (36, 3, 8, 8) and data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64 and data.train.posterior is None


def test_fingerprint_tells_data_apart_but_not_splits(save):
    data = load_dataset(save(), "nowhere")
    assert data.fingerprint == load_dataset(save(name="b.npz"), "", split_seed=1).fingerprint
    for key, value in small_arrays().items():
        changed = value.copy()
        changed.flat[0] ^= 1
        assert load_dataset(save(**{key: changed}), "nowhere").fingerprint != data.fingerprint


def test_measured_statistics_are_those_of_the_training_split(save):
    data = load_dataset(save(), "nowhere")
    shares = data.train.images.double() / 255
    np.testing.assert_allclose(data.mean, shares.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, shares.std((0, 2, 3), correction=0), rtol=1e-12)
    mean, std = pixel_statistics(torch.full((4, 3, 8, 8), 255, dtype=torch.uint8))
    assert mean == (1.0, 1.0, 1.0) and min(std) > 0  # a channel that never varies


# a validation split that the data bring


def with_validation(**changes):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    return small_arrays() | {"x_val": images, "y_val": np.arange(12)[::-1] % 4} | changes


def test_own_validation_images_validate_and_all_of_train_trains(save):
    arrays = with_validation()
    data = load_dataset(save(arrays), "nowhere")
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        assert np.array_equal(as_saved(split.images), arrays[f"x_{part}"])
        assert np.array_equal(split.labels.numpy(), arrays[f"y_{part}"])
    shares = torch.from_numpy(arrays["x_train"]).double() / 255
    np.testing.assert_allclose(data.mean, shares.mean((0, 1, 2)), rtol=1e-12)


def test_the_fingerprint_knows_own_validation_images(save):
    arrays = with_validation()
    own = load_dataset(save(arrays), "nowhere").fingerprint
    assert own != load_dataset(save(), "nowhere").fingerprint
    for key in ("x_val", "y_val"):
        changed = arrays[key].copy()
        changed.flat[0] ^= 1
        assert load_dataset(save(arrays, **{key: changed}), "nowhere").fingerprint != own


def test_a_split_seed_without_effect_is_refused(save):
    with pytest.raises(UserError, match="--split-seed 3: has no effect on .*own.npz"):
        load_dataset(save(with_validation()), "nowhere", split_seed=3)


BAD_VALIDATION = {
    "labels missing": ({"y_val": None}, "has no y_val; .*may hold x_val and y_val"),
    "images missing": ({"x_val": None}, "has no x_val; .*may hold x_val and y_val"),
    "sizes differ": ({"x_val": np.zeros((12, 9, 9, 3), "u1")}, "x_val .* sizes must agree"),
    "too few labels": ({"y_val": np.zeros(9, int)}, r"y_val has shape \(9,\); it must be \(12,\)"),
    "unknown class": ({"y_val": np.full(12, 4)}, "class 4 of y_val has no training image"),
}


@pytest.mark.parametrize("case", BAD_VALIDATION)
def test_bad_validation_images_are_refused(save, case):
    changes, expected = BAD_VALIDATION[case]
    assert re.search(expected, refused(save(with_validation(**changes))))


def test_classes_without_a_validation_image_are_said(save, capsys):
    y_train = np.arange(40) % 2  # four validate, of which none is of the two rare classes
    rare = split_indices(40, 0)[0][:2]
    y_train[rare] = 2, 3
    load_dataset(save(y_train=y_train), "nowhere")
    said = capsys.readouterr().out
    assert "no validation image of 2 of 4 classes (class 2, 3)" in said and said.count("\n") == 1
    load_dataset(save(with_validation(y_val=np.arange(12) % 3)), "nowhere")
    assert "no validation image of 1 of 4 classes (class 3)" in capsys.readouterr().out


# what an .npz may hold


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_grey_images_and_channels_first(save, channels):
    last = small_arrays(size=33, channels=channels)
    images = load_dataset(save(last), "nowhere").test.images
    expected = np.broadcast_to(last["x_test"].reshape(10, 33, 33, -1), (10, 33, 33, 3))
    assert np.array_equal(as_saved(images), expected)
    if channels:
        moved = {key: last[key].transpose(0, 3, 1, 2) for key in ("x_train", "x_test")}
        assert torch.equal(load_dataset(save(last, **moved), "nowhere").test.images, images)


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i8", "uint64"])
def test_labels_of_any_integer_type_and_in_a_column(save, dtype):
    arrays, plain = small_arrays(), load_dataset(save(), "nowhere").fingerprint
    labels = {key: arrays[key].astype(dtype)[:, None] for key in ("y_train", "y_test")}
    data = load_dataset(save(arrays, **labels), "nowhere")
    assert data.train.labels.dtype == torch.int64 and data.fingerprint == plain


def test_a_class_that_only_validates_is_said(save, capsys):
    y_train = np.arange(40) % 4
    y_train[split_indices(40, 0)[1][0]] = 4
    data = load_dataset(save(y_train=y_train), "nowhere")
    assert data.num_classes == 5
    said = capsys.readouterr().out
    assert re.search("--split-seed 0: .* 1 of 5 classes .*validation split", said)
    load_dataset(save(y_train=y_train), "nowhere", split_seed=1)
    assert "in the validation split" not in capsys.readouterr().out


def test_other_arrays_compression_and_fortran_order_are_welcome(save):
    arrays, plain = small_arrays(), load_dataset(save(), "nowhere").fingerprint
    other = {"x_train": np.asfortranarray(arrays["x_train"]), "names": np.array(["a", 1], object)}
    assert load_dataset(save(arrays, compress=True, **other), "nowhere").fingerprint == plain


def test_other_arrays_are_named(save, capsys):
    load_dataset(save(x_valid=np.zeros((3, 8, 8, 3), "u1"), notes=np.array(["own"])), "nowhere")
    assert "own.npz: not read: notes, x_valid" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["U", "S"])
def test_names_of_classes(save, kind):
    names = ["cat", "dog", "emu", "fox"]
    data = load_dataset(save(classes=np.array(names, kind)), "nowhere")
    assert data.class_names == tuple(names)
    assert data.fingerprint == load_dataset(save(), "nowhere").fingerprint


@pytest.mark.parametrize(
    "classes", [np.array(["cat", "dog"]), np.arange(4), np.array(["a", 1, 2, 3], object)]
)
def test_classes_that_are_no_names_are_said(save, capsys, classes):
    assert load_dataset(save(classes=classes), "nowhere").class_names is None
    assert "classes is no array of 4 texts" in capsys.readouterr().out


def test_known_data_sets_have_known_names(save, tmp_path):
    for name, classes in (("cifar10", 10), ("cifar100", 100), ("svhn", 10), ("cifar10", 4)):
        save(small_arrays(train=300, classes=classes), name=f"{name}.npz")
        names = load_dataset(name, tmp_path).class_names
        if classes == 4:  # not what its name says
            assert names is None
        else:
            assert len(set(names)) == classes and list(names) == sorted(names)
            own = np.array([f"my {k}" for k in range(classes)])
            save(small_arrays(train=300, classes=classes), name=f"{name}.npz", classes=own)
            assert load_dataset(name, tmp_path).class_names == tuple(own)
    assert NAMES_OF["cifar100"][23] == "cloud" and NAMES_OF["cifar10"][9] == "truck"


def empty(*shape, kind="u1"):
    return np.zeros(shape, kind)


BAD_ARRAYS = {
    "shares": ({"x_train": np.ones((40, 8, 8, 3))}, "is float64; .*round.*times 255"),
    "oblong": ({"x_train": empty(40, 8, 9, 3)}, r"shape \(40, 8, 9, 3\); .*square"),
    "too small": ({"x_train": empty(40, 7, 7, 3)}, "8 to 512"),
    "too large": ({"x_train": empty(40, 513, 513)}, "8 to 512"),
    "scalar": ({"x_train": np.uint8(3)}, "x_train has shape"),
    "empty": ({"x_test": empty(0, 8, 8), "y_test": empty(0)}, r"x_test has shape \(0, 8"),
    "sizes differ": ({"x_test": empty(10, 9, 9, 3)}, "sizes must agree"),
    "float labels": ({"y_train": empty(40, kind=float)}, "y_train is float64"),
    "text labels": ({"y_train": np.full(40, "cat")}, "y_train is <U3"),
    "one-hot": ({"y_train": np.eye(40, dtype=int)}, r"it must be \(40,\)"),
    "too few labels": ({"y_test": empty(9)}, r"it must be \(10,\)"),
    "negative": ({"y_train": np.arange(40) - 1}, "y_train has 40 classes, -1 to 38, not 0 to 39"),
    "far too large": ({"y_test": np.full(10, 10**9)}, "class 1000000000 of y_test has no train"),
    "twelve channels": ({"x_train": empty(40, 32, 32, 12)}, "with 1 or 3 channels are wanted"),
    "transparent": ({"x_train": empty(40, 8, 8, 4)}, "with 1 or 3 channels are wanted"),
    "one class": ({"y_train": empty(40)}, "every label in y_train is 0"),
    "1 to K": ({"y_train": np.arange(40) % 4 + 1}, "1 to 4, not 0 to 3; .*numpy.searchsorted"),
    "two missing": ({"y_train": None, "y_test": None}, "has no y_train, y_test"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(save, case):
    changes, expected = BAD_ARRAYS[case]
    path = save(**changes)
    assert re.match(f"--dataset {path}: .*{expected}", refused(path))


@pytest.mark.parametrize("compress", [False, True])
def test_truncated_files(save, compress):
    path = Path(save(compress=compress))
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:length])
        refused(str(path))


def test_an_npy_and_a_folder_are_not_npz(tmp_path):
    with open(tmp_path / "own.npz", "wb") as file:
        np.save(file, np.zeros(3))
    assert "not a readable .npz" in refused(str(tmp_path / "own.npz"))
    (tmp_path / "folder.npz").mkdir()
    assert "0 images of 0 classes in train/CLASS/" in refused(str(tmp_path / "folder.npz"))


def test_unknown_names_suggest_the_nearest():
    assert "there is none; did you mean cifar100? It is one of" in refused("CIFAR-100")
    for name in ("mnist", "absent.npz"):
        assert "check the path; it is one of cifar10, cifar100, svhn" in refused(name)


def test_an_npz_in_data_dir_serves_as_cifar(save, tmp_path):
    path = save(small_arrays(classes=10, size=32), name="cifar10.npz")
    data = load_dataset("cifar10", tmp_path, is_main=False)
    assert (data.mean, data.std) == NORMALISATION["cifar10"]
    assert data.name == "cifar10" and data.num_classes == 10
    own = load_dataset(path, "nowhere")
    assert own.mean != data.mean and own.fingerprint == data.fingerprint
    save(name="cifar10.npz", x_test=None)
    assert refused("cifar10", tmp_path).startswith(f"--data_dir {tmp_path}, file cifar10.npz: has")


ARRAYS = small_arrays(classes=10, size=32)


class Fake:
    """What torchvision's CIFAR10 (`train`) and SVHN (`split`) hold; SVHN's images (N, C, H, W)."""

    def __init__(self, root, train=None, split=None, download=False):
        assert download is True
        part = "test" if train is False or split == "test" else "train"
        self.data, self.targets = ARRAYS[f"x_{part}"], ARRAYS[f"y_{part}"].tolist()
        if split is not None:
            self.data, self.labels = self.data.transpose(0, 3, 1, 2), np.array(self.targets)


@pytest.mark.parametrize("name, copies, flip", [("cifar10", 1, True), ("svhn_extra", 2, False)])
def test_torchvision_arrays(monkeypatch, tmp_path, name, copies, flip):
    import torchvision

    monkeypatch.setattr(torchvision.datasets, name.split("_")[0].upper(), Fake)
    data = load_dataset(name, tmp_path)
    assert np.array_equal(as_saved(data.test.images), ARRAYS["x_test"])
    assert data.test.labels.tolist() == ARRAYS["y_test"].tolist()
    assert len(data.train.labels) + len(data.val.labels) == 40 * copies
    assert data.flip is flip and load_dataset(name, tmp_path, flip=not flip).flip is not flip


# folders of images


def write_images(folder, classes=("cat", "dog"), side=16, suffix=".png"):
    """Images of random grey levels, 3 of a class to train and 2 to test; the arrays they make."""
    rng, made = np.random.default_rng(0), {}
    for part, count in (("train", 3), ("val", 2)):
        made[part] = rng.integers(0, 256, (count * len(classes), side, side, 3), dtype=np.uint8)
        for n, image in enumerate(made[part]):
            label, number = classes[n // count], n % count
            place = folder / part / label / ("" if number else "deep")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number}{suffix}")
    return made


@pytest.fixture
def photos(tmp_path):
    write_images(tmp_path / "photos")
    return tmp_path / "photos"


def test_a_folder_of_images_is_what_its_files_hold(tmp_path):
    made = write_images(tmp_path / "photos")
    (tmp_path / "photos/train/.ipynb_checkpoints").mkdir()
    for name in ("Thumbs.db", "._1.png"):
        (tmp_path / "photos/train/cat" / name).write_text("no image")
    data = load_dataset(f"{tmp_path}/photos", tmp_path / "data")
    assert data.name == "photos" and data.num_classes == 2 and data.flip
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    # Sorted by path: 1.png, then deep/0.png.
    assert np.array_equal(as_saved(data.test.images), made["val"][[1, 0, 3, 2]])
    train = as_saved(torch.cat([data.train.images, data.val.images]))
    assert {image.tobytes() for image in train} == {image.tobytes() for image in made["train"]}


def test_a_test_folder_goes_before_val(photos, tmp_path):
    shutil.copytree(photos / "train", photos / "test")
    assert len(load_dataset(str(photos), tmp_path).test.labels) == 6


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (16, 48)])
def test_the_shorter_side_is_resized_and_the_middle_cut_out(photos, tmp_path, size):
    x, y = np.meshgrid(*(np.arange(side) * 255 / side for side in size))
    image = Image.fromarray(np.stack([x, y, y], axis=2).astype(np.uint8))
    image.save(photos / "val/cat/1.png")
    made = load_dataset(str(photos), tmp_path, image_size=16).test.images[0]
    expected = TF.pil_to_tensor(TF.center_crop(TF.resize(image, 16), 16))  # cuts whole pixels
    assert made.shape == expected.shape and (made.int() - expected.int()).abs().max() < 9


@pytest.mark.parametrize("suffix", [".JPEG", ".bmp", ".webp", ".gif", ".ppm"])
def test_any_format_that_pillow_reads(tmp_path, suffix):
    write_images(tmp_path / "photos", suffix=suffix)
    assert len(load_dataset(str(tmp_path / "photos"), tmp_path).test.images) == 4


def test_grey_and_transparent_images(photos, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "val/cat/1.png")
    Image.fromarray(pixels[..., 0]).save(photos / "val/dog/1.png")
    images = as_saved(load_dataset(str(photos), tmp_path).test.images)
    assert np.array_equal(images[0], pixels[..., :3])
    assert np.array_equal(images[2], pixels[..., :1].repeat(3, axis=2))


def test_images_are_decoded_once_for_a_content(photos, tmp_path, monkeypatch):
    data = tmp_path / "data"
    first = load_dataset(str(photos), data)
    [cache] = data.glob("decoded/*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        assert load_dataset(str(photos), data).fingerprint == first.fingerprint
    cache.write_bytes(cache.read_bytes()[:1000])
    assert "delete it" in refused(str(photos), data, "decoded")
    os.utime(photos / "val/cat/1.png", (1, 1))
    load_dataset(str(photos), data)
    load_dataset(str(photos), data, image_size=8)
    assert len(list(data.glob("decoded/*"))) == 3


def test_a_data_folder_that_one_may_only_read_is_enough(photos, tmp_path, capsys):
    (tmp_path / "file").touch()  # where root, too, can make no folder
    data = load_dataset(str(photos), tmp_path / "file")
    assert "not kept" in capsys.readouterr().out
    assert data.fingerprint == load_dataset(str(photos), tmp_path / "data").fingerprint


def test_tiny_imagenet_has_its_own_layout(save, tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    made = write_images(folder, ("n02", "n01"), side=64)["val"]
    (folder / "val/images").mkdir()
    for label, name in (("n02", "val_1.png"), ("n01", "val_0.png")):
        (folder / "val" / label / "1.png").rename(folder / "val/images" / name)
    rows = ["val_1.png\tn02\t0\t0\t63\t63", "val_0.png\tn01\t0\t0\t63\t63"]
    (folder / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")
    data = load_dataset("tiny_imagenet", tmp_path)
    assert data.name == "tiny_imagenet" and data.test.labels.tolist() == [1, 0]
    assert np.array_equal(as_saved(data.test.images), made[[1, 3]])
    assert "tiny-imagenet-200.zip" in refused("tiny_imagenet", tmp_path / "nowhere")
    save(name="tiny_imagenet.npz")
    assert load_dataset("tiny_imagenet", tmp_path).num_classes == 4


def cut_short(folder):
    for name in ("train/cat/1.png", "val/dog/1.png"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])


def paint(*size):
    return lambda file: Image.new("RGB", size).save(file)


BAD_FOLDERS = [  # what is done to which files or folders, and what is said
    ("train/dog", shutil.rmtree, "3 images of 1 class in tr"),
    ("val", shutil.rmtree, "2 classes in train/CLASS/ and 0 in"),
    ("val/dog", lambda folder: folder.rename(folder.parent / "emu"), "class emu .*; .*train/emu/"),
    ("val/cat/1.png", paint(20, 16), "1.png is 20 x 16 pixels, not 16 x 16; give --image_size"),
    ("**/*.png", paint(4, 4), "x_train has shape .* 8 to 512 pixels"),
    (".", cut_short, "2 of 10 images cannot be read, first .*cat/1.png .*--skip_unreadable"),
]


@pytest.mark.parametrize("place, damage, expected", BAD_FOLDERS)
def test_bad_folders_are_refused(photos, tmp_path, place, damage, expected):
    for path in list(photos.glob(place)) if "*" in place else [photos / place]:
        damage(path)
    assert re.search(expected, refused(str(photos), tmp_path))
    assert not (tmp_path / "decoded").exists()


def test_unreadable_images_are_left_out_and_said(photos, tmp_path, capsys):
    whole = load_dataset(str(photos), tmp_path).test
    cut_short(photos)
    data = load_dataset(str(photos), tmp_path, skip_unreadable=True)
    assert "2 of 10 images cannot be read" in capsys.readouterr().out
    assert len(data.train.labels) + len(data.val.labels) == 5
    assert data.test.labels.tolist() == [0, 0, 1]
    assert torch.equal(data.test.images, whole.images[[0, 1, 3]])


def test_more_images_than_memory_holds(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert "GiB of memory" in refused(str(photos), tmp_path)


# synthetic


@pytest.fixture(scope="module")
def synthetic():
    return load_dataset("synthetic", "nowhere")


SPLITS = ("train", "val", "test")


def test_synthetic_is_the_same_every_time(synthetic):
    np.random.seed(1)
    torch.manual_seed(1)
    again = load_dataset("synthetic", "elsewhere")
    assert again.fingerprint == synthetic.fingerprint
    for part in SPLITS:
        one, other = getattr(synthetic, part), getattr(again, part)
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.posterior, other.posterior)


def test_synthetic_brings_a_validation_and_a_test_split_of_its_own(synthetic):
    sizes = {part: tuple(getattr(synthetic, part).images.shape) for part in SPLITS}
    side = (3, 32, 32)
    assert sizes == {"train": (2000, *side), "val": (2000, *side), "test": (10_000, *side)}
    for part in SPLITS:
        split = getattr(synthetic, part)
        assert len(split.labels) == len(split.posterior) == len(split.images)
        assert split.labels.bincount(minlength=10).min() > len(split.labels) / 15
    assert synthetic.num_classes == 10
    with pytest.raises(UserError, match="--split-seed 3: has no effect on --dataset synthetic"):
        load_dataset("synthetic", "nowhere", split_seed=3)


def test_synthetic_splits_are_disjoint_draws(synthetic):
    images = torch.cat([getattr(synthetic, part).images for part in SPLITS])
    posteriors = torch.cat([getattr(synthetic, part).posterior for part in SPLITS])
    assert len({image.numpy().tobytes() for image in images}) == 14_000
    assert len(np.unique(posteriors.numpy(), axis=0)) == 14_000
    # One generator after the other: the blocks' sides and shares are as unrelated as any draws.
    blocks = posteriors.reshape(7, 2000, 10)
    for first in range(7):
        for second in range(first):
            related = np.corrcoef(blocks[first].flatten(), blocks[second].flatten())[0, 1]
            assert abs(related) < 5 / np.sqrt(20_000)


# Of the training split as all versions have drawn it, and of the whole.
TRAINING_IMAGES = "54055b6ed6ebb73c7f152a9219f01c1eb5d3484e0a3e5e1404bb49f1a4e4ddaf"
FINGERPRINT = "9ba8fbb1dd69d4a1474fec43d3c3c818155f0d60d45bd9da7319d43d75d7668d"


def test_synthetic_training_images_stay_and_the_fingerprint_tells_the_splits(synthetic):
    # Whoever changes a draw changes the fingerprint, by which runs on other data are told apart.
    assert hashlib.sha256(as_saved(synthetic.train.images)).hexdigest() == TRAINING_IMAGES
    assert synthetic.fingerprint == FINGERPRINT


def chance_of_labels(posterior, labels) -> float:
    """The p-value of a chi-square test that labels are drawn from a posterior.

    Images are told apart by their likeliest class and by a fifth of its range, 0.5 to 1. In each
    such cell the times that it is drawn are a sum of independent draws.
    """
    largest, likeliest = posterior.max(1)
    cell = 5 * likeliest + (10 * largest - 5).long().clamp(0, 4)
    drawn = (labels == likeliest).double()
    surplus = torch.zeros(50).double().index_add(0, cell, drawn - largest)
    variance = torch.zeros(50).double().index_add(0, cell, largest * (1 - largest))
    return chi2.sf((surplus**2 / variance).sum().item(), 50)


@pytest.mark.parametrize("part", SPLITS)
def test_synthetic_labels_are_drawn_from_the_posterior(synthetic, part):
    split = getattr(synthetic, part)
    posterior = split.posterior
    torch.testing.assert_close(posterior.sum(1), torch.ones(len(posterior)).double())
    assert posterior.min() >= 0 and ((posterior > 0).sum(1) == 2).all()
    assert posterior[torch.arange(len(posterior)), split.labels].min() > 0
    assert 1e-3 < chance_of_labels(posterior, split.labels) < 1 - 1e-3
    # A sharper or a flatter one is told from it.
    for power in (1.5, 0.5):
        other = posterior**power
        other /= other.sum(1, keepdim=True)
        assert chance_of_labels(other, split.labels) < 1e-4


def test_synthetic_blend_can_be_read_off_the_pixels(synthetic):
    # Least squares on the true patterns: what a net could at best do, and nearly exact.
    rng = np.random.default_rng(synthetic_module.SEED)
    patterns = synthetic_module.class_patterns(rng).reshape(10, -1)
    for part in SPLITS:
        split = getattr(synthetic, part)
        pixels = as_saved(split.images[:2000]).reshape(2000, -1).astype(float)
        pixels -= pixels.mean(1, keepdims=True)
        parts = np.linalg.lstsq(patterns.T, pixels.T, rcond=None)[0].T.clip(0)
        estimate = parts / parts.sum(1, keepdims=True)
        assert np.abs(estimate - split.posterior[:2000].numpy()).sum(1).mean() < 0.1


def test_real_cifar10():
    data = load_dataset("cifar10", given_file("KD_DATA", "cifar10.npz").parent, is_main=False)
    assert len(data.train.labels) + len(data.val.labels) in (39_536, 50_000)
    assert data.test.labels.bincount().tolist() == [1000] * 10
    measured = pixel_statistics(data.train.images)
    np.testing.assert_allclose(measured, (data.mean, data.std), atol=1e-3)


def test_real_tiny_imagenet(tmp_path):
    folder = given_file("KD_DATA", "tiny-imagenet-200/wnids.txt").parent
    (tmp_path / "tiny-imagenet-200").symlink_to(folder)
    first = load_dataset("tiny_imagenet", tmp_path)
    assert load_dataset("tiny_imagenet", tmp_path).fingerprint == first.fingerprint
    names = (folder / "wnids.txt").read_text().split()
    assert first.train.images.shape == (450 * len(names), 3, 64, 64)
    assert first.test.labels.bincount().tolist() == [50] * len(names)
    assert first.class_names == tuple(sorted(names))
