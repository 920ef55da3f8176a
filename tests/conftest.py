"""Shared by all tests: small data sets, and the entry scripts run as a user runs them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks

import train_teacher
from utils.program import one_line_errors

ROOT = Path(__file__).resolve().parent.parent


# Two workers share two cores; sums must not depend on how many threads a worker gets. Set here, for
# fixtures of a whole module come before those of its first test.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Long tests first: no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def one_thread():
    """A test that changes the number of threads does so for itself."""
    yield
    torch.set_num_threads(1)


def write_npz(
    path: Path, classes: int, train: int, test: int, size: int = 8, seed: int = 0
) -> Path:
    """A data set of noisy class colours: learnable in a few steps."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(40, 216, (classes, 1, 1, 3))
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
        noise = rng.normal(0, 30, (count, size, size, 3))
        arrays[f"x_{part}"] = np.clip(colours[labels] + noise, 0, 255).astype(np.uint8)
        arrays[f"y_{part}"] = labels.astype(np.int64)
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory) -> Path:
    """Four classes, 8x8 pixels, 135 training images (after the split) and 40 test images."""
    return write_npz(tmp_path_factory.mktemp("data") / "tiny.npz", 4, 150, 40)


@pytest.fixture(scope="session")
def cifar100_dir(tmp_path_factory) -> Path:
    """A data folder whose cifar100.npz has 100 classes and 8x8 pixels."""
    folder = tmp_path_factory.mktemp("cifar100")
    write_npz(folder / "cifar100.npz", 100, 320, 100)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, tiny_npz) -> Path:
    """The folder of an undisturbed run of three epochs, alone in its root; nothing changes it."""
    root = tmp_path_factory.mktemp("teacher")
    train_teacher.main(command(tiny_npz, root))
    return root / "tiny/resnet8/NLL_seed=42"


@pytest.fixture(scope="session")
def forks():
    """Runs in processes of their own, without the seconds of importing torch."""
    forks = Forks()
    yield forks
    forks.close()


def command(data: Path, root: Path, *flags: str) -> list[str]:
    common = (
        f"--dataset {data} --model resnet8 --epochs 3 --train-batch-size 64 --checkpoint {root}"
    )
    return [*common.split(), *flags]


def folder_of(root: Path) -> Path:
    """The folder of the one finished run below `root`."""
    return next(root.rglob("result.json")).parent


def weights(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(folder / f"model_{which}.pth", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    """Those of two runs are equal to the last bit."""
    for which in ("best", "last"):
        first, second = weights(one, which), weights(other, which)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, history and result are equal to the last bit; times are not compared."""
    assert_same_weights(one, other)

    def lines(folder: Path) -> list[dict]:
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        timeless = {"seconds", "images_per_second"}
        return [{k: v for k, v in record.items() if k not in timeless} for record in records]

    assert lines(one) == lines(other)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for which in ("best", "last"):
        assert results[0][which] == results[1][which]


def given_file(variable: str, pattern: str) -> Path:
    """The first such file of the folder that an environment variable names."""
    found = sorted(Path(os.environ.get(variable) or "/nonexistent").glob(pattern))
    if not found:
        pytest.skip(f"needs {pattern} in the folder that {variable} names")
    return found[0]


def wait_for(path: Path, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def fails(capsys, folder, main, argv) -> str:
    """Run a script's main in `folder`; its one line of error."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop, one_line_errors("script"):
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("script: error: ") and error.count("\n") == 1, error
    assert sorted(folder.rglob("*")) == before, "something was left behind"
    return error


def run_script(*command, cwd, check: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` (or any command whose first word is no .py) in an empty folder."""
    command = [str(part) for part in command]
    if command[0].endswith(".py"):
        command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600
    )
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done
