"""--teacher_cache and scripts/cache_teacher.py: exact, complete, never stale, safe to share."""

import dataclasses
import errno
import json
import os
import shutil
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, command, folder_of

import train_student
import train_teacher
from scripts import cache_teacher
from utils.data import load_dataset
from utils.data.views import NUM_VIEWS, TrainLoader, epoch_plan
from utils.program import RunFailed, UserError
from utils.program.files import atomic
from utils.settings import TeacherSource
from utils.teachers import answers as answers_module
from utils.teachers import cache as cache_module
from utils.teachers.answers import CachedAnswers
from utils.teachers.cache import open_cache
from utils.teachers.loading import load_teacher
from utils.teachers.nets import NetTeacher

LONE = ("--train-batch-size", "67")  # 135 = 2 x 67 + 1: the last step has one image
ONE_PROCESS = Namespace(mixed_precision="no", device=torch.device("cpu"), num_processes=1)


def student_command(data: Path, root: Path, teacher: Path, *flags) -> list[str]:
    return command(data, root, "--teacher_path", str(teacher), *LONE, *map(str, flags))


@pytest.fixture
def train(tiny_npz, teacher, tmp_path):
    """Train a student in a root of its own; its folder."""

    def run(root: str, *flags) -> Path:
        train_student.main(student_command(tiny_npz, tmp_path / root, teacher, *flags))
        return folder_of(tmp_path / root)

    return run


@pytest.fixture(scope="module")
def students(tmp_path_factory, tiny_npz, teacher) -> tuple[Path, Path, Path]:
    """Folders of a student without a cache, of the same one that filled a cache, and that cache."""
    root = tmp_path_factory.mktemp("students")
    train_student.main(student_command(tiny_npz, root / "plain", teacher))
    cache = ("--teacher_cache", root / "cache")
    train_student.main(student_command(tiny_npz, root / "first", teacher, *cache))
    return folder_of(root / "plain"), folder_of(root / "first"), root / "cache"


@pytest.fixture
def cache(students, tmp_path) -> Path:
    """A copy of what a student of three epochs has kept."""
    return Path(shutil.copytree(students[2], tmp_path / "cache"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny_npz, teacher) -> Path:
    """A cache with all views."""
    cache = tmp_path_factory.mktemp("views")
    cache_teacher.main(fill_command(tiny_npz, teacher, cache))
    return cache


def fill_command(data: Path, teacher: Path, cache: Path) -> list[str]:
    flags = ("--dataset", data, "--teacher_path", teacher, "--teacher_cache", cache)
    return [*map(str, flags), "--batch-size", "134"]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many images the teacher has been given in training, call by call."""
    logits, calls = NetTeacher.logits, []

    def count(self, images):
        if not torch.is_inference_mode_enabled():  # as a split is evaluated
            calls.append(len(images))
        return logits(self, images)

    monkeypatch.setattr(NetTeacher, "logits", count)
    return calls


@pytest.fixture
def parts(tiny_npz, teacher) -> tuple:
    """Teacher and data, as the scripts load them."""
    data = load_dataset(str(tiny_npz), "data")
    return load_teacher(TeacherSource(paths=(str(teacher),)), data), data


# The same numbers


def test_filling_and_reading_change_no_bit(students, train, calls):
    plain, first, cache = students
    assert_same_run(plain, first)
    assert_same_run(plain, train("second", "--teacher_cache", cache))
    # Other students of the seed, and at a teacher's temperature: kept are the logits before any.
    other = ("--T", 2, "--Lambda", 0.5, "--train-batch-size", 32, "--teacher_temperature", 1.5)
    other_cached = train("third", *other, "--teacher_cache", cache)
    assert not calls
    assert_same_run(train("plain", *other), other_cached)


def test_bfloat16_is_exact_and_half_as_large(tiny_npz, teacher, tmp_path, forks):
    # What `accelerate launch --cpu --mixed_precision bf16` sets.
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    folders = []
    for root in ("plain", "first", "second"):
        cache = () if root == "plain" else ("--teacher_cache", tmp_path / "cache")
        line = student_command(tiny_npz, tmp_path / root, teacher, *cache, "--epochs", 1)
        assert forks.run(["train_student.py", *line], **bf16).code == 0
        folders.append(folder_of(tmp_path / root))
        assert_same_run(folders[0], folders[-1])
    [file] = (tmp_path / "cache").rglob("*.bin")
    assert file.stat().st_size == 135 * 4 * 2


@pytest.mark.parametrize("kept", [True, False])
def test_several_processes_read_and_keep_no_part_of_an_epoch(parts, tmp_path, kept):
    teacher, data = parts
    plan, logits = epoch_plan(135, 42, 1, True), torch.randn(135, 4)
    if kept:
        files = open_cache(tmp_path, teacher, data, ONE_PROCESS)
        files.write(f"seed=42_epoch=1_plan={zlib.crc32(plan.numpy()):08x}", logits)
    two = Namespace(**vars(ONE_PROCESS) | {"num_processes": 2})
    for rank in range(2):
        files = open_cache(tmp_path, teacher, data, two)
        cached = CachedAnswers(lambda batch: teacher.logits(batch.images), files, two, 42)
        loader = TrainLoader(data.train, 16, 42, "cpu", rank, 2)
        with cached.during_epoch(1):
            assert cached.reads_cache is kept
            for batch in map(loader.batch, loader.epoch(1)):
                expected = logits[batch.places] if kept else teacher.logits(batch.images)
                assert torch.equal(cached(batch), expected)
    assert len(list(tmp_path.rglob("*.bin"))) == kept


def test_an_ensemble_costs_once_what_one_teacher_does(train, tiny_npz, teacher, tmp_path, calls):
    other = tmp_path / "other"
    train_teacher.main(command(tiny_npz, other, "--epochs", "1", "--seed", "1"))
    two = ("--teacher_path", teacher, other, "--teacher_temperature", "auto")
    expected = train("plain", *two)
    cache = ("--teacher_cache", tmp_path / "cache")
    assert_same_run(expected, train("first", *two, *cache))
    calls.clear()
    assert_same_run(expected, train("second", *two, *cache))
    assert not calls
    sizes = [file.stat().st_size for file in (tmp_path / "cache").rglob("*.bin")]
    assert sizes == [135 * 4 * 4] * 3
    taught = json.loads((expected / "result.json").read_text())["teacher"]
    assert "from_2xresnet8_NLL_Tcal=auto" in expected.name and taught["temperature"] != 1
    assert taught["teacher_temperature"] == "auto" and taught["seed"] == "1+42"
    assert taught["test"]["tempered"]["nll"] == pytest.approx(taught["test"]["scaled"]["nll"])


# All views ahead


def test_views_written_ahead_serve_any_seed(train, filled, calls):
    cached = train("cached", "--seed", 1, "--teacher_cache", filled)
    assert not calls
    assert_same_run(train("plain", "--seed", 1), cached)


def test_unflipped_students_need_and_read_unflipped_views(
    train, tiny_npz, teacher, filled, tmp_path, calls
):
    half, one = tmp_path / "half", ("--seed", 1, "--epochs", 1)
    plain = train("plain", "--no_flip", *one)
    cache_teacher.main([*fill_command(tiny_npz, teacher, half), "--no_flip"])
    names = {path.name.split("_")[0] for path in half.rglob("view=*.bin")}
    assert names == {f"view={view}" for view in range(0, 162, 2)}
    calls.clear()
    for root, views in (("first", half), ("second", filled)):
        assert_same_run(plain, train(root, "--no_flip", *one, "--teacher_cache", views))
    assert not calls
    train("flipped", *one, "--teacher_cache", half)
    assert calls == [67, 67, 1]
    with pytest.raises(UserError, match="flip was True and is False"):
        train("flipped", "--no_flip", *one)


def test_only_missing_and_damaged_views_are_made(tiny_npz, teacher, filled, capsys):
    times = {path: path.stat().st_mtime_ns for path in filled.rglob("view=*.bin")}
    assert len(times) == NUM_VIEWS == 162
    made = [next(filled.rglob(f"view={view}_*")) for view in (5, 77)]
    made[0].unlink()
    made[1].write_bytes(flipped(made[1].read_bytes()))
    cache_teacher.main(fill_command(tiny_npz, teacher, filled))
    out = capsys.readouterr().out
    assert f"{made[1]} is damaged" in out and "all 162 views" in out
    again = {path: path.stat().st_mtime_ns for path in filled.rglob("view=*.bin")}
    assert again.keys() == times.keys()
    assert {path for path in times if again[path] != times[path]} == set(made)


def test_a_view_that_is_not_there_is_no_view_at_all(train, filled, students, tmp_path, calls):
    """Half a table never half serves: the epoch is computed, and kept."""
    path = next(filled.rglob("view=9_*"))
    content = path.read_bytes()
    path.unlink()
    assert_same_run(students[0], train("student", "--teacher_cache", filled))
    assert calls == [67, 67, 1] * 3
    assert len(list(filled.rglob("seed=42_epoch=*.bin"))) == 3
    path.write_bytes(content)


# Never stale, never damaged


def changed(teacher: NetTeacher, **facts) -> NetTeacher:
    return NetTeacher([dataclasses.replace(member, **facts) for member in teacher.members])


def test_whatever_the_logits_depend_on_names_the_folder(parts, tmp_path):
    teacher, data = parts

    def folder(of=teacher, data=data, **facts) -> str:
        """Its first part, which stands for all but the arithmetic."""
        files = open_cache(tmp_path, of, data, Namespace(**vars(ONE_PROCESS) | facts))
        return files.folder.name.partition("_torch=")[0]

    facts = {"sha256": "0" * 64, "mean": (0.5,) * 3, "std": (0.5,) * 3, "model": "resnet20"}
    others = [changed(teacher, **{name: fact}) for name, fact in [*facts.items(), ("size", 16)]]
    found = {folder(of) for of in (teacher, *others, NetTeacher(teacher.members * 2))}
    found |= {folder(mixed_precision="bf16"), folder(device=torch.device("cuda"))}
    for fact in ({"split_seed": 1}, {"fingerprint": "0" * 64}):
        found.add(folder(data=dataclasses.replace(data, **fact)))
    assert len(found) == 11
    moved = changed(teacher, path=Path("moved.pth"), loss="NLL")
    assert folder(moved) == folder(NetTeacher(teacher.members, temperature=2)) == folder()


def test_what_changes_the_last_bits_names_the_folder(parts, tmp_path, monkeypatch, capsys):
    teacher, data = parts

    def folder(of=teacher) -> Path:
        return open_cache(tmp_path, of, data, ONE_PROCESS).folder

    first = folder()
    assert folder() == first and not capsys.readouterr().out
    torch.set_num_threads(2)
    other_threads = folder()
    torch.set_num_threads(1)
    said = capsys.readouterr().out
    assert first.name in said and "are not read" in said and "threads" in said
    found = {first, other_threads}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.9.9")
        found.add(folder())
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "processor", lambda: "another processor")
        found.add(folder())
    with monkeypatch.context() as patch:  # the code of a net, say
        logits = NetTeacher.logits
        patch.setattr(NetTeacher, "logits", lambda self, images: logits(self, images) * 1.0000001)
        found.add(folder())
    teacher.to(torch.device("cpu"))
    assert teacher.members[0].folded
    found.add(folder())
    assert len(found) == 6
    assert len({path.name.split("_torch=")[0] for path in found}) == 1  # one teacher


def test_files_of_an_earlier_version_are_neither_read_nor_deleted(
    train, students, cache, calls, capsys
):
    [folder] = cache.glob("*/*")
    older = folder.rename(folder.with_name(folder.name.split("_torch=")[0]))
    before = {path: path.read_bytes() for path in older.iterdir()}
    assert_same_run(students[0], train("second", "--teacher_cache", cache))
    assert calls == [67, 67, 1] * 3
    said = capsys.readouterr().out
    assert f"logits in {older.name} (in {older.parent}) are not read" in said
    assert {path: path.read_bytes() for path in older.iterdir()} == before
    assert len(list(folder.iterdir())) == 3


def test_a_net_that_leaves_half_precision_at_its_end_is_kept_exactly(parts, tmp_path):
    teacher, data = parts
    net = teacher.members[0].net

    class Float32(torch.nn.Module):
        def forward(self, pixels):
            return net(pixels).float() / 3

    own = changed(teacher, net=Float32())
    bf16 = Namespace(**vars(ONE_PROCESS) | {"mixed_precision": "bf16"})
    files = open_cache(tmp_path, own, data, bf16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = own.logits(data.train.images)
    files.write("view=0", logits)
    assert files.verify("view=0") and torch.equal(files.rows("view=0"), logits)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_other_views_and_another_plan_are_other_files(parts, tmp_path, monkeypatch):
    def kept() -> Path:
        files = open_cache(tmp_path, *parts, ONE_PROCESS)
        with CachedAnswers(None, files, ONE_PROCESS, 42).during_epoch(1):
            pass
        return max(files.folder.glob("*.bin"), key=lambda path: path.stat().st_mtime_ns)

    first = kept()
    with monkeypatch.context() as patch:  # another algorithm of the generator
        patch.setattr(answers_module, "epoch_plan", lambda n, *_: epoch_plan(n, 1, 9, True))
        other = kept()
    assert other.parent == first.parent and other.name[:24] != first.name[:24]
    monkeypatch.setattr(cache_module, "PADDING", 3)
    assert kept().parent != first.parent


def test_a_cache_that_one_may_only_read(train, students, cache, calls, capsys, monkeypatch):
    next(cache.rglob("seed=42_epoch=3_*")).unlink()
    before = sorted(cache.rglob("*"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # what root is never told
    assert_same_run(students[0], train("second", "--teacher_cache", cache))
    assert calls == [67, 67, 1]  # of the epoch that it lacks
    out = capsys.readouterr().out
    assert "--teacher_cache: seed=42_epoch=3_" in out and "no permission" in out
    assert sorted(cache.rglob("*")) == before


def test_a_cache_that_lacks_all_and_takes_nothing_is_said_once(
    train, students, tmp_path, calls, capsys, monkeypatch
):
    """A colleague's folder, in which there is none for this teacher."""
    root = tmp_path / "colleague"
    root.mkdir()

    def refused(path, flag):
        raise UserError(flag) from PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache_module, "make_folder", refused)
    assert_same_run(students[0], train("second", "--teacher_cache", root))
    # The first epoch twice: it is looked at before the training.
    assert calls == [67, 67, 1] * 4 and not list(root.iterdir())
    assert capsys.readouterr().out.count("Permission denied") == 1
    with pytest.raises(UserError):  # no such folder at all: a slip of the pen
        train("third", "--teacher_cache", tmp_path / "colleagues")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_fills_up_is_said_once_and_ends_no_run(
    train, students, tmp_path, capsys, monkeypatch, number
):
    """From the second epoch on nothing can be written into the cache."""
    written, fsync = [], os.fsync

    def full(file):
        if "cache" in os.readlink(f"/proc/self/fd/{file}"):
            written.append(file)
            if len(written) > 1:
                raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    cache = tmp_path / "cache"
    assert_same_run(students[0], train("second", "--teacher_cache", cache))
    out = capsys.readouterr().out
    assert out.count(os.strerror(number)) == 1 and "seed=42_epoch=2_" in out
    assert len(written) == 2  # it is not tried again
    [file] = (path for path in cache.rglob("*") if path.is_file())
    assert file.name.startswith("seed=42_epoch=1_")


def test_a_disk_too_full_for_a_folder(train, students, tmp_path, capsys, monkeypatch):
    def full(path, flag):
        raise UserError(flag) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "make_folder", full)
    assert_same_run(students[0], train("second", "--teacher_cache", tmp_path / "cache"))
    assert capsys.readouterr().out.count("No space left") == 1


def test_all_views_ahead_need_a_disk_that_takes_them(tiny_npz, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunFailed, match="--teacher_cache.*cannot be written to: no permission"):
        cache_teacher.main(fill_command(tiny_npz, teacher, tmp_path / "cache"))


def test_a_file_that_cannot_be_read_is_computed_anew(train, students, cache, capsys, monkeypatch):
    memmap = np.memmap

    def broken(path, *options, **more):
        if "epoch=2_" in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return memmap(path, *options, **more)

    monkeypatch.setattr(np, "memmap", broken)
    assert_same_run(students[0], train("second", "--teacher_cache", cache))
    assert "cannot be read (Input/output error): computed anew" in capsys.readouterr().out


def flipped(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


def test_damage_is_found_said_and_mended(train, students, cache, calls, capsys):
    damages = (flipped, lambda content: content[:-1], lambda content: content + b"x")
    paths = [next(cache.rglob(f"seed=42_epoch={epoch}_*.bin")) for epoch in (1, 2, 3)]
    contents = [path.read_bytes() for path in paths]
    for path, damage in zip(paths, damages, strict=True):
        path.write_bytes(damage(path.read_bytes()))
    assert_same_run(students[0], train("second", "--teacher_cache", cache))
    out = capsys.readouterr().out
    assert all(f"{path} is damaged: removed, and computed anew" in out for path in paths)
    assert calls == [67, 67, 1] * 3 and [path.read_bytes() for path in paths] == contents


def test_temporary_names_are_never_shared(tmp_path, monkeypatch):
    """In containers that share a folder every process may have the same number."""
    names, replace = set(), os.replace
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "replace", lambda a, b: (names.add(a), replace(a, b)))
    for _ in range(24):
        with atomic(tmp_path / "file") as file:
            file.write(b"x")
    assert len(names) == 24 and [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "usual").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_several_runs_at_once_share_one_cache(train, tiny_npz, teacher, tmp_path, forks):
    cache = ("--teacher_cache", tmp_path / "cache")
    children = []
    for T in (1, 2, 3):
        line = student_command(tiny_npz, tmp_path / f"T={T}", teacher, "--T", T, *cache)
        children.append(forks.start(["train_student.py", *line]))
    assert [child.wait() for child in children] == [0] * 3
    files = [path.name for path in next((tmp_path / "cache").glob("*/*")).iterdir()]
    assert len(files) == 3 and not any(name.endswith(".tmp") for name in files)
    assert_same_run(train("plain", "--T", 3), folder_of(tmp_path / "T=3"))
