"""Files from strangers run no code, fill no memory and name no place outside the run folders."""

import json
import pickle
import re
import resource
import shutil
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, fails

import train_student
import train_teacher
from models import build_model
from scripts import evaluate, posthoc, report
from utils.program import UserError
from utils.program.files import read_torch

NAME = "tiny/resnet8/NLL_seed=42"


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def root(teacher, tmp_path) -> Path:
    """The root of a finished run."""
    return Path(shutil.copytree(teacher.parents[2], tmp_path / "root"))


# What each file is read by: its place, what is run
READERS = {
    "a teacher": ("teacher.pth", lambda root, data: student(root, data, root / "teacher.pth")),
    "a run's weights": (f"{NAME}/model_best.pth", lambda root, data: student(root, data, root)),
    "a checkpoint": (f"{NAME}/checkpoint.pth", lambda root, data: resume(root, data)),
    "weights to evaluate": (f"{NAME}/model_best.pth", lambda root, _: shifted(root, "corruptions")),
    "a data set": ("bad.npz", lambda root, data: (train_teacher.main, ["--dataset", "bad.npz"])),
    "other images": ("bad.npz", lambda root, _: shifted(root, "bad.npz")),
    "predictions": (f"{NAME}/predictions.npz", lambda root, data: (posthoc.main, [str(root)])),
    "people's votes": ("cifar10h-counts.npy", lambda root, _: shifted(root, "cifar10h")),
}


def shifted(root: Path, on: str):
    return evaluate.main, [str(root), "--on", on, "--data_dir", "."]


def student(root: Path, data: Path, teacher: Path):
    return train_student.main, command(data, root, "--teacher_path", str(teacher))


def resume(root: Path, data: Path):
    (root / NAME / "result.json").unlink(missing_ok=True)
    return train_teacher.main, command(data, root)


def save_zip(thing, path: Path) -> None:
    torch.save({"state_dict": thing, "best": thing}, path)


def save_pickle(thing, path: Path) -> None:
    path.write_bytes(pickle.dumps(thing))


def save_arrays(thing, path: Path) -> None:
    content = np.empty((), object)
    content[()] = thing
    names = ("x_train", "y_train", "x_test", "y_test", "best_test_logits", "best_val_logits")
    with open(path, "wb") as file:
        if path.suffix == ".npy":
            np.save(file, content, allow_pickle=True)
        else:
            np.savez(file, **dict.fromkeys(names, content))


@pytest.fixture(params=READERS)
def refuses(request, root, tiny_npz, monkeypatch, capsys):
    """Writes a file and has it read, which must end in a line that names it."""
    monkeypatch.chdir(root)
    place, make = READERS[request.param]
    main, argv = make(root, tiny_npz)

    def refuses(write) -> None:
        write(root / place)
        assert Path(place).name in fails(capsys, root, main, argv)

    return refuses


@pytest.mark.parametrize("save", [save_zip, save_pickle, save_arrays])
def test_no_code_is_run(refuses, tmp_path, save):
    trace = tmp_path / "trace"
    refuses(partial(save, RunsCode(trace)))
    assert not trace.exists()
    pickle.loads(pickle.dumps(RunsCode(trace)))
    assert trace.exists()  # so it would have run


class ArrayOfObjects:
    """As an array of NumPy that holds what runs code; and a number of such a type."""

    def __init__(self, trace: Path, scalar: bool):
        self.trace, self.scalar = trace, scalar

    def __reduce__(self):
        if self.scalar:
            make, _ = np.float64().__reduce__()
            return make, (np.dtype(object), RunsCode(self.trace))
        content = np.empty(1, object)
        content[0] = RunsCode(self.trace)
        return content.__reduce__()


@pytest.mark.parametrize("scalar", [True, False])
def test_numbers_of_numpy_bring_no_objects(tmp_path, scalar):
    """Beside the weights, where plain numbers of NumPy may stand."""
    file, trace = tmp_path / "net.pth", tmp_path / "trace"
    weights = build_model("resnet8", 4).state_dict()
    torch.save({"state_dict": weights, "top1": ArrayOfObjects(trace, scalar)}, file)
    with pytest.raises(UserError, match=r"net\.pth cannot be read"):
        read_torch(file, "")
    assert not trace.exists()


def npy(shape: str, kind: str = "|u1", content: bytes = bytes(64)) -> bytes:
    """An array whose header declares any shape."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def declaring(shape: str, kind: str = "|u1"):
    def save(path: Path) -> None:
        if path.suffix == ".npy":
            return path.write_bytes(npy(shape, kind))
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("x_train", "x_test", "best_val_logits", "best_test_logits"):
                archive.writestr(f"{name}.npy", npy(shape, kind))
            for name in ("y_train", "y_test", "val_labels", "test_labels"):
                archive.writestr(f"{name}.npy", npy("(1,)", "<i8"))

    return save


def bomb(path: Path) -> None:
    """Few bytes in the file, many out of it, as its directory says."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x_train", "y_train", "x_test", "y_test", "best_test_logits"):
            archive.writestr(f"{name}.npy", npy("(1000000,)"))
    data = path.read_bytes()
    small = archive.getinfo("x_train.npy").file_size.to_bytes(4, "little")
    path.write_bytes(data.replace(small, (2**32 - 2).to_bytes(4, "little")))


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**43)


SAVES = {
    "8 TiB": sparse,
    "no such memory": declaring("(10000000000000, 8, 8, 3)"),
    "no such integer": declaring(f"({10**30}, 8, 8, 3)"),
    "negative": declaring("(-1, 8, 8, 3)"),
    "more than the file": declaring("(1000, 8, 8, 3)"),
    "objects": declaring("(1,)", "|O"),
    "bomb": bomb,
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_no_memory_is_filled(refuses, monkeypatch, save):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**30))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(save)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 200e3  # kB


def test_no_name_leaves_the_root_or_becomes_markup(tiny_npz, tmp_path):
    """A data set, a teacher's file and a teacher's label with names as bad as a file may have."""
    worst = "..;\"><script>alert('x')&"
    data = shutil.copy(tiny_npz, tmp_path / f"{worst}.npz")
    third_party, ours = tmp_path / f"{worst}.pth", tmp_path / "ours.pth"
    torch.save(build_model("resnet8", 4).state_dict(), third_party)
    root = tmp_path / "root"
    common = [*command(data, root), "--epochs", "1"]
    train_teacher.main([*common, "--exp_name", "..."])
    [best] = root.rglob("model_best.pth")
    torch.save(torch.load(best) | {"label": f"../../../{worst}\n"}, ours)
    said = ["--teacher", "resnet8", "--teacher_loss", "<script>"]
    train_student.main([*common, "--teacher_path", str(third_party), *said])
    train_student.main([*common, "--teacher_path", str(ours)])
    runs = [path.parent.relative_to(root) for path in root.rglob("result.json")]
    assert [len(run.parts) for run in runs] == [3, 3, 3]
    for part in (part for run in runs for part in run.parts):
        assert re.fullmatch(r"[A-Za-z0-9+=,_-][A-Za-z0-9+=.,_-]*", part)
    report.main([str(root), "--out", str(tmp_path / "out"), "--resamples", "0"])
    assert "<script" not in (tmp_path / "out/report.html").read_text()


def test_wrong_types_in_a_checkpoint(root, tiny_npz):
    path, (main, flags) = root / NAME / "checkpoint.pth", resume(root, tiny_npz)
    content = torch.load(path)
    for key in ("task", "optimizer", "history", "best"):
        for value in ("x", -1, float("nan"), 10**30):
            torch.save(content | {key: value}, path)
            with pytest.raises(UserError, match="--overwrite"):
                main(flags)


def with_one_value(content: dict, value) -> Iterator[dict]:
    """Copies of a nested dictionary, in each of which another value is that one."""
    for key, kept in content.items():
        yield content | {key: value}
        for changed in with_one_value(kept, value) if isinstance(kept, dict) else ():
            yield content | {key: changed}


def test_wrong_types_in_a_result(root, capsys):
    """It stands among the runs that are in no table, or what is wrong is not read."""
    path = root / NAME / "result.json"
    result, apart = json.loads(path.read_text()), 0
    for value in (None, [], "<script>", {}, -1, ["a"]):
        for changed in with_one_value(result, value):
            path.write_text(json.dumps(changed))
            report.main([str(root), "--resamples", "0"])
            apart += "result.json is damaged" in capsys.readouterr().out
    assert apart > 100
