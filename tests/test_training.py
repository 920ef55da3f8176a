"""fit(), the schedules, and what a run folder promises, on real runs of the real scripts."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, command, fails, folder_of, run_script, weights

import train_student
import train_teacher
from utils.calibration.metrics import classification_metrics
from utils.calibration.temperature import fit_temperature
from utils.optimizers import build_optimizer, build_schedule
from utils.options import student_options, teacher_options
from utils.program import RunFailed, UserError
from utils.program.files import atomic, safe_name
from utils.run_files import label_of, number_text
from utils.runs import Run
from utils.settings import Recipe

EXACT = ("state_dict", "metrics", "epoch")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_npz) -> Path:
    """The folder of an undisturbed run of three epochs."""
    root = tmp_path_factory.mktemp("teacher")
    train_teacher.main(command(tiny_npz, root))
    return root / "tiny/resnet8/NLL_seed=42"


# Schedules


def rates(epochs: int, steps: int, **flags) -> list[float]:
    """The learning rate of every step."""
    recipe = Recipe(epochs=epochs, lr=1.0, **flags)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], recipe.lr)
    schedule, seen = build_schedule(optimizer, recipe, steps), []
    for _ in range(epochs * steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_multistep_falls_after_the_milestones():
    seen = rates(8, 5, scheduler="multistep", schedule_steps=(4, 6))
    assert seen == pytest.approx([1.0] * 20 + [0.1] * 10 + [0.01] * 10)


def test_cosine_is_the_formula():
    wanted = [(1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    assert rates(8, 5, scheduler="cosine") == pytest.approx(wanted)
    assert rates(8, 5, scheduler="warmupcosine") == pytest.approx(wanted)


def test_warmup_rises_in_a_line_and_hands_over():
    seen = rates(8, 5, scheduler="warmupcosine", warmup=10)
    assert seen[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert seen[10:] == pytest.approx(
        [(1 + math.cos(math.pi * step / 30)) / 2 for step in range(30)]
    )


@pytest.mark.parametrize("script", [teacher_options, student_options])
def test_both_scripts_decay_by_default(script):
    argv = ["--epochs", "160", *(["--teacher_path", "x"] if script is student_options else [])]
    recipe = script(argv).recipe
    assert (recipe.scheduler, recipe.schedule_steps) == ("multistep", (80, 120))
    assert script([*argv, "--epochs", "1"]).recipe.schedule_steps == ()


def test_either_spelling_of_a_flag():
    flags = ["--train_batch_size", "7", "--weight_decay=0.1", "--data-dir", "x"]
    experiment = teacher_options(flags)
    assert (experiment.recipe.train_batch_size, experiment.recipe.weight_decay) == (7, 0.1)
    assert experiment.data.data_dir == "x"


# What a run leaves


def test_files_and_their_contents(teacher):
    files = {path.name for path in teacher.iterdir()} - {".lock"}
    assert files == {
        *("config.json", "train_log.txt", "metrics.jsonl", "checkpoint.pth", "model_best.pth"),
        *("model_last.pth", "predictions.npz", "result.json", "reliability.png"),
    }
    records = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert records[0].keys() == {
        *("epoch", "lr", "train_loss", "train_top1", "seconds", "images_per_second"),
        *("val_nll", "val_top1", "val_ece", "val_sce", "val_adaece", "val_refinement"),
    }
    best = torch.load(teacher / "model_best.pth", weights_only=True)
    tops = [record["val_top1"] for record in records]
    assert best["epoch"] == 1 + tops.index(max(tops))
    assert best["model"] == "resnet8" and best["dataset"] == "tiny" and best["num_classes"] == 4
    config = json.loads((teacher / "config.json").read_text())
    assert config["images"] == {"train": 135, "val": 15, "test": 40}
    assert config["arguments"]["epochs"] == 3 and config["class_names"] is None
    assert (teacher / "reliability.png").read_bytes()[:4] == b"\x89PNG"


def test_result_follows_from_the_predictions(teacher):
    """Metrics and temperature can be computed again from what is stored."""
    result = json.loads((teacher / "result.json").read_text())
    stored = np.load(teacher / "predictions.npz")
    for which in ("best", "last"):
        val, test = stored[f"{which}_val_logits"], stored[f"{which}_test_logits"]
        assert val.dtype == np.float32 and val.shape == (15, 4) and test.shape == (40, 4)
        temperature, at_bound = fit_temperature(val, stored["val_labels"])
        assert result[which]["temperature"] == temperature
        assert result[which]["temperature_at_bound"] == at_bound
        raw = classification_metrics(test, stored["test_labels"])
        assert result[which]["test"]["raw"] == pytest.approx(raw)
        scaled = classification_metrics(test, stored["test_labels"], temperature)
        assert result[which]["test"]["scaled"] == pytest.approx(scaled)


def test_the_net_in_the_file_makes_the_stored_logits(teacher, tiny_npz):
    from models import build_model
    from utils.data import load_dataset
    from utils.data.views import normalise

    saved = torch.load(teacher / "model_last.pth", weights_only=True)
    net = build_model(saved["model"], saved["num_classes"])
    net.load_state_dict(saved["state_dict"])
    data = load_dataset(str(tiny_npz), "data", saved["split_seed"])
    with torch.inference_mode():
        logits = net.eval()(normalise(data.test.images, saved["mean"], saved["std"]))
    stored = np.load(teacher / "predictions.npz")["last_test_logits"]
    np.testing.assert_allclose(logits, stored, rtol=1e-4, atol=1e-5)


# The same command again


def test_a_finished_run_is_shown_not_repeated(teacher, tiny_npz, capsys):
    before = (teacher / "result.json").stat().st_mtime_ns
    train_teacher.main(command(tiny_npz, teacher.parents[2]))
    assert "best, scaled" in capsys.readouterr().out
    assert (teacher / "result.json").stat().st_mtime_ns == before


def test_same_seed_same_bits_and_flags_that_change_nothing(teacher, tiny_npz, tmp_path):
    train_teacher.main(command(tiny_npz, tmp_path, "--test-batch-size", "7", "--gamma", "5"))
    first, second = weights(teacher), weights(tmp_path / "tiny/resnet8/NLL_seed=42")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_differs(teacher, tiny_npz, tmp_path):
    train_teacher.main(command(tiny_npz, tmp_path, "--seed", "1"))
    other = weights(tmp_path / "tiny/resnet8/NLL_seed=1")
    assert not torch.equal(other["fc.weight"], weights(teacher)["fc.weight"])


def test_other_settings_are_refused_with_both_ways_out(teacher, tiny_npz):
    root = teacher.parents[2]
    with pytest.raises(UserError, match=r"lr was 0\.1 and is 0\.2.*--exp_name.*--overwrite"):
        train_teacher.main(command(tiny_npz, root, "--lr", "0.2"))
    flags = ("--lr", "0.2", "--exp_name", "fast", "--epochs", "1")
    train_teacher.main(command(tiny_npz, root, *flags))
    assert (root / "tiny/resnet8/NLL_seed=42_fast/result.json").exists()


class Killed(BaseException):
    """Stands in for SIGKILL within the process: nothing in the project catches it."""


def test_warm_schedules_resume_exactly(tiny_npz, tmp_path, monkeypatch):
    """torch's chained schedulers keep more state than the multistep one."""
    flags = ("--scheduler", "warmupcosine", "--warmup", "4", "--momentum", "0.5")
    train_teacher.main(command(tiny_npz, tmp_path / "whole", *flags))
    write, calls = Run.save, []

    def killed(self, *arguments):
        write(self, *arguments)
        calls.append(0)
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", killed)
        train_teacher.main(command(tiny_npz, tmp_path / "cut", *flags))
    train_teacher.main(command(tiny_npz, tmp_path / "cut", *flags))
    folders = [tmp_path / part / "tiny/resnet8/NLL_seed=42" for part in ("whole", "cut")]
    assert_same_run(*folders)


def test_adamw_is_torchs_and_resumes_exactly(tiny_npz, tmp_path, monkeypatch):
    flags = ("--optimizer", "adamw", "--lr", "0.01", "--wd", "0.1")
    train_teacher.main(command(tiny_npz, tmp_path / "whole", *flags))
    optimizer = build_optimizer(torch.nn.Linear(2, 2), Recipe(optimizer="adamw", lr=0.01))
    assert type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["lr"] == 0.01

    save = Run.save

    def killed(self, *arguments):
        save(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", killed)
        train_teacher.main(command(tiny_npz, tmp_path / "cut", *flags))
    train_teacher.main(command(tiny_npz, tmp_path / "cut", *flags))
    folders = [tmp_path / part / "tiny/resnet8/NLL_seed=42" for part in ("whole", "cut")]
    assert_same_run(*folders)
    assert json.loads((folders[0] / "config.json").read_text())["settings"]["optimizer"] == "adamw"


def test_the_parts_of_a_loss_add_up(teacher, tiny_npz, tmp_path):
    """A loss of one part is not said twice."""
    train_teacher.main(command(tiny_npz, tmp_path / "teacher", "--loss", "FL+MDCA"))
    student = ("--teacher_path", str(teacher))
    train_student.main(command(tiny_npz, tmp_path / "student", *student))
    parts = {"teacher": ("labels", "calibration"), "student": ("distillation", "labels")}
    for root, names in parts.items():
        lines = next((tmp_path / root).rglob("metrics.jsonl")).read_text().splitlines()
        for record in map(json.loads, lines):
            total = sum(record[f"train_{name}"] for name in names)
            assert total == pytest.approx(record["train_loss"])
    alone = json.loads((teacher / "metrics.jsonl").read_text().splitlines()[0])
    assert "train_labels" not in alone


# Students


def test_student_of_a_run_folder(teacher, tiny_npz, tmp_path):
    flags = ("--teacher_path", str(teacher.parents[2] / "tiny/resnet8/NLL_seed=42"), "--T", "2.0")
    train_student.main(command(tiny_npz, tmp_path, *flags, "--teacher_loss", "cross_entropy"))
    folder = tmp_path / "tiny/resnet8/KD_T=2_Lambda=0.9_from_resnet8_NLL_seed=42"
    result = json.loads((folder / "result.json").read_text())
    own = json.loads((teacher / "result.json").read_text())
    for way in ("raw", "scaled"):
        assert result["teacher"]["test"][way] == pytest.approx(own["best"]["test"][way], abs=1e-6)
    assert result["teacher"]["label"] == "NLL" and result["teacher"]["seed"] == 42
    saved = torch.load(folder / "model_best.pth", weights_only=True)
    assert not any("teacher" in name for name in saved["state_dict"])


def test_a_student_can_teach(teacher, tiny_npz, tmp_path):
    once = ("--epochs", "1", "--teacher_path")
    train_student.main(command(tiny_npz, tmp_path / "a", *once, str(teacher)))
    train_student.main(command(tiny_npz, tmp_path / "b", *once, str(tmp_path / "a")))
    label = "KD_T=4_Lambda=0.9_from_resnet8_KD_T=4_Lambda=0.9_from_resnet8_NLL_seed=42"
    assert (tmp_path / "b/tiny/resnet8" / label / "result.json").exists()


def test_own_validation_images_serve_a_teacher_and_its_student(tiny_npz, tmp_path, capsys):
    with np.load(tiny_npz) as arrays:
        own = dict(arrays) | {"x_val": arrays["x_test"][:30], "y_val": arrays["y_test"][:30]}
    path = tmp_path / "own.npz"
    np.savez(path, **own, classes=np.array(["red", "green", "blue", "grey"]))
    train_teacher.main(command(path, tmp_path / "runs", "--epochs", "1"))
    assert "30 images of x_val validate, and all of x_train trains" in capsys.readouterr().out
    run = ["--epochs", "1", "--teacher_path", str(tmp_path / "runs")]
    train_student.main(command(path, tmp_path / "students", *run))
    for root in ("runs", "students"):
        folder = folder_of(tmp_path / root)
        config = json.loads((folder / "config.json").read_text())
        assert config["images"] == {"train": 150, "val": 30, "test": 40}
        assert config["class_names"] == ["red", "green", "blue", "grey"]
        with np.load(folder / "predictions.npz") as stored:
            assert stored["val_labels"].tolist() == own["y_val"].tolist()
    flags = command(path, tmp_path / "other", "--split-seed", "1")
    assert "--split-seed 1: has no effect" in fails(capsys, tmp_path, train_teacher.main, flags)
    train = ["--teacher_path", str(tmp_path / "runs")]
    flags = command(tiny_npz, tmp_path / "other", *train)
    assert "trained on other data, own" in fails(capsys, tmp_path, train_student.main, flags)


def test_without_labels_a_student_sees_its_teacher_only(teacher, tiny_npz, tmp_path):
    """Lambda = 1 and a student as large as the teacher: its logits approach the teacher's."""
    flags = ("--teacher_path", str(teacher), "--Lambda", "1", "--T", "1", "--epochs", "8")
    train_student.main(command(tiny_npz, tmp_path, *flags))
    folder = tmp_path / "tiny/resnet8/KD_T=1_Lambda=1_from_resnet8_NLL_seed=42"
    records = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    assert records[-1]["train_loss"] < 0.5 * records[0]["train_loss"]


# Processes and launchers


def test_piped_output_has_no_progress_bar(tiny_npz, tmp_path):
    flags = command(tiny_npz, tmp_path, "--epochs", "2")
    done = run_script("train_teacher.py", *flags, cwd=tmp_path)
    assert done.stderr == ""
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    assert done.stdout.count("epoch ") == 3  # a line for each, and the table's head


# Names and files


def test_numbers_are_written_one_way():
    assert [number_text(x) for x in (3.0, 3, 0.1, 1e-5, 0.30000000000000004)] == [
        *("3", "3", "0.1", "1e-05", "0.30000000000000004")
    ]
    assert label_of("FL+MDCA", {"gamma": 3.0, "beta": 1.0}) == "FL+MDCA_gamma=3_beta=1"


@pytest.mark.parametrize("text", ["../../etc", "a/b", "a:b c", "..", "", "x" * 500, "ü\n\t"])
def test_names_are_safe(text):
    name = safe_name(text)
    assert 0 < len(name) < 200 and not name.startswith(".") and "/" not in name
    assert name.isascii() and name.isprintable()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFailed, match="file.*No space"), atomic(path, "w") as file:
        file.write("new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
