"""RepVGG: Ding et al., Making VGG-style ConvNets Great Again, CVPR 2021; as it is trained."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv_bn, repeated

COUNTS, STRIDES = (1, 2, 4, 14, 1), (1, 1, 2, 2, 2)  # of a stem and four stages
WIDTHS = {"a0": (48, 48, 96, 192, 1280), "a1": (64, 64, 128, 256, 1280)}
WIDTHS |= {"a2": (64, 96, 192, 384, 1408)}


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
        return F.relu(out if self.identity is None else out + self.identity(x))


def repvgg(size: str, num_classes: int = 10) -> Chain:
    layers, inputs = nn.Sequential(), 3
    for count, outputs, stride in zip(COUNTS, WIDTHS[size], STRIDES, strict=True):
        layers.append(repeated(RepBlock, count, inputs, outputs, stride))
        inputs = outputs
    return Chain(layers=layers, pool=Pool(), fc=nn.Linear(inputs, num_classes))
