"""The ResNets made for 32x32 images: He et al., Deep Residual Learning, CVPR 2016, section 4.2."""

from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def init_weights(net: nn.Module) -> None:
    """Kaiming normal, fan out, for convolutions; batch norm starts as torch has it, at 1 and 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def conv_shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Option B of the paper: a learned projection."""
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class PadShortcut(nn.Module):
    """Option A of the paper, without parameters: every stride-th pixel, zeros as new channels.

    The zeros are shared between both ends of the channels, as public CIFAR code has it.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        before = (outputs - inputs) // 2
        self.stride, self.padding = stride, (before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))


SHORTCUTS = {"conv": conv_shortcut, "pad": PadShortcut}


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module):
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.downsample(x))


def make_stage(block, blocks: int, inputs: int, width: int, stride: int, shortcut) -> nn.Sequential:
    """The first block changes the shape where it has to, the others keep it."""
    outputs = width * block.expansion
    same = stride == 1 and inputs == outputs
    first = block(
        inputs, width, stride, nn.Identity() if same else shortcut(inputs, outputs, stride)
    )
    rest = (block(outputs, width, 1, nn.Identity()) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class ResNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes), in three stages of `blocks` blocks each.

    `shortcut` joins stages of different shape: "conv" (learned) or "pad" (without parameters).
    """

    def __init__(self, block, blocks: int, num_classes: int = 10, shortcut: str = "conv"):
        super().__init__()
        joint, grown = SHORTCUTS[shortcut], block.expansion
        self.conv1, self.bn1 = conv3x3(3, 16), nn.BatchNorm2d(16)
        self.layer1 = make_stage(block, blocks, 16, 16, 1, joint)
        self.layer2 = make_stage(block, blocks, 16 * grown, 32, 2, joint)
        self.layer3 = make_stage(block, blocks, 32 * grown, 64, 2, joint)
        self.fc = nn.Linear(64 * grown, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean((2, 3)))
