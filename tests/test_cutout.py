"""--cutout: which square of an image is blotted out, and that runs repeat and resume."""

import json

import cuda_graphs
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import assert_same_run, command, fails, folder_of

import train_student
import train_teacher
from utils.data import Split, load_dataset
from utils.data.cutout import Cutout, blot_out, centres
from utils.data.shared import train_loader
from utils.data.views import TrainLoader
from utils.runs import Run
from utils.settings import Recipe

RNG = np.random.default_rng(0)
IMAGES = torch.from_numpy(RNG.integers(0, 256, (50, 3, 8, 8), dtype=np.uint8))
SPLIT = Split(IMAGES, torch.arange(50) % 4)
CUTOUT = Cutout(3, (1, 2, 3))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_square_of_each_image(size):
    where = centres(50, side=8, seed=1, epoch=2)
    colour = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]
    blotted = blot_out(IMAGES, where, size, colour)
    expected = IMAGES.clone()
    for image, row, column in zip(expected, *where.tolist(), strict=True):
        for y in range(row - size // 2, row - size // 2 + size):
            for x in range(column - size // 2, column - size // 2 + size):
                if 0 <= y < 8 and 0 <= x < 8:
                    image[:, y, x] = colour[:, 0, 0]
    assert torch.equal(blotted, expected)


def test_every_pixel_is_a_centre_and_every_epoch_draws_anew():
    drawn = centres(6400, side=8, seed=1, epoch=1)
    counts = torch.bincount(8 * drawn[0] + drawn[1], minlength=64)
    assert ((counts - 100).abs() < 5 * 10).all()  # five standard deviations
    assert not torch.equal(drawn, centres(6400, side=8, seed=1, epoch=2))
    assert torch.equal(drawn, centres(6400, side=8, seed=1, epoch=1))


def batches(loader: TrainLoader, epoch: int = 3) -> list:
    return [loader.batch(draw) for draw in loader.epoch(epoch)]


def test_order_and_views_are_as_without_it():
    plain = TrainLoader(SPLIT, 16, 7, "cpu")
    cut = TrainLoader(SPLIT, 16, 7, "cpu", cutout=CUTOUT)
    colour = torch.tensor(CUTOUT.colour)[:, None, None]
    for one, other in zip(batches(plain), batches(cut), strict=True):
        assert torch.equal(one.labels, other.labels) and torch.equal(one.places, other.places)
        untouched = (one.images == other.images) | (other.images == colour)
        assert untouched.all() and not torch.equal(one.images, other.images)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_squares_of_one(world):
    single = TrainLoader(SPLIT, 6 * world, 7, "cpu", cutout=CUTOUT)
    ranks = [TrainLoader(SPLIT, 6, 7, "cpu", rank, world, cutout=CUTOUT) for rank in range(world)]
    for whole, *pieces in zip(*map(batches, (single, *ranks)), strict=True):
        kept = [piece.images for piece in pieces if piece.weight > 0]
        assert torch.equal(torch.cat(kept), whole.images)


def test_the_square_has_the_mean_colour(tiny_npz):
    data = load_dataset(str(tiny_npz), "data")
    loader = train_loader(data, Recipe(cutout=5), Accelerator(cpu=True))
    assert loader.cutout.size == 5
    assert loader.colour.flatten().tolist() == [round(255 * level) for level in data.mean]


class Killed(BaseException):
    """Stands in for SIGKILL within the process: nothing in the project catches it."""


def test_a_run_is_another_one_and_resumes_exactly(teacher, tiny_npz, tmp_path, monkeypatch):
    flags = ("--cutout", "4", "--teacher_path", str(teacher))
    train_student.main(command(tiny_npz, tmp_path / "whole", *flags))
    save = Run.save

    def save_and_die(self, *arguments):
        save(self, *arguments)
        raise Killed

    line = command(tiny_npz, tmp_path / "cut", *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", save_and_die)
        train_student.main(line)
    train_student.main(line)
    whole, cut = (folder_of(tmp_path / part) for part in ("whole", "cut"))
    assert_same_run(whole, cut)
    assert json.loads((whole / "result.json").read_text())["settings"]["cutout"] == 4
    train_student.main(command(tiny_npz, tmp_path / "plain", *flags[2:]))
    with pytest.raises(AssertionError):
        assert_same_run(whole, folder_of(tmp_path / "plain"))
    assert "cutout" not in Recipe().settings()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph may choose other kernels")
def test_a_captured_step_draws_anew(tiny_npz, tmp_path, monkeypatch):
    # Powers of two, which are the same numbers for the host and in a tensor.
    flags = ("--cutout", "4", "--lr", "0.0625", "--lr-decay-factor", "0.5")
    flags = (*flags, "--train-batch-size", "32")
    train_teacher.main(command(tiny_npz, tmp_path / "eager", *flags, "--step", "eager"))
    monkeypatch.setattr("utils.steps.can_capture", lambda accelerator: True)
    graphs = cuda_graphs.emulate(monkeypatch)
    train_teacher.main(command(tiny_npz, tmp_path / "graph", *flags))
    assert [graph.replays for graph in graphs] == [4 * 3 - 3]
    assert_same_run(folder_of(tmp_path / "eager"), folder_of(tmp_path / "graph"))


def test_what_it_does_not_go_with(teacher, tiny_npz, tmp_path, capsys):
    def error(main, *flags: str) -> str:
        return fails(capsys, tmp_path, main, command(tiny_npz, tmp_path / "runs", *flags))

    said = error(train_teacher.main, "--cutout", "4", "--mix", "mixup")
    assert "--cutout 4: images are blotted out or mixed, not both" in said
    said = error(train_teacher.main, "--cutout", "8")
    assert "--cutout 8: the images have 8 x 8 pixels; give fewer" in said
    student = ("--cutout", "4", "--teacher_path", str(teacher))
    said = error(train_student.main, *student, "--teacher_temperature", "views")
    assert "--cutout 4: no accuracy is known on images with a square" in said
    said = error(train_student.main, *student, "--teacher_cache", str(tmp_path / "cache"))
    assert "--cutout 4: --teacher_cache cannot hold a teacher's answers to all squares" in said
    said = error(train_student.main, "--cutout", "4", "--teacher_logits", "logits.npz")
    assert "--cutout 4: --teacher_logits cannot hold" in said
