"""Files of logits and labels as rows of scripts.report and scripts.posthoc."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import fails
from scipy.special import softmax

from scripts import evaluate, posthoc, report
from utils.analysis.records import finished_nets, read_runs
from utils.analysis.sections import ReportChoice, sections_of
from utils.calibration.metrics import classification_metrics
from utils.calibration.posthoc import temperature_scaling
from utils.calibration.temperature import fit_temperature
from utils.program import UserError

CLASSES = 4


def logits_and_labels(images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels that the logits know something of, overconfidently."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, CLASSES))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return 3 * logits, labels


VAL, VAL_LABELS = logits_and_labels(300, seed=1)
TEST, TEST_LABELS = logits_and_labels(400, seed=2)
WHOLE = {
    "val_logits": VAL,
    "val_labels": VAL_LABELS,
    "test_logits": TEST,
    "test_labels": TEST_LABELS,
}


def sections(*roots: Path, resamples: int = 0):
    records, left_out = read_runs(roots, "best")
    assert not left_out
    return sections_of(records, ReportChoice(resamples=resamples))[0]


def write(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_a_row_of_its_own(tmp_path):
    """Raw and scaled values are those of its logits; without validation there is no scaled row."""
    without = {"test_probs": softmax(TEST, axis=1), "test_labels": TEST_LABELS}
    [section] = sections(
        write(tmp_path / "jax.npz", **WHOLE), write(tmp_path / "api.npz", **without)
    )
    assert section.title == "400-images"
    rows = {group.name: group.rows for group in section.groups}
    assert {name: list(kinds) for name, kinds in rows.items()} == {
        "logits api": ["raw"],
        "logits jax": ["raw", "scaled"],
    }
    T, _ = fit_temperature(VAL, VAL_LABELS)
    expected = {
        ("logits api", "raw"): classification_metrics(TEST, TEST_LABELS),
        ("logits jax", "raw"): classification_metrics(TEST, TEST_LABELS),
        ("logits jax", "scaled"): classification_metrics(TEST, TEST_LABELS, T),
    }
    for (name, logits), metrics in expected.items():
        for metric in ("top1", "ece", "nll", "brier"):
            cell = rows[name][logits].cells[metric]
            assert cell.mean == pytest.approx(metrics[metric], rel=1e-5)


def test_an_infinite_nll_is_explained(tmp_path, capsys):
    """An empty cell has a reason, and only where there is one."""
    probs = softmax(TEST, axis=1)
    report.main([str(write(tmp_path / "sure.npz", test_probs=probs, test_labels=TEST_LABELS))])
    assert "its NLL is infinite" not in capsys.readouterr().out

    probs[0] = np.eye(CLASSES)[(TEST_LABELS[0] + 1) % CLASSES]
    report.main([str(write(tmp_path / "wrong.npz", test_probs=probs, test_labels=TEST_LABELS))])
    assert "its NLL is infinite" in capsys.readouterr().out


def test_an_infinite_nll_is_in_no_difference(tmp_path, capsys):
    probs = softmax(TEST, axis=1)
    sure = write(tmp_path / "sure.npz", test_probs=probs, test_labels=TEST_LABELS)
    probs[0] = np.eye(CLASSES)[(TEST_LABELS[0] + 1) % CLASSES]
    wrong = write(tmp_path / "wrong.npz", test_probs=probs, test_labels=TEST_LABELS)
    columns = ["--columns", "nll", "top1", "--resamples", "0"]
    report.main([str(sure), str(wrong), *columns, "--against", "logits sure"])
    [row] = re.findall(r"logits wrong .*", capsys.readouterr().out.split("Difference from")[1])
    assert len(re.findall(r"\[", row)) == 1 and "–" in row


def test_a_single_image_tests_nothing(tmp_path, capsys):
    for name, logits in (("first", [[1.0, 2.0]]), ("second", [[1.0, 3.0]])):
        write(tmp_path / f"{name}.npz", test_logits=np.array(logits), test_labels=np.array([1]))
    files = [str(tmp_path / f"{name}.npz") for name in ("first", "second")]
    report.main([*files, "--resamples", "0", "--against", "logits first"])
    _, difference = capsys.readouterr().out.split("Difference from")
    assert "[" not in difference and "a single test image" in difference


def test_nothing_is_fitted_to_a_probability_of_0(tmp_path, capsys):
    probs = softmax(VAL, axis=1)
    probs[0] = np.eye(CLASSES)[0]
    arrays = {"val_probs": probs, "val_labels": VAL_LABELS}
    test = {"test_logits": TEST, "test_labels": TEST_LABELS}
    posthoc.main([str(write(tmp_path / "votes.npz", **arrays, **test))])
    printed = capsys.readouterr().out
    assert "nothing is fitted: logits of -inf" in printed and "Dirichlet" not in printed


def test_it_stands_among_the_runs_on_the_same_images(tmp_path, teacher, capsys):
    """By their test labels in their order; tested against a run, and drawn."""
    predictions = dict(np.load(teacher / "predictions.npz"))
    labels = predictions["test_labels"]
    same = write(
        tmp_path / "same.npz", test_logits=predictions["best_test_logits"], test_labels=labels
    )
    other = write(tmp_path / "other.npz", test_logits=TEST[:40], test_labels=TEST_LABELS[:40])
    names = [
        (section.title, [group.name for group in section.groups])
        for section in sections(teacher, same, other)
    ]
    assert sorted(names) == [
        ("40-images", ["logits other"]),
        ("tiny", ["logits same", "resnet8 NLL"]),
    ]

    out = ["--out", str(tmp_path / "out"), "--against", "logits same", "--classes"]
    report.main([str(teacher), str(same), "--resamples", "50", *out])
    shown = capsys.readouterr().out
    assert "Difference from logits same" in shown and "has no scaled row" in shown
    assert "logits same" in (tmp_path / "out/report.html").read_text()
    lines = (tmp_path / "out/runs.csv").read_text().splitlines()
    assert sum("logits same" in line for line in lines) == 1

    # A pack of the last epoch has no logits of the best one.
    pack = tmp_path / "last.zip"
    report.main([str(teacher), "--epoch", "last", "--resamples", "0", "--pack", str(pack)])
    [section] = sections(pack, same)
    assert section.title == "tiny" and len(section.groups) == 2


def test_posthoc_fits_its_maps(tmp_path, capsys):
    file = write(tmp_path / "jax.npz", **WHOLE)
    posthoc.main([str(file)])
    shown = capsys.readouterr().out
    fit = temperature_scaling(VAL.astype(np.float32), VAL_LABELS)
    assert f"T = {fit.facts['temperature']:.4g}" in shown and "jax.npz" in shown
    nll = classification_metrics(fit(TEST.astype(np.float32)), TEST_LABELS)["nll"]
    assert f"{nll:.4f}" in shown


def test_a_file_twice_is_one_row_and_two_of_one_name_are_two(tmp_path):
    first = write(tmp_path / "a.npz", **WHOLE)
    (tmp_path / "b").mkdir()
    second = write(tmp_path / "b/a.npz", test_logits=2 * TEST, test_labels=TEST_LABELS)
    [section] = sections(first, first, second)
    assert len({group.name for group in section.groups}) == len(section.groups) == 2
    copy = shutil.copy(first, tmp_path / "b/c.npz")
    assert len(finished_nets([first, Path(copy)], "best", False, logits_alone=True)) == 2


MISTAKES = {
    "no test": ({"val_logits": VAL, "val_labels": VAL_LABELS}, "has no test_logits or test_probs"),
    "no labels": ({"test_logits": TEST}, "of test it needs both"),
    "no logits": ({"test_labels": TEST_LABELS}, "of test it needs both"),
    "fewer": ({"test_logits": TEST, "test_labels": TEST_LABELS[1:]}, "there are 399 labels"),
    "views": ({"test_logits": TEST[None], "test_labels": TEST_LABELS}, r"shape \(1, 400, 4\)"),
    "from 1": ({"test_logits": TEST, "test_labels": TEST_LABELS + 1}, "labels go from 1 to 4"),
    "other classes": ({**WHOLE, "val_logits": VAL[:, [0, 1, 2, 3, 3]]}, "differ in their classes"),
    "NaN": ({**WHOLE, "test_logits": TEST * np.nan}, "test_logits holds NaN"),
    "a data set": ({"x_test": TEST}, "holds x_test, which nothing reads"),
    "labels as floats": ({**WHOLE, "test_labels": TEST_LABELS * 1.0}, "test_labels is float64"),
}


@pytest.mark.parametrize("program", [report, posthoc])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, capsys, program, name):
    arrays, pattern = MISTAKES[name]
    file = write(tmp_path / "a.npz", **arrays)
    error = fails(capsys, tmp_path, program.main, [str(file)])
    assert re.search(f"{re.escape(str(file))}: .*{pattern}", error), error


def test_what_needs_more_than_logits_refuses_it(tmp_path, capsys):
    file = str(write(tmp_path / "a.npz", test_logits=TEST, test_labels=TEST_LABELS))
    for main, words, pattern in (
        (posthoc.main, [file], "has no val_logits, which are needed here"),
        (posthoc.main, [file, "--write"], "no net to run and no folder to write to"),
        (evaluate.main, [file, "--on", "corruptions"], "no net to run and no folder to write to"),
        (report.main, [file, "--pack", str(tmp_path / "p.zip")], "--pack: .*a.npz is no run"),
    ):
        assert re.search(pattern, fails(capsys, tmp_path, main, words))
    with pytest.raises(UserError, match="no net to run"):
        finished_nets([Path(file)], "best", with_teacher=False)
