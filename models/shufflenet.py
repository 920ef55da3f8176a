"""ShuffleNets: Zhang et al., CVPR 2018 (V1), and Ma et al., ECCV 2018 (V2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv_bn, repeated

STEM = 24  # channels of the first convolution
GROUPS = 3  # of V1
# V2: channels of three stages and of the last convolution.
WIDTHS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


def shuffle(maps: Tensor, groups: int) -> Tensor:
    """Channels dealt out in turn to `groups` groups; channels_last stays so."""
    pixels = maps.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
    return pixels.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


class GroupedBlock(nn.Module):
    """Grouped 1x1 convolutions around one that filters each channel, with a shuffle between."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        # A block that halves the size appends to its pooled input.
        if stride == 2:
            outputs -= inputs
        narrow = outputs // 4
        self.stride = stride
        # The stem's few channels are not grouped.
        self.groups = 1 if inputs == STEM else GROUPS
        self.conv1, self.bn1 = conv_bn(inputs, narrow, groups=self.groups)
        self.conv2, self.bn2 = conv_bn(narrow, narrow, 3, stride, groups=narrow)
        self.conv3, self.bn3 = conv_bn(narrow, outputs, groups=GROUPS)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(shuffle(out, self.groups))))
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return F.relu(out + x)
        pooled = F.avg_pool2d(x, 3, stride=2, padding=1)
        return F.relu(torch.cat([out, pooled], dim=1))


def shufflenet_v1(num_classes: int = 10) -> Chain:
    conv1, bn1 = conv_bn(3, STEM)
    layers = {
        "conv1": conv1,
        "bn1": bn1,
        "relu": nn.ReLU(),
        "layer1": repeated(GroupedBlock, 4, STEM, 240, stride=2),
        "layer2": repeated(GroupedBlock, 8, 240, 480, stride=2),
        "layer3": repeated(GroupedBlock, 4, 480, 960, stride=2),
        "pool": Pool(),
        "fc": nn.Linear(960, num_classes),
    }
    return Chain(layers, stages=("layer1", "layer2", "layer3"))


class SplitBlock(nn.Module):
    """One half of the channels passes, or is filtered where the size halves; then a shuffle."""

    def __init__(self, inputs: int, outputs: int, stride: int, kdc: bool):
        super().__init__()
        self.split = stride == 1
        half = outputs // 2
        if self.split:
            inputs = half
        wide = inputs if kdc else half
        self.downsample = nn.Sequential()
        if not self.split:
            self.downsample.extend(conv_bn(inputs, inputs, 3, 2, groups=inputs, bias=kdc))
            self.downsample.extend([*conv_bn(inputs, half, bias=kdc), nn.ReLU()])
        widen = [*conv_bn(inputs, wide, bias=kdc), nn.ReLU()]
        filter_each = conv_bn(wide, wide, 3, stride, groups=wide, bias=kdc)
        narrow = [*conv_bn(wide, half, bias=kdc), nn.ReLU()]
        self.residual = nn.Sequential(*widen, *filter_each, *narrow)

    def forward(self, x: Tensor) -> Tensor:
        passed, changed = x.chunk(2, dim=1) if self.split else (x, x)
        halves = torch.cat([self.downsample(passed), self.residual(changed)], dim=1)
        return shuffle(halves, groups=2)


def shufflenet_v2(
    width: float = 1.0, stem: int = 3, kdc: bool = False, num_classes: int = 10
) -> Chain:
    """`stem` is the first kernel's size.

    `kdc` is the net of the calibration transfer paper's code: biases, no ReLU behind the stem, and
    blocks that halve the size widen behind their filter and not before it.
    """
    first, second, third, last = WIDTHS[width]
    act = nn.Identity() if kdc else nn.ReLU()
    layers = {
        "pre": nn.Sequential(*conv_bn(3, STEM, stem, bias=kdc), act),
        "stage2": repeated(SplitBlock, 4, STEM, first, stride=2, kdc=kdc),
        "stage3": repeated(SplitBlock, 8, first, second, stride=2, kdc=kdc),
        "stage4": repeated(SplitBlock, 4, second, third, stride=2, kdc=kdc),
        "conv5": nn.Sequential(*conv_bn(third, last, bias=kdc), nn.ReLU()),
        "pool": Pool(),
        "fc": nn.Linear(last, num_classes),
    }
    return Chain(layers, stages=("stage2", "stage3", "stage4"))
