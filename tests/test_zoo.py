"""Every net of the zoo against the literature: counts, a step, and other people's weights.

The folder that KD_ZOO names has nets.json.gz: names, shapes, parameter counts and logits of the
nets of five other code bases, in float64 and eval mode, with weights made from their names.
"""

import gzip
import json
import math
import os
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import MODELS, build_model
from models.spellings import standard_names
from utils.options import student_options
from utils.teachers import load_member

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


def test_the_table_is_complete():
    assert PARAMETERS.keys() == MODELS.keys()
    assert all(entry.origin for entry in MODELS.values())


@pytest.mark.parametrize("name", MODELS)
def test_counts_and_a_step(name):
    net, side = build_model(name, 10), 64 if name.startswith("tin") else 32
    with torch.device("meta"):
        hundred = build_model(name, 100)
        # These have no numbers, so that a net which looks at one fails: a graph can replay it.
        assert hundred(torch.empty(2, 3, 64, 64)).shape == (2, 100)
    assert (parameters(net), parameters(hundred)) == PARAMETERS[name]
    assert isinstance(hundred.fc, nn.Linear)
    logits = net(torch.randn(2, 3, side, side))
    assert logits.shape == (2, 10)
    F.cross_entropy(logits, torch.arange(2)).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad.any() and parameter.grad.isfinite().all(), key


def elsewhere(net: nn.Module, *changes: tuple[str, str]) -> dict[str, Tensor]:
    """The weights of `net` as they are called where `changes` are the names."""
    state = net.state_dict()
    for ours, theirs in changes:
        state = {re.sub(ours, theirs, key): value for key, value in state.items()}
    return state


def test_other_names_are_paired_by_their_order_and_only_by_the_whole():
    net = build_model("vgg8", 7)
    state = elsewhere(net, (r"block(\d)", r"stage\1.body"), ("^fc", "last"))
    found = standard_names(state, build_model("vgg8", 7))
    assert found.keys() == {key for key in net.state_dict() if "num_batches" not in key}
    assert all(torch.equal(found[key], net.state_dict()[key]) for key in found)
    for wrong in (dict(sorted(state.items())), dict(list(state.items())[:-1])):
        assert not standard_names(wrong, net).keys() <= net.state_dict().keys()


def test_a_head_that_is_a_convolution():
    net = build_model("mobilenetv2", 7)
    state = elsewhere(net, ("^fc", "conv3"))
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
    args = student_options(["--teacher_path", str(file)])
    net = load_member(str(file), name, args, data).net
    file.unlink()
    assert parameters(net) == expected["parameters"]
    shape = 2, 3, expected["side"], expected["side"]
    images = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    logits = net.double()(torch.from_numpy(images).double())[:, :10].numpy()
    scale = abs(np.array(expected["logits"])).max()
    np.testing.assert_allclose(logits / scale, np.array(expected["logits"]) / scale, atol=1e-5)
