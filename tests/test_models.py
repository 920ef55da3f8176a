"""The nets against the literature: parameter counts, names, shapes, initial weights."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import MODELS, WRN_PATTERN, build_model, check_name, model_names

PARAMETERS = {
    "resnet8": (78_042, 83_892),
    "resnet20": (272_474, 278_324),
    "resnet32": (466_906, 472_756),
    "resnet44": (661_338, 667_188),
    "resnet56": (855_770, 861_620),
    "resnet110": (1_730_714, 1_736_564),
    "resnet56_bottleneck": (591_322, 614_452),
    "resnet110_bottleneck": (1_147_738, 1_170_868),
    "wrn_40_2": (2_243_546, 2_255_156),
    "wrn_40_1": (563_930, 569_780),
    "wrn_16_2": (691_674, 703_284),
    "wrn_16_1": (175_066, 180_916),
}
BUILDABLE = [name for name in model_names() if name != WRN_PATTERN]
CHILDREN = ["conv1", "bn1", "layer1", "layer2", "layer3", "fc"]
SMALL = ["resnet8", "resnet56_bottleneck", "wrn_16_1", "wrn_16_2"]


def meta_model(name, num_classes=10, **options):
    with torch.device("meta"):
        return build_model(name, num_classes, **options)


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert tuple(parameters(meta_model(name, k)) for k in (10, 100)) == PARAMETERS[name]


def test_padding_shortcuts_have_no_parameters():
    # The count of He et al. for ResNet-20 and ResNet-56: 0.27 M and 0.85 M.
    assert parameters(meta_model("resnet20", shortcut="pad")) == 269_722
    assert parameters(meta_model("resnet56", shortcut="pad")) == 853_018


def test_names():
    assert set(PARAMETERS) | {"resnet14", "resnet26", "resnet38", "wrn_28_10"} == set(BUILDABLE)
    assert model_names()[-1] == "wrn_{depth}_{width}"


@pytest.mark.parametrize("name", BUILDABLE)
def test_depth_is_the_number_of_layers_on_the_longest_path(name):
    net = meta_model(name)
    convs = [
        key
        for key, module in net.named_modules()
        if isinstance(module, nn.Conv2d) and "downsample" not in key
    ]
    # A wide ResNet counts its three shortcuts as layers: 40 = 6 * 6 + 4.
    counted = len(convs) + 1 + 2 * name.startswith("wrn")
    assert counted == int("".join(c if c.isdigit() else " " for c in name).split()[0])


@pytest.mark.parametrize("name", ["wrn_10_1", "wrn_22_3", "wrn_28_4", "wrn_1000_1"])
def test_any_wide_resnet(name):
    assert check_name(name) == name
    assert meta_model(name).fc.in_features == 64 * int(name.split("_")[2])


@pytest.mark.parametrize(
    "name",
    ["wrn_41_2", "wrn_4_1", "wrn_40_0", "wrn_040_2", "wrn_40_2 ", "wrn_40_-1", "wrn_1006_1"]
    + ["wrn_40_101", "wrn_40", "wrn_{depth}_{width}", "resnet21", "resnet20_bottleneck", "", "zzz"],
)
def test_unknown_names(name):
    for refuse in (check_name, build_model):
        with pytest.raises(ValueError, match="unknown model .* nearest is .* known are resnet8, "):
            refuse(name)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resnet57", "resnet56"),
        ("ResNet-110", "resnet110"),
        ("resnet56_botleneck", "resnet56_bottleneck"),
        ("WRN-40-2", "wrn_40_2"),
    ],
)
def test_the_nearest_name_is_suggested(typed, meant):
    with pytest.raises(ValueError, match=f"nearest is {meant};"):
        build_model(typed)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_imagenet_nets_are_refused_as_such(depth):
    with pytest.raises(ValueError, match="ImageNet"):
        build_model(f"resnet{depth}")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [8, 9, 32, 64])
def test_logits_of_any_image_size(name, size):
    net = build_model(name, 7)
    logits = net(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", BUILDABLE)
def test_shapes_of_every_net(name):
    images = torch.empty(2, 3, 32, 32, device="meta")
    net = meta_model(name, 100)
    assert net(images).shape == (2, 100)
    assert isinstance(net.fc, nn.Linear)


@pytest.mark.parametrize("name", [*SMALL, "padded"])
def test_gradient_reaches_every_parameter(name):
    net = build_model("resnet8", shortcut="pad") if name == "padded" else build_model(name)
    F.cross_entropy(net(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", MODELS)
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
