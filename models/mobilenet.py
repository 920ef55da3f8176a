"""MobileNetV2: Sandler et al., Inverted Residuals and Linear Bottlenecks, CVPR 2018.

Three nets of that name are in use for small images; they differ in stem, strides and clipping.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from models.blocks import Chain, Pool, conv_bn, repeated


class Stage(NamedTuple):
    """A row of the paper's Table 2."""

    expansion: int
    channels: int
    blocks: int


STEM = 32  # channels
STAGES = (
    Stage(expansion=1, channels=16, blocks=1),
    Stage(expansion=6, channels=24, blocks=2),
    Stage(expansion=6, channels=32, blocks=3),
    Stage(expansion=6, channels=64, blocks=4),
    Stage(expansion=6, channels=96, blocks=3),
    Stage(expansion=6, channels=160, blocks=3),
    Stage(expansion=6, channels=320, blocks=1),
)
LAST = 1280  # channels, of a net that is not widened
STRIDES = (1, 1, 1, 2, 2, 1, 2, 1)  # of the stem, then of the stages


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; added to its input where the shape stays.

    A block of expansion 1 does not widen, unless `even` gives it that convolution all the same.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        expansion: int,
        act: nn.Module,
        bias: bool,
        even: bool,
    ):
        super().__init__()
        wide = inputs * expansion
        self.residual = nn.Sequential()
        if even or expansion > 1:
            self.residual.extend([*conv_bn(inputs, wide, bias=bias), act])
        self.residual.extend([*conv_bn(wide, wide, 3, stride, groups=wide, bias=bias), act])
        self.residual.extend(conv_bn(wide, outputs, bias=bias))
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x) if self.added else self.residual(x)


def mobilenetv2(
    width: float = 1,
    unit: int = 8,
    strides: Sequence[int] = STRIDES,
    relu: type[nn.Module] = nn.ReLU6,
    even: bool = False,
    kdc: bool = False,
    num_classes: int = 10,
) -> Chain:
    """With `width` times the paper's channels, in multiples of `unit`.

    `strides` are those of the stem and the stages. `even` is the MobileNetV2 of distillation's
    code: the first stage has a convolution from as many to as many channels where the paper's has
    none, and there is no dropout. `kdc` is that of the calibration transfer paper's code: biases,
    and a 1x1 stem.
    """
    act = relu()
    stem_channels = rounded(width * STEM, unit)
    outputs = [rounded(width * stage.channels, unit) for stage in STAGES]
    last = rounded(max(width, 1) * LAST, unit)

    # A 1x1 stem is padded too: 32 pixels become 34.
    kernel = 1 if kdc else 3
    stem = nn.Conv2d(3, stem_channels, kernel, strides[0], padding=1, bias=kdc)
    layers = {
        "conv1": nn.Sequential(stem, nn.BatchNorm2d(stem_channels), act),
        "stages": stages_of(stem_channels, outputs, strides[1:], act=act, bias=kdc, even=even),
        "conv2": nn.Sequential(*conv_bn(outputs[-1], last, bias=kdc), act),
        "pool": Pool(),
        "dropout": nn.Dropout(0.0 if even else 0.2),
        "fc": nn.Linear(last, num_classes),
    }
    # The ends of the stages before the size halves, and the last one.
    return Chain(layers, stages=("stages.1", "stages.2", "stages.4", "stages.6"))


def stages_of(
    inputs: int,
    outputs: Sequence[int],
    strides: Sequence[int],
    act: nn.Module,
    bias: bool,
    even: bool,
) -> nn.Sequential:
    """All of STAGES, from `inputs` channels; each has its number of `outputs` and its stride."""
    stages = nn.Sequential()
    for stage, channels, stride in zip(STAGES, outputs, strides, strict=True):
        blocks = repeated(
            InvertedResidual,
            stage.blocks,
            inputs,
            channels,
            stride,
            expansion=stage.expansion,
            act=act,
            bias=bias,
            even=even,
        )
        stages.append(blocks)
        inputs = channels
    return stages


def rounded(channels: float, unit: int) -> int:
    """The nearest multiple of `unit`, but no more than a tenth below."""
    nearest = max(unit, int(channels + unit / 2) // unit * unit)
    return nearest if nearest >= 0.9 * channels else nearest + unit
