"""Densely connected networks: Huang et al., CVPR 2017, with a 3x3 stem for small images."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import conv3x3, conv_bn, init_weights, pooled

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


class DenseNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes), in four blocks of dense layers.

    `linear_transitions` is the net of the calibration transfer paper's code: no ReLU between
    blocks, and the newest channels last.
    """

    def __init__(self, depth: int, linear_transitions: bool = False, num_classes: int = 10):
        super().__init__()
        growth, inputs = 32, 64
        self.conv1 = conv3x3(3, inputs)
        for i, count in enumerate(BLOCKS[depth], 1):
            layers = nn.Sequential()
            for _ in range(count):
                layers.append(DenseLayer(inputs, growth, not linear_transitions))
                inputs += growth
            self.add_module(f"dense{i}", layers)
            if i < 4:
                self.add_module(f"trans{i}", transition(inputs, not linear_transitions))
                inputs //= 2
        self.bn = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.trans1(self.dense1(self.conv1(images)))
        out = self.trans2(self.dense2(out))
        out = self.dense4(self.trans3(self.dense3(out)))
        return self.fc(pooled(F.relu(self.bn(out))))
