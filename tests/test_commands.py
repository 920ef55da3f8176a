"""The commands that this project promises, typed into a shell as a user types them.

They run on a small cifar100.npz and for one epoch; nothing else in them is changed.
"""

import json

import pytest
import torch
from conftest import ROOT, run_script

from losses import (
    BASES,
    DISTILLATIONS,
    FEATURES,
    TERMS,
    distillation_names,
    loss_flags,
    loss_names,
    loss_parameters,
)
from utils.options import student_options, teacher_options
from utils.program import UserError

SHORT = "--epochs 1 --data_dir {data}"
TEACHER = (
    "CUDA_VISIBLE_DEVCES=0 python {root}/train_teacher.py --dataset cifar100 --model {model} "
    "--lr 0.1 --wd 5e-4 --train-batch-size 128 {loss} --checkpoint calibrated_teachers/ " + SHORT
)
STUDENT = (
    "python {root}/train_student.py --dataset cifar100 --model resnet8 --teacher resnet56 "
    "--teacher_path {teacher} {more} --lr 0.1 --wd 5e-4 --train-batch-size 128 "
    "--checkpoint {checkpoint} " + SHORT
)


def shell(line: str, folder, **environment):
    return run_script("bash", "-o", "pipefail", "-c", line, cwd=folder, **environment)


def results(folder) -> dict[str, dict]:
    return {file.parent.name: json.loads(file.read_text()) for file in folder.rglob("result.json")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cifar100_dir):
    """A working folder with a first run in it: a ResNet-56 trained with NLL."""
    folder = tmp_path_factory.mktemp("commands")
    line = TEACHER.format(root=ROOT, data=cifar100_dir, model="resnet56", loss="--loss NLL")
    shell(line + " --gamma 3 --beta 5", folder)
    return folder


@pytest.mark.parametrize(
    "loss, name",
    [
        ("--loss NLL+MDCA --gamma 1 --beta 5", "NLL+MDCA_beta=5"),
        ("--loss FL --gamma 2 --beta 1", "FL_gamma=2"),
        ("--loss FL+MDCA --gamma 3 --beta 1", "FL+MDCA_gamma=3_beta=1"),
        ("--loss LS --alpha 0.1", "LS_alpha=0.1"),
        ("--loss MMCE --beta 4", "NLL+MMCE_beta=4"),
    ],
)
def test_teachers(tmp_path, cifar100_dir, loss, name):
    shell(TEACHER.format(root=ROOT, data=cifar100_dir, model="resnet8", loss=loss), tmp_path)
    assert results(tmp_path / "calibrated_teachers").keys() == {f"{name}_seed=42"}


@pytest.mark.parametrize("loss", ["NLL", "NLL+MDCA", "FL", "FL+MDCA", "cross_entropy"])
def test_the_pages_flags_are_accepted_and_said_to_have_no_effect(loss):
    """Its command has both flags for whichever of four losses."""
    given = {"gamma": 3.0, "beta": 5.0}
    notes = teacher_options(["--loss", loss, "--gamma", "3", "--beta", "5"]).notes
    unread = given.keys() - loss_parameters(loss, given).keys()
    assert {note.split()[0] for note in notes} == {f"--{flag}" for flag in unread}
    assert all("has no effect" in note for note in notes)


def test_what_has_no_effect_is_printed_and_kept(folder):
    """The first run of the folder was given --gamma and --beta with NLL."""
    log = next(folder.glob("calibrated_teachers/*/*/NLL_seed=42/train_log.txt")).read_text()
    first, second, *_ = log.splitlines()
    assert first.startswith("--gamma 3 has no effect with --loss NLL")
    assert second.startswith("--beta 5 has no effect with --loss NLL")


@pytest.mark.parametrize("name", loss_names())
def test_every_flag_that_a_loss_does_not_read_is_refused(name):
    """But for two flags with the four losses of the page."""
    flags = {flag.name for entry in (BASES | TERMS).values() for flag in entry.flags}
    read = {flag.name for flag in loss_flags(name)}
    for flag in flags:
        words = ["--loss", name, f"--{flag}", "0.5"]
        on_page = flag in ("gamma", "beta") and name in ("NLL", "NLL+MDCA", "FL", "FL+MDCA")
        if flag in read or on_page:
            assert bool(teacher_options(words).notes) == (flag not in read)
        else:
            with pytest.raises(UserError, match=f"--{flag} 0.5 has no effect with --loss"):
                teacher_options(words)


@pytest.mark.parametrize("name", distillation_names())
def test_every_flag_that_a_distillation_does_not_read_is_refused(name):
    flags = {flag.name for entry in (DISTILLATIONS | FEATURES).values() for flag in entry.flags}
    read = {flag.name for flag in loss_flags(name)}
    for flag in flags:
        words = ["--teacher_path", "t", "--distill", name, f"--{flag}", "0.5"]
        if flag in read:
            assert student_options(words).notes == ()
        else:
            with pytest.raises(UserError, match=f"--{flag} 0.5 has no effect with --distill"):
                student_options(words)


def test_student(folder, cifar100_dir):
    line = STUDENT.format(
        root=ROOT,
        data=cifar100_dir,
        teacher="calibrated_teachers/",
        more="--Lambda 0.9 --T 4",
        checkpoint="distilled_students/",
    )
    shell(f"CUDA_VISIBLE_DEVICES=0 {line}", folder)
    (result,) = results(folder / "distilled_students").values()
    assert result["teacher"]["model"] == "resnet56" and result["model"] == "resnet8"


def test_hypersearch(folder, cifar100_dir):
    """Four settings over four slots: all complete, none overwrites another."""
    line = STUDENT.format(
        root=ROOT,
        data=cifar100_dir,
        teacher="calibrated_teachers/cifar100/resnet56/NLL_seed=42",
        more="--teacher_loss NLL",
        checkpoint="distilled_model_library/ --T {T} --Lambda {Lambda}",
    )
    sweep = "-p T 1.5 20 -p Lambda 0.9 1.0 --sampling-mode grid"
    shell(f'simple_hypersearch "{line}" {sweep} | simple_gpu_scheduler --gpus 0,1,2,3', folder)
    found = results(folder / "distilled_model_library")
    assert found.keys() == {
        f"KD_T={T}_Lambda={Lambda}_from_resnet56_NLL_seed=42"
        for T in ("1.5", "20")
        for Lambda in ("0.9", "1")
    }
    assert len({tuple(result["loss_parameters"].values()) for result in found.values()}) == 4


def test_accelerate(tmp_path, cifar100_dir):
    """fp16: on a machine without a GPU the run says that it is float32."""
    line = TEACHER.format(
        root=ROOT, data=cifar100_dir, model="resnet56", loss="--loss cross_entropy"
    )
    launcher = "accelerate launch --num_processes 1 --mixed_precision fp16  "
    done = shell(line.replace("python ", launcher), tmp_path)
    ((name, result),) = results(tmp_path / "calibrated_teachers").items()
    assert name == "NLL_seed=42" and result["loss"] == "NLL"
    if not torch.cuda.is_available():
        [run] = tmp_path.glob("calibrated_teachers/*/*/*")
        note = "fp16 needs a GPU and there is none: this run computes in float32"
        assert note in done.stdout and note in (run / "train_log.txt").read_text().splitlines()
        config = json.loads((run / "config.json").read_text())
        assert config["mixed_precision_asked"] == "fp16"
        assert config["settings"]["mixed_precision"] == "no"
