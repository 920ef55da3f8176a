"""MobileNetV2: Sandler et al., Inverted Residuals and Linear Bottlenecks, CVPR 2018.

Three nets of that name are in use for small images; they differ in stem, strides and clipping.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.blocks import Chain, Pool, conv_bn, repeated

# Table 2 of the paper: expansion, channels, blocks. Strides, the stem's first, are each net's own.
STAGES = (
    (1, 16, 1),
    (6, 24, 2),
    (6, 32, 3),
    (6, 64, 4),
    (6, 96, 3),
    (6, 160, 3),
    (6, 320, 1),
)
STRIDES = (1, 1, 1, 2, 2, 1, 2, 1)


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; added to its input where the shape stays."""

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
        widen = []
        if even or expansion > 1:
            widen = [*conv_bn(inputs, wide, bias=bias), act]
        filter_each = [*conv_bn(wide, wide, 3, stride, groups=wide, bias=bias), act]
        narrow = conv_bn(wide, outputs, bias=bias)
        self.residual = nn.Sequential(*widen, *filter_each, *narrow)
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

    `strides` are those of the stem and the stages. `even` puts a convolution from as many to as
    many channels where the paper's first stage has none, and leaves out its dropout. `kdc` is the
    net of the calibration transfer paper's code: biases, and a 1x1 stem.
    """
    act = relu()
    stem_stride, *stage_strides = strides
    inputs = rounded(width * 32, unit)
    # A 1x1 stem is padded too: 32 pixels become 34.
    stem = nn.Conv2d(3, inputs, 1 if kdc else 3, stem_stride, padding=1, bias=kdc)
    conv1 = nn.Sequential(stem, nn.BatchNorm2d(inputs), act)

    stages = nn.Sequential()
    for (expansion, channels, count), stride in zip(STAGES, stage_strides, strict=True):
        outputs = rounded(width * channels, unit)
        stages.append(
            repeated(
                InvertedResidual,
                count,
                inputs,
                outputs,
                stride,
                expansion=expansion,
                act=act,
                bias=kdc,
                even=even,
            )
        )
        inputs = outputs

    last = rounded(max(width, 1) * 1280, unit)
    parts = {
        "conv1": conv1,
        "stages": stages,
        "conv2": nn.Sequential(*conv_bn(inputs, last, bias=kdc), act),
        "pool": Pool(),
        "dropout": nn.Dropout(0.0 if even else 0.2),
        "fc": nn.Linear(last, num_classes),
    }
    # The ends of the stages before the size halves, and the last one.
    return Chain(parts, stages=("stages.1", "stages.2", "stages.4", "stages.6"))


def rounded(channels: float, unit: int) -> int:
    """The nearest multiple of `unit`, but no more than a tenth below."""
    nearest = max(unit, int(channels + unit / 2) // unit * unit)
    return nearest if nearest >= 0.9 * channels else nearest + unit
