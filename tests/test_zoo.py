"""Every net of the zoo: its parts, names, counts against the literature, third parties' weights.

The folder that KD_ZOO names has nets.json.gz: names, shapes, parameter counts and logits of the
nets of five other code bases, in float64 and eval mode, with weights made from their names.
"""

import gzip
import json
import math
import os
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import MODELS, build_model, check_name
from models.blocks import Chain
from models.spellings import standard_names
from utils.settings import TeacherSource
from utils.teachers.loading import load_member

# Parameters for 10 and for 100 classes.
COUNTS = """
resnet8 78042 83892  resnet14 175258 181108  resnet20 272474 278324  resnet26 369690 375540
resnet32 466906 472756  resnet38 564122 569972  resnet44 661338 667188  resnet56 855770 861620
resnet110 1730714 1736564  resnet1202 19421274 19427124  resnet56_bottleneck 591322 614452
resnet110_bottleneck 1147738 1170868  resnet8x4 1210410 1233540  resnet32x4 7410730 7433860
resnet18 11173962 11220132  resnet34 21282122 21328292  resnet50 23520842 23705252
resnet101 42512970 42697380  resnet152 58156618 58341028  resnet110_wide 45864522 46048932
tin_resnet18 11189322 11373732  tin_resnet34 21297482 21481892  tin_resnet50 23582282 24319652
tin_resnet101 42574410 43311780  tin_resnet110 45925962 46663332  tin_resnet152 58218058 58955428
wrn_16_1 175066 180916  wrn_16_2 691674 703284  wrn_40_1 563930 569780  wrn_40_2 2243546 2255156
wrn_28_10 36479194 36536884  wrn_26_10 36481434 36539124  vgg8 3918858 3965028
vgg11 9231114 9277284  vgg13 9416010 9462180  vgg16 14728266 14774436  vgg19 20040522 20086692
vgg11_bn 9756426 9802596  vgg13_bn 9941322 9987492  vgg16_bn 15253578 15299748
vgg19_bn 20565834 20612004  convnet2 13082 215172  convnet4 37338 475652  convnet6 82778 1107204
convnet8 327962 1246276  convnet10 2487850 2931460  mobilenetv2 2254090 2369380
mobilenetv2_half 697546 812836  mobilenetv2_x0_5 700490 815780  mobilenetv2_x0_75 1368234 1483524
mobilenetv2_x1_0 2236682 2351972  mobilenetv2_x1_4 4333706 4495076  shufflenetv1 862768 949258
shufflenetv2 1263278 1355528  shufflenetv2_kdc 1268646 1360896  shufflenetv2_x0_5 352042 444292
shufflenetv2_x1_0 1263854 1356104  shufflenetv2_x1_5 2488874 2581124
shufflenetv2_x2_0 5365486 5549896  densenet121 6956298 7048548  densenet169 12493322 12643172
densenet201 18104330 18277220  repvgg_a0 7840874 7956164  repvgg_a1 12824202 12939492
repvgg_a2 26815690 26942500
"""
PARAMETERS = {
    name: (int(few), int(many)) for name, few, many in zip(*[iter(COUNTS.split())] * 3, strict=True)
}
# What our nets are called elsewhere, where the name differs.
OURS = {
    ("repdistiller", "ResNet50"): "resnet50",
    ("repdistiller", "MobileNetV2"): "mobilenetv2_half",
    ("repdistiller", "ShuffleV1"): "shufflenetv1",
    ("repdistiller", "ShuffleV2"): "shufflenetv2",
    ("mdistiller", "ResNet18"): "resnet18",
    ("mdistiller", "ResNet50"): "resnet50",
    ("mdistiller", "ResNet18_tin"): "resnet18",
    ("mdistiller", "mobilenetv2_tinyimagenet"): "mobilenetv2",
    ("focal", "resnet110"): "resnet110_wide",
    ("focal", "wide_resnet_cifar"): "wrn_26_10",
    ("official", "resnet56"): "resnet56_bottleneck",
    ("official", "resnet110"): "resnet110_bottleneck",
    **{("official", f"resnet{depth}_tin"): f"tin_resnet{depth}" for depth in (18, 34, 50)},
    **{("official", f"shufflenetv2{end}"): "shufflenetv2_kdc" for end in ("", "_tin")},
    ("official", "mobilenetv2_tin"): "mobilenetv2",
    ("official", "densenet121_tin"): "densenet121",
}


def facts() -> dict[tuple[str, str], dict]:
    """Each net's facts, of those that agree in everything the first."""
    file = Path(os.environ.get("KD_ZOO", "")) / "nets.json.gz"
    if not file.is_file():
        return {}
    families = json.loads(gzip.decompress(file.read_bytes()))
    every = {(family, net): facts for family in families for net, facts in families[family].items()}
    same = {json.dumps([our_name(*key), facts]): key for key, facts in reversed(every.items())}
    return {key: every[key] for key in sorted(same.values())}


def our_name(family: str, net: str) -> tuple[str, int]:
    name, classes = net.split("/")
    return OURS.get((family, name), name), int(classes)


FACTS = facts()


def recipe(name: str, shape: list[int]) -> Tensor:
    """The weights that `name` stands for."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    noise = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith("running_var"):
        noise = 1 + 0.1 * abs(noise)
    elif name.endswith(("running_mean", "bias")):
        noise = 0.1 * noise
    elif len(shape) == 1:
        noise = 1 + 0.1 * noise
    else:
        noise *= math.sqrt(2 / math.prod(shape[1:]))
    return torch.from_numpy(noise.astype(np.float32))


def parameters(net) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def meta_model(name: str, classes: int = 10, **options) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, classes, **options)


@pytest.mark.parametrize("name", MODELS)
def test_counts_and_a_step(name):
    net, hundred = build_model(name, 10), meta_model(name, 100)
    # It has no numbers, so that a net which looks at one fails: a graph can replay it.
    assert hundred(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 100)
    assert (parameters(net), parameters(hundred)) == PARAMETERS[name]
    assert MODELS[name].origin
    if isinstance(hundred, Chain):
        assert isinstance(hundred.fc, nn.Linear)
    logits = net(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    F.cross_entropy(logits, torch.arange(2)).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad.any() and parameter.grad.isfinite().all(), key


CHILDREN = {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}
SMALL = ["resnet8", "resnet56_bottleneck", "wrn_16_1", "vgg8", "mobilenetv2_half"]
SMALL += ["shufflenetv1", "shufflenetv2", "repvgg_a0"]


def test_padding_shortcuts_have_no_parameters():
    # The count of He et al. for ResNet-20 and ResNet-56: 0.27 M and 0.85 M.
    assert parameters(meta_model("resnet20", shortcut="pad")) == 269_722
    assert parameters(meta_model("resnet56", shortcut="pad")) == 853_018


def test_any_wide_resnet():
    assert check_name("wrn_22_3") == "wrn_22_3"
    assert meta_model("wrn_22_3").fc.in_features == 64 * 3


UNKNOWN = ["wrn_41_2", "wrn_4_1", "wrn_40_0", "wrn_040_2", "wrn_40_2 ", "wrn_40_-1", "wrn_40"]
UNKNOWN += ["wrn_{depth}_{width}", "resnet21", "resnet20_bottleneck", "", "zzz"]
MEANT = {"ResNet-110": "resnet110", "resnet56_botleneck": "resnet56_bottleneck"}
MEANT |= {"WRN-40-2": "wrn_40_2", "MobileNetV2": "mobilenetv2"}


@pytest.mark.parametrize("name", [*UNKNOWN, *MEANT])
def test_unknown_names(name):
    for refuse in (check_name, build_model):
        nearest = MEANT.get(name, ".*")
        with pytest.raises(ValueError, match=f"unknown model .* nearest is {nearest};.* timm/NAME"):
            refuse(name)


def test_timm(monkeypatch):
    timm = pytest.importorskip("timm")
    assert build_model("timm/resnet18", 7).num_classes == 7
    with pytest.raises(ValueError, match="unknown model 'timm/resnet19'; .* resnet18"):
        check_name("timm/resnet19")
    given = {}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: given.update({name: options}))
    build_model("timm/resnet18.a1_in1k", 10, pretrained=True)
    assert given == {"resnet18.a1_in1k": {"num_classes": 10, "pretrained": True}}


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    check_name("resnet8")
    with pytest.raises(ValueError, match="timm/resnet18 needs timm; pip install timm"):
        check_name("timm/resnet18")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [8, 9, 32, 64])
def test_logits_of_any_image_size_in_either_layout(name, size):
    net, images = build_model(name, 7).eval(), torch.randn(2, 3, size, size)
    logits = net(images)
    assert logits.shape == (2, 7) and logits.isfinite().all()
    fast = net.to(memory_format=torch.channels_last)
    again = fast(images.to(memory_format=torch.channels_last))
    # Another layout sums in another order: as far as float32 goes, whatever the logits' size.
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-3 * logits.abs().max().item())


@pytest.mark.parametrize(
    ("name", "joined"), [("resnet20", "23"), ("resnet56_bottleneck", "123"), ("wrn_16_2", "123")]
)
def test_module_names(name, joined):
    """Those of all checkpoints so far."""
    net = meta_model(name)
    assert {key for key, part in net.named_children() if part.state_dict()} == CHILDREN
    end = "weight" if name.startswith("wrn") else "0.weight"
    joints = {key for key in net.state_dict() if "downsample" in key and key.endswith(end)}
    assert joints == {f"layer{stage}.0.downsample.{end}" for stage in joined}


@pytest.mark.parametrize("name", ["resnet20", "resnet56_bottleneck", "wrn_16_2"])
def test_initial_weights(name):
    torch.manual_seed(0)
    for module in build_model(name).modules():
        if isinstance(module, nn.Conv2d):
            spread = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            # Five standard errors of an estimated mean, and of an estimated deviation.
            slack = 5 * spread / math.sqrt(module.weight.numel())
            assert module.weight.mean().item() == pytest.approx(0, abs=slack)
            assert module.weight.std().item() == pytest.approx(spread, abs=slack)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_padding_shortcut_by_hand():
    x = torch.randn(2, 16, 9, 9)
    out = build_model("resnet8", shortcut="pad").layer2[0].downsample(x)
    assert out.shape == (2, 32, 5, 5)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_basic_block_by_hand():
    block = build_model("resnet8").layer2[0].eval()
    x = torch.randn(2, 16, 8, 8)
    scale = 1 / math.sqrt(1 + 1e-5)  # fresh running statistics: mean 0, variance 1
    inner = F.relu(F.conv2d(x, block.conv1.weight, stride=2, padding=1) * scale)
    inner = F.conv2d(inner, block.conv2.weight, padding=1) * scale
    joint = F.conv2d(x, block.downsample[0].weight, stride=2) * scale
    torch.testing.assert_close(block(x), F.relu(inner + joint))


@pytest.mark.parametrize("index", [0, 1])
def test_preactivation_block_by_hand(index):
    block = build_model("wrn_16_2").layer2[index].eval()
    x = torch.randn(2, block.bn1.num_features, 8, 8)
    scale, stride = 1 / math.sqrt(1 + 1e-5), 2 - index
    active = F.relu(x * scale)
    inner = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
    inner = F.conv2d(F.relu(inner * scale), block.conv2.weight, padding=1)
    # Only a learned shortcut sees the activated input; the others pass the input on as it is.
    joint = x if index else F.conv2d(active, block.downsample.weight, stride=2)
    torch.testing.assert_close(block(x), inner + joint)


def test_other_names_are_paired_by_their_order_and_only_by_the_whole():
    net = build_model("vgg8", 7)
    state = {re.sub(r"block(\d)", r"stage\1.body", k): v for k, v in net.state_dict().items()}
    found = standard_names(state, build_model("vgg8", 7))
    assert found.keys() == {key for key in net.state_dict() if "num_batches" not in key}
    assert all(torch.equal(found[key], net.state_dict()[key]) for key in found)
    for wrong in (dict(sorted(state.items())), dict(list(state.items())[:-1])):
        assert not standard_names(wrong, net).keys() <= net.state_dict().keys()


def test_a_head_that_is_a_convolution():
    net = build_model("mobilenetv2", 7)
    state = {key.replace("fc", "conv3"): value for key, value in net.state_dict().items()}
    state["conv3.weight"] = state["conv3.weight"][:, :, None, None]
    assert torch.equal(standard_names(state, net)["fc.weight"], net.fc.weight)


@pytest.mark.skipif(not FACTS, reason="needs nets.json.gz in the folder that KD_ZOO names")
@pytest.mark.parametrize("key", FACTS or [None], ids=str)
def test_other_peoples_weights(key, tmp_path):
    """The logits of the net whose names these are, through the teacher loader."""
    expected, (name, classes) = FACTS[key], our_name(*key)
    file = tmp_path / "weights.pth"
    torch.save({"model": {key: recipe(key, shape) for key, shape in expected["tensors"]}}, file)
    data = SimpleNamespace(name="images", num_classes=classes, mean=(0.0,) * 3, std=(1.0,) * 3)
    net = load_member(str(file), name, TeacherSource(paths=(str(file),)), data).net
    file.unlink()
    assert parameters(net) == expected["parameters"]
    shape = 2, 3, expected["side"], expected["side"]
    images = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    logits = net.double()(torch.from_numpy(images).double())[:, :10].numpy()
    scale = abs(np.array(expected["logits"])).max()
    np.testing.assert_allclose(logits / scale, np.array(expected["logits"]) / scale, atol=1e-5)
