"""Wide residual networks: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import conv3x3, init_weights, repeated


class PreActBlock(nn.Module):
    """Batch norm and ReLU stand before each convolution, and before a shortcut that is learned."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + shortcut


class WideResNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes); depth 6n+4, stages of 16, 32, 64 times width.

    Without the dropout of the paper, as the distillation literature uses it.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10):
        super().__init__()
        blocks, channels = (depth - 4) // 6, 64 * width
        self.conv1 = conv3x3(3, 16)
        self.layer1 = repeated(PreActBlock, blocks, 16, 16 * width, 1)
        self.layer2 = repeated(PreActBlock, blocks, 16 * width, 32 * width, 2)
        self.layer3 = repeated(PreActBlock, blocks, 32 * width, channels, 2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.fc(F.relu(self.bn1(out)).mean((2, 3)))
