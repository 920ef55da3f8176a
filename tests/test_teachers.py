"""What teaches together, what its logits are divided by, and the published teachers."""

import copy
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import command, given_file
from stand_in_teachers import (
    LABEL,
    MEAN,
    STD,
    checkpoint,
    load,
    load_all,
    make_dataset,
    make_run,
    refused,
    third_party,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_student
from losses import build_distillation
from models import build_model
from utils.calibration.metrics import classification_metrics
from utils.calibration.temperature import fit_temperature, mean_confidence
from utils.data import Dataset, Split, load_dataset
from utils.data.views import normalise
from utils.program import UserError
from utils.split_metrics import evaluate
from utils.teachers.nets import Member, NetTeacher, in_half
from utils.teachers.settling import MAY_KNOW_VALIDATION, settle_nets
from utils.teachers.weights import ready

# --- one teacher or several, and their temperature ------------------------------------------------

IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
LABELS = torch.tensor([1, 2, 3, 1, 2])


def three_runs(tmp_path) -> Iterator[Path]:
    for seed in (44, 42, 43):
        state = checkpoint()["state_dict"]
        state["fc.bias"] *= seed / 10
        yield make_run(tmp_path / str(seed), seed=seed, state_dict=state)


def test_an_ensemble_teaches_its_mean_probabilities(tmp_path):
    """The log of the mean over teachers of softmax, in float64."""
    runs = list(three_runs(tmp_path))
    teacher = load_all(*runs)
    each = [load_all(run).logits(IMAGES).double() for run in runs]
    expected = sum(logits.softmax(1) for logits in each).div(3).log()
    torch.testing.assert_close(teacher.logits(IMAGES).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(teacher.logits(IMAGES), load_all(*runs[::-1]).logits(IMAGES))


def test_an_ensemble_says_who_is_in_it(tmp_path):
    runs = list(three_runs(tmp_path))
    file, _ = third_party(tmp_path)
    teacher = load_all(*runs)
    assert (teacher.model, teacher.label) == ("3xresnet8", LABEL)
    said = teacher.identity
    assert said["seed"] == "42+43+44" and said == json.loads(json.dumps(said))
    hashes = {hashlib.sha256((run / "model_best.pth").read_bytes()).hexdigest() for run in runs}
    assert {member["sha256"] for member in said["members"]} == hashes
    assert said["sha256"] not in hashes
    mixed = load_all(runs[0], file, model="resnet8")
    assert mixed.identity["seed"] is None and mixed.label == f"{LABEL}_and_their-net,v1"
    with pytest.raises(UserError, match="same weights as .*name each teacher once"):
        load_all(runs[0], runs[1], runs[0])


class Casts(TorchDispatchMode):
    """Counts the tensors that are cast to another type."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten._to_copy.default
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("model", ["resnet8", "wrn_16_1"])
def test_under_autocast_a_teacher_is_cast_once(model):
    """Its logits keep their bits. A wide ResNet has batch norms that are not folded."""
    torch.manual_seed(3)
    net = ready(build_model(model), Path("x"))
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    logits, casts = [], []
    for precision in ("no", "bf16"):
        member = Member(copy.deepcopy(net), model, MEAN, STD, "x", "x", Path("x"))
        teacher = NetTeacher([member]).to(torch.device("cpu"), precision)
        with torch.autocast("cpu", torch.bfloat16), Casts() as counter:
            logits.append(teacher.logits(images))
        casts.append(counter.count)
    assert torch.equal(*logits) and logits[0].dtype == torch.bfloat16
    products = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules())
    assert casts[0] - casts[1] >= products


def test_a_net_that_half_precision_would_change_keeps_its_weights():
    """It uses its weight outside of what autocast casts."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images):
            return self.conv(images).mean((2, 3)) + self.conv.weight[:, 0, 0, 0]

    net = Own()
    assert in_half(net, torch.bfloat16) is net
    assert net.conv.weight.dtype == torch.float32


class SureOf:
    """Stands for SeenViews: a mean confidence that is known for each T."""

    def __init__(self, confidence=lambda temperature: 0.8):
        self.confidence_at = confidence

    def confidence(self, temperature: float = 1.0) -> float:
        return self.confidence_at(temperature)


def test_temperature(tmp_path):
    run, (file, _) = make_run(tmp_path / "run"), third_party(tmp_path)
    plain, warm, auto = (load_all(run, temperature=T) for T in (1.0, 2.5, "auto"))
    logits = plain.logits(IMAGES)
    assert torch.equal(plain.tempered(logits), logits)
    assert torch.equal(warm.tempered(warm.logits(IMAGES)), logits / 2.5)
    assert (warm.label, auto.label) == (f"{LABEL}_Tcal=2.5", f"{LABEL}_Tcal=auto")
    before = auto.identity
    labels = logits.argmax(dim=1).repeat(9)
    labels[:9] = (labels[:9] + 1) % 10  # it is wrong now and then
    data = make_dataset(val=Split(IMAGES.repeat(9, 1, 1, 1), labels))
    seen = SureOf(lambda temperature: 0.9 - temperature / 10)
    line, confidences = settle_nets(auto, data, Accelerator(cpu=True), seen).splitlines()
    assert auto.temperature == fit_temperature(logits.repeat(9, 1), data.val.labels)[0]
    assert f"with T = {auto.temperature:.4g}" in line
    own = 100 * mean_confidence(logits)
    assert f"80.00 % on training images, {own:.2f} % on validation images" in confidences
    assert f"{90 - 10 * auto.temperature:.2f} % on training images" in confidences.split("T = ")[1]
    assert auto.confidences["view_confidence"] == 0.8
    assert auto.confidences["temperature"] == auto.temperature
    assert auto.identity == before  # a run that goes on elsewhere is the same run
    refused(file, "auto", "validate", "give a number", model="resnet8", temperature="auto")
    assert load_all(file, model="resnet8", temperature=2.0).temperature == 2


@pytest.mark.parametrize("right, bound", [(True, "0.05"), (False, "20")])
def test_a_temperature_at_its_bound_teaches_nobody(tmp_path, right, bound):
    """Labels that the teacher always predicts, or that it always finds least likely."""
    auto = load_all(make_run(tmp_path / "run"), temperature="auto")
    logits = auto.logits(IMAGES)
    labels = logits.argmax(dim=1) if right else logits.argmin(dim=1)
    data = make_dataset(val=Split(IMAGES, labels))
    words = f"--teacher_temperature auto: .* bound of its range, {bound} .*give a number"
    with pytest.raises(UserError, match=words):
        settle_nets(auto, data, Accelerator(cpu=True), SureOf())


def test_a_teacher_at_the_bound_leaves_no_run_behind(tiny_npz, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.teachers.settling.fit_temperature", lambda *_: (0.05, True))
    root = tmp_path / "students"
    auto = ("--teacher_path", str(teacher), "--teacher_temperature", "auto")
    with pytest.raises(UserError, match="--teacher_temperature auto.*give a number"):
        train_student.main(command(tiny_npz, root, *auto))
    assert not root.exists()


class Fixed(nn.Module):
    """Logits that do not look at the image: one row for all."""

    def __init__(self, *row: float):
        super().__init__()
        self.row = torch.tensor(row)

    def forward(self, pixels):
        return self.row.expand(len(pixels), -1)


def fixed_teacher(*rows, temperature=1.0) -> NetTeacher:
    members = [Member(Fixed(*row), "fixed", MEAN, STD, "NLL", str(row), Path("x")) for row in rows]
    return NetTeacher(
        [dataclasses.replace(member, seed=1) for member in members], temperature=temperature
    )


def test_an_ensemble_and_a_temperature_keep_what_is_ruled_out():
    """A class is ruled out where all members do so; a temperature does not bring it back."""
    never = float("-inf")
    rows = [(0.0, 1.0, never, never), (2.0, never, 0.5, never)]
    together = fixed_teacher(*rows, temperature=2.0)
    logits = together.logits(IMAGES[:1])
    shares = sum(torch.tensor(row).double().softmax(0) for row in rows) / 2
    torch.testing.assert_close(logits[0].double().exp(), shares, rtol=1e-6, atol=0)
    tempered = together.tempered(logits)[0]
    assert tempered[3] == never and tempered[:3].isfinite().all()
    torch.testing.assert_close(tempered[:3], logits[0, :3] / 2)


def test_a_teacher_that_rules_classes_out_is_measured_and_refused_where_it_must(tmp_path):
    never, accelerator = float("-inf"), Accelerator(cpu=True)
    split = Split(IMAGES, torch.tensor([0, 1, 1, 0, 0]))
    data = make_dataset(val=split, num_classes=3)
    teacher = fixed_teacher((1.0, 0.5, never), temperature=None)
    teacher.rule = "auto"

    def inspect(distill):
        loss = build_distillation(distill)
        return settle_nets(teacher, data, accelerator, SureOf(), loss=loss)

    for distill in ("KD", "DKD", "DIST"):
        assert "validation top-1 60.00 %" in inspect(distill)
    # Two of the classes are left, the shares of which are 3 to 2.
    assert teacher.temperature == pytest.approx(0.5 / math.log(1.5))
    with pytest.raises(UserError, match="--distill: LSKD .*give --distill KD"):
        inspect("LSKD")
    # The label alone is possible: there are no others to compare.
    data.val.labels.zero_()
    teacher = fixed_teacher((1.0, never, never))
    assert "100.00 %" in inspect("KD")
    with pytest.raises(UserError, match="--distill: DKD .*give --distill KD"):
        inspect("DKD")
    # A label that is ruled out has an infinite NLL, which no file of JSON can hold.
    data.val.labels.fill_(2)
    found = evaluate(torch.tensor([[1.0, 0.0, never]] * 5), data.val)
    assert "nll" not in found and found["top1"] == 0 and found["brier"] > 1
    for bad in (float("nan"), float("inf")):
        teacher = fixed_teacher((1.0, bad, 0.0))
        with pytest.raises(UserError, match="--teacher_path x: its outputs are NaN or infinite"):
            inspect("KD")


def test_a_larger_view(tmp_path):
    run = make_run(tmp_path / "run")
    small, large = load(run), load(run, size=16)
    pixels = F.interpolate(normalise(IMAGES, MEAN, STD), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(large.logits(IMAGES), small.net(pixels))
    assert large.identity == small.identity | {"size": 16}


@pytest.mark.parametrize("model", ["resnet56_bottleneck", "wrn_10_2"])
def test_a_logit_has_the_same_bits_in_any_batch(model, tmp_path):
    net = build_model(model, 100).eval().to(memory_format=torch.channels_last)
    teacher = NetTeacher([Member(net, model, MEAN, STD, "x", "x", Path("x"))])
    images = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8)
    together, order = teacher.logits(images), torch.randperm(100)
    assert torch.equal(teacher.logits(images[order]), together[order])
    for size in (7, 95):
        parts = [teacher.logits(part) for part in images.split(size)]
        assert torch.equal(torch.cat(parts), together)


def test_a_student_in_the_teachers_root_is_not_its_teacher(tmp_path):
    teacher, *students = (make_run(tmp_path / name) for name in "bac")
    for student in students:
        (student / "result.json").write_text('{"teacher": {}}')
    assert load(tmp_path).path == teacher / "model_best.pth"
    assert load(students[0]).path == students[0] / "model_best.pth"  # it teaches where it is named
    (teacher / "result.json").unlink()
    refused(tmp_path, "2 finished runs lie below it: a, c")


# --- folded nets --------------------------------------------------------------------------------


@pytest.mark.parametrize("model, left", [("resnet8", 0), ("wrn_10_1", 4), ("vgg8", 5)])
def test_batch_norms_go_into_convolutions_where_the_code_can_be_traced(tmp_path, model, left):
    def lived_in(state):
        draw = torch.Generator().manual_seed(7)
        norms = (key.rpartition(".")[0] for key in state if key.endswith("running_var"))
        for each in norms:
            for name in ("weight", "bias", "running_mean", "running_var"):
                state[f"{each}.{name}"].uniform_(0.5, 1.5, generator=draw)
        return state

    file, _ = third_party(tmp_path, model, lived_in)
    teacher = load_all(file, model=model)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    before = teacher.logits(images)
    after = teacher.to(torch.device("cpu")).logits(images)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
    parts = teacher.members[0].net.modules()
    assert sum(isinstance(part, torch.nn.BatchNorm2d) for part in parts) == left
    assert len(before.unique(dim=0)) == 3


class Recurrent(nn.Module):
    """Calls one convolution several times, each time with a batch norm of its own or the same."""

    def __init__(self, norms: int):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(norms))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for k in range(2):
            x = self.norms[k % len(self.norms)](self.conv(x)).relu()
        return self.head(x.mean((2, 3)))


class Hooked(nn.Sequential):
    """Its batch norm's output is doubled by a hook, which a folded net would not run."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
        self.append(nn.Flatten())
        self[1].register_forward_hook(lambda module, given, result: 2 * result)


class OfOneSize(nn.Sequential):
    """Takes images of 16 pixels a side, and no others."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))


def in_use(net: nn.Module) -> nn.Module:
    """In eval mode, with the statistics that training leaves."""
    torch.manual_seed(0)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.uniform_(0.2, 2)
            part.running_mean.normal_()
    return net.eval()


@pytest.mark.parametrize(
    "net", [Recurrent(1), Recurrent(2), Hooked()], ids=["one norm", "two norms", "hook"]
)
def test_a_net_that_folding_would_change_stays_as_it_is(net):
    """Bit for bit, and the member does not say that it is folded."""
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    teacher = NetTeacher([Member(in_use(net), "own", MEAN, STD, "x", "x", Path("x"))])
    before = teacher.logits(images)
    assert torch.equal(teacher.to(torch.device("cpu")).logits(images), before)
    assert not teacher.members[0].folded


def test_a_net_of_one_size_is_folded_at_its_own():
    for size, folds in ((None, False), (16, True)):
        member = Member(in_use(OfOneSize()), "own", MEAN, STD, "x", "x", Path("x"), size=size)
        NetTeacher([member]).to(torch.device("cpu"))
        assert member.folded is folds


# --- the published teachers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10():
    return load_dataset("cifar10", given_file("KD_DATA", "cifar10.npz").parent, is_main=False)


def published(model: str, data: Dataset, norm: str) -> NetTeacher:
    file = given_file("KD_CHECKPOINTS", f"{model}-*.th")
    return load_all(file, dataset=data, model=model, norm=norm)


@pytest.mark.parametrize("model, error, ece", [("resnet20", 8.27, 5.32), ("resnet56", 6.61, 4.64)])
def test_published_teachers(cifar10, model, error, ece):
    teacher = published(model, cifar10, "imagenet")
    logits = torch.cat([teacher.logits(images) for images in cifar10.test.images.split(256)])
    metrics = classification_metrics(logits, cifar10.test.labels)
    assert 100 * (1 - metrics["top1"]) == pytest.approx(error, abs=0.005)
    assert 100 * metrics["ece"] == pytest.approx(ece, abs=0.01)


def test_a_teacher_that_is_fed_wrongly_is_said_to_be(cifar10):
    """Test images stand for the validation split, which the published nets have seen."""
    few = Split(cifar10.test.images[:400], cifar10.test.labels[:400])
    data = dataclasses.replace(cifar10, val=few)
    accelerator = Accelerator(cpu=True)
    teacher = published("resnet20", data, "imagenet")
    right, _, known = settle_nets(teacher, data, accelerator, SureOf()).splitlines()
    assert known == MAY_KNOW_VALIDATION
    assert re.fullmatch(r"teacher resnet20 resnet20-\w+: validation top-1 9.* %, ECE .* %", right)
    wrong = published("resnet20", data, "0,0,0/1,1,1")
    *_, advice = settle_nets(wrong, data, accelerator, SureOf()).splitlines()
    own, other = map(float, re.findall(r"([\d.]+) %", advice))
    assert own < 60 < 90 < other and "400 validation images" in advice
    assert re.search("--teacher_norm (imagenet|cifar)", advice)
