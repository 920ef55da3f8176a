"""ShuffleNets: Zhang et al., CVPR 2018 (V1), and Ma et al., ECCV 2018 (V2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv_bn, repeated

# What the first convolution gives, and groups of V1.
STEM, GROUPS = 24, 3
# V2: channels of three stages and of the last convolution.
WIDTHS = {0.5: (48, 96, 192, 1024), 1.0: (116, 232, 464, 1024)}
WIDTHS |= {1.5: (176, 352, 704, 1024), 2.0: (244, 488, 976, 2048)}


def shuffle(maps: Tensor, groups: int) -> Tensor:
    """Channels dealt out in turn to `groups` groups; channels_last stays so."""
    pixels = maps.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
    return pixels.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


class GroupedBlock(nn.Module):
    """Grouped 1x1 convolutions around one that filters each channel, with a shuffle between."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        # A block that halves the size appends to its pooled input.
        outputs -= inputs if stride == 2 else 0
        self.stride, narrow = stride, outputs // 4
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
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], 1))


def shufflenet_v1(num_classes: int = 10) -> Chain:
    conv1, bn1 = conv_bn(3, STEM)
    return Chain(
        **{"conv1": conv1, "bn1": bn1, "relu": nn.ReLU()},
        layer1=repeated(GroupedBlock, 4, STEM, 240, 2),
        layer2=repeated(GroupedBlock, 8, 240, 480, 2),
        layer3=repeated(GroupedBlock, 4, 480, 960, 2),
        **{"pool": Pool(), "fc": nn.Linear(960, num_classes)},
    )


class SplitBlock(nn.Module):
    """One half of the channels passes, or is filtered where the size halves; then a shuffle."""

    def __init__(self, inputs: int, outputs: int, stride: int, kdc: bool):
        super().__init__()
        self.split, half = stride == 1, outputs // 2
        inputs = half if self.split else inputs
        wide, bias = inputs if kdc else half, kdc
        self.downsample = nn.Sequential()
        if not self.split:
            self.downsample.extend(conv_bn(inputs, inputs, 3, 2, groups=inputs, bias=bias))
            self.downsample.extend([*conv_bn(inputs, half, bias=bias), nn.ReLU()])
        first = [*conv_bn(inputs, wide, bias=bias), nn.ReLU()]
        each = conv_bn(wide, wide, 3, stride, groups=wide, bias=bias)
        self.residual = nn.Sequential(*first, *each, *conv_bn(wide, half, bias=bias), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        passed, changed = x.chunk(2, 1) if self.split else (x, x)
        return shuffle(torch.cat([self.downsample(passed), self.residual(changed)], 1), 2)


def shufflenet_v2(width=1.0, stem=3, kdc=False, num_classes=10) -> Chain:
    """`stem` is the first kernel's size.

    `kdc` is the net of the calibration transfer paper's code: biases, no ReLU behind the stem, and
    blocks that halve the size widen behind their filter and not before it.
    """
    first, second, third, last = WIDTHS[width]
    act = nn.Identity() if kdc else nn.ReLU()
    return Chain(
        pre=nn.Sequential(*conv_bn(3, STEM, stem, bias=kdc), act),
        stage2=repeated(SplitBlock, 4, STEM, first, 2, kdc=kdc),
        stage3=repeated(SplitBlock, 8, first, second, 2, kdc=kdc),
        stage4=repeated(SplitBlock, 4, second, third, 2, kdc=kdc),
        conv5=nn.Sequential(*conv_bn(third, last, bias=kdc), nn.ReLU()),
        **{"pool": Pool(), "fc": nn.Linear(last, num_classes)},
    )
