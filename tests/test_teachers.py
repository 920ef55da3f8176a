"""Teachers from run folders and from third parties' files, and everything that is refused."""

import copy
import dataclasses
import hashlib
import json
import math
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import command, given_file
from safetensors.torch import save_file as save_safetensors
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_student
from losses import build_distillation
from models import build_model
from utils.calibration.metrics import classification_metrics
from utils.calibration.temperature import fit_temperature, mean_confidence
from utils.data import Dataset, Split, load_dataset, normalisation
from utils.data.views import normalise
from utils.program import UserError
from utils.program.files import read_torch
from utils.settings import TeacherSource
from utils.split_metrics import evaluate
from utils.teachers import loading
from utils.teachers.loading import load_teacher
from utils.teachers.nets import Member, NetTeacher, in_half
from utils.teachers.settling import MAY_KNOW_VALIDATION, settle_nets
from utils.teachers.weights import ready

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
LABEL = "FL+MDCA_gamma=3_beta=1"


def make_dataset(**changes) -> Dataset:
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), None)
    facts = {"name": "cifar10", "num_classes": 10, "mean": MEAN, "std": STD, "val": split}
    return Dataset(**{"train": split, "test": split, "fingerprint": "f" * 64} | facts | changes)


def checkpoint(**changes) -> dict:
    torch.manual_seed(5)
    facts = {"state_dict": build_model("resnet8").state_dict(), "model": "resnet8", "epoch": 12}
    facts |= {"dataset": "cifar10", "num_classes": 10, "mean": list(MEAN), "std": list(STD)}
    facts |= {"loss": "FL+MDCA", "label": LABEL, "seed": 42, "split_seed": 3}
    return facts | {"fingerprint": "f" * 64} | changes


def make_run(folder: Path, finished=True, **changes) -> Path:
    folder.mkdir(parents=True)
    for which in ("best", "last"):
        torch.save(checkpoint(**changes), folder / f"model_{which}.pth")
    if finished:
        (folder / "result.json").write_text("{}")
    return folder


def third_party(tmp_path, model="resnet8", change=lambda state: state, **options):
    """A file as another code base saves it; the net whose weights it holds."""
    torch.manual_seed(6)
    net = build_model(model, **options).eval()
    file = tmp_path / "their net,v1.pth"
    torch.save(change(net.state_dict()), file)
    return file, net


def renamed(*changes):
    def change(state):
        for pattern, replacement in changes:
            state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
        return state

    return change


def load_all(*paths, dataset=None, split_seed=3, model=None, **flags) -> NetTeacher:
    source = TeacherSource(paths=paths, models=(model,), **flags)
    dataset = dataclasses.replace(dataset or make_dataset(), split_seed=split_seed)
    return load_teacher(source, dataset)


def load(path, **options) -> Member:
    (member,) = load_all(path, **options).members
    return member


def refused(path, *words, **options) -> None:
    """One line refuses `path`; it has all the words."""
    with pytest.raises(UserError) as caught:
        load_all(path, **options)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    for word in ("--teacher", *words):
        assert word in message, message


def same_net(net, other):
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


# --- our own runs ---------------------------------------------------------------------------------


def test_a_run_folder_says_everything(tmp_path):
    run = make_run(tmp_path / "run")
    teacher = load(run)
    file = run / "model_best.pth"
    assert teacher.path == file
    assert teacher.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (teacher.model, teacher.label, teacher.seed) == ("resnet8", LABEL, 42)
    assert (teacher.mean, teacher.std) == (MEAN, STD)
    assert not any(part.training for part in teacher.net.modules())
    assert not any(weight.requires_grad for weight in teacher.net.parameters())
    torch.manual_seed(5)
    assert same_net(build_model("resnet8"), teacher.net)
    first = load_all(run).identity
    run.rename(tmp_path / "moved")
    moved = first | {"path": str(tmp_path / "moved/model_best.pth")}
    assert load_all(tmp_path / "moved").identity == moved == json.loads(json.dumps(moved))


def test_best_or_last(tmp_path):
    run = make_run(tmp_path / "run")
    assert load(run, select="last").path.name == "model_last.pth"
    assert load(str(run / "model_last.pth")).path.name == "model_last.pth"
    refused(run / "model_last.pth", "--teacher_select", select="last")
    (run / "model_last.pth").unlink()
    refused(run, str(run), "model_last.pth", "--teacher_select", select="last")


def test_only_a_finished_run_is_a_teacher(tmp_path):
    run = make_run(tmp_path / "cifar10" / "run", finished=False)
    for path in (run, tmp_path):
        refused(path, "--teacher_path", str(path), "no finished run")
    assert load(run / "model_best.pth").model == "resnet8"
    other = make_run(tmp_path / "cifar10" / "other")
    assert load(tmp_path).path == other / "model_best.pth"


OTHER = {"name": "cifar100", "num_classes": 100, "fingerprint": "e" * 64}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "resnet20"}, ("resnet8", "not --teacher resnet20; leave --teacher out")),
        ({"split_seed": 0}, ("--split-seed 3", "not 0", "validate")),
        ({"key": "model"}, ("leave --teacher_key out",)),
        ({"norm": "half"}, ("--teacher_norm half",)),
        ({"dataset": make_dataset(**OTHER)}, ("other data, cifar10 (10 cl", "cifar100 (100 cl")),
        ({"loss": "MDCA"}, (LABEL, "not --teacher_loss NLL+MDCA")),
        ({"loss": "FL+MDCA_gamma=1_beta=1"}, (LABEL, "not --teacher_loss FL+MDCA_gamma=1")),
    ],
)
def test_what_contradicts_our_checkpoint(tmp_path, options, words):
    refused(make_run(tmp_path / "run"), *words, **options)


@pytest.mark.parametrize(
    ("loss", "options"),
    [("FL+MDCA", {"model": "resnet8"}), ("FL+MDCA", {"dataset": make_dataset(name="moved")})]
    + [("FL+MDCA", {"loss": LABEL}), ("NLL+MDCA", {"loss": "MDCA"}), ("KD", {"loss": "KD"})],
)
def test_what_agrees_with_our_checkpoint(tmp_path, loss, options):
    assert load(make_run(tmp_path / "run", loss=loss), **options).label == LABEL


def test_weights_of_another_architecture(tmp_path):
    run = make_run(tmp_path / "run", state_dict=build_model("resnet14").state_dict())
    reason = "layer1.1.conv1.weight is (16, 16, 3, 3) where none"
    refused(run, f"does not fit resnet8 of 10 classes: {reason}")
    file, _ = third_party(tmp_path)
    reason = "does not fit wrn_16_2 of 10 classes: layer1.0.conv1.weight"
    refused(file, str(file), reason, model="wrn_16_2")


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


# --- third parties' files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapper", "head", "prefix"),
    [(None, "linear", "module."), ("state_dict", "classifier", ""), (None, "fc", "backbone.")]
    + [("ema", "fc", "_orig_mod.module."), ("student", "linear", "module.student.")],
)
def test_wrappers_heads_and_prefixes(tmp_path, wrapper, head, prefix):
    def change(state):
        # Sorted, so that no order says which tensor is which.
        state = renamed((r"^fc\.", f"{head}."), (r"^", prefix))(dict(sorted(state.items())))
        return {wrapper: OrderedDict(state), "epoch": 3} if wrapper else state

    file, net = third_party(tmp_path, change=change)
    teacher = load(file, model="resnet8")
    assert same_net(net, teacher.net)
    assert (teacher.label, teacher.seed) == ("their-net,v1", None)


@pytest.mark.parametrize(
    ("model", "options", "changes"),
    [
        ("resnet8", {"shortcut": "pad"}, []),
        ("resnet8", {}, [(r"\.downsample\.", ".shortcut.")]),
        ("wrn_16_2", {}, [(r"^layer(\d)\.", r"block\1.layer."), ("downsample", "convShortcut")]),
    ],
)
def test_shortcuts(tmp_path, model, options, changes):
    file, net = third_party(tmp_path, model, change=renamed(*changes), **options)
    teacher = load(file, model=model)
    assert same_net(net, teacher.net)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(teacher.net(images), net(images), rtol=1e-4, atol=1e-4)


def test_their_normalisation(tmp_path):
    file, _ = third_party(tmp_path)
    teacher = load(file, model="resnet8", norm="0.5,0.4,0.3/0.2,0.25,1")
    assert (teacher.mean, teacher.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 1.0))
    assert load(file, model="resnet8").mean == MEAN
    assert load(file, model="resnet8", norm="cifar10_old").std == (0.2023, 0.1994, 0.2010)
    for text in ("mnist", "1,2/3,4", "0.5,0.5,0.5/0.5,0,0.5", "123.7,116.3,103.5/58.4,57.1,57.4"):
        with pytest.raises(ValueError, match="six numbers"):
            normalisation(text)


def test_old_files_and_half_precision(tmp_path):
    file, net = third_party(
        tmp_path, change=lambda state: {k: v.half() for k, v in state.items() if v.ndim}
    )
    assert same_net(net.half().float(), load(file, model="resnet8").net)


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_numbers_of_numpy_beside_the_weights(tmp_path, module):
    """Under the names that NumPy 2 and NumPy 1 give them."""
    numbers = {"top1": np.float64(93.5), "epoch": np.int64(3), "loss": np.float32(0.25)}
    numbers |= {"done": np.bool_(True), "small": np.float16(0.5)}
    file, net = third_party(tmp_path, change=lambda state: {"state_dict": state} | numbers)
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content.replace(b"numpy._core.multiarray", module.encode()))
    assert same_net(net, load(file, model="resnet8").net)
    content = read_torch(file, "")
    assert {name: content[name] for name in numbers} == numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite(tmp_path, bad):
    broken = {"bn1.running_var": torch.full((16,), bad, dtype=torch.float64)}
    file, _ = third_party(tmp_path, change=lambda state: state | broken)
    refused(file, "--teacher_path", "NaN or infinite", model="resnet8")


def test_several_sets_of_weights_are_listed_and_one_is_named(tmp_path):
    torch.manual_seed(7)
    ema = build_model("resnet8", 10)

    def change(state):
        optimizer = {"state": {0: {"exp_avg": torch.zeros(3, 3)}}, "param_groups": [{"lr": 0.1}]}
        metrics = {"top1": torch.tensor(0.9)}
        wrapped = {"model": state, "ema": {"shadow": ema.state_dict(), "decay": 0.9}}
        return wrapped | {"optimizer": optimizer, "metrics": metrics, "epoch": 3}

    file, net = third_party(tmp_path, change=change)
    for key, more in ((None, "names one"), ("net", "names one, and not net")):
        words = f"sets of weights are model, ema.shadow; --teacher_key {more}"
        refused(file, words, model="resnet8", key=key)
    for key, expected in (("model", net), ("ema.shadow", ema)):
        teacher = load(file, model="resnet8", key=key)
        assert same_net(expected, teacher.net) and teacher.label == f"their-net,v1_{key}"


def test_safetensors(tmp_path):
    (_, net), file = third_party(tmp_path), tmp_path / "net.safetensors"
    save_safetensors(net.state_dict(), file)
    assert same_net(net, load(file, model="resnet8").net)
    content = file.read_bytes()
    for kept in (len(content) - 1, 1000, 9):
        file.write_bytes(content[:kept])
        refused(file, "damaged, cut short", model="resnet8")


def test_timm_downloads_what_fits_the_data(monkeypatch):
    def timm(name, num_classes, pretrained):
        assert (name, pretrained) == ("timm/small", True)
        net = build_model("resnet8", num_classes)
        net.pretrained_cfg = {"num_classes": classes, "mean": (0.5,) * 3, "std": (0.2,) * 3}
        return net

    monkeypatch.setattr(loading, "build_model", timm)
    classes = 10
    teacher = load("pretrained", model="timm/small", size=16)
    assert (teacher.mean, teacher.std, teacher.size) == ((0.5,) * 3, (0.2,) * 3, 16)
    assert teacher.seed is None
    assert load("pretrained", model="timm/small", norm="half").std == (0.5,) * 3
    classes = 1000
    refused("pretrained", "has 1000 classes but --dataset cifar10 has 10", model="timm/small")
    refused("pretrained", "timm/NAME", model="resnet8")
    offline = Path("/no/network")
    monkeypatch.setattr(loading, "build_model", lambda *_, **__: offline.read_text())
    refused("pretrained", "cannot be downloaded", "weights file", model="timm/small")


# --- files that are none --------------------------------------------------------------------------


def test_what_holds_more_than_tensors_or_no_weights(tmp_path):
    file, net = tmp_path / "net.pth", build_model("resnet8")
    for named, thing in (("models.blocks.Chain", net), ("argparse.Namespace", {"a": Namespace()})):
        torch.save(thing, file)
        refused(file, named, "could run code", "state_dict", model="resnet8")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    refused(file, "TorchScript", "torch.jit.load", model="resnet8")
    for thing in (torch.zeros(3), [1, 2], {}, {"epoch": 3}, {"state_dict": {}}):
        torch.save(thing, file)
        refused(file, "--teacher_path", "state dict", model="resnet8")


def test_other_content_and_files_cut_short(tmp_path):
    run = make_run(tmp_path / "run")
    data = (run / "model_best.pth").read_bytes()
    cut_short = (data[:kept] for kept in (1, 100, 5000, len(data) // 2, -10))
    for content in (b"", b"hello", bytes(100), b"PK\x03\x04", b"<html>", b"\x80\x02", *cut_short):
        (run / "model_best.pth").write_bytes(content)
        refused(run, "--teacher_path", "model_best.pth", "damaged")


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
