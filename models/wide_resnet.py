"""Wide residual networks: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv3x3, repeated


class PreActBlock(nn.Module):
    """Batch norm and ReLU stand before each convolution, and before a shortcut that is learned."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + shortcut


def wide_resnet(depth: int, width: int, num_classes: int = 10) -> Chain:
    """Depth 6n+4, stages of 16, 32, 64 times width.

    Without the dropout of the paper, as the distillation literature uses it.
    """
    blocks_per_stage = (depth - 4) // 6
    layers = {"conv1": conv3x3(3, 16)}
    inputs = 16
    for i, outputs in enumerate((16 * width, 32 * width, 64 * width), start=1):
        stride = 1 if i == 1 else 2
        layers[f"layer{i}"] = repeated(PreActBlock, blocks_per_stage, inputs, outputs, stride)
        inputs = outputs
    layers["bn1"] = nn.BatchNorm2d(inputs)
    layers["relu"] = nn.ReLU()
    layers["pool"] = Pool()
    layers["fc"] = nn.Linear(inputs, num_classes)
    return Chain(layers, stages=("layer1", "layer2", "layer3"))
