"""--teacher_temperature views: a teacher as sure of training images as it is right on others."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import assert_same_run, command, fails, folder_of
from scipy.optimize import brentq
from scipy.special import softmax

import train_student
import train_teacher
from utils.calibration.temperature import (
    T_MAX,
    T_MIN,
    matching_temperature,
    mean_confidence,
)
from utils.data import load_dataset, synthetic
from utils.data.views import TrainLoader
from utils.program import UserError
from utils.settings import TeacherSource
from utils.teachers.loading import load_teacher

RNG = np.random.default_rng(5)
LOGITS = 3 * RNG.standard_normal((5000, 7))


def confidence_by_scipy(logits: np.ndarray, temperature: float) -> float:
    return softmax(logits.astype(np.float64) / temperature, axis=1).max(axis=1).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_matched_temperature_is_that_of_a_root_finder(dtype):
    logits = torch.from_numpy(LOGITS).to(dtype)
    stored = logits.double().numpy()
    for accuracy in (0.2, 0.55, 0.8, 0.97):
        temperature, at_bound = matching_temperature(
            lambda T, logits=logits: mean_confidence(logits, T), accuracy
        )
        root = brentq(
            lambda T, accuracy=accuracy: confidence_by_scipy(stored, T) - accuracy,
            T_MIN,
            T_MAX,
            xtol=1e-12,
        )
        assert not at_bound and temperature == pytest.approx(root, rel=1e-8)


def test_confidence_of_classes_that_are_ruled_out_and_of_no_rows():
    rows = torch.tensor([[0.0, 0.0, -math.inf], [math.log(3.0), 0.0, -math.inf]])
    assert mean_confidence(rows) == pytest.approx((0.5 + 0.75) / 2, rel=1e-7)
    assert mean_confidence(rows[:0]) == 0


@pytest.mark.parametrize("accuracy, bound", [(1.0, T_MIN), (1 / 7, T_MAX)])
def test_an_accuracy_that_no_confidence_reaches_is_met_at_the_bound(accuracy, bound):
    logits = torch.from_numpy(LOGITS)
    matched = matching_temperature(lambda T: mean_confidence(logits, T), accuracy)
    assert matched == (bound, True)


@pytest.fixture
def train(tiny_npz, teacher, tmp_path):
    """A student of two epochs, which matches an accuracy that its teacher may have."""

    def train(name: str, *flags):
        root = tmp_path / name
        line = command(tiny_npz, root, "--epochs", "2", "--teacher_path", str(teacher), *flags)
        train_student.main([str(word) for word in line])
        return folder_of(root)

    return train


VIEWS = ("--teacher_temperature", "views", "--teacher_accuracy", "0.6")


def test_a_student_of_matched_views(train, tiny_npz, teacher, tmp_path, capsys):
    cache = ("--teacher_cache", tmp_path / "cache")
    plain = train("plain", *VIEWS)
    shown = capsys.readouterr().out
    assert_same_run(plain, train("first", *VIEWS, *cache))
    assert_same_run(plain, train("second", *VIEWS, *cache))
    assert "from_resnet8_NLL_Tcal=views_seed=42" in plain.name

    # The logits of the first epoch's views, computed here once more, an image at a time.
    data = load_dataset(str(tiny_npz), "")
    net = load_teacher(TeacherSource((str(teacher),)), data)
    loader = TrainLoader(data.train, 1, seed=42, device="cpu", flip=data.flip)
    logits = torch.cat([net.logits(loader.batch(draw).images) for draw in loader.epoch(1)]).numpy()
    root = brentq(lambda T: confidence_by_scipy(logits, T) - 0.6, T_MIN, T_MAX, xtol=1e-12)

    result = json.loads((plain / "result.json").read_text())["teacher"]
    seen = result["seen"]
    assert seen["temperature"] == pytest.approx(root, rel=1e-4)  # logits of float32
    assert seen["view_confidence"] == pytest.approx(confidence_by_scipy(logits, 1.0), rel=1e-5)
    assert result["teacher_temperature"] == "views" and result["teacher_accuracy"] == 0.6
    with np.load(plain / "predictions.npz") as arrays:
        own = confidence_by_scipy(arrays["teacher_val_logits"], 1.0)
    assert seen["val_confidence"] == pytest.approx(own, rel=1e-6)
    assert f"with T = {seen['temperature']:.4g} 60.00 % on training images" in shown

    # Another accuracy is another student.
    with pytest.raises(UserError, match="teacher_accuracy"):
        train("plain", "--teacher_temperature", "views", "--teacher_accuracy", "0.7")


def test_the_confidences_of_every_teacher_are_recorded(train):
    result = json.loads((train("plain") / "result.json").read_text())["teacher"]
    assert result["seen"]["temperature"] == 1
    assert 0.25 < result["seen"]["view_confidence"] < 1 and "teacher_accuracy" not in result


@pytest.mark.long
def test_views_by_the_accuracy_on_validation(tmp_path, monkeypatch):
    """Teacher and student on images with noisy labels, 500 of each split."""
    monkeypatch.setattr(synthetic, "BLOCK", 500)
    monkeypatch.setattr(synthetic, "IMAGES", dict.fromkeys(("train", "val", "test"), 500))
    words = "--dataset synthetic --model resnet8 --epochs 2 --lr 0.05 --train-batch-size 32"
    common = f"{words} --checkpoint {tmp_path}"
    train_teacher.main(f"{common}/teacher".split())
    teacher = folder_of(tmp_path / "teacher")
    views = f"--teacher_temperature views --teacher_path {teacher}"
    train_student.main(f"{common}/student {views}".split())
    student = folder_of(tmp_path / "student")
    result = json.loads((student / "result.json").read_text())["teacher"]
    metrics = json.loads((teacher / "result.json").read_text())["best"]["val"]
    assert result["val"]["top1"] == metrics["top1"]
    assert result["seen"]["temperature"] != 1 and "tempered" in result["test"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--teacher_accuracy 0.7", "--teacher_accuracy 0.7 .*give --teacher_temperature views"),
        ("--teacher_temperature views --teacher_accuracy 72.6", "such as 0.9"),
        ("--teacher_temperature views --mix mixup", "--mix mixup: .*give auto or a number"),
        ("--teacher_temperature view", "'view' will not do"),
        ("--teacher_temperature views --teacher_accuracy 0.01", "no T .*another --teacher_accur"),
    ],
)
def test_refused(tiny_npz, teacher, tmp_path, capsys, flags, words):
    line = command(tiny_npz, tmp_path, "--teacher_path", str(teacher), *flags.split())
    error = fails(capsys, tmp_path, train_student.main, line)
    assert re.search(words, error), error


def test_of_a_third_party_an_accuracy_must_be_given(tiny_npz, teacher, tmp_path, capsys):
    state = torch.load(teacher / "model_best.pth", weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "theirs.pth")
    line = command(
        tiny_npz,
        tmp_path / "students",
        "--teacher_path",
        str(tmp_path / "theirs.pth"),
        *("--teacher", "resnet8", "--teacher_temperature", "views"),
    )
    error = fails(capsys, tmp_path, train_student.main, line)
    assert "give --teacher_accuracy" in error
    train_student.main([*line, "--epochs", "1", "--teacher_accuracy", "0.6"])
    result = json.loads((folder_of(tmp_path) / "result.json").read_text())
    assert result["teacher"]["seen"]["temperature"] > 0
