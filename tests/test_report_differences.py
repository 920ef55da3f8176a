"""What a report says of its numbers: post-hoc rows, empty bins, differences and tests."""

import re
from collections import Counter

import numpy as np
import pytest
from conftest import fails
from written_runs import (
    CLASSES,
    cells,
    identity,
    measured,
    only_section,
    shown,
    with_logits,
    write_posthoc,
    write_predicted_run,
    write_run,
)

from scripts import report
from utils.analysis import comparisons
from utils.analysis.rendering import render
from utils.analysis.tables import main_table
from utils.calibration.metrics import classification_metrics
from utils.calibration.paired import Difference, paired_difference


def test_no_ece_is_best_that_a_calibrated_net_could_have(tmp_path):
    for loss, excess in (("NLL", 0.0), ("LS", 0.1), ("FL", 0.2)):
        write_predicted_run(tmp_path, excess, loss=loss)
    assert "95 % interval" not in shown(only_section(tmp_path))
    section = only_section(tmp_path, "--resamples", "200")
    marks = {loss: cells(section, f"resnet8 {loss}")["ece"].mark for loss in ("NLL", "LS", "FL")}
    assert marks == {"NLL": "chance", "LS": "", "FL": ""}
    assert re.search(r"resnet8 NLL .*\d° +\[.*\] +\d\.\d\d \(< \d\.\d\d\)", shown(section))
    # Nor is another error of calibration, nor the ECE of other maps, of which no chance is known.
    of_nets = [cells(section, f"resnet8 {loss}") for loss in ("NLL", "LS", "FL")]
    for metric, is_marked in {"adaece": False, "sce": False, "mce": False, "brier": True}.items():
        assert any(of_net[metric].mark == "best" for of_net in of_nets) == is_marked
    for loss in ("NLL", "LS"):
        write_posthoc(tmp_path / f"toy/resnet8/{loss}_seed=42")
    section = only_section(tmp_path, "--resamples", "200")
    fitted = [cells(section, f"resnet8 {loss}", "vector") for loss in ("NLL", "LS")]
    assert [of_net["ece"].mark for of_net in fitted] == ["", ""]
    assert [of_net["nll"].mark for of_net in fitted] == ["best", "best"]
    (tmp_path / "toy/resnet8/NLL_seed=42/result.json").unlink()
    assert cells(only_section(tmp_path, "--resamples", "200"), "resnet8 LS")["ece"].mark == "best"
    (tmp_path / "toy/resnet8/LS_seed=42/predictions.npz").unlink()  # now it is not known of it
    section = only_section(tmp_path, "--resamples", "200")
    assert [cells(section, f"resnet8 {loss}")["ece"].mark for loss in ("LS", "FL")] == ["", ""]


def test_few_images_in_a_bin_are_said(tmp_path):
    for loss, images, said in (("NLL", 20, False), ("LS", 19, True)):
        write_run(tmp_path, loss, best=measured(test={"smallest_bin": images}))
        assert ("MCE: beware" in shown(only_section(tmp_path, "--columns", "mce"))) == said
    assert "MCE: beware" not in shown(only_section(tmp_path))


def test_differences_from_a_row(tmp_path, capsys):
    for loss, excess in (("NLL", 0.0), ("LS", 0.0), ("FL", 0.2)):
        write_predicted_run(tmp_path, excess, loss=loss)
    write_run(tmp_path, "DFL")  # without predictions
    rows = (f"--against=resnet8 {loss}" for loss in ("NLL", "FL", "DFL"))
    report.main([str(tmp_path), *rows, "--columns", "ece", "sce"])
    _, table, other, unknown = capsys.readouterr().out.split("Difference from resnet8 ")
    assert table.startswith("NLL ") and other.startswith("FL ") and "resnet8 NLL" in other
    assert "Nothing to test" in unknown and "raw" not in unknown
    assert "no stored predictions: resnet8 DFL." in table
    rows = {line.split("raw")[0].strip(): line for line in table.splitlines() if "raw" in line}
    assert rows.keys() == {"resnet8 LS", "resnet8 FL"}
    assert re.search(r" -?0.00 \[-?0.00, 0.00\]", rows["resnet8 LS"])
    assert "SCE" not in table  # no mean over images or bins, and so not tested
    value, low, high = re.findall(r"[-+]?\d+\.\d+", rows["resnet8 FL"])
    assert 15 < float(low) < float(value) < float(high) < 25 and "]*" in rows["resnet8 FL"]
    error = fails(capsys, tmp_path, report.main, [str(tmp_path), "--against", "resnet8 NLX"])
    assert "did you mean resnet8 NLL?" in error


def test_differences_of_scaled_logits_are_theirs(tmp_path, capsys):
    nll = {}
    for loss, excess in (("NLL", 0.0), ("FL", 0.2)):
        folder = write_predicted_run(tmp_path, excess, loss=loss)
        stored = np.load(folder / "predictions.npz")
        for logits, temperature in (("raw", 1.0), ("scaled", 1.5)):
            metrics = classification_metrics(
                stored["best_test_logits"], stored["test_labels"], temperature
            )
            nll[loss, logits] = metrics["nll"]
    report.main([str(tmp_path), "--against", "resnet8 NLL", "--columns", "nll"])
    _, table = capsys.readouterr().out.split("Difference from resnet8 NLL")
    for logits in ("raw", "scaled"):
        [line] = [line for line in table.splitlines() if f" {logits} " in line]
        expected = nll["FL", logits] - nll["NLL", logits]
        assert f" {expected:+.4f} [" in line


@pytest.mark.parametrize(("p", "marked"), [(0.02, False), (0.01, True), (0.2, False)])
def test_a_difference_is_marked_after_holms_correction(tmp_path, monkeypatch, capsys, p, marked):
    """Of three rows, the least p counts three times."""
    monkeypatch.setattr(
        comparisons, "paired_difference", lambda *_: Difference(value=0.1, low=0.05, high=0.15, p=p)
    )
    for loss in ("NLL", "LS", "FL", "DFL"):
        write_predicted_run(tmp_path, loss=loss)
    report.main([str(tmp_path), "--against", "resnet8 NLL", "--columns", "top1"])
    _, table = capsys.readouterr().out.split("Difference from resnet8 NLL")
    rows = [line for line in table.splitlines() if "raw" in line]
    assert len(rows) == 3
    assert all(line.rstrip().endswith("]*") == marked for line in rows)


def test_what_is_not_tested_says_why(tmp_path, capsys):
    """Errors of nets that are hardly ever wrong, and an NLL that is infinite."""
    for loss in ("NLL", "LS", "FL"):
        folder = write_predicted_run(tmp_path, loss=loss)
    with np.load(folder / "predictions.npz") as stored:
        labels = stored["test_labels"]
    sure = 1000 * np.eye(CLASSES, dtype=np.float32)[labels]
    sure[:19] = np.roll(sure[:19], 1, axis=1)
    with_logits(folder, sure)
    columns = ["--columns", "top1", "nll", "ece"]
    report.main([str(tmp_path), "--against", "resnet8 NLL", *columns])
    _, table = capsys.readouterr().out.split("Difference from resnet8 NLL")
    rows = {line.split("raw")[0].strip(): line for line in table.splitlines() if "raw" in line}
    assert "–" not in rows["resnet8 LS"] and rows["resnet8 FL"].count("–") == 2
    assert "ECE and AdaECE are not tested of nets with fewer than 20 wrong predictions" in table
    assert "NLL is not tested where a label has the probability 0" in table


def test_a_row_of_several_teachers_says_how_it_is_tested(tmp_path, monkeypatch, capsys):
    """By the means of each teacher's students; and a single run is said to borrow its spread."""
    tested_by = []

    def keep(*arguments):
        tested_by.append(arguments[-1])
        return paired_difference(*arguments)

    monkeypatch.setattr(comparisons, "paired_difference", keep)
    for teacher_seed in (1, 2):
        for seed in (11, 12):
            root = tmp_path / str(teacher_seed)
            write_predicted_run(root, loss="KD", seed=seed, teacher=identity(seed=teacher_seed))
    write_predicted_run(tmp_path, loss="NLL", seed=5)
    report.main([str(tmp_path), "--against", "resnet8 NLL", "--columns", "top1"])
    _, table = capsys.readouterr().out.split("Difference from resnet8 NLL")
    assert "the mean of each one's students counts as one run" in table
    students_of_each = [list(Counter(teachers).values()) for teachers, _ in tested_by]
    assert [2, 2] in students_of_each
    assert "A single run has no spread of its own" in table
    report.main([str(tmp_path / "1"), "--against", "resnet56 NLL", "--columns", "top1"])
    assert "counts as one run" not in capsys.readouterr().out


def test_posthoc_is_a_row_where_it_is_of_these_predictions(tmp_path):
    folder = write_predicted_run(tmp_path)
    write_posthoc(folder)
    section = only_section(tmp_path)
    ways = ["raw", "scaled", "vector", "Dirichlet ODIR"]
    assert list(section.groups[0].rows) == ways
    assert cells(section, "resnet8 NLL", "vector")["ece"].mean == 0.0456
    assert "vector, Dirichlet ODIR: fitted on the validation split" in shown(section)
    for form, text in (("terminal", "<absent>"), ("html", "&lt;absent&gt;"), ("latex", "$<$abs")):
        assert f"vector, class 3 is {text}" in render(main_table(section), form)
    write_posthoc(folder, "of an earlier run")
    assert list(only_section(tmp_path).groups[0].rows) == ["raw", "scaled"]


def test_without_a_finished_run_there_is_nothing_to_compare_with(tmp_path, capsys):
    (write_predicted_run(tmp_path) / "result.json").unlink()
    message = fails(capsys, tmp_path, report.main, [str(tmp_path), "--against", "resnet8 NLL"])
    assert "--against resnet8 NLL: there is no finished run" in message
