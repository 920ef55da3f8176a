"""Teachers that are files of logits: which row an image gets, what a run says, what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, assert_same_weights, command, fails, folder_of, write_npz
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

import train_student
from utils.analysis.records import read_runs
from utils.analysis.sections import ReportChoice, sections_of
from utils.calibration.temperature import fit_temperature
from utils.data import load_dataset, split_indices
from utils.data.views import NUM_VIEWS, TrainLoader, epoch_plan, take_views, view_windows
from utils.program import UserError
from utils.settings import TeacherSource
from utils.teachers.answers import StoredAnswers
from utils.teachers.loading import load_teacher

IMAGES, TRAINED, TESTED, CLASSES = 150, 135, 40, 4  # of tiny_npz
EVERY = np.arange(IMAGES)


def logits_for(images: int, views: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (images, CLASSES) if views is None else (views, images, CLASSES)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stored(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def load(file, data, **options):
    return load_teacher(TeacherSource(logits=str(file), **options), data)


@pytest.fixture(scope="module")
def data(tiny_npz):
    return load_dataset(str(tiny_npz), "data")


# Which row an image gets


@pytest.mark.parametrize("with_validation", [True, False])
@pytest.mark.parametrize("views", [None, 1, 3, NUM_VIEWS])
def test_every_image_of_a_step_gets_its_own_row(tmp_path, data, views, with_validation):
    """By a loop over the steps of four epochs."""
    training, _ = split_indices(IMAGES, 0)
    logits = logits_for(IMAGES, views)
    np.save(tmp_path / "a.npy", logits if with_validation else logits[..., training, :])
    teacher = load(tmp_path / "a.npy", data)
    answers = StoredAnswers(teacher, data, Accelerator(cpu=True), seed=5)
    loader = TrainLoader(data.train, batch_size=64, seed=5, device=torch.device("cpu"))

    for epoch in range(1, 5):
        order, drawn = epoch_plan(TRAINED, 5, epoch, flip=True).numpy()
        place = 0
        with answers.during_epoch(epoch):
            for draw in loader.epoch(epoch):
                rows = answers(loader.batch(draw)).numpy()
                for row in rows:
                    image = training[order[place]]
                    view = drawn[place] if views == NUM_VIEWS else (epoch - 1) % (views or 1)
                    expected = logits[image] if views is None else logits[view, image]
                    np.testing.assert_array_equal(row, expected)
                    place += 1
        assert place == TRAINED


def test_all_stored_views_of_a_net_teach_as_the_net_does(tmp_path, tiny_npz, teacher, data):
    """The student's weights are the same, bit for bit."""
    net = load_teacher(TeacherSource((str(teacher),)), data).to(torch.device("cpu"))
    windows = view_windows(data.train.images)
    index = torch.arange(TRAINED)
    logits = []
    for view in range(NUM_VIEWS):
        images = take_views(windows, index, torch.full_like(index, view))
        logits.append(net.logits(images).numpy())
    file = stored(tmp_path / "net.npz", train_logits=np.stack(logits))
    teachers = {"net": ["--teacher_path", str(teacher)], "file": ["--teacher_logits", file]}
    for name, flags in teachers.items():
        train_student.main(command(tiny_npz, tmp_path / name, *flags))
    assert_same_weights(folder_of(tmp_path / "net"), folder_of(tmp_path / "file"))


def test_probabilities_become_logarithms(tmp_path, data):
    probs = softmax(logits_for(IMAGES).astype(np.float64), axis=1)
    probs[EVERY[:50], probs[:50].argmin(axis=1)] = 0
    probs /= probs.sum(axis=1, keepdims=True)
    file = stored(tmp_path / "a.npz", train_probs=probs)
    logits = load(file, data).training[0]
    training, _ = split_indices(IMAGES, 0)
    with np.errstate(divide="ignore"):
        expected = np.log(probs[training])
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    assert logits.isneginf().sum() == np.isneginf(expected).sum() > 0


def test_data_with_their_own_validation_split(tmp_path):
    """All training images teach, and one number of them fits."""
    arrays = dict(np.load(write_npz(tmp_path / "a.npz", 3, 60, 20)))
    own = {"x_val": arrays["x_test"], "y_val": arrays["y_test"]}
    np.savez(tmp_path / "own.npz", **arrays, **own)
    data = load_dataset(str(tmp_path / "own.npz"), "data")
    logits = np.random.default_rng(0).normal(size=(80, 3))
    file = stored(tmp_path / "b.npz", train_logits=logits[:60])
    np.testing.assert_allclose(load(file, data).training[0], logits[:60], rtol=1e-6)
    with pytest.raises(UserError, match="80 images.*has 60;"):
        load(stored(tmp_path / "c.npz", train_logits=logits), data)


# What a run and a report say


def run(data: Path, root: Path, file: str, *flags: str) -> dict:
    words = command(data, root, "--teacher_logits", file, "--epochs", "1", *flags)
    return train_student.main(words)


def only_section(*roots: Path):
    records, left_out = read_runs(roots, "best")
    assert not left_out
    [section] = sections_of(records, ReportChoice(resamples=0))[0]
    return section


@pytest.mark.parametrize("distill", ["KD", "DKD", "LSKD", "DIST"])
def test_a_run_of_each_distillation(tmp_path, tiny_npz, data, distill):
    """The file holds all: the teacher is measured, and stands above its student."""
    test_logits = logits_for(TESTED, seed=1)
    file = stored(tmp_path / "their.npz", train_logits=logits_for(IMAGES), test_logits=test_logits)
    result = run(tiny_npz, tmp_path / "runs", file, "--distill", distill, "--teacher_loss", "votes")
    assert result["label"].endswith("_from_logits_their")
    teacher = result["teacher"]
    assert (teacher["path"], teacher["loss"], teacher["seed"]) == (file, "votes", None)
    own = -log_softmax(test_logits.astype(float), axis=1)[np.arange(TESTED), data.test.labels]
    assert teacher["test"]["raw"]["nll"] == pytest.approx(own.mean(), rel=1e-9)

    groups = only_section(tmp_path / "runs").groups
    assert [(group.name.split()[:2], list(group.rows)) for group in groups] == [
        (["logits", "their"], ["raw"]),
        (["resnet8", distill], ["raw", "scaled"]),
    ]
    assert groups[1].teacher is groups[0]


@pytest.mark.parametrize("known", [(), ("val",)])
def test_a_teacher_that_says_nothing_of_test_has_no_row(tmp_path, tiny_npz, data, known, capsys):
    logits = {"val_logits": logits_for(IMAGES - TRAINED)} if known else {}
    file = stored(tmp_path / "their.npz", train_logits=logits_for(TRAINED), **logits)
    result = run(tiny_npz, tmp_path / "runs", file)
    assert "test" not in result["teacher"] and ("val" in result["teacher"]) == bool(known)
    assert "validation top-1" in capsys.readouterr().out or not known
    assert (folder_of(tmp_path / "runs") / "reliability.png").exists()
    # Another file of that name taught, too.
    (tmp_path / "b").mkdir()
    other = stored(tmp_path / "b/their.npz", train_logits=logits_for(TRAINED, seed=1))
    run(tiny_npz, tmp_path / "b/runs", other)

    groups = only_section(tmp_path).groups
    assert len({group.name for group in groups}) == 2 and not any(group.teacher for group in groups)
    for group in groups:
        assert group.name.startswith("resnet8 KD T=4 Lambda=0.9 from logits their logits=")


def test_another_file_is_another_setting(tmp_path, tiny_npz, capsys):
    file = stored(tmp_path / "a.npz", train_logits=logits_for(IMAGES))
    run(tiny_npz, tmp_path / "runs", file)
    assert run(tiny_npz, tmp_path / "runs", file)["label"].endswith("_from_logits_a")
    assert "finished" in capsys.readouterr().out
    stored(tmp_path / "a.npz", train_logits=logits_for(IMAGES, seed=1))
    alone = r"other settings \(teacher's sha256 was \w+ and is \w+\); "
    with pytest.raises(UserError, match=alone):
        run(tiny_npz, tmp_path / "runs", file)
    Path(file).unlink()
    with pytest.raises(UserError, match="no such file"):
        run(tiny_npz, tmp_path / "runs", file, "--overwrite")
    assert run(tiny_npz, tmp_path / "runs", file)["label"].endswith("_from_logits_a")


@pytest.mark.parametrize("temperature", ["auto", "2.5"])
def test_a_temperature(tmp_path, tiny_npz, data, temperature):
    """`auto` is the one that fits val_logits."""
    val, test = logits_for(IMAGES - TRAINED, seed=1), logits_for(TESTED, seed=2)
    val[np.arange(len(val)), data.val.labels] += 1
    logits = logits_for(IMAGES)
    file = stored(tmp_path / "a.npz", train_logits=logits, val_logits=val, test_logits=test)
    result = run(tiny_npz, tmp_path / "runs", file, "--teacher_temperature", temperature)
    assert result["label"].endswith(f"_from_logits_a_Tcal={temperature}")
    T = fit_temperature(val, data.val.labels)[0] if temperature == "auto" else 2.5
    own = -log_softmax(test.astype(float) / T, axis=1)[np.arange(TESTED), data.test.labels]
    assert result["teacher"]["test"]["tempered"]["nll"] == pytest.approx(own.mean(), rel=1e-6)
    row = only_section(tmp_path / "runs").groups[0].rows["tempered"]
    assert row.cells["nll"].mean == pytest.approx(own.mean(), rel=1e-6)


@pytest.mark.parametrize("accuracy", [None, 0.45])
def test_the_temperature_of_training_views(tmp_path, tiny_npz, data, accuracy):
    """SciPy's root: as sure of the rows that teach as val_logits are right, or as is said."""
    training, _ = split_indices(IMAGES, 0)
    logits = 2 * logits_for(IMAGES)
    arrays = {"train_logits": logits}
    flags = ["--teacher_accuracy", str(accuracy)]
    if accuracy is None:
        val = logits_for(IMAGES - TRAINED, seed=1)
        val[np.arange(len(val))[:6], data.val.labels[:6]] += 9
        accuracy = (val.argmax(axis=1) == data.val.labels.numpy()).mean()
        arrays["val_logits"] = val
        flags = []
    file = stored(tmp_path / "a.npz", **arrays)
    result = run(tiny_npz, tmp_path / "runs", file, "--teacher_temperature", "views", *flags)

    def gap(T: float) -> float:
        return softmax(logits[training].astype(float) / T, axis=1).max(axis=1).mean() - accuracy

    seen = result["teacher"]["seen"]
    assert seen["temperature"] == pytest.approx(brentq(gap, 0.1, 19, xtol=1e-12), rel=1e-6)
    assert seen["view_confidence"] == pytest.approx(gap(1) + accuracy, rel=1e-6)
    assert "val_confidence" in seen  # a row that does not teach, or val_logits


# What is refused

ROWS = logits_for(IMAGES)
PROBS = softmax(ROWS, axis=1)


def changed(array: np.ndarray, value, place=(3, 1)) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


FILES = {
    "other images": (
        {"train_logits": ROWS[:-1]},
        "149 images.*has 135, or 150 with the validation",
    ),
    "other classes": ({"train_logits": ROWS[:, :3]}, "train logits have 3 classes.*has 4"),
    "NaN": ({"train_logits": changed(ROWS, np.nan)}, "train_logits holds NaN .image 3, 1 of 150"),
    "+inf": ({"train_logits": changed(ROWS, np.inf)}, "no finite float32 .image 3,"),
    "too large": (
        {"train_logits": changed(ROWS.astype(float), 1e39)},
        "no finite float32 .image 3",
    ),
    "-inf": ({"train_logits": changed(ROWS, -np.inf, 7)}, "rules every class out.*image 7"),
    "labels": ({"train_logits": np.zeros(IMAGES, int)}, "holds int64, as labels do"),
    "one number": ({"train_logits": ROWS[:, 0]}, r"has shape \(150,\)"),
    "four dimensions": ({"train_logits": ROWS[None, None]}, r"shape \(1, 1, 150, 4\)"),
    "no images": ({"train_logits": ROWS[:0]}, "has shape"),
    "texts": ({"train_logits": ROWS.astype(str)}, "holds <U.*floats"),
    "complex": ({"train_logits": ROWS.astype(complex)}, "holds complex128"),
    "no sum": ({"train_probs": 1.002 * PROBS}, "do not sum to 1; divide.*image 0, 150 of 150"),
    "below 0": ({"train_probs": changed(PROBS, -0.1)}, "probability below 0 .image 3"),
    "NaN in probabilities": ({"train_probs": changed(PROBS, np.nan)}, "train_probs holds NaN"),
    "probabilities as logits": (
        {"train_logits": PROBS},
        r"train_logits holds probabilities .*numpy.savez\(file, train_probs=probs\)",
    ),
    "the same as halves": ({"train_logits": PROBS.astype(np.float16)}, "holds probabilities"),
    "both": ({"train_logits": ROWS, "train_probs": PROBS}, "train_logits and train_probs; leave"),
    "none": ({"test_logits": ROWS}, "neither train_logits nor train_probs"),
    "other names": (
        {"logits": ROWS},
        "holds logits, which nothing reads; it may hold train_logits",
    ),
    "objects": ({"train_logits": ROWS.astype(object)}, "Object arrays cannot be loaded"),
    "other order": (
        {"train_logits": ROWS, "train_labels": np.zeros(IMAGES, int)},
        "train_labels are not the labels",
    ),
    "odd labels": ({"train_logits": ROWS, "train_labels": ROWS}, "train_labels is float32"),
    "validation": ({"train_logits": ROWS, "val_logits": ROWS}, "val logits.*has 15 images"),
    "test": ({"train_logits": ROWS, "test_probs": PROBS}, "test logits.*has 40 images"),
    "views of test": (
        {"train_logits": ROWS, "test_logits": logits_for(TESTED, 2)},
        r"test logits have shape \(2, 40, 4\)",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_teach(tmp_path, capsys, tiny_npz, name):
    arrays, pattern = FILES[name]
    file = stored(tmp_path / "a.npz", **arrays)
    words = command(tiny_npz, tmp_path / "runs", "--teacher_logits", file)
    error = fails(capsys, tmp_path, train_student.main, words)
    assert re.search(f"--teacher_logits {re.escape(file)}: .*{pattern}", error), error


@pytest.mark.parametrize(
    "content, pattern",
    [
        (None, "no such file; give an .npz or .npy file"),
        (b"0.1,0.9", r"cannot be read \(it is neither an .npy nor an .npz file\); write it with"),
        (b"", "cannot be read"),
        (b"PK\x05\x06" + bytes(18), "neither train_logits nor"),
    ],
)
def test_no_file_of_logits(tmp_path, capsys, tiny_npz, content, pattern):
    file = tmp_path / "a.npz"
    if content is not None:
        file.write_bytes(content)
    words = command(tiny_npz, tmp_path / "runs", "--teacher_logits", str(file))
    error = fails(capsys, tmp_path, train_student.main, words)
    assert re.search(f"--teacher_logits {re.escape(str(file))}: .*{pattern}", error), error


@pytest.mark.parametrize("what", ["pickle", "cut"])
def test_an_npy_file_that_is_damaged_or_would_run_code(tmp_path, capsys, tiny_npz, what):
    file = tmp_path / "a.npy"
    np.save(file, ROWS.astype(object) if what == "pickle" else ROWS)
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    words = command(tiny_npz, tmp_path / "runs", "--teacher_logits", str(file))
    assert "cannot be read" in fails(capsys, tmp_path, train_student.main, words)


FLAGS = [
    ("", "--teacher_path or --teacher_logits: exactly one.*give one"),
    ("--teacher_path t", "--teacher_path or --teacher_logits: exactly one"),
    ("--mix mixup", "--mix mixup: --teacher_logits has no logits of mixtures"),
    ("--distill KD+AT", "--distill KD.AT: compares the teacher.s maps.*give --distill KD or"),
    ("--teacher_cache c", "--teacher_cache has no effect with --teacher_logits"),
    ("--teacher resnet8", "--teacher has no effect with --teacher_logits"),
    ("--teacher_norm imagenet", "--teacher_norm has no effect with"),
    ("--teacher_size 8", "--teacher_size has no effect with"),
    ("--teacher_key ema", "--teacher_key has no effect with"),
    ("--teacher_select last", "--teacher_select has no effect with"),
    ("--teacher_temperature auto", "auto: .* has no val_logits.*trained on.*give a number"),
    ("--teacher_temperature views", "views: .* has no val_logits.*give --teacher_accuracy"),
    ("--distill LSKD", "--distill: LSKD divides.*give --distill KD"),
]


@pytest.mark.parametrize("flags, pattern", FLAGS)
def test_flags_that_do_not_go_with_it(tmp_path, capsys, tiny_npz, flags, pattern):
    file = stored(tmp_path / "a.npz", train_logits=changed(ROWS, -np.inf))
    words = [*flags.split(), *(["--teacher_logits", file] if flags else [])]
    words = command(tiny_npz, tmp_path / "runs", *words)
    assert re.search(pattern, fails(capsys, tmp_path, train_student.main, words))


# The page


def test_the_pages_file_of_people(tmp_path, monkeypatch):
    """On images and answers that are drawn here: labels and shares of the same images."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 10, 10_000)
    counts = rng.multinomial(20, [0.05] * 10, 10_000)
    counts[np.arange(10_000), labels] += 30
    (tmp_path / "data/cifar10h").mkdir(parents=True)
    np.save(tmp_path / "data/cifar10h/cifar10h-counts.npy", counts)
    images = rng.integers(0, 255, (10_000, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data/cifar10.npz", x_test=images, y_test=labels)
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/teachers.md").read_text(), re.S)
    assert len(code.strip().splitlines()) <= 10
    exec(code, {})

    data = load_dataset("cifar10h.npz", "data")
    teacher = load("people.npz", data)
    assert teacher.training.shape == (1, 4500, 10) and len(data.test.labels) == 5000
    assert teacher.val_and_test["val"].shape == (500, 10)
    for split, logits in {"train": teacher.training[0], **teacher.val_and_test}.items():
        agreement = (logits.argmax(dim=1) == getattr(data, split).labels).double().mean()
        assert agreement > 0.99, split
