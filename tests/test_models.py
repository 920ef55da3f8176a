"""The nets' names, shapes, parts and initial weights; test_zoo.py holds them against others'."""

import math
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import MODELS, build_model, check_name

CHILDREN = ["conv1", "bn1", "layer1", "layer2", "layer3", "fc"]
THIN = ["resnet8", "resnet20", "resnet56", "resnet110", "resnet56_bottleneck"]
THIN += ["resnet110_bottleneck"]
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


@pytest.mark.parametrize("name", [*THIN, "wrn_40_2", "vgg16_bn", "densenet121", "convnet10"])
def test_depth_is_the_number_of_layers_on_the_longest_path(name):
    net = meta_model(name)
    layers = [
        key
        for key, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in key
    ]
    # A wide ResNet counts its shortcuts too (40 = 6 * 6 + 4), a convnet convolutions alone.
    counted = len(layers) + 2 * name.startswith("wrn") - 2 * name.startswith("convnet")
    assert counted == int(re.search(r"\d+", name)[0])


@pytest.mark.parametrize("name", ["wrn_10_1", "wrn_22_3", "wrn_28_4"])
def test_any_wide_resnet(name):
    assert check_name(name) == name
    assert meta_model(name).fc.in_features == 64 * int(name.split("_")[2])


@pytest.mark.parametrize(
    "name",
    ["wrn_41_2", "wrn_4_1", "wrn_40_0", "wrn_040_2", "wrn_40_2 ", "wrn_40_-1", "wrn_40"]
    + ["wrn_{depth}_{width}", "resnet21", "resnet20_bottleneck", "", "zzz"],
)
def test_unknown_names(name):
    for refuse in (check_name, build_model):
        with pytest.raises(ValueError, match="unknown model .* nearest is .* timm/NAME"):
            refuse(name)
    assert name not in MODELS


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resnet57", "resnet56"),
        ("ResNet-110", "resnet110"),
        ("resnet56_botleneck", "resnet56_bottleneck"),
        ("WRN-40-2", "wrn_40_2"),
        ("MobileNetV2", "mobilenetv2"),
    ],
)
def test_the_nearest_name_is_suggested(typed, meant):
    with pytest.raises(ValueError, match=f"nearest is {meant};"):
        build_model(typed)


def test_timm(monkeypatch):
    timm = pytest.importorskip("timm")
    net = build_model("timm/resnet18", 7)
    assert net.num_classes == 7 and parameters(net) == parameters(
        timm.create_model("resnet18", num_classes=7)
    )
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
def test_logits_of_any_image_size(name, size):
    net = build_model(name, 7)
    logits = net(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", [*SMALL, "padded"])
def test_gradient_reaches_every_parameter(name):
    net = build_model("resnet8", shortcut="pad") if name == "padded" else build_model(name)
    F.cross_entropy(net(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", THIN)
def test_module_names_of_resnets(name):
    net = meta_model(name)
    assert [key for key, _ in net.named_children()] == CHILDREN
    joints = {key.split(".downsample")[0] for key in net.state_dict() if "downsample" in key}
    changed = {"layer2.0", "layer3.0"} | ({"layer1.0"} if "bottleneck" in name else set())
    assert joints == changed
    assert isinstance(net.layer2[0].downsample[0], nn.Conv2d)
    assert isinstance(net.layer2[0].downsample[1], nn.BatchNorm2d)


def test_module_names_of_wide_resnets():
    net = meta_model("wrn_16_2")
    assert {key for key, _ in net.named_children()} == set(CHILDREN)
    joints = {key for key in net.state_dict() if "downsample" in key}
    assert joints == {f"layer{stage}.0.downsample.weight" for stage in (1, 2, 3)}


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


def test_the_seed_decides_the_weights():
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(build_model("resnet8").conv1.weight)
    assert torch.equal(nets[0], nets[1]) and not torch.equal(nets[0], nets[2])


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


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_changes_no_number(name):
    net = build_model(name).eval()
    images = torch.randn(2, 3, 32, 32)
    plain = net(images)
    net = net.to(memory_format=torch.channels_last)
    fast = net(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-4)
