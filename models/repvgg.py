"""RepVGG: Ding et al., Making VGG-style ConvNets Great Again, CVPR 2021; as it is trained."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv_bn, repeated

# Of a stem and four stages: blocks, strides and channels.
COUNTS = (1, 2, 4, 14, 1)
STRIDES = (1, 1, 2, 2, 2)
WIDTHS = {
    "a0": (48, 48, 96, 192, 1280),
    "a1": (64, 64, 128, 256, 1280),
    "a2": (64, 96, 192, 384, 1408),
}


class RepBlock(nn.Module):
    """The sum of a 3x3 and a 1x1 convolution, and of the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        same = stride == 1 and inputs == outputs
        self.identity = nn.BatchNorm2d(inputs) if same else None
        self.dense = nn.Sequential(*conv_bn(inputs, outputs, 3, stride))
        self.point = nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense(x) + self.point(x)
        if self.identity is not None:
            out = out + self.identity(x)
        return F.relu(out)


def repvgg(size: str, num_classes: int = 10) -> Chain:
    blocks = nn.Sequential()
    inputs = 3
    for count, outputs, stride in zip(COUNTS, WIDTHS[size], STRIDES, strict=True):
        blocks.append(repeated(RepBlock, count, inputs, outputs, stride))
        inputs = outputs
    layers = {"layers": blocks, "pool": Pool(), "fc": nn.Linear(inputs, num_classes)}
    return Chain(layers, stages=("layers.1", "layers.2", "layers.3", "layers.4"))
