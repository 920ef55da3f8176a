"""Every mistake ends in one line that names the flag or file, exit code 2, and nothing on disk."""

import re

import numpy as np
import pytest
import torch
from conftest import fails, run_script, write_npz

import train_student
import train_teacher


@pytest.fixture
def folder(tmp_path, tiny_npz, monkeypatch):
    """An empty working folder but for tiny.npz."""
    (tmp_path / "tiny.npz").write_bytes(tiny_npz.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


TEACHER = [
    ("--loss MDAC", "--loss.*'MDAC'.*MDCA"),
    ("--loss FL+MDCA+MMCE", "--loss.*FL"),
    ("--model resnet57", "--model.*resnet56"),
    ("--model resnet50", "--model.*ImageNet"),
    ("--model wrn_41_2", "--model.*wrn_40_2"),
    ("--dataset cifar11", "--dataset.*cifar1"),
    ("--dataset missing.npz", "--dataset.*missing.npz"),
    ("--scheduler step", "--scheduler.*multistep"),
    ("--schedule-steps 8 4 --epochs 10", "--schedule-steps 8 4.*--epochs 10"),
    ("--schedule-steps 4 12 --epochs 10", "--schedule-steps 4 12.*--epochs 10"),
    ("--schedule-steps -1", "--schedule-steps.*at least 1"),
    ("--lr 0", "--lr.*'0'.*above 0"),
    ("--lr nan", "--lr.*'nan'"),
    ("--lr inf", "--lr.*'inf'"),
    ("--lr fast", "--lr.*'fast'"),
    ("--lr 1e99", "--lr.*'1e99'"),
    ("--momentum 1", "--momentum.*below 1"),
    ("--wd -1", "--weight-decay/--wd.*'-1'"),
    ("--epochs 0", "--epochs.*'0'"),
    ("--epochs 1.5", "--epochs.*'1.5'"),
    ("--seed -3", "--seed.*'-3'"),
    ("--split-seed -3", "--split-seed.*'-3'"),
    ("--alpha 1", "--alpha.*'1'.*below 1"),
    ("--beta -1", "--beta.*'-1'"),
    ("--gamma -1", "--gamma.*'-1'"),
    ("--warmup -1", "--warmup.*'-1'"),
    ("--lr-decay-factor 2", "--lr-decay-factor.*'2'"),
    ("--train-batch-size 0", "--train-batch-size.*'0'"),
    ("--train-batch-size 500", "--train-batch-size 500.*135"),
    ("--exp_name ../up", "--exp_name.*'../up'"),
    ("--lamda 1", "'--lamda'"),
    ("--epoch 1", "'--epoch'.*--epochs"),
    ("--epochs", "--epochs"),
    ("--log_with wandb", "--log_with.*tensorboard"),
    ("--checkpoint tiny.npz", "--checkpoint.*tiny.npz"),
]


@pytest.mark.parametrize("flags, said", TEACHER, ids=[flags for flags, _ in TEACHER])
def test_teacher(folder, capsys, flags, said):
    flags = flags if flags.startswith("--dataset") else f"--dataset tiny.npz {flags}"
    assert re.search(said, fails(capsys, folder, train_teacher.main, flags.split()))


STUDENT = [
    ("", "--teacher_path"),
    ("--teacher_path nowhere", "--teacher_path nowhere"),
    ("--teacher_path .", r"--teacher_path \."),
    ("--teacher_path tiny.npz", "--teacher_path tiny.npz"),
    ("--teacher_path . --T 0", "--T.*'0'.*above 0"),
    ("--teacher_path . --T -4", "--T.*'-4'"),
    ("--teacher_path . --Lambda 1.5", "--Lambda.*'1.5'.*0 to 1"),
    ("--teacher_path . --Lambda -0.1", "--Lambda.*'-0.1'"),
    ("--teacher_path . --teacher resnet57", "--teacher.*resnet56"),
    ("--teacher_path . --teacher_norm cifar", "--teacher_norm.*cifar10"),
    ("--teacher_path . --loss NLL", "'--loss'"),
]


@pytest.mark.parametrize("flags, said", STUDENT, ids=[flags for flags, _ in STUDENT])
def test_student(folder, capsys, flags, said):
    command = f"--dataset tiny.npz {flags}".split()
    assert re.search(said, fails(capsys, folder, train_student.main, command))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, tiny_npz):
    """A root with two finished one-epoch teachers."""
    root = tmp_path_factory.mktemp("teachers")
    common = f"--dataset {tiny_npz} --model resnet8 --epochs 1 --train-batch-size 32".split()
    for loss in ("NLL", "FL"):
        train_teacher.main([*common, "--loss", loss, "--checkpoint", str(root)])
    return root


MISMATCHES = [
    ("", "--teacher_path.*2 finished runs.*FL_gamma=1_seed=42.*NLL_seed=42"),
    ("tiny/resnet8/NLL_seed=42 --teacher resnet20", "resnet8.*--teacher resnet20"),
    ("tiny/resnet8/NLL_seed=42 --teacher_loss FL+MDCA", "NLL.*--teacher_loss FL.MDCA"),
    ("tiny/resnet8/NLL_seed=42 --teacher_loss MDAC", "--teacher_loss MDAC"),
    ("tiny/resnet8/NLL_seed=42 --split-seed 1", "--split-seed 0.*1"),
    ("tiny/resnet8/NLL_seed=42 --teacher_norm imagenet", "--teacher_norm imagenet"),
    ("tiny/resnet8/NLL_seed=42/checkpoint.pth", "model_best.pth"),
    ("tiny/resnet8/NLL_seed=42/config.json", "config.json"),
]


@pytest.mark.parametrize("path, said", MISMATCHES, ids=[path for path, _ in MISMATCHES])
def test_teacher_that_does_not_fit(folder, capsys, teachers, path, said):
    command = f"--dataset tiny.npz --teacher_path {teachers}/{path}".split()
    assert re.search(said, fails(capsys, folder, train_student.main, command))


def test_teacher_of_other_data(folder, capsys, teachers):
    write_npz(folder / "other.npz", 4, 150, 40, seed=1)
    write_npz(folder / "five.npz", 5, 150, 40)
    path = teachers / "tiny/resnet8/NLL_seed=42"
    for name in ("other", "five"):
        command = ["--dataset", f"{name}.npz", "--teacher_path", str(path)]
        assert "--dataset" in fails(capsys, folder, train_student.main, command)


def good_arrays() -> dict[str, np.ndarray]:
    images, labels = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 4
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}


ARRAYS = {
    "missing": {"y_test": None},
    "float images": {"x_train": np.zeros((40, 8, 8, 3))},
    "wrong shape": {"x_train": np.zeros((40, 8, 9, 3), np.uint8)},
    "two channels": {"x_train": np.zeros((40, 8, 8, 2), np.uint8)},
    "too few labels": {"y_train": np.zeros(39, int)},
    "negative label": {"y_train": np.full(40, -1)},
    "float labels": {"y_train": np.zeros(40)},
    "no images": {"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)},
}


@pytest.mark.parametrize("case", ARRAYS)
def test_npz_that_is_no_data_set(folder, capsys, case):
    arrays = {k: v for k, v in (good_arrays() | ARRAYS[case]).items() if v is not None}
    np.savez(folder / "bad.npz", **arrays)
    error = fails(capsys, folder, train_teacher.main, ["--dataset", "bad.npz"])
    assert "bad.npz" in error


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut short"])
def test_npz_that_is_no_archive(folder, capsys, content):
    (folder / "bad.npz").write_bytes(content)
    assert "bad.npz" in fails(capsys, folder, train_teacher.main, ["--dataset", "bad.npz"])


def test_no_data_and_no_network(folder, capsys, monkeypatch):
    import torchvision

    def no_network(*args, **kwargs):
        raise OSError("network unreachable")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    command = ["--dataset", "cifar100", "--data_dir", "nothing"]
    error = fails(capsys, folder, train_teacher.main, command)
    assert "cifar100.npz" in error and "--data_dir" in error


def test_as_a_user_sees_it(folder):
    done = run_script("train_teacher.py", "--loss", "MDAC", cwd=folder, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_teacher.py: error: --loss")


def test_third_partys_teacher_needs_its_name(folder, capsys):
    from models import build_model

    torch.save(build_model("resnet8", 4).state_dict(), folder / "weights.pth")
    command = ["--dataset", "tiny.npz", "--teacher_path", "weights.pth"]
    assert "--teacher" in fails(capsys, folder, train_student.main, command)
