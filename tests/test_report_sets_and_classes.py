"""Conformal sets as columns of a report, and its tables class by class."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import confusion_matrix, recall_score
from written_runs import CLASSES, cells, identity, only_section, shown, write_predicted_run

from scripts import report
from utils.analysis.classes import values_by_class
from utils.calibration.metrics import ece
from utils.calibration.sets import set_metrics

SETS = ["--columns", "top1", "coverage", "set_size", "aps_set_size", "set_size_matched"]


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "predictions.npz") as stored:
        return dict(stored)


def with_val_labels(folder: Path, count: int) -> None:
    """Leave that many validation images."""
    arrays = arrays_of(folder)
    for name in [name for name in arrays if "val" in name]:
        arrays[name] = arrays[name][:count]
    np.savez(folder / "predictions.npz", **arrays)


def test_the_columns_are_what_the_stored_logits_give(tmp_path):
    expected = {"raw": [], "scaled": []}
    for seed in (1, 2):
        arrays = arrays_of(write_predicted_run(tmp_path, seed=seed))
        for logits, temperature in (("raw", 1.0), ("scaled", 1.5)):
            metrics = set_metrics(
                arrays["best_val_logits"],
                arrays["val_labels"],
                arrays["best_test_logits"],
                arrays["test_labels"],
                temperature,
            )
            expected[logits].append(metrics)
    section = only_section(tmp_path, *SETS)
    for logits, runs in expected.items():
        row = cells(section, "resnet8 NLL", logits)
        for metric in SETS[1:]:
            if metric != "top1":
                values = [metrics[metric] for metrics in runs]
                assert row[metric].mean == pytest.approx(np.mean(values), rel=1e-12)
                assert row[metric].sd == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    text = shown(section)
    assert "conformal sets at 90 %" in text and "A row has none" not in text
    assert "Size at 90 % of test: with the threshold" in text
    assert "coverage" not in cells(only_section(tmp_path), "resnet8 NLL")  # not asked for


def test_a_row_without_validation_logits_is_blank(tmp_path, capsys):
    """A third party's teacher, a run of few validation images, a pack."""
    third_party = identity("foreign", "best", None, "abc")
    write_predicted_run(tmp_path / "runs", loss="KD", teacher=third_party)
    with_val_labels(write_predicted_run(tmp_path / "runs", loss="LS"), 8)
    with_val_labels(write_predicted_run(tmp_path / "runs", loss="FL"), 9)
    section = only_section(tmp_path / "runs", *SETS)
    assert "coverage" not in cells(section, "foreign best")
    assert "coverage" not in cells(section, "resnet8 LS")
    assert "coverage" in cells(section, "resnet8 FL")
    assert "A row has none where validation logits are not stored" in shown(section)

    pack = tmp_path / "runs.zip"
    report.main([str(tmp_path / "runs"), "--resamples", "0", "--pack", str(pack)])
    section = only_section(pack, *SETS)
    assert all("coverage" not in group.rows["raw"].cells for group in section.groups)
    assert "A row has none" in shown(section) and "Not in the tables" not in capsys.readouterr().out


def test_differences_of_coverage_and_set_size_are_those_of_the_means(tmp_path, capsys):
    for loss, excess in (("NLL", 0.0), ("FL", 0.2)):
        write_predicted_run(tmp_path, excess, loss=loss)
    rows = {loss: cells(only_section(tmp_path, *SETS), f"resnet8 {loss}") for loss in ("NLL", "FL")}
    difference = rows["FL"]["set_size"].mean - rows["NLL"]["set_size"].mean
    report.main([str(tmp_path), *SETS, "--resamples", "50", "--against", "resnet8 NLL"])
    table = capsys.readouterr().out.split("Difference from")[1]
    assert f"{difference:+.2f} [" in table
    assert "the sets are taken as they were fitted" in table


def test_every_class_against_a_loop_over_classes():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(500, 4, generator=generator, dtype=torch.float64).mul(2).softmax(dim=1)
    labels = torch.randint(0, 3, (500,), generator=generator)  # the last class has no image
    values = values_by_class(probs, labels)
    for label in range(3):
        own = labels == label
        assert values["ece"][label] == pytest.approx(ece(probs[own], labels[own]), rel=1e-12)
        assert values["confidence"][label] == pytest.approx(probs[own].amax(dim=1).mean().item())
    recall = recall_score(labels, probs.argmax(dim=1), labels=range(3), average=None)
    np.testing.assert_allclose(values["accuracy"][:3], recall)
    assert all(np.isnan(values[name][3]) for name in values)


def test_tables_class_by_class(tmp_path, capsys):
    """At the terminal, in every file of --out, with the names that config.json has."""
    folder = write_predicted_run(tmp_path / "runs")
    config = json.loads((folder / "config.json").read_text()) | {"class_names": ["a<b", "dog", "é"]}
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    report.main([str(tmp_path / "runs"), "--classes", "--resamples", "0", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "resnet8 NLL, class by class" in printed and "most frequent confusion" in printed

    arrays = arrays_of(folder)
    predicted = arrays["best_test_logits"].argmax(axis=1)
    counts = confusion_matrix(arrays["test_labels"], predicted, labels=range(CLASSES))
    with open(out / "classes.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["class"] for line in lines] == ["a<b", "dog", "é"]
    assert [int(line["images"]) for line in lines] == counts.sum(axis=1).tolist()
    accuracy = 100 * counts[1, 1] / counts[1].sum()
    assert float(lines[1]["raw accuracy %"]) == pytest.approx(accuracy)
    assert lines[1]["most frequent confusion"] == "a<b" and lines[0]["raw ECE %"]
    assert (lines[2]["images"], lines[2]["raw ECE %"]) == ("0", "")  # no test image has it
    assert "é" in (out / "report.md").read_text() and "a\\<b" in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert "a&lt;b" in page and "<h3>Confusion matrices" in page
    assert page.count("confusion matrix of resnet8 NLL") == 1


def test_without_the_flag_nothing_speaks_of_classes(tmp_path, capsys):
    write_predicted_run(tmp_path / "runs")
    out = tmp_path / "out"
    report.main([str(tmp_path / "runs"), "--resamples", "0", "--out", str(out)])
    assert "class by class" not in capsys.readouterr().out
    assert not (out / "classes.csv").exists()
    assert "Confusion matrices" not in (out / "report.html").read_text()


def test_a_report_imports_nothing_that_trains():
    code = (
        "import sys, scripts.report, scripts.posthoc, utils.analysis.page; "
        "print(*[name for name in sys.modules if name.split('.')[0] in "
        "('accelerate', 'models', 'losses') or name in "
        "('utils.training', 'utils.teachers.teacher', 'utils.runs', 'utils.tasks', "
        "'utils.evaluation')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr
