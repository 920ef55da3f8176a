import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import utils.data
from utils.data import NORMALISATION, dataset_label, load_dataset, pixel_statistics, split_indices
from utils.data.synthetic import SYNTHETIC_TEST, SYNTHETIC_TRAIN
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


def refused(name, data_dir="nowhere"):
    """The message of the UserError that loading ends with, which must be one line."""
    with pytest.raises(UserError) as caught:
        load_dataset(name, data_dir, download=False)
    message = str(caught.value)
    assert "\n" not in message
    assert "--dataset" in message or "--data_dir" in message
    return message


# the split


@pytest.mark.parametrize("n", [2, 9, 10, 11, 1000, 5003])
def test_split_is_a_tenth_disjoint_and_complete(n):
    train, val = split_indices(n, 0)
    assert len(val) == max(1, n // 10)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(n))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(val) > 0)


def test_split_depends_on_the_split_seed_alone():
    first = split_indices(1000, 0)
    np.random.seed(3)
    torch.manual_seed(3)
    assert all(np.array_equal(a, b) for a, b in zip(first, split_indices(1000, 0), strict=True))
    assert not np.array_equal(first[1], split_indices(1000, 1)[1])


def test_split_is_frozen():
    # A teacher's validation images must stay the same ones in every version of this code.
    assert split_indices(30, 0)[1].tolist() == [2, 11, 26]
    assert split_indices(30, 1)[1].tolist() == [7, 16, 21]


def test_splits_hold_the_images_of_their_indices(save):
    arrays = small_arrays()
    data = load_dataset(save(arrays), "nowhere", split_seed=5)
    for split, index in zip((data.train, data.val), split_indices(40, 5), strict=True):
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), arrays["x_train"][index])
        assert np.array_equal(split.labels.numpy(), arrays["y_train"][index])
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), arrays["x_test"])
    assert data.train.images.shape == (36, 3, 8, 8) and data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.train.posterior is None


def test_fingerprint_tells_data_apart_but_not_splits(save):
    data = load_dataset(save(), "nowhere")
    assert len(data.fingerprint) == 64
    assert data.fingerprint == load_dataset(save(name="b.npz"), "", split_seed=1).fingerprint
    for key, value in small_arrays().items():
        changed = value.copy()
        changed.flat[0] ^= 1
        assert load_dataset(save(**{key: changed}), "nowhere").fingerprint != data.fingerprint


# statistics


def test_measured_statistics_are_those_of_the_training_split(save):
    data = load_dataset(save(), "nowhere")
    pixels = data.train.images.double() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3), correction=0), rtol=1e-12)
    assert data.mean != load_dataset(save(), "nowhere", split_seed=1).mean


def test_a_channel_that_never_varies_does_not_divide_by_zero():
    mean, std = pixel_statistics(torch.full((4, 3, 8, 8), 255, dtype=torch.uint8))
    assert mean == (1.0, 1.0, 1.0)
    assert min(std) > 0


# what an .npz may hold


@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("channels", [(), (1,)])
def test_grey_images_become_three_equal_channels(save, size, channels):
    arrays = small_arrays(size=size, channels=channels)
    images = load_dataset(save(arrays), "nowhere").test.images
    assert images.shape == (10, 3, size, size)
    for c in range(3):
        assert np.array_equal(images[:, c].numpy(), arrays["x_test"].reshape(10, size, size))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_first_is_the_same_data_as_channels_last(save, channels):
    last = small_arrays(channels=(channels,))
    moved = {key: last[key].transpose(0, 3, 1, 2) for key in ("x_train", "x_test")}
    data = [load_dataset(save(arrays), "nowhere") for arrays in (last, {**last, **moved})]
    assert torch.equal(data[0].train.images, data[1].train.images)
    assert data[0].fingerprint == data[1].fingerprint


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", ">i8", "uint64"])
def test_labels_of_any_integer_type(save, dtype):
    arrays = small_arrays()
    labels = {key: arrays[key].astype(dtype) for key in ("y_train", "y_test")}
    data = load_dataset(save(arrays, **labels), "nowhere")
    assert data.train.labels.dtype == torch.int64 and data.num_classes == 4


def test_number_of_classes_counts_both_parts(save):
    y_test = np.full(10, 6)
    assert load_dataset(save(y_test=y_test), "nowhere").num_classes == 7


def test_other_arrays_compression_and_fortran_order_are_welcome(save):
    arrays = small_arrays()
    plain = load_dataset(save(arrays), "nowhere").fingerprint
    path = save(
        arrays,
        compress=True,
        x_train=np.asfortranarray(arrays["x_train"]),
        classes=np.array(["cat", "dog"], dtype=object),
    )
    assert load_dataset(path, "nowhere").fingerprint == plain


def test_labels_in_folder_names(save):
    assert dataset_label("cifar10") == "cifar10"
    assert dataset_label("/some/where/tiny100.npz") == "tiny100"
    assert dataset_label("my data: v2.npz") == "my_data__v2"
    assert dataset_label("...npz") not in ("", ".", "..")
    assert load_dataset(save(name="my set.npz"), "nowhere").name == "my_set"


# what is refused

BAD_ARRAYS = {
    "float images": (dict(x_train=np.zeros((40, 8, 8, 3))), "x_train is float64"),
    "int images": (dict(x_test=np.zeros((10, 8, 8, 3), int)), "x_test is int64"),
    "oblong": (dict(x_train=np.zeros((40, 8, 9, 3), "u1")), r"shape \(40, 8, 9, 3\)"),
    "two channels": (dict(x_train=np.zeros((40, 8, 8, 2), "u1")), "x_train has shape"),
    "flat": (dict(x_train=np.zeros((40, 192), "u1")), "x_train has shape"),
    "too small": (dict(x_train=np.zeros((40, 7, 7, 3), "u1")), "8 to 512"),
    "too large": (dict(x_train=np.zeros((40, 513, 513), "u1")), "8 to 512"),
    "scalar": (dict(x_train=np.uint8(3)), "x_train is empty"),
    "empty": (
        dict(x_test=np.zeros((0, 8, 8, 3), "u1"), y_test=np.zeros(0, int)),
        "x_test is empty",
    ),
    "one image": (
        dict(x_train=np.zeros((1, 8, 8, 3), "u1"), y_train=np.zeros(1, int)),
        "one image",
    ),
    "sizes differ": (dict(x_test=np.zeros((10, 9, 9, 3), "u1")), "sizes must agree"),
    "float labels": (dict(y_train=np.zeros(40)), "y_train is float64"),
    "bool labels": (dict(y_train=np.zeros(40, bool)), "y_train is bool"),
    "text labels": (dict(y_train=np.full(40, "cat")), "y_train is <U3"),
    "column": (dict(y_train=np.zeros((40, 1), int)), r"it must be \(40,\)"),
    "too few labels": (dict(y_test=np.zeros(9, int)), r"it must be \(10,\)"),
    "negative": (dict(y_train=np.arange(40) - 1), "y_train has label -1"),
    "far too large": (dict(y_test=np.full(10, 10**9)), "y_test has label 1000000000"),
    "one class": (dict(y_train=np.zeros(40, int), y_test=np.zeros(10, int)), "every label is 0"),
    "structured": (dict(x_train=np.zeros(40, [("a", "u1")])), "x_train is"),
    "missing": (dict(x_test=None), "has no x_test"),
    "two missing": (dict(y_train=None, y_test=None), "has no y_train, y_test"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(save, case):
    changes, expected = BAD_ARRAYS[case]
    path = save(**changes)
    message = refused(path)
    assert re.search(expected, message), message
    assert message.startswith(f"--dataset {path}: ")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


@pytest.mark.parametrize("key", ["x_train", "y_test"])
def test_a_pickle_is_refused_and_its_code_not_run(save, tmp_path, monkeypatch, key):
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    path = save(**{key: np.array([Bomb()] * 40, dtype=object)})
    assert f"{key} is object" in refused(path)
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_refused_and_its_code_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    (tmp_path / "own.npz").write_bytes(pickle.dumps(Bomb()))
    assert "not a readable .npz" in refused(str(tmp_path / "own.npz"))
    assert not (tmp_path / "ran").exists()


def write_headers(path, shape, data=b""):
    """An .npz whose image arrays declare `shape` and hold `data`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("train", "test"):
            for key, dtype, dims in ((f"x_{part}", "|u1", shape), (f"y_{part}", "<i8", shape[:1])):
                header = io.BytesIO()
                np.lib.format.write_array_header_1_0(
                    header, {"shape": dims, "fortran_order": False, "descr": dtype}
                )
                archive.writestr(f"{key}.npy", header.getvalue() + data)
    return str(path)


def test_a_header_that_declares_more_than_there_is(tmp_path):
    path = write_headers(tmp_path / "own.npz", (100_000, 512, 512, 3), b"\0" * 100)
    assert "not as long as its header says" in refused(path)


def test_more_than_memory_holds_is_refused_before_it_is_unpacked(save, monkeypatch):
    monkeypatch.setattr(utils.data, "available_memory", lambda: 1e-6)
    monkeypatch.setattr(np, "load", None)
    assert "of memory" in refused(save(compress=True))


def test_available_memory_is_plausible():
    assert 0.01 < utils.files.available_memory() < 1e5


@pytest.mark.parametrize("shape", [(-40, -8, 8, 3), (2**70, 8, 8, 3)])
def test_absurd_headers(tmp_path, shape):
    refused(write_headers(tmp_path / "own.npz", shape))


@pytest.mark.parametrize("compress", [False, True])
def test_truncated_files(save, compress):
    path = Path(save(compress=compress))
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:length])
        refused(str(path))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_never_a_traceback(save, compress):
    path = Path(save(compress=compress))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_dataset(str(path), "nowhere")
        except UserError as error:
            assert "\n" not in str(error)


def test_an_npy_and_a_folder_are_not_npz(tmp_path):
    np.save(tmp_path / "own.npy", np.zeros(3))
    (tmp_path / "own.npy").rename(tmp_path / "own.npz")
    assert "not a readable .npz" in refused(str(tmp_path / "own.npz"))
    (tmp_path / "folder.npz").mkdir()
    assert "no such file" in refused(str(tmp_path / "folder.npz"))


def test_unknown_names_suggest_the_nearest():
    assert "did you mean cifar10?" in refused("cfar10")
    assert "did you mean cifar100?" in refused("CIFAR-100")
    assert "did you mean synthetic?" in refused("syntetic")
    message = refused("mnist")
    assert "did you mean" not in message and "cifar10, cifar100, synthetic" in message
    assert "no such file" in refused("absent.npz")


# CIFAR


def test_no_data_says_where_to_put_it(tmp_path):
    message = refused("cifar10", tmp_path)
    assert str(tmp_path / "cifar10.npz") in message
    assert str(tmp_path / "cifar-10-batches-py") in message


def test_a_failed_download_says_where_to_put_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    def no_network(self):
        raise OSError("no route\nto host")

    monkeypatch.setattr(CIFAR100, "download", no_network)
    with pytest.raises(UserError, match="no route to host.*cifar100.npz.*cifar-100-python"):
        load_dataset("cifar100", tmp_path)


def test_an_npz_in_data_dir_serves_as_cifar(save, tmp_path):
    path = save(small_arrays(classes=10, size=32), name="cifar10.npz")
    data = load_dataset("cifar10", tmp_path, download=False)
    assert (data.mean, data.std) == NORMALISATION["cifar10"]
    assert data.name == "cifar10" and data.num_classes == 10
    own = load_dataset(path, "nowhere")
    assert own.mean != data.mean and own.fingerprint == data.fingerprint


def test_cifar_with_other_classes_is_refused(save, tmp_path):
    save(small_arrays(train=200, classes=20), name="cifar100.npz")
    message = refused("cifar100", tmp_path)
    assert "20 classes" in message and "cifar100.npz" in message


def test_faults_in_data_dir_name_the_file(save, tmp_path):
    save(name="cifar10.npz", x_test=None)
    assert refused("cifar10", tmp_path).startswith(f"--data_dir {tmp_path}, file cifar10.npz: has")


def test_torchvision_arrays(monkeypatch, tmp_path):
    import torchvision

    arrays = small_arrays(classes=10, size=32)

    class Fake:
        base_folder = "cifar-10-batches-py"

        def __init__(self, root, train, download):
            assert root == tmp_path and download is True
            part = "train" if train else "test"
            self.data, self.targets = arrays[f"x_{part}"], arrays[f"y_{part}"].tolist()

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load_dataset("cifar10", tmp_path)
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), arrays["x_test"])
    assert data.test.labels.tolist() == arrays["y_test"].tolist()


# synthetic


@pytest.fixture(scope="module")
def synthetic():
    return load_dataset("synthetic", "nowhere")


def test_synthetic_is_the_same_every_time(synthetic):
    np.random.seed(1)
    torch.manual_seed(1)
    again = load_dataset("synthetic", "elsewhere", split_seed=9)
    assert again.fingerprint == synthetic.fingerprint
    assert torch.equal(again.test.images, synthetic.test.images)
    assert not torch.equal(again.val.images, synthetic.val.images)


def test_synthetic_sizes(synthetic):
    assert len(synthetic.train.labels) + len(synthetic.val.labels) == SYNTHETIC_TRAIN
    assert len(synthetic.test.labels) == SYNTHETIC_TEST
    assert synthetic.num_classes == 10
    assert synthetic.test.images.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_synthetic_posterior_is_a_distribution_over_two_classes(synthetic, part):
    split = getattr(synthetic, part)
    assert split.posterior.shape == (len(split.labels), 10)
    assert split.posterior.dtype == torch.float64
    assert split.posterior.min() >= 0
    torch.testing.assert_close(split.posterior.sum(1), torch.ones(len(split.labels)).double())
    assert (split.posterior > 0).sum(1).max() <= 2


def test_synthetic_labels_are_drawn_from_the_posterior(synthetic):
    posterior = torch.cat([synthetic.train.posterior, synthetic.test.posterior])
    labels = torch.cat([synthetic.train.labels, synthetic.test.labels])
    onehot = torch.nn.functional.one_hot(labels, 10).double()
    for low in np.arange(0, 1, 0.1):
        inside = (posterior > low) & (posterior <= low + 0.1)
        p = posterior[inside]
        # Four standard deviations of a sum of independent draws.
        tolerance = 4 * (p * (1 - p)).sum().sqrt() / len(p)
        assert abs(onehot[inside].mean() - p.mean()) < tolerance
    assert torch.all(posterior[torch.arange(len(labels)), labels] > 0)


def test_synthetic_blend_can_be_read_off_the_pixels(synthetic):
    # Least squares on the true patterns: what a net could at best do, and nearly exact.
    rng = np.random.default_rng(utils.data.synthetic.SYNTHETIC_SEED)
    patterns = utils.data.synthetic.class_patterns(rng).reshape(10, -1)
    pixels = synthetic.test.images.permute(0, 2, 3, 1).reshape(SYNTHETIC_TEST, -1).double().numpy()
    pixels -= pixels.mean(1, keepdims=True)
    parts = np.linalg.lstsq(patterns.T, pixels.T, rcond=None)[0].T.clip(0)
    parts = (parts / parts.sum(1, keepdims=True)) ** utils.data.synthetic.SYNTHETIC_SHARPNESS
    estimate = parts / parts.sum(1, keepdims=True)
    assert np.abs(estimate - synthetic.test.posterior.numpy()).sum(1).mean() < 0.1


# real data


def real(name):
    folder = os.environ.get("KD_DATA", "")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"needs {name} in the folder that the environment variable KD_DATA names")
    return Path(folder)


def test_real_cifar10():
    data = load_dataset("cifar10", real("cifar10.npz"), download=False)
    assert len(data.train.labels) + len(data.val.labels) in (39_536, 50_000)
    assert data.test.labels.bincount().tolist() == [1000] * 10
    measured = pixel_statistics(data.train.images)
    np.testing.assert_allclose(measured, (data.mean, data.std), atol=1e-3)


def test_real_tiny100():
    data = load_dataset(str(real("tiny100.npz") / "tiny100.npz"), "nowhere")
    assert data.name == "tiny100" and data.num_classes == 100
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [45_000, 5000, 5000]
    assert data.test.labels.bincount().tolist() == [50] * 100
