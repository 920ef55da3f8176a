"""The zoo: `build_model("resnet56", num_classes=100)`. Nets only: images in, logits out."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

from torch import nn

from models.densenet import densenet
from models.mobilenet import mobilenetv2
from models.own import FORM, is_own, own_net, read_own
from models.repvgg import repvgg
from models.resnet import FOUR_STAGES, Bottleneck, four_stages, thin
from models.shufflenet import shufflenet_v1, shufflenet_v2
from models.vgg import convnet, vgg
from models.wide_resnet import wide_resnet


class NetEntry(NamedTuple):
    """What makes a net from num_classes, and whose net it is."""

    build: Callable[..., nn.Module]
    origin: str


def family(name: str, build: Callable, sizes: Iterable, origin: str) -> dict[str, NetEntry]:
    """A net in several sizes, each of which stands for {} in the name and in whose it is."""
    return {
        name.format(size).replace(".", "_"): NetEntry(partial(build, size), origin.format(size))
        for size in sizes
    }


# Code bases of which several nets are.
DISTILLERS = "RepDistiller, mdistiller"
FOCAL = "focal_calibration"

# Nets of another code base, each with what makes it differ from ours.
resnet_x4 = partial(thin, widths=(64, 128, 256), stem=32)
# Distillation's VGGs keep maps of four pixels; the others have the paper's three linear layers.
distillers_vgg = partial(vgg, smallest=4)
vgg_bn = partial(vgg, smallest=1, hidden=(512, 512), dropout=0.5)
kdc_mobilenet = partial(mobilenetv2, strides=(1, 1, 2, 2, 2, 1, 1, 1), even=True, kdc=True)
half_mobilenet = partial(
    mobilenetv2,
    width=0.5,
    unit=4,
    strides=(2, 1, 1, 2, 2, 1, 2, 1),
    relu=nn.ReLU,
    even=True,
)

# A new net is one line here: its name, what makes it from num_classes, and whose it is. KD(C) is
# the calibration transfer paper's own code.
MODELS: dict[str, NetEntry] = {
    **family("resnet{}", thin, (8, 14, 20, 26, 32, 38, 44, 56, 110), "He et al."),
    "resnet1202": NetEntry(partial(thin, 1202, shortcut="pad"), "He et al., akamaster"),
    **family("resnet{}_bottleneck", partial(thin, block=Bottleneck), (56, 110), "KD(C)'s resnet{}"),
    **family("resnet{}x4", resnet_x4, (8, 32), DISTILLERS),
    **family("resnet{}", four_stages, (18, 34, 50, 101, 152), f"{DISTILLERS}, {FOCAL}, KD(C)"),
    "resnet110_wide": NetEntry(partial(four_stages, 110), f"{FOCAL}'s resnet110"),
    **family("tin_resnet{}", partial(four_stages, grid=2), FOUR_STAGES, "KD(C), Tiny-ImageNet"),
    **family("wrn_16_{}", partial(wide_resnet, 16), (1, 2), f"Zagoruyko, {DISTILLERS}"),
    **family("wrn_40_{}", partial(wide_resnet, 40), (1, 2), f"Zagoruyko, {DISTILLERS}, KD(C)"),
    "wrn_28_10": NetEntry(partial(wide_resnet, 28, 10), "Zagoruyko"),
    "wrn_26_10": NetEntry(partial(thin, 26, widths=(160, 320, 640)), f"{FOCAL}'s wide_resnet"),
    **family("vgg{}", distillers_vgg, (8, 11, 13, 16, 19), DISTILLERS),
    **family("vgg{}_bn", vgg_bn, (11, 13, 16, 19), "chenyaofo"),
    **family("convnet{}", convnet, (2, 4, 6, 8, 10), "KD(C)"),
    "mobilenetv2": NetEntry(kdc_mobilenet, "KD(C); mdistiller, Tiny-ImageNet"),
    "mobilenetv2_half": NetEntry(half_mobilenet, f"{DISTILLERS}: MobileNetV2"),
    **family("mobilenetv2_x{}", mobilenetv2, (0.5, 0.75, 1.0, 1.4), "chenyaofo"),
    "shufflenetv1": NetEntry(shufflenet_v1, f"{DISTILLERS}, KD(C)"),
    "shufflenetv2": NetEntry(partial(shufflenet_v2, stem=1), f"{DISTILLERS}: ShuffleV2"),
    "shufflenetv2_kdc": NetEntry(partial(shufflenet_v2, kdc=True), "KD(C)'s shufflenetv2"),
    **family("shufflenetv2_x{}", shufflenet_v2, (0.5, 1.0, 1.5, 2.0), "chenyaofo"),
    **family("densenet{}", densenet, (121, 169, 201), f"{FOCAL}, KD(C)"),
    **family("repvgg_{}", repvgg, ("a0", "a1", "a2"), "chenyaofo"),
}
# Beside these: wide ResNets of any size, the nets of timm by their names there, and the user's own.
WRN_PATTERN = "wrn_{depth}_{width}"
TIMM = "timm/"


def constructor(name: str) -> Callable[..., nn.Module]:
    """What makes the net of that name. Raises ValueError with the nearest."""
    if name in MODELS:
        return MODELS[name].build
    if name.startswith(TIMM):
        return timm_constructor(name)
    if is_own(name):
        return own_net(name).build
    match = re.fullmatch(r"wrn_([1-9][0-9]{1,2})_([1-9][0-9]?)", name)
    if match and int(match[1]) % 6 == 4:
        return partial(wide_resnet, int(match[1]), int(match[2]))
    nearest = get_close_matches(name.lower(), MODELS, n=1, cutoff=0)[0]
    raise ValueError(
        f"unknown model {name!r}; the nearest is {nearest}; --help lists all, {WRN_PATTERN} takes "
        f"any depth 6n+4, {TIMM}NAME any net of timm, and {FORM} a net of your own"
    )


def timm_constructor(name: str) -> Callable[..., nn.Module]:
    """What makes timm's net of that name. Raises ValueError where timm or the net is missing."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"{name} needs timm; pip install timm") from None
    short = name.removeprefix(TIMM)
    names = {*timm.list_models(), *timm.list_pretrained()}
    if short not in names:
        nearest = get_close_matches(short.lower(), sorted(names), n=3, cutoff=0)
        raise ValueError(f"unknown model {name!r}; timm's nearest are {', '.join(nearest)}")
    return partial(timm.create_model, short)


def check_name(name: str) -> str:
    """The name itself where it is known, else a ValueError that names the nearest.

    For a command line only: a file that it names is read here, and so its code runs.
    """
    if is_own(name):
        read_own(name)
    else:
        constructor(name)
    return name


def check_own(name: str) -> str:
    """The name itself, where it is a FILE.py:function that can be read. Raises ValueError."""
    if not is_own(name):
        raise ValueError(f"{name!r} is no {FORM}; other nets are found without it")
    return check_name(name)


def build_model(name: str, num_classes: int = 10, **kwargs) -> nn.Module:
    """A net with fresh weights: images (B, 3, H, W) of 8 pixels or more, to logits (B, K).

    `kwargs` go to the net: ResNets take `shortcut="pad"` for shortcuts without parameters, timm's
    nets `pretrained=True`. Raises ValueError for an unknown name, with the nearest known ones.
    """
    return constructor(name)(num_classes=num_classes, **kwargs)
