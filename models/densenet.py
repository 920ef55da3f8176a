"""Densely connected networks: Huang et al., CVPR 2017, with a 3x3 stem for small images."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv3x3, conv_bn

# Layers of each block.
BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
GROWTH = 32  # channels that a layer adds


class DenseLayer(nn.Module):
    """Puts `growth` channels before its input, or behind it."""

    def __init__(self, inputs: int, growth: int, newest_first: bool):
        super().__init__()
        self.newest_first = newest_first
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1, self.bn2 = conv_bn(inputs, 4 * growth)
        self.conv2 = conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x] if self.newest_first else [x, out], dim=1)


def transition(inputs: int, relu: bool) -> nn.Sequential:
    """Half the channels and half the size."""
    return nn.Sequential(
        OrderedDict(
            bn=nn.BatchNorm2d(inputs),
            relu=nn.ReLU() if relu else nn.Identity(),
            conv=nn.Conv2d(inputs, inputs // 2, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


def densenet(depth: int, linear_transitions: bool = False, num_classes: int = 10) -> Chain:
    """Four blocks of dense layers.

    `linear_transitions` is the net of the calibration transfer paper's code: no ReLU between
    blocks, and the newest channels last.
    """
    inputs = 64
    layers = {"conv1": conv3x3(3, inputs)}
    for i, count in enumerate(BLOCKS[depth], start=1):
        block = nn.Sequential()
        for _ in range(count):
            block.append(DenseLayer(inputs, GROWTH, newest_first=not linear_transitions))
            inputs += GROWTH
        layers[f"dense{i}"] = block
        if i < len(BLOCKS[depth]):
            layers[f"trans{i}"] = transition(inputs, relu=not linear_transitions)
            inputs //= 2
    layers["bn"] = nn.BatchNorm2d(inputs)
    layers["relu"] = nn.ReLU()
    layers["pool"] = Pool()
    layers["fc"] = nn.Linear(inputs, num_classes)
    return Chain(layers, stages=("dense1", "dense2", "dense3", "dense4"))
