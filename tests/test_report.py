"""Rows, marks and what is left out, in scripts/report.py on results that are written by hand."""

import csv
import hashlib
import json
import math
import shutil
from itertools import product

import pytest
from written_runs import (
    cells,
    identity,
    measured,
    only_section,
    read,
    sections,
    shown,
    write_posthoc,
    write_predicted_run,
    write_run,
)

from scripts import report
from utils.analysis import taught
from utils.columns import result_table

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
    for teacher, is_shown in ((third_party, False), (third_party | {"seed": 42}, True)):
        table = result_table({"best": own, "last": own, "teacher": teacher})
        assert ("teacher, scaled" in table) == is_shown and "teacher, raw" in table
        assert ("The teacher has no scaled row" in table) != is_shown
        assert ("at the bound" in table) == is_shown


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
    """Raw and scaled apart; of a single run, which has no spread, the other one's counts.

    FLSD is further from the best than either spread alone, Brier within their sum.
    """
    errors = {"NLL": [0.01, 0.03], "LS": [0.02, 0.05], "FL": [0.31, 0.32], "DFL": [0.0201]}
    errors |= {"FLSD": [0.028, 0.05], "Brier": [0.034, 0.056]}
    for loss, values in errors.items():
        for seed, error in enumerate(values):
            test = {"ece": error, "top1": error}
            best = measured(test=test, scaled={"ece": 0.05 - error / 10})
            write_run(tmp_path, loss, seed=seed, best=best)
    section = only_section(tmp_path)
    rows = {group.first.loss: group.rows for group in section.groups}
    raw = {loss: rows[loss]["raw"].cells["ece"].mark for loss in errors}
    assert {loss for loss, mark in raw.items() if mark == "close"} == {"LS", "DFL", "FLSD"}
    assert raw["NLL"] == "best" and raw["FL"] == raw["Brier"] == ""
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


def test_columns_and_epoch(tmp_path, capsys):
    write_run(tmp_path, best=measured(), last=measured(test={"brier": 0.1234}))
    report.main([str(tmp_path), "--columns", "brier", "top1", "true_kl", "--epoch", "last"])
    head, _, row = capsys.readouterr().out.splitlines()[:3]
    assert head.split() == ["toy", "logits", "n", "Brier", "top-1", "%", "true", "KL"]
    assert row.split() == ["resnet8", "NLL", "raw", "1", "0.1234", "50.00", "–"]
