"""A run that is not trained says so, and by which code it was made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command, fails, run_script

import train_student
import train_teacher
from utils.program import UserError, source
from utils.program.files import write_json

NAME = "tiny/resnet8/NLL_seed=42"


@pytest.fixture
def finished(teacher, tmp_path) -> Path:
    """A copy of a finished run; its root."""
    shutil.copytree(teacher, tmp_path / "runs" / NAME)
    return tmp_path / "runs"


def change(file: Path, **values) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | values
    write_json(file, {key: value for key, value in content.items() if value is not None})


def other_code(config: Path, file: str = "losses/classification.py") -> None:
    """As if this file had been another one when the run began."""
    code = json.loads(config.read_text())["training_code"]
    change(config, training_code=code | {file: "0" * 16})


def test_a_finished_run_says_that_it_is_shown(finished, tiny_npz, capsys):
    result = json.loads((finished / NAME / "result.json").read_text())
    config = json.loads((finished / NAME / "config.json").read_text())
    train_teacher.main(command(tiny_npz, finished))
    _, first, folder, *_ = capsys.readouterr().out.splitlines()
    before, now = source.short(config["git"]), source.short(source.commit())
    assert first == (
        f"finished on {result['finished']} at commit {before} (the code is now {now}): "
        "shown, not trained; --overwrite trains anew"
    )
    assert folder == str(finished / NAME)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_tag_does_not_hide_the_commit(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        line = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    git("tag", "-a", "v1.0", "-m", "first")
    git("commit", "--allow-empty", "-m", "second")
    monkeypatch.setattr(source, "ROOT", tmp_path)
    assert source.commit() == git("rev-parse", "HEAD")
    assert source.short(source.commit()) == git("rev-parse", "HEAD")[:7]


def test_a_new_run_says_nothing_of_that(tiny_npz, tmp_path, capsys):
    train_teacher.main(command(tiny_npz, tmp_path, "--epochs", "1"))
    assert "shown, not trained" not in capsys.readouterr().out


def test_a_finished_run_of_other_code_says_so_loudly(finished, tiny_npz, capsys):
    other_code(finished / NAME / "config.json")
    train_teacher.main(command(tiny_npz, finished))
    printed = capsys.readouterr().out
    assert "WARNING: the training code has changed since: losses/classification.py." in printed
    assert "OLD code" in printed and "--overwrite" in printed
    # What has been trained anew is of today's code.
    train_teacher.main(command(tiny_npz, finished, "--overwrite"))
    train_teacher.main(command(tiny_npz, finished))
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("commit", "said"),
    [("today", False), ("0123456789abcdef", True), ("unknown", True), (None, True)],
)
def test_a_finished_run_of_an_older_version(finished, tiny_npz, capsys, monkeypatch, commit, said):
    """It recorded no checksums and no date; only an equal commit tells that its code is today's."""
    monkeypatch.setattr(source, "commit", lambda: "fedcba9876543210")
    commit = source.commit() if commit == "today" else commit
    change(finished / NAME / "config.json", training_code=None, git=commit)
    change(finished / NAME / "result.json", finished=None)
    train_teacher.main(command(tiny_npz, finished))
    printed = capsys.readouterr().out
    assert "finished on 20" in printed and "shown, not trained" in printed
    assert ("may differ" in printed) == said


def test_an_unfinished_run_that_goes_on_with_other_code(finished, tiny_npz, capsys):
    (finished / NAME / "result.json").unlink()
    other_code(finished / NAME / "config.json", "utils/steps.py")
    train_teacher.main(command(tiny_npz, finished))
    printed = capsys.readouterr().out
    warning = "WARNING: the training code has changed since this run began: utils/steps.py."
    assert warning in printed and warning in (finished / NAME / "train_log.txt").read_text()
    assert printed.index(warning) < printed.index("going on after epoch")


def test_an_unfinished_run_that_goes_on_with_the_same_code(finished, tiny_npz, capsys):
    (finished / NAME / "result.json").unlink()
    train_teacher.main(command(tiny_npz, finished))
    printed = capsys.readouterr().out
    assert "going on after epoch" in printed and "code" not in printed


def test_a_student_whose_teacher_has_gone(finished, tiny_npz, tmp_path, capsys):
    taught = ("--epochs", "1", "--teacher_path", str(finished / NAME))
    line = command(tiny_npz, tmp_path / "students", *taught)
    train_student.main(line)
    shutil.rmtree(finished)
    [config] = tmp_path.glob("students/*/*/*/config.json")
    other_code(config, "losses/distillation.py")
    capsys.readouterr()
    train_student.main(line)
    printed = capsys.readouterr().out
    assert "shown, not trained" in printed and "since: losses/distillation.py" in printed


def test_a_student_whose_data_have_changed_is_not_shown(finished, tiny_npz, tmp_path):
    data = Path(shutil.copy(tiny_npz, tmp_path / "tiny.npz"))
    line = command(data, tmp_path / "students", "--epochs", "1")
    line += ["--teacher_path", str(finished / NAME)]
    train_student.main(line)
    with np.load(data) as arrays:
        changed = {name: arrays[name][::-1] for name in arrays}
    np.savez(data, **changed)
    with pytest.raises(UserError, match="trained on other data"):
        train_student.main(line)


def test_the_checksums_cover_what_training_runs():
    """Every module of ours that an entry script loads, but for those that decide no number."""
    aside = {
        "utils/__init__.py",
        "utils/columns.py",
        "utils/flags.py",
        "utils/options.py",
        "utils/progress.py",
        "utils/run_files.py",
        "utils/run_identity.py",
        "utils/runs.py",
        "utils/settings.py",
        "utils/teacher_flags.py",
        "utils/preflight.py",
        "utils/trackers.py",
    }
    line = "import sys, train_teacher, train_student\nfor module in list(sys.modules.values()):\n"
    line += "    print(getattr(module, '__file__', None))"
    printed = run_script(sys.executable, "-c", line, cwd=ROOT).stdout.split("\n")
    parts = ("train_teacher.py", "train_student.py", "losses", "models", "utils")
    files = {Path(file).relative_to(ROOT) for file in printed if file.startswith(f"{ROOT}/")}
    loaded = {file.as_posix() for file in files if file.parts[0] in parts}
    assert len(loaded) > 25
    assert not any(file.startswith("utils/analysis/") for file in loaded)
    loaded = {file for file in loaded if not file.startswith("utils/program/")}
    assert loaded - aside == loaded & source.training_code().keys()


def test_an_edit_of_a_loss_is_seen(tmp_path, monkeypatch):
    for folder in ("losses", "models", "utils"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for script in ("train_teacher.py", "train_student.py"):
        shutil.copy(ROOT / script, tmp_path)
    monkeypatch.setattr(source, "ROOT", tmp_path)
    config = {"training_code": source.training_code()}
    assert source.changed_files(config) == []
    with open(tmp_path / "losses/calibration.py", "a") as file:
        file.write("\nWEIGHT = 2\n")
    (tmp_path / "models/plain.py").write_text("")
    (tmp_path / "utils/options.py").write_text("")
    assert source.changed_files(config) == ["losses/calibration.py", "models/plain.py"]


def test_a_start_that_kept_no_epoch_leaves_no_settings_behind(finished, tiny_npz):
    """What config.json says of code and commit is of the start that trains."""
    folder = finished / NAME
    other_code(folder / "config.json")
    change(folder / "config.json", settings={"lr": 1e9})
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    train_teacher.main(command(tiny_npz, finished))
    config = json.loads((folder / "config.json").read_text())
    assert config["training_code"] == source.training_code()


def test_a_result_without_its_settings_is_no_run(finished, tiny_npz, capsys):
    folder = finished / NAME
    (folder / "config.json").unlink()
    (folder / "checkpoint.pth").unlink()
    error = fails(capsys, finished, train_teacher.main, command(tiny_npz, finished))
    assert f"{folder} has a result but no config.json; --overwrite starts it anew" in error
    assert not (folder / "config.json").exists()


def test_what_is_said_of_a_sweep(finished):
    folder = finished / NAME
    said = source.sweep_lines([folder, finished / "nowhere"], 5)
    assert said == "2 of 5 runs are complete from before: not trained again"
    other_code(folder / "config.json")
    said = source.sweep_lines([folder], 5)
    assert "WARNING" in said and "since 1 of them began: losses/classification.py." in said
    assert said.count("WARNING") == 1

    config = json.loads((folder / "config.json").read_text())
    data = Path(config["arguments"]["dataset"])
    os.utime(folder / "config.json", (0, 0))
    said = source.sweep_lines([folder], 5)
    assert f"what 1 of them read was written after they began: {data}." in said


def test_inputs_that_were_written_since(finished, tmp_path, monkeypatch):
    folder = finished / NAME
    monkeypatch.chdir(tmp_path)
    for name in ("images/train/cat", "teachers/cifar10/resnet8/NLL_seed=42"):
        Path(name).mkdir(parents=True)
    written = ("net.py", "logits.npz", "teachers/cifar10/resnet8/NLL_seed=42/result.json")
    for name in written:
        Path(name).write_text("")
    os.utime(folder / "config.json", (0, 0))
    arguments = {
        "dataset": "images",
        "data_dir": "data",
        "model": "resnet8",
        "teacher": ["resnet8", "net.py:tiny"],
        "teacher_path": ["teachers", "absent.pth"],
        "teacher_logits": "logits.npz",
    }
    newer = source.newer_inputs(folder, {"arguments": arguments})
    assert sorted(newer) == ["images", "logits.npz", "net.py", "teachers"]
    os.utime(folder / "config.json")
    assert not source.newer_inputs(folder, {"arguments": arguments})
