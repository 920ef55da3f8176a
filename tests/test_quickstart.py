"""quickstart.sh, and the table that docs/quickstart.md shows of it."""

import csv
import json
import os
import re
import shlex
import shutil
import sys

import pytest
from conftest import ROOT, run_script, write_npz

import train_student
import train_teacher
from scripts import quickstart_table, report
from utils.options import student_options, teacher_options
from utils.program import UserError

# Notes each command; a training leaves a result of its own.
STAND_IN = """#!{python}
import os, shlex, sys
with open("commands", "a") as file:
    print(shlex.join(sys.argv[1:]), file=file)
if sys.argv[1].startswith("train"):
    number = len(open("commands").readlines())
    root = sys.argv[sys.argv.index("--checkpoint") + 1]
    os.makedirs(f"{{root}}/{{number}}")
    open(f"{{root}}/{{number}}/result.json", "w").close()
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the code in which `python` is what the test says, and nothing is installed."""
    for part in ("losses", "models", "utils", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / part)
    for script in ("train_teacher.py", "train_student.py"):
        shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "scripts/environment.sh").write_text("")
    (tmp_path / "bin").mkdir()
    return tmp_path


def quickstart(copy, python: str, *words, **environment) -> str:
    """What it prints, with a `python` of this text."""
    stand_in = copy / "bin/python"
    stand_in.write_text(python)
    stand_in.chmod(0o755)
    variables = {"PATH": f"{copy / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(copy)}
    command = ["bash", copy / "scripts/quickstart.sh", *words]
    return run_script(*command, cwd=copy, **(variables | environment)).stdout


def headlines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("== training")]


def test_it_says_which_training_of_how_many_and_what_is_left(copy):
    shown = headlines(quickstart(copy, STAND_IN.format(python=sys.executable), "out"))
    assert [line.split(":")[0] for line in shown] == [f"== training {n} of 5" for n in range(1, 6)]
    assert "minutes on two idle cores" in shown[0]
    for line in shown[1:]:
        assert re.search(r"about \d+ min \d+ s left, until \d\d:\d\d", line)


def test_runs_that_were_finished_before_say_nothing_about_the_time(copy):
    python = STAND_IN.format(python=sys.executable).replace("os.makedirs", "0 and os.makedirs")
    python = python.replace("    open(f", "    0 and open(f")
    shown = headlines(quickstart(copy, python, "out"))
    assert len(shown) == 5 and all("minutes on two idle cores" in line for line in shown)


def test_a_training_that_stops_ends_all_and_says_how_to_go_on(copy):
    python = copy / "bin/python"
    python.write_text('#!/bin/sh\necho "$1" >>commands\n[ "$1" != train_student.py ] || exit 3\n')
    python.chmod(0o755)
    path = f"{copy / 'bin'}:{os.environ['PATH']}"
    command = ["bash", copy / "scripts/quickstart.sh", "out"]
    done = run_script(*command, cwd=copy, check=False, PATH=path)
    assert done.returncode == 3 and "training 4 of 5 has stopped" in done.stderr
    assert "another FOLDER starts anew" in done.stderr and done.stderr.count("\n") == 1
    assert (copy / "commands").read_text().split() == 3 * ["train_teacher.py"] + [
        "train_student.py"
    ]


def test_the_shares_of_the_work_add_up():
    text = (ROOT / "scripts/quickstart.sh").read_text()
    shares = re.findall(r"^training (\d+) ", text, re.MULTILINE)
    assert len(shares) == 5 and sum(map(int, shares)) == 100


@pytest.mark.parametrize("seed", [42, 7])
def test_the_epoch_that_teaches_is_the_one_that_is_shown(copy, seed):
    environment = {} if seed == 42 else {"SEED": str(seed)}
    quickstart(copy, STAND_IN.format(python=sys.executable), "my runs", **environment)
    commands = [shlex.split(line) for line in (copy / "commands").read_text().splitlines()]
    root = str(copy / "my runs")
    teachers = [teacher_options(words) for script, *words in commands if "teacher.py" in script]
    students = [student_options(words) for script, *words in commands if "student.py" in script]
    assert [(run.recipe.model, run.loss.name) for run in teachers] == [
        *(("resnet14", "NLL"), ("resnet14", "FL+MDCA"), ("resnet8", "NLL"))
    ]
    names = [f"NLL_seed={seed}", f"FL+MDCA_gamma=1_beta=1_seed={seed}"]
    for student, name in zip(students, names, strict=True):
        assert student.teacher.paths == (f"{root}/synthetic/resnet14/{name}",)
        assert student.teacher.select == "last"
    everyone = [*teachers, *students]
    for run in everyone:
        assert (run.run.checkpoint, run.recipe.seed) == (root, seed)
        assert run.data.dataset == "synthetic"
    _, module, report_root, *flags = commands[-1]
    assert module == "scripts.report" and report_root == root
    assert flags == ["--epoch", "last", "--out", f"{root}/report"]


def test_its_commands_on_smaller_data(copy, capsys):
    """One epoch each, in this process, of the commands that quickstart.sh gives."""
    quickstart(copy, STAND_IN.format(python=sys.executable), "out")
    shutil.rmtree(copy / "out")
    data = write_npz(copy / "synthetic.npz", 10, 150, 60)
    smaller = {"synthetic": str(data), "10": "1"}
    for line in (copy / "commands").read_text().splitlines():
        words = [smaller.get(word, word) for word in shlex.split(line)]
        if words[0] == "-m":
            report.main(words[2:])
        else:
            main = {"train_teacher.py": train_teacher.main, "train_student.py": train_student.main}
            main[words[0]](words[1:])
    printed = capsys.readouterr().out
    sizes = "10 classes; 135 images train it, 15 validate, 60 test"
    assert printed.count(f"resnet14: 175,258 parameters; {sizes}") == 2
    assert printed.count(f"resnet8: 78,042 parameters; {sizes}") == 3
    with open(copy / "out/report/runs.csv") as file:
        shown = [(row["net"], row["teacher"], row["epoch"]) for row in csv.DictReader(file)]
    calibrated = "resnet14 FL+MDCA gamma=1 beta=1"
    student = "resnet8 KD T=4 Lambda=0.9"
    for net in (
        *((calibrated, ""), ("resnet14 NLL", ""), ("resnet8 NLL", "")),
        *((student, calibrated), (student, "resnet14 NLL")),
    ):
        assert shown.count((*net, "last")) == 2, net  # raw and scaled
    assert len(shown) == 10
    assert (copy / "out/report/report.html").stat().st_size > 10_000


# The table of docs/quickstart.md


def result_of(root, net, seed, top1, ece, true):
    """A finished run as far as the table reads it; fractions."""
    raw = {"top1": top1, "ece": ece, "true_calibration_error": true}
    scaled = {"top1": top1, "ece": ece / 2, "true_calibration_error": true}
    label = net.label if net.teacher is None else f"{net.label}_from_resnet14_{net.teacher}"
    result = {"model": net.model, "label": label, "seed": seed}
    result["last"] = {"test": {"raw": raw, "scaled": scaled}}
    if net.teacher is not None:
        result["teacher"] = {"label": net.teacher}
    folder = root / net.model / f"{label}_seed={seed}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def test_the_table_shows_the_spread_and_what_holds_in_all(tmp_path, capsys):
    roots = [tmp_path / "one", tmp_path / "two"]
    for number, root in enumerate(roots):
        for seed in (1, 2):
            for rank, net in enumerate(quickstart_table.NETS):
                # The first net has always the least ECE; the true error's order changes once.
                true = 0.09 + 0.01 * rank
                if (number, seed) == (1, 2) and rank == 0:
                    true = 0.5
                result_of(root, net, seed, 0.7, 0.01 * (rank + 1) + 0.001 * seed, true)
    quickstart_table.main(list(map(str, roots)))
    repetitions, _, _, *lines = capsys.readouterr().out.splitlines()
    assert repetitions == "4 repetitions"
    first = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert first == [
        *("teacher resnet14, FL+MDCA", "raw", "70.00 [70.00, 70.00]"),
        *("**1.15 [1.10, 1.20]**", "19.25 [9.00, 50.00]"),
    ]
    assert lines[1].startswith("|  | scaled |") and "**0.57 [0.55, 0.60]**" in lines[1]
    # The students are ahead of their net from scratch in both: the first of them is named.
    bold = [number for number, line in enumerate(lines) if "**" in line]
    assert bold == [0, 1, 2, 3] and lines[2].count("**") == lines[3].count("**") == 4
    compared = [line for line in lines if line.startswith("resnet14 FL+MDCA")]
    assert "raw, ECE %: -2.00 [-2.00, -2.00], lower in 4 of 4" in compared[1]
    assert "raw, true cal. error %: 8.25 [-2.00, 39.00], lower in 3 of 4" in compared[2]


def test_the_table_wants_every_net_of_every_seed(tmp_path):
    for seed in (1, 2):
        for net in quickstart_table.NETS[:-1] if seed == 2 else quickstart_table.NETS:
            result_of(tmp_path, net, seed, 0.7, 0.1, 0.1)
    with pytest.raises(UserError, match="hold 2, 2, 2, 2, 1 runs of the five nets"):
        quickstart_table.main([str(tmp_path)])
    with pytest.raises(UserError, match="hold 0, 0, 0, 0, 0 runs"):
        quickstart_table.main([str(tmp_path / "nowhere")])


def test_its_labels_are_those_of_the_quickstart():
    text = (ROOT / "scripts/quickstart.sh").read_text()
    assert f"{quickstart_table.CALIBRATED}_seed=$seed" in text
