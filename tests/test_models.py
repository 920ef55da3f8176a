"""The nets' names, shapes, parts and initial weights; test_zoo.py holds them against others'."""

import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import build_model, check_name

CHILDREN = {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}
SMALL = ["resnet8", "resnet56_bottleneck", "wrn_16_1", "vgg8", "mobilenetv2_half"]
SMALL += ["shufflenetv1", "shufflenetv2", "repvgg_a0"]


def meta_model(name, num_classes=10, **options):
    with torch.device("meta"):
        return build_model(name, num_classes, **options)


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


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
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "joined"), [("resnet20", "23"), ("resnet56_bottleneck", "123"), ("wrn_16_2", "123")]
)
def test_module_names(name, joined):
    """Those of all checkpoints so far."""
    net = meta_model(name)
    assert {key for key, _ in net.named_children()} == CHILDREN
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
