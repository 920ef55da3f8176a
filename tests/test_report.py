"""scripts/report.py on results that are written here by hand."""

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
import shutil
import subprocess
import zipfile
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import fails
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from scripts import report
from utils.analysis import comparisons, taught
from utils.analysis.figures import is_grid
from utils.analysis.groups import group_runs
from utils.analysis.records import read_runs
from utils.analysis.rendering import Table, TableCell, latex_text, render
from utils.analysis.sections import sections_of
from utils.analysis.tables import main_table
from utils.calibration.metrics import classification_metrics
from utils.calibration.paired import Difference, paired_difference
from utils.columns import result_table
from utils.run_files import label_of

CLASSES = 3


def measured(val: dict | None = None, test: dict | None = None, scaled: dict | None = None) -> dict:
    """A part of a result, in which what is not given is one half."""
    every = dict.fromkeys(("top1", "top5", "nll", "brier", "ece", "sce", "adaece", "mce"), 0.5)
    test = every | (test or {})
    tests = {"raw": test, "scaled": test | (scaled or {})}
    fitted = {"temperature": 1.5, "temperature_at_bound": False}
    return fitted | {"val": every | (val or {}), "test": tests}


def write_run(
    root: Path, loss="NLL", parameters=None, seed=42, model="resnet8", dataset="toy", **more
) -> Path:
    """A run folder with config.json, metrics.jsonl and result.json."""
    parameters, exp_name, teacher = parameters or {}, more.get("exp_name"), more.get("teacher")
    label = label_of(loss, parameters)
    if teacher:
        label += f"_from_{teacher['model']}_{teacher['label']}"
    folder = root / dataset / model / f"{label}_seed={seed}{exp_name or ''}"
    folder.mkdir(parents=True)
    own = {"lr": 0.1, "epochs": 2, "seed": seed, "label": label} | parameters
    own |= more.get("settings", {})
    result = {"model": model, "dataset": dataset, "fingerprint": "f", "label": label, "seed": seed}
    result |= {"loss": loss, "loss_parameters": parameters, "settings": own, "seconds": 60.0}
    result |= {"num_classes": CLASSES, "split_seed": 0, "mean": [0.5] * 3, "std": [0.2] * 3}
    result |= {name: {"epoch": 1} | more.get(name, measured()) for name in ("best", "last")}
    if teacher:
        facts = {*measured(), "epoch", "path", "loss", "seen"}
        own["teacher"] = {key: value for key, value in teacher.items() if key not in facts}
        result["teacher"] = measured(test={"top1": 0.9}) | teacher
    command = more.get("command", "python train_teacher.py")
    config = {"arguments": {"exp_name": exp_name}, "settings": own, "command": command}
    (folder / "config.json").write_text(json.dumps(config))
    values = dict.fromkeys(("val_top1", "val_ece", "val_nll", "val_refinement"), 0.5)
    epochs = [json.dumps({"epoch": epoch} | values) for epoch in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(epochs) + "\n")
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def identity(model="resnet56", label="NLL", seed=42, sha256="unknown") -> dict:
    """What a student's settings say of its teacher."""
    norm = {"mean": [0.5] * 3, "std": [0.2] * 3}
    return {"model": model, "label": label, "seed": seed, "sha256": sha256} | norm


def divided(temperature: float | str, **more) -> dict:
    """The same of a teacher whose logits are divided by a temperature."""
    label = f"NLL_Tcal={temperature}"
    return identity(label=label, **more) | {"teacher_temperature": temperature}


def predictions(rng: np.random.Generator, images: int, excess: float) -> tuple:
    """Logits (N, 3) and labels; the confidence exceeds the accuracy by `excess`."""
    confidence = rng.uniform(0.6, 1 - 1e-6, images)
    labels = np.where(rng.random(images) < confidence - excess, 0, 1)
    rest = (1 - confidence) / 2
    return np.log(np.stack([confidence, rest, rest], 1)).astype(np.float32), labels


def write_predicted_run(root: Path, excess: float = 0.1, **options) -> Path:
    """A run and its predictions.npz; on test the confidence exceeds the accuracy by `excess`."""
    rng = np.random.default_rng(options.get("seed", 1))
    logits, labels = predictions(rng, 2000, excess)
    val_logits, val_labels = predictions(rng, 1000, excess / 2)
    raw = classification_metrics(logits, labels)
    val = classification_metrics(val_logits, val_labels)
    part = measured(val, raw, classification_metrics(logits, labels, 1.5))
    folder = write_run(root, best=part, last=part, **options)
    arrays = {"test_labels": labels, "val_labels": val_labels}
    for name in ("best", "last", "teacher"):
        arrays |= {f"{name}_test_logits": logits, f"{name}_val_logits": val_logits}
    np.savez(folder / "predictions.npz", **arrays)
    return folder


def write_posthoc(folder: Path, digest: str | None = None) -> None:
    """What scripts.posthoc would write there; of other predictions where a digest is given."""
    digest = digest or hashlib.sha256((folder / "predictions.npz").read_bytes()).hexdigest()
    one = measured()["test"]["raw"]
    found = {"val": one, "test": one | {"ece": 0.0456}, "notes": ["class 3 is <absent>"]}
    best = dict.fromkeys(("none", "temperature", "vector", "Dirichlet ODIR"), found)
    (folder / "posthoc.json").write_text(json.dumps({"predictions": digest, "best": best}))


def read(*roots: Path):
    records, left_out = read_runs(roots, "best")
    groups, repeated = group_runs(records)
    return groups, left_out + repeated


def sections(root: Path, *flags: str):
    args = report.options([str(root), "--resamples", "0", *flags])
    return sections_of(read_runs(args.roots, args.epoch)[0], report.choice_of(args))[0]


def only_section(root: Path, *flags: str):
    [section] = sections(root, *flags)
    return section


def cells(section, name: str, logits: str = "raw") -> dict:
    [group] = [group for group in section.groups if group.full_name == name]
    return group.rows[logits].cells


def shown(section) -> str:
    return render(main_table(section), "terminal")


# Groups


def test_other_settings_or_names_are_another_row_that_says_so(tmp_path):
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2, settings={"lr": 0.2})
    write_run(tmp_path / "c", seed=3, exp_name="try")
    names = [group.name for group in read(tmp_path)[0]]
    assert names == ["resnet8 NLL lr=0.1", "resnet8 NLL lr=0.2", "resnet8 NLL try"]


def test_a_setting_that_only_some_runs_name_is_its_default_elsewhere(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", settings={"lr": 0.001, "optimizer": "adamw"})
    write_run(tmp_path / "c", settings={"cutout": 4, "ema": 0.9})
    assert {group.name for group in read(tmp_path)[0]} == {
        "resnet8 NLL lr=0.001 optimizer=adamw",
        "resnet8 NLL cutout=4 ema=0.9 lr=0.1 optimizer=sgd",
        "resnet8 NLL lr=0.1 optimizer=sgd",
    }


@pytest.mark.parametrize("exp_name", ["t{}", "same", ""])
def test_seeds_of_the_teacher_are_seeds(tmp_path, exp_name):
    """Also where --exp_name had to tell the students' folders apart."""
    for seed, own in product((1, 2), (3, 4)):
        options = {"teacher": identity(seed=seed), "exp_name": exp_name.format(seed) or None}
        write_run(tmp_path / str(seed), "KD", {"T": 4}, own, **options)
    students = [group for group in read(tmp_path)[0] if group.teacher]
    assert [len(group.records) for group in students] == [4]


def test_a_run_counts_once(tmp_path):
    """Where roots overlap, a link leads to it or back up, and where a copy is no second seed."""
    folder = write_run(tmp_path / "a")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a").symlink_to(tmp_path / "a")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    for roots in ([tmp_path], [tmp_path / "links"], [tmp_path, folder, tmp_path / "a/toy"]):
        groups, apart = read(*roots)
        assert [len(group.records) for group in groups] == [1] and not apart
    shutil.copytree(tmp_path / "a/toy", tmp_path / "b/toy")
    groups, apart = read(tmp_path)
    assert [len(group.records) for group in groups] == [1]
    assert [one.reason.split()[0] for one in apart] == ["repeats"]


def test_data_sets_of_one_name_are_two_sections(tmp_path):
    write_run(tmp_path / "a")
    other = write_run(tmp_path / "b", seed=43) / "result.json"
    other.write_text(other.read_text().replace('"fingerprint": "f"', '"fingerprint": "other"'))
    assert [section.title for section in sections(tmp_path)] == ["toy (f)", "toy (other)"]


# Teachers


def test_students_stand_below_their_teacher(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, seed=seed)
        write_run(tmp_path, seed=seed, model="resnet56")
        for temperature in (10, 4):
            knobs = {"T": temperature, "Lambda": 0.9}
            write_run(tmp_path, "KD", knobs, seed, teacher=identity(seed=seed))
    label = "KD_T=4_Lambda=0.9_from_resnet56_NLL"
    write_run(tmp_path, "KD", {"T": 4}, 1, "convnet2", teacher=identity("resnet8", label, 1))
    groups, _ = read(tmp_path)
    assert [(len(group.teachers), group.name, len(group.records)) for group in groups] == [
        (0, "resnet56 NLL", 2),
        (1, "resnet8 KD T=4 Lambda=0.9", 2),
        (2, "convnet2 KD T=4", 1),
        (1, "resnet8 KD T=10 Lambda=0.9", 2),
        (0, "resnet8 NLL", 2),
    ]


def test_a_teacher_without_a_run_is_what_its_students_measured(tmp_path):
    """An ensemble, and two files of one name."""
    files = [identity("resnet56", "best", None, sha256) for sha256 in ("abc", "def")]
    ensemble = identity("2xresnet20", "NLL", "42+43") | {
        "members": [identity("resnet20", seed=seed) for seed in (42, 43)]
    }
    for seed, (place, teacher) in product((1, 2), enumerate([*files, ensemble])):
        write_run(tmp_path / str(place), "KD", {"T": 4}, seed, teacher=teacher)
    section = only_section(tmp_path)
    student, file = "resnet8 KD T=4", "resnet56 best sha256={}"
    names = ["2xresnet20 NLL", student, file.format("abc"), student, file.format("def"), student]
    assert [group.name for group in section.groups] == names
    assert [len(group.records) for group in section.groups] == [1, 2] * 3
    assert cells(section, file.format("abc"))["top1"].mean == 0.9
    assert "A teacher without a run here" in shown(section)


@pytest.mark.parametrize("members", [1, 2])
def test_what_is_fitted_on_images_that_a_teacher_may_know_is_not_shown(tmp_path, capsys, members):
    """A third party's teacher, or an ensemble with one, has no scaled and no post-hoc row."""
    third_party = identity("foreign", "best", None, "abc")
    if members == 2:
        third_party["members"] = [
            identity("own", "NLL", 42, "a"),
            identity("foreign", "best", None, "b"),
        ]
    folder = write_predicted_run(tmp_path / "runs", loss="KD", teacher=third_party)
    write_predicted_run(tmp_path / "runs", 0.2)
    result = json.loads((folder / "result.json").read_text())
    lucky = {name: 0.0 if name in ("ece", "nll") else 1.0 for name in ("ece", "nll", "top1")}
    result["teacher"]["test"]["scaled"] |= lucky
    result["teacher"]["temperature_at_bound"] = True
    (folder / "result.json").write_text(json.dumps(result))
    digest = hashlib.sha256((folder / "predictions.npz").read_bytes()).hexdigest()
    fitted = {"val": measured()["val"], "test": measured()["test"]["raw"]}
    content = {"predictions": digest, "teacher": {"vector": fitted}, "best": {"vector": fitted}}
    (folder / "posthoc.json").write_text(json.dumps(content))
    out = ["--out", str(tmp_path / "out"), "--resamples", "50"]
    groups = only_section(tmp_path / "runs", "--resamples", "0").groups
    [name] = [group.full_name for group in groups if group.first.third_party]
    report.main([str(tmp_path / "runs"), *out, "--against", name])
    printed = capsys.readouterr().out
    assert "A third party's teacher has no scaled row." in printed and "†" not in printed
    assert "Students of a third party's teacher may know something" in printed
    section = only_section(tmp_path / "runs", "--resamples", "50")
    rows = {group.first.model: group.rows for group in section.groups if not group.teachers}
    assert list(rows["foreign"]) == ["raw"]
    [student] = [group for group in section.groups if group.teachers]
    assert list(student.rows) == ["raw", "scaled", "vector"]
    # The best of the column is one of those that are shown.
    scaled = [group.rows["scaled"] for group in section.groups if "scaled" in group.rows]
    assert "best" in {row.cells["nll"].mark for row in scaled}
    with open(tmp_path / "out/report.csv") as file:
        kinds = [row["logits"] for row in csv.DictReader(file) if row["model"] == "foreign"]
    with open(tmp_path / "out/runs.csv") as file:
        kinds += [row["logits"] for row in csv.DictReader(file) if row["model"] == "foreign"]
    assert kinds == ["raw", "raw"]
    differences = printed.split(f"Difference from {name}")[1]
    assert "raw" in differences and "scaled" not in differences
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("reliability of") == 3  # its diagram is there, without the scaled half


def test_the_table_of_a_run_shows_no_temperature_of_a_third_partys_teacher():
    own, third_party = measured(), measured() | {"seed": None, "temperature_at_bound": True}
    for teacher, shown in ((third_party, False), (third_party | {"seed": 42}, True)):
        table = result_table({"best": own, "last": own, "teacher": teacher})
        assert ("teacher, scaled" in table) == shown and "teacher, raw" in table
        assert ("The teacher has no scaled row" in table) != shown
        assert ("at the bound" in table) == shown


def test_the_weights_decide_between_teachers_of_one_name(tmp_path):
    for lr in (0.1, 0.2):
        folder = write_run(tmp_path / str(lr), model="resnet56", settings={"lr": lr})
        (folder / "model_best.pth").write_bytes(str(lr).encode())
    sha256 = hashlib.sha256(b"0.2").hexdigest()
    write_run(tmp_path, "KD", {"T": 4}, teacher=identity(sha256=sha256))
    [student] = [group for group in read(tmp_path)[0] if group.teacher]
    assert student.teacher.name == "resnet56 NLL lr=0.2"


# Marks


def test_the_best_and_those_within_the_spread_of_it(tmp_path):
    """Raw and scaled apart; a single run has no spread."""
    errors = {"NLL": [0.01, 0.03], "LS": [0.02, 0.05], "FL": [0.31, 0.32], "DFL": [0.0201]}
    for loss, values in errors.items():
        for seed, error in enumerate(values):
            test = {"ece": error, "top1": error}
            best = measured(test=test, scaled={"ece": 0.05 - error / 10})
            write_run(tmp_path, loss, seed=seed, best=best)
    section = only_section(tmp_path)
    rows = {group.first.loss: group.rows for group in section.groups}
    raw = {loss: rows[loss]["raw"].cells["ece"].mark for loss in errors}
    assert raw == {"NLL": "best", "LS": "close", "FL": "", "DFL": ""}
    assert cells(section, "resnet8 FL")["top1"].mark == "best"
    assert cells(section, "resnet8 FL", "scaled")["ece"].mark == "best"


def test_no_mark_goes_to_a_temperature_at_its_bound(tmp_path):
    lucky = measured(scaled={"ece": 0.01}) | {"temperature_at_bound": True}
    write_run(tmp_path, "NLL", best=lucky)
    for gamma, error in ((1, 0.2), (2, 0.3)):
        write_run(tmp_path, f"FL{gamma}", best=measured(scaled={"ece": error}))
    groups = only_section(tmp_path).groups
    marks = {group.name: group.rows["scaled"].cells["ece"].mark for group in groups}
    assert marks == {"resnet8 NLL": "", "resnet8 FL1": "best", "resnet8 FL2": ""}


# What a number is worth


def test_no_ece_is_best_that_a_calibrated_net_could_have(tmp_path):
    for loss, excess in (("NLL", 0.0), ("LS", 0.1), ("FL", 0.2)):
        write_predicted_run(tmp_path, excess, loss=loss)
    assert "95 % interval" not in shown(only_section(tmp_path))
    section = only_section(tmp_path, "--resamples", "200")
    marks = {loss: cells(section, f"resnet8 {loss}")["ece"].mark for loss in ("NLL", "LS", "FL")}
    assert marks == {"NLL": "chance", "LS": "", "FL": ""}
    assert re.search(r"resnet8 NLL .*\d° +\[.*\] +\d\.\d\d \(< \d\.\d\d\)", shown(section))
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


# Scale


def test_many_runs(tmp_path, monkeypatch, capsys):
    """As pairs and as one sweep: work grows with the runs, pictures with what is shown."""
    compared = []
    fits = {"best": taught.Fit(False, False, 0.0)}
    monkeypatch.setattr(taught, "epochs_that_fit", lambda run, *_: compared.append(run) or fits)
    for gamma in range(60):
        write_run(tmp_path, "FL", {"gamma": gamma}, model="resnet56")
        teacher = identity(label=f"FL_gamma={gamma}")
        write_run(tmp_path, "KD", {"T": 4}, teacher=teacher)
        write_run(tmp_path, "LS", {"alpha": gamma / 60}, best=measured({"nll": gamma + 1.0}))
    report.main([str(tmp_path), "--nets", "10", "--out", str(tmp_path / "out")])
    assert len(compared) == 60
    text = capsys.readouterr().out
    # The best by validation, of the sweep one alone; teachers of students; the rest is counted.
    assert "resnet8 LS alpha=0 ←" not in text and text.count("resnet8 KD T=4") == 9
    assert "162 further nets are in report.csv only" in text
    with open(tmp_path / "out/report.csv") as file:
        assert len(list(csv.DictReader(file))) == 2 * 180


def test_a_report_comes_again_from_its_pack(tmp_path, capsys):
    trained = json.loads(
        (write_predicted_run(tmp_path / "runs", model="resnet56") / "result.json").read_text()
    )["best"]
    write_posthoc(
        write_predicted_run(
            tmp_path / "runs", loss="KD", teacher=identity("foreign", "best", None, "abc")
        )
    )
    write_predicted_run(tmp_path / "runs", loss="DKD", teacher=trained | identity())
    write_predicted_run(tmp_path / "runs", loss="DIST", teacher=trained | divided("auto"))
    write_predicted_run(tmp_path / "runs", loss="LSKD", teacher=divided(2))
    options = ["--columns", "top1", "nll", "--out", str(tmp_path / "out"), "--resamples", "50"]
    pages = []
    for root in ("runs", "runs.zip"):
        pack = ["--pack", str(tmp_path / "runs.zip")] if root == "runs" else []
        report.main([str(tmp_path / root), *options, *pack])
        table = capsys.readouterr().out.split("written")[0]
        pages.append((table, (tmp_path / "out/report.html").read_text().count("<img")))
    assert pages[0] == pages[1] and "vector" in pages[0][0]
    with zipfile.ZipFile(tmp_path / "runs.zip") as archive:
        packed = {
            name: set(np.load(io.BytesIO(archive.read(name)))) & {"teacher_test_logits"}
            for name in archive.namelist()
            if name.endswith(".npz")
        }
    # A teacher's logits are there once: in its own run, or where it has none, or one that measured
    # something else, with its student.
    assert [name.split("/")[-2][:4] for name, of in packed.items() if of] == ["KD_f", "LSKD"]
    for student in (one for one in read_runs([tmp_path / "runs.zip"], "best")[0] if one.taught_by):
        assert student.taught_by.stored("test")[0].shape == (2000, CLASSES)


def with_logits(folder: Path, logits: np.ndarray) -> None:
    """Give a run written by `write_predicted_run` other test logits, of the same labels."""
    with np.load(folder / "predictions.npz") as stored:
        arrays = dict(stored)
    arrays |= dict.fromkeys(("best_test_logits", "teacher_test_logits"), logits)
    np.savez(folder / "predictions.npz", **arrays)


def test_a_temperature_at_its_bound_says_nothing_of_the_splits(tmp_path):
    folder = write_predicted_run(tmp_path)
    flag = "--test-temperature"
    assert "The T that test would choose" in shown(only_section(tmp_path, flag))
    with np.load(folder / "predictions.npz") as stored:
        labels = stored["test_labels"]
    with_logits(folder, np.eye(CLASSES, dtype=np.float32)[labels])  # always right: T is 0
    assert "The T that test would choose" not in shown(only_section(tmp_path, flag))


def test_without_a_finished_run_there_is_nothing_to_compare_with(tmp_path, capsys):
    (write_predicted_run(tmp_path) / "result.json").unlink()
    message = fails(capsys, tmp_path, report.main, [str(tmp_path), "--against", "resnet8 NLL"])
    assert "--against resnet8 NLL: there is no finished run" in message


def test_a_pack_takes_the_place_of_no_other_file(tmp_path, capsys):
    """Neither of a picture, nor of what is a .zip file inside: arrays, a text document."""
    write_predicted_run(tmp_path / "runs")
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"no pack")
    data = tmp_path / "data.npz"
    np.savez(data, images=np.zeros(3))
    for file in (photo, data):
        before = file.read_bytes()
        argv = [str(tmp_path / "runs"), "--pack", str(file)]
        message = fails(capsys, tmp_path, report.main, argv)
        assert "--pack" in message and "no pack" in message and file.read_bytes() == before
    for _ in range(2):  # an older pack is written anew
        report.main([str(tmp_path / "runs"), "--pack", str(tmp_path / "runs.zip")])
    assert "half precision" in capsys.readouterr().out


@pytest.mark.parametrize("offset, scale", [(3e3, 1), (7e4, 1), (-7e4, 1), (0, 1e4), (7e4, 1e5)])
def test_a_pack_keeps_probabilities_whatever_the_size_of_the_logits(tmp_path, offset, scale):
    folder = write_predicted_run(tmp_path / "runs")
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(2000, CLASSES)) + offset).astype(np.float32)
    with_logits(folder, logits)
    report.main([str(tmp_path / "runs"), "--resamples", "0", "--pack", str(tmp_path / "p.zip")])
    [packed], [] = read_runs([tmp_path / "p.zip"], "best")
    with np.load(folder / "predictions.npz") as stored:
        labels = stored["test_labels"]
    for kind, temperature in (("raw", 1.0), ("scaled", 1.5)):
        values = logits.astype(np.float64) / temperature
        shares = np.exp(values - values.max(1, keepdims=True))
        found, theirs = packed.probabilities(kind)
        np.testing.assert_allclose(found, shares / shares.sum(1, keepdims=True), atol=1e-3)
        assert np.array_equal(theirs, labels)


def test_a_teacher_that_rules_classes_out_is_read_and_packed(tmp_path, capsys):
    teacher = identity("foreign", "best", None, "abc")
    folder = write_predicted_run(tmp_path / "runs", loss="KD", teacher=teacher)
    with np.load(folder / "predictions.npz") as stored:
        arrays = dict(stored)
    arrays["teacher_test_logits"][:, 2] = -np.inf
    np.savez(folder / "predictions.npz", **arrays)
    pack = ["--resamples", "20", "--pack", str(tmp_path / "runs.zip")]
    report.main([str(tmp_path / "runs"), *pack])
    assert "Not in the tables" not in capsys.readouterr().out
    for root in ("runs", "runs.zip"):
        [student], [] = read_runs([tmp_path / root], "best")
        probabilities, _ = student.taught_by.probabilities("raw")
        assert not probabilities[:, 2].any() and probabilities.isfinite().all()


# Sweeps


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    """Validation prefers T = 4, Lambda = 0.9; test prefers T = 1, Lambda = 1; one is missing."""
    root = tmp_path_factory.mktemp("grid")
    write_run(root, model="resnet56", best=measured(test={"ece": 0.4}))
    for temperature, weight in {*product((1, 4, 20), (0.9, 1))} - {(20, 1)}:
        chosen, lure = ((temperature, weight) == one for one in ((4, 0.9), (1, 1)))
        val = {
            "nll": 0.2 if chosen else 0.6,
            "ece": 0.04 if chosen else 0.09,
            "refinement": 0.1 if chosen else 0.3,
        }
        test = {"nll": 0.1 if lure else 0.5, "ece": 0.01 if lure else 0.0765}
        best = measured(val, test, scaled={"ece": 0.0123})
        knobs = {"T": temperature, "Lambda": weight}
        write_run(root, "KD", knobs, best=best, teacher=identity())
    return root


@pytest.mark.parametrize("select", ["nll", "ece", "refinement"])
def test_validation_chooses_and_its_test_value_is_quoted(grid, select):
    section = only_section(grid, "--select", select)
    [sweep] = section.sweeps
    assert sweep.chosen.name == "resnet8 KD T=4 Lambda=0.9"
    assert sweep.parameters == ["T", "Lambda"] and len(sweep.places) == 5 and is_grid(sweep)
    text = shown(section)
    [sentence] = [line for line in text.splitlines() if line.startswith("Sweep of")]
    assert "T = 4, Lambda = 0.9 has the best validation" in sentence
    assert "ECE % 7.65 → 1.23" in sentence
    assert re.search(r"T=4 Lambda=0.9 ←", text) and text.count("=0.9 ←") == 1
    for setting, mark in (("T=1 Lambda=1", ""), ("T=4 Lambda=0.9", "best")):
        assert cells(section, f"resnet8 KD {setting} from resnet56 NLL")["ece"].mark == mark


def test_any_set_of_settings(tmp_path):
    """Three parameters at random, and one alone: no map, but the best by validation."""
    rng = np.random.default_rng(0)
    for nll in (0.5, 0.3, 0.4, 0.6):
        knobs = dict(zip(("T", "Lambda"), rng.uniform(1, 9, 2), strict=True))
        lr, best = rng.uniform(), measured({"nll": nll})
        write_run(tmp_path, "KD", knobs, best=best, settings={"lr": lr}, teacher=identity())
        write_run(tmp_path, "NLL+MDCA", {"beta": 10 * nll}, best=best)
    section = only_section(tmp_path)
    three, one = section.sweeps
    assert (three.parameters, one.name) == (["T", "Lambda", "lr"], "resnet8 NLL+MDCA over beta")
    for sweep in (three, one):
        assert sweep.chosen.validation("nll") == [0.3] and not is_grid(sweep)
    assert "beta = 3 has the best validation NLL" in shown(section)


def test_other_seeds_losses_or_settings_are_no_sweep(tmp_path):
    write_run(tmp_path, seed=1)
    write_run(tmp_path, seed=2)
    write_run(tmp_path, "LS", {"alpha": 0.1})
    write_run(tmp_path / "b", "FL", {"gamma": 1})
    write_run(tmp_path / "c", "FL", {"gamma": 2}, settings={"epochs": 1})
    assert only_section(tmp_path).sweeps == []


def write_sweep(root: Path, values: dict[int, dict[int, float]]) -> None:
    """Validation NLL by gamma and seed."""
    for gamma, by_seed in values.items():
        for seed, nll in by_seed.items():
            write_run(root, "FL", {"gamma": gamma}, seed, best=measured({"nll": nll}))


def test_settings_are_compared_on_the_seeds_that_all_have(tmp_path):
    """One lucky seed does not beat a setting that is better on that very seed."""
    write_sweep(tmp_path, {1: {42: 0.40, 43: 0.44, 44: 0.45}, 2: {42: 0.41}})
    section = only_section(tmp_path)
    [sweep] = section.sweeps
    assert sweep.chosen.name == "resnet8 FL gamma=1"
    assert "validation NLL on the seeds that all settings have (42). On test" in shown(section)


def test_settings_without_a_common_seed(tmp_path):
    write_sweep(tmp_path, {1: {42: 0.40, 43: 0.44}, 2: {44: 0.41}})
    section = only_section(tmp_path)
    assert section.sweeps[0].chosen.name == "resnet8 FL gamma=2"
    assert "no seed is common to all settings" in shown(section)


def test_equal_seeds_need_no_word(tmp_path):
    write_sweep(tmp_path, {1: {42: 0.40, 43: 0.44}, 2: {43: 0.41, 42: 0.30}})
    section = only_section(tmp_path)
    assert section.sweeps[0].chosen.name == "resnet8 FL gamma=2"
    assert "seed" not in shown(section).split("Sweep of")[1]


# Validation and test


def set_images(root: Path, val: int = 4000, test: int = 10000) -> None:
    for file in root.rglob("config.json"):
        content = json.loads(file.read_text()) | {"images": {"val": val, "test": test}}
        file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "val, test, said",
    [
        ((0.87, 0.89), (0.855, 0.875), "easier than test here: its top-1 is on average 1.5 points"),
        ((0.85, 0.85), (0.87, 0.87), "harder than test here: its top-1 is on average 2.0 points"),
        ((0.87, 0.86), (0.86, 0.855), None),  # less than two standard errors
    ],
)
def test_whether_validation_is_easier_is_said(tmp_path, val, test, said):
    for seed, (own, others) in enumerate(zip(val, test, strict=True)):
        write_run(tmp_path, seed=seed, best=measured({"top1": own}, {"top1": others}))
    assert "than test here" not in shown(only_section(tmp_path))  # of how many images?
    set_images(tmp_path)
    text = shown(only_section(tmp_path))
    assert said in text and "2 of 2 nets" in text if said else "than test here" not in text


def test_a_third_partys_teacher_says_nothing_of_the_splits(tmp_path):
    third_party = measured({"top1": 1.0}, {"top1": 0.5}) | identity("foreign", "best", None, "abc")
    write_run(tmp_path, "KD", {"T": 4}, teacher=third_party)
    set_images(tmp_path)
    assert "than test here" not in shown(only_section(tmp_path))


def test_the_temperature_that_test_would_choose_is_shown_on_request(tmp_path, capsys):
    """Against SciPy's minimum of the NLL; no row but the scaled one has it."""
    folder = write_predicted_run(tmp_path, seed=3)
    write_run(tmp_path, "LS")  # without predictions
    with np.load(folder / "predictions.npz") as arrays:
        logits, labels = arrays["best_test_logits"].astype(float), arrays["test_labels"]

    def nll(temperature):
        log_probs = log_softmax(logits / temperature, axis=1)
        return -log_probs[np.arange(len(labels)), labels].mean()

    best = minimize_scalar(nll, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-8}).x
    report.main([str(tmp_path), "--columns", "ece", "--resamples", "0"])
    assert "T of test" not in capsys.readouterr().out
    flags = ["--columns", "ece", "--test-temperature", "--out", str(tmp_path / "out")]
    report.main([str(tmp_path), *flags, "--resamples", "0"])
    text = capsys.readouterr().out
    lines = {tuple(line.split()[:3]): line.split() for line in text.splitlines()}
    expected = classification_metrics(logits, labels, best)["ece"]
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("scaled ")]
    assert rows[0][-2:] == ["–", "–"] and rows[0][-3] == "1.500"
    assert rows[1][-3:] == ["1.500", f"{best:.3f}", f"{100 * expected:.2f}"]
    assert lines[("resnet8", "NLL", "raw")][-3:] == ["–"] * 3
    assert "no result" in text and "times the one in use (1 with stored logits)" in text
    with open(tmp_path / "out/report.csv") as file:
        found = {(line["net"], line["logits"]): line["T of test"] for line in csv.DictReader(file)}
    assert float(found["resnet8 NLL", "scaled"]) == pytest.approx(best, rel=1e-5)
    assert found["resnet8 NLL", "raw"] == found["resnet8 LS", "scaled"] == ""


# Runs that are not in the tables


def test_unfinished_and_damaged_runs_are_listed(tmp_path, capsys):
    """Whatever is wrong with one run, the others are in the table."""
    whole = write_run(tmp_path, seed=1)
    result = json.loads((whole / "result.json").read_text())
    result["best"]["temperature"] = 10**400  # JSON allows it, and no float holds it
    stopped = write_run(tmp_path, seed=2)
    (stopped / "result.json").unlink()
    (stopped / "train_log.txt").write_text("epoch 1/2\nepoch 2/2 \033[1mtrain loss 0.3\n\n")
    damage = {
        "result.json": ['{"answer"', '{"answer": 42}', "[]", "[" * 10**5, json.dumps(result)],
        "config.json": ['{"arguments": null}', "[1]", "\x80"],
        "metrics.jsonl": ['{"epoch": 1}\n{"epoch"', '{"loss": 1}', "[]"],
        "predictions.npz": ["PK\3\4 nonsense", ""],
        "posthoc.json": ["{}", '{"predictions": 1}\n}'],
    }
    for file, contents in damage.items():
        for number, content in enumerate(contents):
            folder = write_predicted_run(tmp_path, loss=file, seed=number)
            (folder / file).write_text(content, encoding="latin1")
    report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--resamples", "50"])
    shown = capsys.readouterr().out
    assert "resnet8 NLL" in shown and "unfinished; its log ends: epoch 2/2  [1mtrain" in shown
    for file, contents in damage.items():
        assert shown.count(f"  {file} is damaged (") == len(contents), (file, shown)
    for name in ("report.html", "report.md"):
        assert "train loss 0.3" in (tmp_path / "out" / name).read_text()


def test_a_value_that_no_row_can_show_takes_its_run_out(tmp_path, capsys):
    """Of two seeds the other one stays, whatever the values are."""
    for number, temperature in enumerate((0, math.nan)):
        write_predicted_run(tmp_path, loss=f"T{number}", seed=1)
        folder = write_predicted_run(tmp_path, loss=f"T{number}", seed=2)
        result = json.loads((folder / "result.json").read_text())
        result["best"]["temperature"] = temperature
        (folder / "result.json").write_text(json.dumps(result))
    for method, test in {"vector": {"ece": "low"}, "raw": {"nll": 1}}.items():
        write_predicted_run(tmp_path, loss=method, seed=1)
        folder = write_predicted_run(tmp_path, loss=method, seed=2)
        write_posthoc(folder)
        posthoc = json.loads((folder / "posthoc.json").read_text())
        posthoc["best"][method] = {"test": test, "notes": []}
        (folder / "posthoc.json").write_text(json.dumps(posthoc))

    report.main([str(tmp_path), "--resamples", "50"])
    table, left_out = capsys.readouterr().out.split("Not in the tables")
    for name in ("T0", "T1", "vector", "raw"):
        [row] = [line for line in table.splitlines() if line.startswith(f"resnet8 {name} ")]
        assert row.split()[2:4] == ["raw", "1"]
        assert f"resnet8/{name}_seed=2" in left_out
    assert "divided by the temperature 0 " in left_out
    assert "the ECE of raw logits is absent" in left_out


def test_nothing_finished_is_no_error(tmp_path, capsys):
    """Not even beside a config.json of another program."""
    (write_run(tmp_path) / "result.json").unlink()
    (tmp_path / "config.json").write_text('["a"]')
    report.main([str(tmp_path)])
    assert capsys.readouterr().out.count("unfinished") == 2


# Formats


def test_columns_and_epoch(tmp_path, capsys):
    write_run(tmp_path, best=measured(), last=measured(test={"brier": 0.1234}))
    report.main([str(tmp_path), "--columns", "brier", "top1", "true_kl", "--epoch", "last"])
    head, _, row = capsys.readouterr().out.splitlines()[:3]
    assert head.split() == ["toy", "logits", "n", "Brier", "top-1", "%", "true", "KL"]
    assert row.split() == ["resnet8", "NLL", "raw", "1", "0.1234", "50.00", "–"]


def test_a_table_in_every_format():
    rows = [
        [TableCell("a", indent=1), TableCell("1.00 ± 0.10", "best")],
        [TableCell("b"), TableCell("2.00")],
    ]
    table = Table(["net", "ECE %"], rows)
    shown = ["net      ECE %", "---  ----------", "  a  1.00±0.10*", "b         2.00"]
    assert render(table, "terminal").splitlines()[:4] == shown

    nasty = [[TableCell(r"a|b*c_d<e>\f`g`"), TableCell("~50%&#$^{}", "close")]]
    table = Table(["x", "y"], nasty)
    assert r"a\|b\*c\_d\<e\>\\f\`g\`" in render(table, "markdown")
    latex = render(table, "latex")
    assert r"a$|$b*c\_d$<$e$>$\textbackslash{}f`g`" in latex
    assert r"\textasciitilde{}50\%\&\#\$\textasciicircum{}\{\}" in latex


# Maps of five metrics; scatter and curves of two data sets; reliability of teacher, student, other.
PICTURES = 5 + 2 * 2 + 3
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{1&amp;'


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A report with a sweep, several seeds, curves, and names that try to be markup."""
    folder = tmp_path_factory.mktemp("written")
    runs = folder / "runs"
    for seed in (1, 2):
        top1 = measured(test={"top1": 0.86 + seed / 25, "true_kl": 0.25})
        write_run(runs, seed=seed, model="resnet20", best=top1)
        folder = write_predicted_run(runs, seed=seed, model="resnet56")
        trained = json.loads((folder / "result.json").read_text())["best"]
        for temperature, weight in product((1, 4), (0.9, 1)):
            knobs = {"T": temperature, "Lambda": weight}
            options = {"seed": seed, "teacher": trained | identity(seed=seed)}
            write_predicted_run(runs, loss="KD", parameters=knobs, **options)
    # A folder's name cannot hold a slash, but what a file says can be anything.
    hostile = write_predicted_run(runs / "<b>bold", command=HOSTILE)
    for name in ("result.json", "config.json"):
        content = json.loads((hostile / name).read_text())
        content |= {"model": HOSTILE, "loss": HOSTILE, "dataset": "a_b & 50%" + HOSTILE}
        content |= {"arguments": {"exp_name": HOSTILE}, "label": HOSTILE}
        (hostile / name).write_text(json.dumps(content))
    stopped = write_run(runs, seed=9)
    (stopped / "result.json").unlink()
    (stopped / "train_log.txt").write_text(HOSTILE)
    report.main([str(runs), "--out", str(folder / "out"), "--resamples", "50"])
    return folder / "out"


def test_csv_has_every_digit_and_every_metric(written):
    names = {f"report.{kind}" for kind in ("html", "md", "csv", "tex")}
    assert {path.name for path in written.iterdir()} == names | {"runs.csv"}
    with open(written / "report.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 1 + 4 + 1)
    [row] = [one for one in rows if one["net"] == "resnet20 NLL" and one["logits"] == "raw"]
    assert float(row["top-1 %"]) == pytest.approx(92)
    assert float(row["top-1 % sd"]) == pytest.approx(100 * np.std([0.9, 0.94], ddof=1))
    assert (row["n"], row["seeds"], row["dataset"]) == ("2", "1 2", "toy")
    assert float(row["true KL"]) == 0.25 and "Brier sd" in row
    students = [one for one in rows if one["teacher"] == "resnet56 NLL"]
    assert len(students) == 8 and sum(one["chosen"] == "yes" for one in students) == 2
    [row] = [one for one in rows if one["dataset"] != "toy" and one["logits"] == "scaled"]
    assert float(row["ECE % low"]) <= float(row["ECE %"]) <= float(row["ECE % high"])
    with open(written / "runs.csv") as file:
        runs = list(csv.DictReader(file))
    raw = [one for one in runs if one["net"] == "resnet20 NLL" and one["logits"] == "raw"]
    assert [(one["seeds"], float(one["top-1 %"])) for one in raw] == [("1", 90), ("2", 94)]
    assert len({one["folder"] for one in raw}) == 2 and {one["T"] for one in raw} == {""}
    for one in runs:
        result = json.loads((Path(one["folder"]) / "result.json").read_text())
        if one["logits"] == "scaled" and one["epoch"]:
            temperature = result[one["epoch"]]["temperature"]
            assert float(one["T"]) == pytest.approx(temperature)
        elif one["logits"] == "raw" and one["epoch"]:
            nll = result[one["epoch"]]["val"]["nll"]
            assert float(one["validation NLL"]) == pytest.approx(nll)


def test_latex_is_whole_tables(written):
    text = (written / "report.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert latex_text("– of --T") == "-- of -{}-T"
    labels = re.findall(r"\\label{tab:([a-z0-9-]+)}", text)
    assert len(set(labels)) == 2
    for table in re.findall(r"\\begin{tabular}.*?\\end{tabular}", text, re.DOTALL):
        columns = len(re.search(r"{(lr+)}", table)[1])
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}
    assert r"a\_b \& 50\%" in text
    assert r"92.00 $\pm$ 2.83" in text and r"\quad resnet8 KD T=1" in text
    assert not re.search(r"(?<!\\)%", text)  # it would comment out the rest of its line
    text.encode("ascii")


def test_markdown_reads_back(written):
    text = (written / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3  # two data sets, the unfinished run
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "**92.00 ± 2.83**" in text


def test_the_page_fetches_nothing_and_names_are_text(written):
    page = (written / "report.html").read_text()
    assert HOSTILE not in page and page.count(html.escape(HOSTILE)) >= 4
    assert "<script" not in page and "<b>bold" not in page and "&lt;b&gt;bold" in page
    assert "url(" not in page and "@import" not in page
    assert all(text.startswith("data:") for text in re.findall(r'(?:src|href)="([^"]*)"', page))
    for tag in ("table", "tr", "td", "div", "figure", "ul", "li", "details"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>") > 0
    assert page.count("python train_teacher.py") == 12  # the command of every run
    pictures = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == PICTURES
    for picture in pictures:
        text = base64.b64decode(picture).decode()
        assert text.rstrip().endswith("</svg>") and "<script" not in text


PROBE = """
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, pictures = [...page.images];
  document.body.dataset.seen = JSON.stringify({
    inner: frame.contentWindow.innerWidth,
    content: page.documentElement.scrollWidth,
    pictures: pictures.length,
    broken: pictures.filter((one) => !one.naturalWidth).length,
  });
});
"""


def test_chromium_renders_it(written, tmp_path):
    """No console message, no broken picture, nothing wider than a narrow page.

    It stands in a frame, for a window is never so narrow.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    wrapper, page = tmp_path / "frame.html", (written / "report.html").read_text()
    wrapper.write_text(
        '<!DOCTYPE html><iframe style="border:0" width="360" height="3000" '
        f'srcdoc="{html.escape(page)}"></iframe><script>{PROBE}</script>'
    )
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    command = [chromium, "--headless", "--no-sandbox", "--no-first-run", "--window-size=1400,1000"]
    command += [f"--disable-{part}" for part in off]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, wrapper.as_uri()], capture_output=True, timeout=120)
    found = re.search(r'data-seen="([^"]*)"', done.stdout.decode())
    assert found, done.stderr.decode()[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["pictures"] == PICTURES and seen["broken"] == 0
    assert seen["inner"] == 360 and seen["content"] <= 360
    assert b"CONSOLE" not in done.stderr
