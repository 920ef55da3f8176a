"""Kills, signals, full disks, damaged files, two runs in one folder: each really done.

What holds after every one of them: no file is half written, and the same command ends with the
numbers of a run that nothing happened to, to the last bit.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_run, command, fails, wait_for

import losses
import train_student
import train_teacher
from models import build_model
from utils import training
from utils.data import load_dataset
from utils.program import RunFailed, UserError
from utils.program.errors import message_of
from utils.program.files import read_torch
from utils.sums import EpochSums
from utils.training import seed_draws

NAME = "tiny/resnet8/NLL_seed=42"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_npz, forks) -> Path:
    """The folder of a run that nothing happens to."""
    root = tmp_path_factory.mktemp("teacher")
    assert forks.run(["train_teacher.py", *command(tiny_npz, root)]).code == 0
    return root / NAME


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_npz, teacher, forks) -> Path:
    root = tmp_path_factory.mktemp("student")
    assert forks.run(student_command(tiny_npz, root, teacher)).code == 0
    return root / "tiny/resnet8/KD_T=4_Lambda=0.9_from_resnet8_NLL_seed=42"


def student_command(data: Path, root: Path, teacher: Path) -> list[str]:
    flags = ("--teacher_path", str(teacher), "--teacher_cache", str(root / "cache"))
    return ["train_student.py", *command(data, root, *flags)]


@pytest.fixture(params=["teacher", "student"])
def job(request, tiny_npz, teacher):
    """(whole, make): the folder of an undisturbed run, and its command for another root."""
    if request.param == "teacher":
        return teacher, lambda root: ["train_teacher.py", *command(tiny_npz, root)]
    whole = request.getfixturevalue("student")
    return whole, lambda root: student_command(tiny_npz, root, teacher)


def folder_below(root: Path, whole: Path) -> Path:
    return root / whole.relative_to(whole.parents[2])


def assert_tidy(folder: Path) -> None:
    assert not list(folder.glob(".*.tmp"))


# Kills


def test_sigkill_at_random_moments(job, tmp_path, forks):
    """Ten kills at any time, most of them of a run that was killed before."""
    whole, make = job
    started = time.monotonic()
    forks.run(make(tmp_path / "timed"))
    longest, rng = time.monotonic() - started, random.Random(0)
    kills = roots = 0
    while kills < 10:
        root, code = tmp_path / str(roots), None
        roots += 1
        while code != 0:
            child = forks.start(make(root))
            time.sleep(rng.uniform(0, longest))
            if child.poll() is None and kills < 10:
                child.send(signal.SIGKILL)
            code = child.wait()
            assert code in (0, -signal.SIGKILL), child.err
            kills += code != 0
        assert_same_run(whole, folder_below(root, whole))
        assert_tidy(folder_below(root, whole))


@pytest.mark.parametrize("when", ["before", "after"])
def test_sigkill_around_every_write(job, tmp_path, forks, when):
    """Before a finished file gets its name, and between that and the next line of the program."""
    whole, make = job
    code, writes = None, 0
    while code != 0:
        writes += 1
        code = forks.run(make(tmp_path), hook=["at_rename", writes, when, "send", 9]).code
        assert code in (0, -9)
    assert writes > 6
    assert_same_run(whole, folder_below(tmp_path, whole))
    assert_tidy(folder_below(tmp_path, whole))


class Noise(torch.nn.Module):
    """Draws in every step, as torch, Python and NumPy do."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return logits
        return F.dropout(logits, 0.5) * (1 + random.random() + np.random.rand())


def train_with_noise(*argv: str) -> None:
    train_teacher.build_model = lambda name, num_classes: torch.nn.Sequential(
        build_model(name, num_classes), Noise()
    )
    train_teacher.main(list(argv))


def test_what_a_net_draws_differs_by_epoch_and_process():
    drawn = set()
    for place in ((1, 2, 0), (1, 3, 0), (1, 2, 1), (2, 2, 0), (1, 2, 0)):
        seed_draws(*place)
        drawn.add((torch.rand(()).item(), random.random(), np.random.rand()))
    assert len(drawn) == 4


def test_a_net_that_draws_numbers_goes_on_exactly(tiny_npz, tmp_path, forks):
    for root, hook in (("whole", None), ("cut", ["at_rename", 4, "after", "send", 9])):
        line = ["test_faults:train_with_noise", *command(tiny_npz, tmp_path / root)]
        if hook:
            assert forks.run(line, hook=hook).code == -9
        assert forks.run(line).code == 0
    assert_same_run(tmp_path / "whole" / NAME, tmp_path / "cut" / NAME)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("writes", [1, 7, 12])
def test_a_signal_stops_in_one_line_and_loses_nothing(
    teacher, tiny_npz, tmp_path, forks, number, writes
):
    """After the settings, in the second and third epoch, and in the evaluation at the end."""
    line = ["train_teacher.py", *command(tiny_npz, tmp_path)]
    child = forks.run(line, hook=["at_rename", writes, "after", "send", int(number)])
    assert child.code == 128 + number
    advice = r"(give the same command again|the same command goes on after epoch \d+)"
    wanted = rf"train_teacher.py: stopped by {number.name}; {advice}\n"
    assert re.fullmatch(wanted, child.err), child.err
    folder = tmp_path / NAME
    saved = folder / "checkpoint.pth"
    if saved.exists():
        epochs = len(torch.load(saved, weights_only=True)["history"])
        assert f"goes on after epoch {epochs}\n" in child.err
    last = (folder / "train_log.txt").read_text().splitlines()[-1]
    assert last == child.err.strip().partition(": ")[2]
    assert_tidy(folder)
    assert forks.run(line).code == 0
    assert_same_run(teacher, folder)


def long_command(data: Path, root: Path) -> list[str]:
    return ["train_teacher.py", *command(data, root, "--epochs", "100000")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside_stops_within_seconds(tiny_npz, tmp_path, forks, number):
    child = forks.start(long_command(tiny_npz, tmp_path))
    wait_for(tmp_path / NAME / "checkpoint.pth")
    sent = time.monotonic()
    child.send(number)
    assert child.wait() == 128 + number
    assert time.monotonic() - sent < 5
    assert re.search(r"the same command goes on after epoch \d+\n$", child.err)


def ignoring() -> None:
    from utils.program import one_line_errors

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with one_line_errors("program"):
        os.kill(os.getpid(), signal.SIGINT)


def test_what_the_shell_ignores_stays_ignored(forks):
    """A job in the background is not to end at Ctrl-C."""
    assert forks.run(["test_faults:ignoring"]).code == 0


# Disks


def assert_failed(child, path: Path, reason: str) -> None:
    assert child.code == 1
    pattern = rf"train_teacher.py: error: cannot write {re.escape(str(path))}: {reason}"
    assert re.match(pattern + "; the files", child.err.splitlines()[-1])
    assert "Traceback" not in child.err


def assert_whole(folder: Path) -> None:
    """The files of the first epoch can be read, and none is half written."""
    read_torch(folder / "checkpoint.pth", "")
    read_torch(folder / "model_best.pth", "")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert_tidy(folder)


def test_a_file_size_limit(teacher, tiny_npz, tmp_path, forks):
    line, folder = ["train_teacher.py", *command(tiny_npz, tmp_path)], tmp_path / NAME
    child = forks.run(line, hook=["at_rename", 4, "after", "limit_file_size", 500_000])
    assert_failed(child, folder / "checkpoint.pth", "File too large")
    assert child.err.count("\n") == 1
    assert "cannot write" in (folder / "train_log.txt").read_text()
    assert_whole(folder)
    assert forks.run(line).code == 0
    assert_same_run(teacher, folder)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk that can be filled needs the right to mount one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("writes", [4, 11])
def test_a_full_disk(teacher, tiny_npz, small_disk, forks, writes):
    """In the second epoch, and at the end, before model_last.pth."""
    line, folder = ["train_teacher.py", *command(tiny_npz, small_disk)], small_disk / NAME
    hook = ["at_rename", writes, "after", "fill", str(small_disk / "filler")]
    child = forks.run(line, hook=hook)
    failed = re.search(r"cannot write (\S+):", child.err)
    assert_failed(child, Path(failed[1]), "No space left on device")
    read_torch(folder / "checkpoint.pth", "")
    assert_tidy(folder)
    (small_disk / "filler").unlink()
    assert forks.run(line).code == 0
    assert_same_run(teacher, folder)


def test_a_folder_that_is_gone(teacher, tiny_npz, tmp_path, forks):
    line, folder = ["train_teacher.py", *command(tiny_npz, tmp_path)], tmp_path / NAME
    child = forks.run(line, hook=["at_rename", 4, "after", "replace_by_file", str(folder)])
    assert_failed(child, folder / "checkpoint.pth", "Not a directory")
    folder.unlink()
    os.rename(f"{folder}.away", folder)
    assert_whole(folder)
    assert forks.run(line).code == 0
    assert_same_run(teacher, folder)


def test_a_folder_that_turns_read_only(teacher, tiny_npz, tmp_path, forks):
    """Root may write everywhere but into an immutable folder."""
    try:
        subprocess.run(["chattr", "+i", str(tmp_path)], check=True, capture_output=True)
        subprocess.run(["chattr", "-i", str(tmp_path)], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a file system and the right for chattr +i")
    line, folder = ["train_teacher.py", *command(tiny_npz, tmp_path)], tmp_path / NAME
    try:
        child = forks.run(line, hook=["at_rename", 4, "after", "make_immutable", str(folder)])
        again = forks.run(line)
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    assert_failed(child, folder / "checkpoint.pth", "Operation not permitted")
    assert_failed(again, folder / "checkpoint.pth", "Operation not permitted")
    assert_whole(folder)
    assert forks.run(line).code == 0
    assert_same_run(teacher, folder)


def test_a_log_that_cannot_be_written_is_said_and_not_fatal(teacher, tiny_npz, tmp_path, forks):
    (tmp_path / NAME / "train_log.txt").mkdir(parents=True)
    child = forks.run(["train_teacher.py", *command(tiny_npz, tmp_path)])
    assert child.code == 0
    assert "this line is missing in" in child.err and "train_log.txt" in child.err
    assert_same_run(teacher, tmp_path / NAME)


# Damaged files

DAMAGE = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    # More than the 64 bytes that torch may leave between two tensors.
    "flipped bytes": lambda data: flipped(data, *range(len(data) // 2, len(data) // 2 + 80)),
    "another file": lambda data: b"<html>not found</html>\n",
}


def flipped(data: bytes, *places: int) -> bytes:
    damaged = bytearray(data)
    for place in places:
        damaged[place] ^= 0x81
    return bytes(damaged)


@pytest.fixture
def unfinished(teacher, tmp_path) -> Path:
    """A copy of the run, as if killed after its last epoch; its root."""
    shutil.copytree(teacher, tmp_path / "root" / NAME)
    (tmp_path / "root" / NAME / "result.json").unlink()
    return tmp_path / "root"


@pytest.mark.parametrize("file", ["checkpoint.pth", "config.json"])
@pytest.mark.parametrize("case", [*DAMAGE, "a folder", "another type"])
def test_a_damaged_run_is_refused_and_left_alone(unfinished, tiny_npz, capsys, file, case):
    path = unfinished / NAME / file
    if case == "a folder":
        path.unlink()
        path.mkdir()
    elif case == "another type" and file == "checkpoint.pth":
        torch.save([1, 2], path)
    else:
        change = DAMAGE.get(case, lambda data: b"[1, 2]")
        path.write_bytes(change(path.read_bytes()))
    before = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    error = fails(capsys, unfinished, train_teacher.main, command(tiny_npz, unfinished))
    assert str(path) in error and "--overwrite" in error
    assert {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()} == before


def test_overwrite_is_the_way_out(unfinished, teacher, tiny_npz):
    (unfinished / NAME / "checkpoint.pth").write_bytes(b"")
    train_teacher.main(command(tiny_npz, unfinished, "--overwrite"))
    assert_same_run(teacher, unfinished / NAME)


def test_a_checkpoint_of_another_run_is_refused(unfinished, tiny_npz, tmp_path, capsys):
    train_teacher.main(command(tiny_npz, tmp_path / "other", "--seed", "1", "--epochs", "1"))
    other = tmp_path / "other/tiny/resnet8/NLL_seed=1/checkpoint.pth"
    shutil.copy(other, unfinished / NAME / "checkpoint.pth")
    error = fails(capsys, unfinished, train_teacher.main, command(tiny_npz, unfinished))
    assert "another run" in error and "--overwrite" in error


def test_a_checkpoint_without_settings_is_refused(unfinished, tiny_npz, capsys):
    (unfinished / NAME / "config.json").unlink()
    error = fails(capsys, unfinished, train_teacher.main, command(tiny_npz, unfinished))
    assert "config.json" in error and "--overwrite" in error


@pytest.mark.parametrize("file", ["model_best.pth", "metrics.jsonl"])
def test_copies_of_the_checkpoint_are_mended(unfinished, teacher, tiny_npz, file):
    (unfinished / NAME / file).write_bytes(b"damaged")
    train_teacher.main(command(tiny_npz, unfinished))
    assert_same_run(teacher, unfinished / NAME)


@pytest.mark.parametrize("case", [*DAMAGE, "no result"])
def test_a_damaged_result_says_how_to_get_it_back(teacher, tmp_path, tiny_npz, capsys, case):
    shutil.copytree(teacher, tmp_path / NAME)
    path = tmp_path / NAME / "result.json"
    if case == "flipped bytes":
        damaged = flipped(path.read_bytes(), path.read_bytes().index(b'"best"') + 1)
    else:
        damaged = DAMAGE.get(case, lambda data: b"{}")(path.read_bytes())
    path.write_bytes(damaged)
    error = fails(capsys, tmp_path, train_teacher.main, command(tiny_npz, tmp_path))
    assert str(path) in error and "delete it" in error
    path.unlink()
    train_teacher.main(command(tiny_npz, tmp_path))
    assert_same_run(teacher, tmp_path / NAME)


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_no_flipped_byte_of_a_checkpoint_goes_unseen(teacher, tmp_path):
    """Refused, or, in the padding of the archive, without effect."""
    data, path = (teacher / "checkpoint.pth").read_bytes(), tmp_path / "checkpoint.pth"
    whole, refused = read_torch(teacher / "checkpoint.pth", ""), 0
    rng = random.Random(0)
    for _ in range(100):
        path.write_bytes(flipped(data, rng.randrange(len(data))))
        try:
            assert equal(read_torch(path, "try again"), whole)
        except UserError as error:
            assert str(path) in str(error) and "try again" in str(error)
            refused += 1
    assert refused > 80


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_flipped_byte_of_a_data_set_goes_unseen(tiny_npz, tmp_path, save):
    path = tmp_path / "tiny.npz"
    save(path, **np.load(tiny_npz))
    data, whole = path.read_bytes(), load_dataset(str(path), ".").fingerprint
    rng, refused = random.Random(0), 0
    for _ in range(60):
        path.write_bytes(flipped(data, rng.randrange(len(data))))
        try:
            assert load_dataset(str(path), ".").fingerprint == whole
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_teacher(teacher, tiny_npz, tmp_path, capsys, case):
    shutil.copytree(teacher, tmp_path / "teacher")
    path = tmp_path / "teacher/model_best.pth"
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    line = command(tiny_npz, tmp_path, "--teacher_path", str(tmp_path / "teacher"))
    error = fails(capsys, tmp_path, train_student.main, line)
    assert str(path) in error and "again" in error


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_cache_file_is_named_and_made_anew(
    student, teacher, tiny_npz, tmp_path, capsys, case
):
    shutil.copytree(student.parents[2] / "cache", tmp_path / "cache")
    path = next(tmp_path.glob("cache/**/seed=42_epoch=2_*.bin"))
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    _, *flags = student_command(tiny_npz, tmp_path, teacher)
    train_student.main(flags)
    assert str(path) in capsys.readouterr().out
    assert_same_run(student, folder_below(tmp_path, student))


# What ends a program on a machine that cannot go on


@pytest.mark.parametrize(
    ("fault", "way_out"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "give smaller batches"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "smaller"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "give smaller batches"),
        ("Unable to find an engine to execute this computation", "give smaller batches"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9", "smaller batches"),
        (
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA",
            "another GPU",
        ),
        ("Connection closed by peer [127.0.0.1]:4", "the same command goes on"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_what_is_said_of_a_machine(fault, way_out):
    said = message_of(RuntimeError(fault))
    assert said is None if way_out is None else way_out in said and "\n" not in said


# A loss that is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_at_once(teacher, tiny_npz, tmp_path, monkeypatch, value):
    calls = []

    def broken(self, logits, labels):
        calls.append(0)
        factor = value if len(calls) == 5 else 1.0
        parts = original(self, logits, labels)
        return {name: factor * part for name, part in parts.items()}

    original = losses.ClassificationLoss.parts
    with monkeypatch.context() as patch, pytest.raises(RunFailed) as caught:
        patch.setattr(losses.ClassificationLoss, "parts", broken)
        patch.setattr(training, "REPORT_SECONDS", 0)
        train_teacher.main(command(tiny_npz, tmp_path, "--schedule-steps", "1"))
    said = str(caught.value)
    assert f"the loss is {value} in epoch 2, step 2" in said
    assert "learning rate of 0.01" in said and "--lr" in said
    assert len(calls) == 5
    assert "the loss is" in (tmp_path / NAME / "train_log.txt").read_text()
    train_teacher.main(command(tiny_npz, tmp_path, "--schedule-steps", "1"))
    records = (tmp_path / NAME / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["epoch"] for record in records] == [1, 2, 3]


def test_a_loss_without_a_first_value_is_not_blamed_on_the_rate(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(
        losses.ClassificationLoss,
        "parts",
        lambda self, logits, labels: {"NLL": logits.sum() * float("nan")},
    )
    with pytest.raises(
        RunFailed, match="the loss is nan in the first step.*look at the loss"
    ) as error:
        train_teacher.main(command(tiny_npz, tmp_path))
    assert "--lr" not in str(error.value)


def test_it_is_seen_at_the_end_of_the_epoch_at_the_latest(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "REPORT_SECONDS", 1e9)
    with pytest.raises(RunFailed, match=r"nan|inf.* in epoch 1, step \d, .*learning rate"):
        train_teacher.main(command(tiny_npz, tmp_path, "--lr", "1e8", "--wd", "1e8"))


def test_a_net_that_the_last_step_broke(tiny_npz, tmp_path, monkeypatch):
    """The loss was finite in every step, the weights after the last are not."""

    def break_net(trainer, *rest):
        record = original(trainer, *rest)
        with torch.no_grad():
            trainer.task.net.fc.weight.fill_(float("nan"))
        return record

    original = training.train_epoch
    monkeypatch.setattr(training, "train_epoch", break_net)
    with pytest.raises(RunFailed, match="outputs are not finite after epoch 1.*--lr"):
        train_teacher.main(command(tiny_npz, tmp_path))


@pytest.fixture
def scaler(monkeypatch):
    """Runs have a scaler of gradients, as under fp16."""
    scaler = torch.amp.GradScaler("cpu")

    def start(*arguments):
        accelerator = original(*arguments)
        accelerator.scaler = scaler
        return accelerator

    original = train_teacher.start
    monkeypatch.setattr(train_teacher, "start", start)
    return scaler


def spoil(monkeypatch, steps: int) -> None:
    """The gradients of that many steps are NaN; the losses are as ever."""
    original, calls = losses.ClassificationLoss.parts, []

    def spoilt(self, logits, labels):
        calls.append(0)
        harm = (0 * logits.sum()).sqrt() if len(calls) <= steps else 0
        return {name: part + harm for name, part in original(self, logits, labels).items()}

    monkeypatch.setattr(losses.ClassificationLoss, "parts", spoilt)


def test_a_hundred_skipped_steps_in_a_row(tiny_npz, tmp_path, monkeypatch, scaler):
    """Three steps an epoch: they are counted from one epoch to the next."""
    spoil(monkeypatch, 1000)
    with pytest.raises(RunFailed, match="fp16.*100 steps in a row.*epoch 34, step 1.*bf16"):
        train_teacher.main(command(tiny_npz, tmp_path, "--epochs", "40"))


def test_skipped_steps_leave_no_trace(tiny_npz, tmp_path, monkeypatch, scaler):
    """Not even where they are the first: the fused optimiser's momentum is no stray memory then."""
    calls = []

    def step(self, *arguments):
        calls.append(0)
        if len(calls) > 2:
            original(self, *arguments)

    original = torch.optim.SGD.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        train_teacher.main(command(tiny_npz, tmp_path / "without"))
    spoil(monkeypatch, 2)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:  # memory that nobody has written to holds NaN
        train_teacher.main(command(tiny_npz, tmp_path / "skipped"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert scaler.get_scale() == 65536 / 4
    assert_same_run(tmp_path / "without" / NAME, tmp_path / "skipped" / NAME)


def test_skipped_steps_that_are_not_in_a_row():
    for skipped_before in (0, 1):
        sums = EpochSums(1000, torch.device("cpu"), skipped_before)
        for step in range(1000):
            skipped = step % 100 != 99
            values = {"loss": 1.0, "right": 0.0, "images": 1.0, "skipped": float(skipped)}
            row = {name: torch.tensor(value).double() for name, value in values.items()}
            sums.add(row, rate=0.1)
        if skipped_before == 0:
            sums.check(1)
        else:  # the hundredth in a row is the ninety-ninth of this epoch
            with pytest.raises(RunFailed, match="epoch 1, step 99"):
                sums.check(1)


# Several runs


def test_the_same_command_twice(tiny_npz, tmp_path, forks):
    """The second leaves at once; when the first is killed, its lock is no obstacle."""
    line = long_command(tiny_npz, tmp_path)
    first = forks.start(line)
    wait_for(tmp_path / NAME / "checkpoint.pth")
    second = forks.run(line)
    assert second.code == 2 and second.err.count("\n") == 1
    assert str(tmp_path / NAME) in second.err and "in use" in second.err
    assert first.poll() is None
    first.send(signal.SIGKILL)
    first.wait()
    third = forks.start(line)
    while "going on after epoch" not in third.out:
        assert third.poll() is None, third.err
        time.sleep(0.01)
    third.send(signal.SIGTERM)
    third.wait()


def test_the_same_command_eight_times_at_once(teacher, tiny_npz, tmp_path, forks):
    line = ["train_teacher.py", *command(tiny_npz, tmp_path)]
    children = [forks.start(line) for _ in range(8)]
    codes = {child.wait() for child in children}
    assert 0 in codes and codes <= {0, 2}
    assert_same_run(teacher, tmp_path / NAME)
