"""Residual networks for small images: He et al., Deep Residual Learning, CVPR 2016, section 4.2.

Three thin stages are that section's; four stages are its ImageNet nets with a 3x3 stem.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv_bn, repeated

# Blocks of each stage.
FOUR_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    110: (3, 4, 26, 3),
    152: (3, 8, 36, 3),
}


class PadShortcut(nn.Module):
    """Option A of the paper, without parameters: every stride-th pixel, zeros as new channels.

    The zeros are shared between both ends of the channels, as public CIFAR code has it.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        before = (outputs - inputs) // 2
        after = outputs - inputs - before
        self.stride = stride
        self.padding = (before, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))


SHORTCUTS = {  # options B and A of the paper
    "conv": lambda inputs, outputs, stride: nn.Sequential(*conv_bn(inputs, outputs, 1, stride)),
    "pad": PadShortcut,
}


def join(inputs: int, outputs: int, stride: int, shortcut: str) -> nn.Module:
    same = stride == 1 and inputs == outputs
    return nn.Identity() if same else SHORTCUTS[shortcut](inputs, outputs, stride)


class BasicBlock(nn.Module):
    expansion = 1  # channels of its output over `outputs` of its narrowest convolution
    layers = 2

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs, 3)
        self.downsample = join(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4
    layers = 3

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str):
        super().__init__()
        narrow = outputs // self.expansion
        self.conv1, self.bn1 = conv_bn(inputs, narrow)
        self.conv2, self.bn2 = conv_bn(narrow, narrow, 3, stride)
        self.conv3, self.bn3 = conv_bn(narrow, outputs)
        self.downsample = join(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.downsample(x))


def resnet(
    block: type[BasicBlock] | type[Bottleneck],
    blocks: Sequence[int],
    widths: Sequence[int] = (16, 32, 64),
    stem: int = 16,
    grid: int = 1,
    shortcut: str = "conv",
    num_classes: int = 10,
) -> Chain:
    """Stage i has `blocks[i]` blocks of `widths[i]` channels, times the block's expansion.

    All but the first stage halve the size. `shortcut` joins stages of different shape: "conv"
    (learned) or "pad" (without parameters). `grid` x `grid` means of each map go to the head.
    """
    conv1, bn1 = conv_bn(3, stem, 3)
    layers = {"conv1": conv1, "bn1": bn1, "relu": nn.ReLU()}
    stages = []
    inputs = stem
    for i, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
        outputs = width * block.expansion
        stride = 1 if i == 1 else 2
        layers[f"layer{i}"] = repeated(block, count, inputs, outputs, stride, shortcut=shortcut)
        stages.append(f"layer{i}")
        inputs = outputs
    layers["pool"] = Pool(grid)
    layers["fc"] = nn.Linear(inputs * grid**2, num_classes)
    return Chain(layers, stages)


def thin(depth: int, block: type = BasicBlock, **options) -> Chain:
    """Three stages of one length; depth 6n+2, with Bottleneck 9n+2."""
    blocks_per_stage = (depth - 2) // (3 * block.layers)
    return resnet(block, [blocks_per_stage] * 3, **options)


def four_stages(depth: int, **options) -> Chain:
    block = BasicBlock if depth < 50 else Bottleneck
    return resnet(block, FOUR_STAGES[depth], widths=(64, 128, 256, 512), stem=64, **options)
