"""What is refused before a run has a folder: nets that cannot take the images, steps of one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_run, command, fails, write_npz

import train_student
import train_teacher
from models import build_model
from scripts import cache_teacher
from scripts import evaluate as evaluate_script
from utils import preflight
from utils.data import Split, load_dataset
from utils.data.views import TrainLoader
from utils.preflight import check_net, check_teacher, other_batch_sizes, shares
from utils.program import UserError
from utils.settings import Recipe
from utils.teachers.nets import Member, NetTeacher

STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """The .npz file of images of a side: 46 to train, of which 4 validate."""
    root = tmp_path_factory.mktemp("sizes")
    return lambda side: write_npz(root / f"{side}.npz", 3, 46, 20, size=side)


def trained_on(path, **flags):
    recipe = Recipe(**({"model": "resnet8", "train_batch_size": 16} | flags))
    return recipe, load_dataset(str(path), "."), SimpleNamespace(num_processes=1)


def line(data, root, *flags):
    run = f"--dataset {data} --epochs 1 --train-batch-size 16 --checkpoint {root}/runs"
    return [*run.split(), *flags]


# what a net can take


@pytest.mark.parametrize("model, side", [("convnet2", 28), ("timm/vit_tiny_patch16_224", 32)])
def test_a_net_of_another_size_is_refused(data_of, tmp_path, capsys, model, side):
    if model.startswith("timm"):
        pytest.importorskip("timm")
    error = fails(
        capsys, tmp_path, train_teacher.main, line(data_of(side), tmp_path, "--model", model)
    )
    wanted = f"--model {model}: cannot be trained on images of {side} x {side} pixels ("
    assert wanted in error and "give another net" in error


@pytest.mark.parametrize("size", [None, 20])
def test_a_teacher_of_another_size_is_refused(data_of, tmp_path, capsys, size):
    torch.save(build_model("convnet2", 3).state_dict(), tmp_path / "conv.pth")
    teacher = ["--teacher", "convnet2", "--teacher_path", str(tmp_path / "conv.pth")]
    flags = [*teacher, *(["--teacher_size", str(size)] if size else [])]
    run = line(data_of(28), tmp_path, "--model", "resnet8", *flags)
    error = fails(capsys, tmp_path, train_student.main, run)
    named = f"--teacher_size {size}: convnet2" if size else f"{tmp_path}/conv.pth: convnet2"
    assert f"{named} cannot take images of" in error
    cache = ["--dataset", str(data_of(28)), *flags, "--teacher_cache", str(tmp_path / "cache")]
    assert "cannot take images of" in fails(capsys, tmp_path, cache_teacher.main, cache)
    train_student.main([*run, "--teacher_size", "32"])  # argparse takes the last


def test_images_of_another_size_out_of_distribution(data_of, tmp_path, capsys):
    run = line(data_of(32), tmp_path, "--model", "convnet2")
    train_teacher.main(run)
    capsys.readouterr()
    other = [str(tmp_path / "runs"), "--on", str(data_of(28)), "--dataset", str(data_of(32))]
    error = fails(capsys, tmp_path, evaluate_script.main, other)
    assert f"--on {data_of(28)}: " in error and "cannot take its images of 28 x 28 pixels" in error


class Odd(torch.nn.Module):
    """Gives `trained(images)` in training mode, and `used(images)` in evaluation mode."""

    def __init__(self, trained, used):
        super().__init__()
        self.trained = trained
        self.used = used

    def forward(self, images):
        return self.trained(images) if self.training else self.used(images)


def logits_of_odd(images):
    return images.flatten(1)[:, :3] * 5


ODD = [
    (lambda images: torch.zeros(2, 7), r"its outputs are \(2, 7\) where \(\d, 3\) is wanted.*size"),
    (lambda images: (logits_of_odd(images),) * 2, "gives a tuple where .*return the logits alone"),
    (lambda images: {"out": logits_of_odd(images)}, "gives a dict where .*the logits alone"),
    (lambda images: logits_of_odd(images).softmax(1), "gives probabilities .*leave its softmax"),
    (lambda images: logits_of_odd(images) * torch.nan, "gives NaN or infinite logits"),
    (lambda images: F.dropout(logits_of_odd(images)), "differently.*training=self.training"),
]


@pytest.mark.parametrize("outputs, said", ODD)
def test_outputs_that_are_no_logits_are_refused(data_of, monkeypatch, outputs, said):
    """Also in evaluation mode alone: an epoch would be trained before it is seen."""
    for trained in (outputs, logits_of_odd):
        net = Odd(trained, outputs)
        monkeypatch.setattr(preflight, "build_model", lambda *_, net=net: net)
        with pytest.raises(UserError, match=said):
            check_net(*trained_on(data_of(8)))


@pytest.mark.parametrize("outputs, said", ODD)
def test_a_teacher_that_gives_no_logits_is_refused(data_of, outputs, said):
    _, data, _ = trained_on(data_of(8))
    net = Odd(outputs, outputs)
    member = Member(net, "odd", label="own", sha256="0", path="own.pth", **STATISTICS)
    net.eval()
    with pytest.raises(UserError, match=said):
        check_teacher(NetTeacher([member]), data)


def test_a_net_may_draw_lots_while_it_is_trained_and_work_in_place(data_of, monkeypatch):
    def in_place(images):
        return logits_of_odd(images.sub_(0.5))

    net = Odd(lambda images: F.dropout(logits_of_odd(images)), in_place)
    monkeypatch.setattr(preflight, "build_model", lambda *_: net)
    check_net(*trained_on(data_of(8)))


# the last step


def shares_of_loader(images, batch_size, processes):
    split = Split(torch.zeros(images, 3, 8, 8, dtype=torch.uint8), torch.zeros(images).long())
    loaders = [
        TrainLoader(split, batch_size, 0, "cpu", rank, processes) for rank in range(processes)
    ]
    return {draw.plan.shape[1] for loader in loaders for draw in loader.epoch(1)}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_are_those_of_the_loader(processes):
    for images in range(processes, 30):
        for batch_size in range(1, images // processes + 1):
            expected = shares_of_loader(images, batch_size, processes)
            assert shares(images, batch_size, processes, False) == expected, (images, batch_size)


def test_shares_of_all_processes_together():
    assert shares(42, 10, 4, True) == {40, 2} and shares(41, 10, 4, True) == {40, 1}


def test_other_batch_sizes_leave_no_step_with_one_image():
    assert other_batch_sizes(42, 41, 1, False) == "give 40 or 42"
    assert other_batch_sizes(42, 1, 1, False) == "give 2 or 3"
    for images in range(3, 60):
        for given in range(1, images + 1):
            for size in other_batch_sizes(images, given, 1, False).split()[1::2]:
                assert 1 not in shares_of_loader(images, int(size), 1)


def test_a_last_step_of_one_image_is_refused_where_it_cannot_be_taken(data_of, tmp_path, capsys):
    flags = ["--train-batch-size", "41", "--model"]
    run = line(data_of(8), tmp_path, *flags, "mobilenetv2_x0_5")
    error = fails(capsys, tmp_path, train_teacher.main, run)
    assert "--train-batch-size 41: of 42 training images a step is left with one" in error
    assert error.endswith("give 40 or 42\n")
    train_teacher.main(
        line(data_of(8), tmp_path, *flags, "resnet8")
    )  # whose maps have 2 x 2 pixels


# nothing changes by the checks


def test_checks_leave_random_states_and_statistics(data_of):
    args, data, accelerator = trained_on(data_of(8), model="vgg11_bn")  # with dropout
    net = build_model("mobilenetv2_x0_5", 3).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    member = Member(net, "mobilenetv2_x0_5", label="own", sha256="0", path="own.pth", **STATISTICS)
    torch.manual_seed(0)
    np.random.seed(0)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].tolist()
    check_net(args, data, accelerator)
    check_teacher(NetTeacher([member]), data)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numbers
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_a_run_is_the_same_without_the_checks(tiny_npz, tmp_path, monkeypatch):
    for name, check in (("with", check_net), ("without", lambda *_: None)):
        monkeypatch.setattr(train_teacher, "check_net", check)
        train_teacher.main(command(tiny_npz, tmp_path / name, "--epochs", "1"))
    folders = [tmp_path / name / "tiny/resnet8/NLL_seed=42" for name in ("with", "without")]
    assert_same_run(*folders)
