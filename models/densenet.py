"""Densely connected networks: Huang et al., CVPR 2017, with a 3x3 stem for small images."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv3x3, conv_bn

BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}


class DenseLayer(nn.Module):
    """Puts `growth` channels before its input, or behind it."""

    def __init__(self, inputs: int, growth: int, newest_first: bool):
        super().__init__()
        self.newest_first, self.bn1 = newest_first, nn.BatchNorm2d(inputs)
        self.conv1, self.bn2 = conv_bn(inputs, 4 * growth)
        self.conv2 = conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x] if self.newest_first else [x, out], 1)


def transition(inputs: int, relu: bool) -> nn.Sequential:
    """Half the channels and half the size."""
    parts = {"bn": nn.BatchNorm2d(inputs), "relu": nn.ReLU() if relu else nn.Identity()}
    parts |= {"conv": nn.Conv2d(inputs, inputs // 2, 1, bias=False), "pool": nn.AvgPool2d(2)}
    return nn.Sequential(OrderedDict(parts))


def densenet(depth: int, linear_transitions: bool = False, num_classes: int = 10) -> Chain:
    """Four blocks of dense layers.

    `linear_transitions` is the net of the calibration transfer paper's code: no ReLU between
    blocks, and the newest channels last.
    """
    growth, inputs = 32, 64
    parts = {"conv1": conv3x3(3, inputs)}
    for i, count in enumerate(BLOCKS[depth], 1):
        widths = range(inputs, inputs + count * growth, growth)
        layers = (DenseLayer(width, growth, not linear_transitions) for width in widths)
        parts[f"dense{i}"], inputs = nn.Sequential(*layers), widths.stop
        if i < 4:
            parts[f"trans{i}"] = transition(inputs, not linear_transitions)
            inputs //= 2
    parts |= {"bn": nn.BatchNorm2d(inputs), "relu": nn.ReLU(), "pool": Pool()}
    return Chain(**parts, fc=nn.Linear(inputs, num_classes))
