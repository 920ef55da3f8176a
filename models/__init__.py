"""The zoo: `build_model("resnet56", num_classes=100)`. Nets only: images in, logits out."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from torch import nn

from models.resnet import BasicBlock, Bottleneck, ResNet
from models.wide_resnet import WideResNet

# A new net is one line here: its name and what makes it from num_classes.
MODELS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"resnet{depth}": partial(ResNet, BasicBlock, (depth - 2) // 6)
        for depth in (8, 14, 20, 26, 32, 38, 44, 56, 110)
    },
    **{
        f"resnet{depth}_bottleneck": partial(ResNet, Bottleneck, (depth - 2) // 9)
        for depth in (56, 110)
    },
}
WRN_PATTERN = "wrn_{depth}_{width}"
COMMON_WRNS = ["wrn_16_1", "wrn_16_2", "wrn_28_10", "wrn_40_1", "wrn_40_2"]
MAX_WRN_DEPTH, MAX_WRN_WIDTH = 1000, 100
IMAGENET_NETS = {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"}


def model_names() -> list[str]:
    """The fixed names, common wide ResNets, and last the pattern that all wide ResNets follow."""
    return [*MODELS, *COMMON_WRNS, WRN_PATTERN]


def constructor(name: str) -> Callable[..., nn.Module]:
    """What makes the net of that name. Raises ValueError with the known names and the nearest."""
    if name in MODELS:
        return MODELS[name]
    match = re.fullmatch(r"wrn_([1-9][0-9]{0,3})_([1-9][0-9]{0,2})", name)
    if match is not None:
        depth, width = map(int, match.groups())
        if depth % 6 == 4 and 10 <= depth <= MAX_WRN_DEPTH and width <= MAX_WRN_WIDTH:
            return partial(WideResNet, depth, width)
    note = " (an ImageNet net; this zoo is for small images)" if name in IMAGENET_NETS else ""
    nearest = get_close_matches(name.lower(), [*MODELS, *COMMON_WRNS], n=1, cutoff=0)[0]
    raise ValueError(
        f"unknown model {name!r}{note}; the nearest is {nearest}; "
        f"known are {', '.join(MODELS)} and {WRN_PATTERN} "
        f"with depth 6n+4 up to {MAX_WRN_DEPTH}, width 1 to {MAX_WRN_WIDTH}"
    )


def check_name(name: str) -> str:
    """The name itself where it is known, else a ValueError that names the nearest."""
    constructor(name)
    return name


def build_model(name: str, num_classes: int = 10, **kwargs) -> nn.Module:
    """A net with fresh weights: images (B, 3, H, W), any size from 8 pixels, to logits (B, K).

    `kwargs` go to the net: ResNets take `shortcut="pad"` for shortcuts without parameters. Raises
    ValueError for an unknown name, with the known ones and the nearest.
    """
    return constructor(name)(num_classes=num_classes, **kwargs)
