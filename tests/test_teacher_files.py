"""Teachers from run folders and from third parties' files, and everything that is refused."""

import hashlib
import json
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_safetensors
from stand_in_teachers import (
    LABEL,
    MEAN,
    STD,
    load,
    load_all,
    make_dataset,
    make_run,
    refused,
    renamed,
    same_net,
    third_party,
)
from torch import nn

from models import build_model
from utils.data import normalisation
from utils.program import UserError
from utils.program.files import read_torch
from utils.teachers import loading

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


def test_their_words_for_the_best_epoch(tmp_path):
    """No checkpoint of a run of ours, though it has an optimiser, too."""
    file, net = third_party(tmp_path)
    content = {"state_dict": net.state_dict(), "optimizer": {"state": {}}, "best": 0.93}
    torch.save(content, file)
    assert same_net(net, load(file, model="resnet8").net)


def test_flags_for_their_nets_beside_a_run_of_ours(tmp_path):
    """They say how the third party's is read, and nothing of ours; alone ours needs none."""
    file, _ = third_party(tmp_path)
    run = make_run(tmp_path / "run")
    ours, theirs = sorted(
        load_all(run, file, model="resnet8", norm="half").members, key=lambda net: net.seed is None
    )
    assert ours.mean == MEAN and theirs.mean == (0.5, 0.5, 0.5)
    other = make_run(tmp_path / "other", seed=43)
    with pytest.raises(UserError, match="--teacher_norm half: --teacher_path names runs of ours"):
        load_all(run, other, norm="half")


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
    # Another program's words under a name of ours.
    for text in ("step 3000", '["a"]', '{"epoch": 3}'):
        save_safetensors(net.state_dict(), file, {"checkpoint": text})
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
