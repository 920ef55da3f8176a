"""Which net stands above a student in a report, and which students share a row."""

import csv
import hashlib
import json
import zipfile
from itertools import product
from pathlib import Path

import pytest
from conftest import command, folder_of
from written_runs import (
    cells,
    divided,
    identity,
    measured,
    only_section,
    read,
    shown,
    write_predicted_run,
    write_run,
)

import train_student
from scripts import report
from utils.analysis.records import finished_nets

TAUGHT = {"best": 0.31, "last": 0.62}  # test NLL of a teacher's two epochs


def write_teacher(root: Path, seed: int = 1, weights: bool = True, **options) -> Path:
    """A run whose epochs differ in NLL and in the bytes that stand for weights."""
    nets = {which: measured(test={"nll": nll}) for which, nll in TAUGHT.items()}
    folder = write_run(root, model="resnet56", seed=seed, **nets, **options)
    if weights:
        for which in TAUGHT:
            (folder / f"model_{which}.pth").write_bytes(f"{seed} {which}".encode())
    return folder


def taught_by(which: str, seed: int = 1, file: str | None = None, **more) -> dict:
    """What a student's result says of the teacher above, and measured of it."""
    sha256 = hashlib.sha256(f"{seed} {which}".encode()).hexdigest()
    found = measured(test={"nll": TAUGHT[which]}) | identity(seed=seed, sha256=sha256)
    return found | {"path": f"teachers/{file or f'model_{which}.pth'}"} | more


def above(section, student: str = "resnet8 KD T=4"):
    """The group above each student of that name."""
    return [group.teacher for group in section.groups if group.name.startswith(student)]


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("which, file", [*product(TAUGHT, (None, "copied.pth"))])
@pytest.mark.parametrize("epoch", TAUGHT)
def test_the_row_above_a_student_is_the_net_that_taught_it(tmp_path, epoch, which, file, weights):
    """By its weights, or where these were deleted by the file's name and the NLL."""
    write_teacher(tmp_path, weights=weights)
    write_run(tmp_path, "KD", {"T": 4}, 1, teacher=taught_by(which, file=file))
    section = only_section(tmp_path, "--epoch", epoch)
    [teacher] = above(section)
    assert teacher.rows["raw"].cells["nll"].mean == TAUGHT[which]
    assert not teacher.first.measured_by_student and len(section.groups) == 2
    note = "" if which == epoch else f" {which} epoch"
    assert teacher.name == f"resnet56 NLL{note}"
    assert ("is always shown at the epoch" in shown(section)) == bool(note)


def test_both_epochs_of_a_run_may_teach(tmp_path, capsys):
    """Each has its row; the run is packed once, and its table comes again from the pack."""
    folder = write_predicted_run(tmp_path / "runs", model="resnet56", seed=1)
    result = json.loads((folder / "result.json").read_text())
    for which, nll in TAUGHT.items():
        result[which]["test"]["raw"]["nll"] = nll
    (folder / "result.json").write_text(json.dumps(result))
    for which, temperature in (("best", 4), ("last", 5)):
        knobs = {"T": temperature}
        teacher = taught_by(which)
        write_predicted_run(tmp_path / "runs", loss="KD", parameters=knobs, seed=1, teacher=teacher)
    tables = []
    for root, flags in (("runs", ["--pack", str(tmp_path / "a.zip")]), ("a.zip", [])):
        out = ["--out", str(tmp_path / "out"), "--columns", "nll", "--resamples", "50"]
        report.main([str(tmp_path / root), *out, "--epoch", "last", *flags])
        tables.append(capsys.readouterr().out.split("written")[0])
        page = (tmp_path / "out/report.html").read_text()
        assert page.count("python train_teacher.py") == 3 and "3 finished runs" in page
        with open(tmp_path / "out/report.csv") as file:
            lines = [line for line in csv.DictReader(file) if line["logits"] == "raw"]
        assert {(line["net"], line["epoch"], line["teacher"]) for line in lines} == {
            ("resnet56 NLL", "last", ""),
            ("resnet56 NLL best epoch", "best", ""),
            ("resnet8 KD T=4", "last", "resnet56 NLL best epoch"),
            ("resnet8 KD T=5", "last", "resnet56 NLL"),
        }
    assert tables[0] == tables[1] and "resnet56 NLL best epoch" in tables[0]
    assert "lacks" not in tables[0]  # its row of the last epoch has it, too
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert len(archive.namelist()) == len(set(archive.namelist()))


def test_a_row_says_which_of_its_runs_stand_at_the_epoch_that_taught(tmp_path):
    for seed in (1, 2, 3):
        write_teacher(tmp_path, seed)
    for seed in (1, 2):
        write_run(tmp_path, "KD", {"T": 4}, seed, teacher=taught_by("best", seed))
    text = " ".join(shown(only_section(tmp_path, "--epoch", "last")).split())
    assert "resnet56 NLL lacks 2 runs that taught: see resnet56 NLL best epoch." in text
    assert "lacks" not in shown(only_section(tmp_path))


@pytest.mark.parametrize("which", TAUGHT)
def test_what_taught_in_a_real_run(which, tmp_path, tiny_npz, teacher):
    """The whole way: train, distil with --teacher_select, report with either --epoch."""
    flags = ["--teacher_path", str(teacher), "--teacher_select", which, "--epochs", "1"]
    train_student.main(command(tiny_npz, tmp_path, *flags))
    [student] = tmp_path.rglob("result.json")
    expected = json.loads(student.read_text())["teacher"]["test"]["raw"]["nll"]
    for epoch in TAUGHT:
        argv = [str(tmp_path), str(teacher), "--epoch", epoch, "--resamples", "0"]
        report.main([*argv, "--out", str(tmp_path / "out")])
        with open(tmp_path / "out/report.csv") as file:
            lines = [line for line in csv.DictReader(file) if line["logits"] == "raw"]
        [row] = [line for line in lines if line["label"] == "NLL"]
        assert float(row["NLL"]) == pytest.approx(expected, rel=1e-6) and row["epoch"] == which
    # A command that is asked for an epoch of a run gets that, whatever taught.
    for epoch in TAUGHT:
        nets = finished_nets([folder_of(teacher), tmp_path], epoch, with_teacher=True)
        assert [net.epoch for net in nets if not net.measured_by_student] == [epoch] * 2
        assert [net.epoch for net in nets if net.measured_by_student] == [which] * (epoch != which)


def test_a_run_that_measures_otherwise_did_not_teach(tmp_path):
    """It has the teacher's name, but was trained again with other settings, say."""
    write_teacher(tmp_path, weights=False)
    other = taught_by("best", file="gone.pth") | measured(test={"nll": 0.4})
    write_run(tmp_path, "KD", {"T": 4}, 1, teacher=other)
    [teacher] = above(only_section(tmp_path))
    assert teacher.first.measured_by_student and teacher.rows["raw"].cells["nll"].mean == 0.4


def test_a_student_of_a_damaged_run_keeps_a_teacher(tmp_path):
    folder = write_predicted_run(tmp_path, model="resnet56", seed=1)
    trained = json.loads((folder / "result.json").read_text())["best"]
    teacher = trained | identity(seed=1)
    write_run(tmp_path, "KD", {"T": 4}, 1, teacher=teacher)
    (folder / "predictions.npz").write_text("damaged")
    [teacher] = above(only_section(tmp_path, "--resamples", "50"))
    assert teacher.first.measured_by_student


VIEWS = {"label": "NLL_Tcal=views", "teacher_temperature": "views"}
ENSEMBLE = identity("3xresnet20", "LS_and_NLL", "1+2+3")


def ensemble(*labels: str) -> dict:
    members = [identity("resnet20", label, seed) for seed, label in enumerate(labels)]
    return {"members": members, "mean": None, "std": None}


@pytest.mark.parametrize("with_runs", [True, False])
@pytest.mark.parametrize(
    "first, second, names",
    [
        ({}, {"size": 16}, {"size=16"}),
        (VIEWS, VIEWS | {"teacher_accuracy": 0.85}, {"teacher_accuracy=0.85"}),
        ({"key": "ema"}, {"key": "model"}, {"key=ema", "key=model"}),
        ({}, {"mean": [0.4] * 3}, {"mean="}),
        (taught_by("best"), taught_by("last"), {"last epoch"}),
        (ENSEMBLE | ensemble("NLL", "NLL", "LS"), ENSEMBLE | ensemble("NLL", "LS", "LS"), set()),
    ],
)
def test_students_of_other_teachers_are_other_rows(tmp_path, first, second, names, with_runs):
    """Seeds 1 and 2 of the same command are one row, with other teachers two, named apart."""
    for seed in (1, 2):
        if with_runs and not {"key", "mean"} & {*first, *second}:  # only third parties' have these
            write_teacher(tmp_path, seed)
        for setting in (first, second):
            which = "last" if "last" in setting.get("path", "") else "best"
            teacher = taught_by(which, seed) | setting
            if "members" not in setting:
                teacher |= {"seed": seed, "sha256": taught_by(which, seed)["sha256"]}
            place = tmp_path / ("first" if setting is first else "second")
            write_run(place, "KD", {"T": 4}, seed, teacher=teacher)
    teachers = above(only_section(tmp_path))
    assert len(teachers) == 2 and len({teacher.name for teacher in teachers}) == 2
    groups = [group for group in read(tmp_path)[0] if group.teacher]
    assert [len(group.records) for group in groups] == [2, 2]
    assert all(any(part in teacher.name for teacher in teachers) for part in names)
    assert not any("None" in teacher.name for teacher in teachers)


def test_other_weights_at_the_same_seed_are_another_teacher(tmp_path):
    """It was trained again, with other settings, and its run is not here: no mean of the two."""
    for training, confidence in (("first", 0.9), ("again", 0.8)):
        for seed in (1, 2):
            sha256 = hashlib.sha256(f"{seed} {training}".encode()).hexdigest()
            seen = {"view_confidence": confidence, "temperature": 1}
            teacher = identity(seed=seed, sha256=sha256) | {"seen": seen}
            write_run(tmp_path, "KD", {"T": 4}, seed, teacher=teacher, exp_name=training)
    section = only_section(tmp_path)
    teachers = above(section)
    assert [len(teacher.records) for teacher in teachers] == [1] * 4
    names = {f"resnet56 NLL sha256={teacher.first.measured['sha256'][:12]}" for teacher in teachers}
    assert {teacher.name for teacher in teachers} == names and len(names) == 4
    text = " ".join(shown(section).split())
    assert text.count("80.0 %") == text.count("90.0 %") == 2


@pytest.mark.parametrize("label, members", [("NLL_Tcal=auto", 1), ("NLL", 2)])
def test_settings_of_a_teachers_runs_tell_its_students_apart(tmp_path, label, members):
    """Also of those of an ensemble, and of a teacher whose logits were divided."""
    for lr, seed in ((0.1, 1), (0.2, 2)):
        every = []
        for own in range(members):
            name = 10 * seed + own
            write_teacher(tmp_path / str(name), name, settings={"lr": lr})
            every.append(identity(seed=name, sha256=taught_by("best", name)["sha256"]))
        facts = measured(test={"nll": TAUGHT["best"]}) | {"path": "model_best.pth"}
        teacher = every[0] | {"label": label, "teacher_temperature": "auto"}
        if members > 1:
            seeds = "+".join(str(member["seed"]) for member in every)
            teacher = identity("2xresnet56", label, seeds, f"of {seed}") | {"members": every}
        write_run(tmp_path / "s", "KD", {"T": 4}, seed, teacher=facts | teacher)
    names = [teacher.name for teacher in above(only_section(tmp_path))]
    assert len(names) == 2 and [name.split()[-1] for name in names] == ["lr=0.1", "lr=0.2"]


# Names that --against takes


def test_a_name_of_several_rows_is_refused_with_names_that_tell_them_apart(tmp_path, capsys):
    for label in ("NLL", "LS"):
        write_run(tmp_path, "KD", {"T": 4}, teacher=identity(label=label))
    write_run(tmp_path)
    with pytest.raises(Exception, match="2 rows have that name") as refused:
        report.main([str(tmp_path), "--against", "resnet8 KD T=4"])
    for label in ("NLL", "LS"):
        name = f"resnet8 KD T=4 from resnet56 {label}"
        assert repr(name) in str(refused.value)
        report.main([str(tmp_path), "--against", name])
        assert f"Difference from {name}" in capsys.readouterr().out
    write_run(tmp_path / "b", dataset="other")  # now there are two of that full name
    folder = tmp_path / "b/other/resnet8/NLL_seed=42"
    text = (folder / "result.json").read_text().replace('"fingerprint": "f"', '"fingerprint": "o"')
    (folder / "result.json").write_text(text)
    with pytest.raises(Exception, match="'other resnet8 NLL', 'toy resnet8 NLL'"):
        report.main([str(tmp_path), "--against", "resnet8 NLL"])
    report.main([str(tmp_path), "--against", "toy resnet8 NLL"])
    assert "Difference from resnet8 NLL" in capsys.readouterr().out


def test_a_name_without_what_sets_rows_apart_is_refused_with_all_of_them(tmp_path):
    for lr in (0.1, 0.2):
        write_run(tmp_path / str(lr), settings={"lr": lr})
    with pytest.raises(Exception, match="give one of 'resnet8 NLL lr=0.1', 'resnet8 NLL lr=0.2'"):
        report.main([str(tmp_path), "--against", "resnet8 NLL"])


# Tests


def test_a_row_that_repeats_its_teachers_is_not_tested_twice(tmp_path, capsys):
    """A teacher whose logits were divided for its students is the same net as its run."""
    folder = write_predicted_run(tmp_path, excess=0.2, model="resnet56", seed=1)
    trained = json.loads((folder / "result.json").read_text())["best"]
    write_predicted_run(tmp_path, excess=0.0, seed=1)
    flags = ["--columns", "top1", "--resamples", "200", "--against"]

    def tested(row: str) -> str:
        report.main([str(tmp_path), *flags, row])
        return capsys.readouterr().out.split("Difference from")[1]

    for name in ("KD", "DKD"):
        teacher = trained | identity(seed=1)
        write_predicted_run(tmp_path, 0.1, loss=name, seed=1, teacher=teacher)
    before = tested("resnet8 NLL")
    for name in ("KD", "DKD"):
        (tmp_path / f"toy/resnet8/{name}_from_resnet56_NLL_seed=1").rename(tmp_path / name)
        (tmp_path / name / "result.json").unlink()
    for name in ("KD", "DKD"):
        teacher = trained | divided("auto", seed=1)
        write_predicted_run(tmp_path, 0.1, loss=name, seed=1, teacher=teacher)
    after = tested("resnet8 NLL")
    assert "Not tested a second time" in after and "Not tested" not in before
    assert after.count("raw") == before.count("raw") == 3
    # Nor is the run's row a difference from its own logits.
    assert tested("resnet56 NLL Tcal=auto").count("raw") == 3


def test_how_sure_teachers_were_is_said_below_the_table(tmp_path):
    """The mean over the students of a teacher; runs of older versions did not record it."""
    for seed, confidence in ((1, 0.95), (2, 0.97)):
        seen = {"view_confidence": confidence, "val_confidence": 0.9, "temperature": 1.5}
        teacher = divided("views", seed=seed) | {"seen": seen}
        write_run(tmp_path, "KD", {"T": 4}, seed, teacher=teacher)
    write_run(tmp_path, "KD", {"T": 4}, 1, teacher=identity(label="older", seed=1))
    # Another accuracy has found another temperature: no mean is taken of the two.
    told = divided("views", seed=1) | {"teacher_accuracy": 0.85, "seen": seen | {"temperature": 2}}
    write_run(tmp_path, "DKD", {"T": 4}, 1, teacher=told)
    words = "resnet56 NLL Tcal=views 96.0 and 90.0 %, divided by T = 1.500"
    others = "resnet56 NLL Tcal=views teacher_accuracy=0.85 97.0 and 90.0 %, divided by T = 2.000"
    text = " ".join(shown(only_section(tmp_path)).split())
    assert words in text and others in text and "older 9" not in text


def test_members_that_are_not_whole_leave_the_run_out(tmp_path):
    """A report of the other runs is made all the same."""
    write_run(tmp_path, seed=1)
    damaged = ENSEMBLE | {"members": [{"seed": 1}, {"seed": 2}]}
    write_run(tmp_path, "KD", {"T": 4}, teacher=damaged)
    groups, left_out = read(tmp_path)
    assert [group.name for group in groups] == ["resnet8 NLL"] and len(left_out) == 1
    assert cells(only_section(tmp_path), "resnet8 NLL")
