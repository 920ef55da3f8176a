"""Nets without shortcuts: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv_bn

# Convolutions in each of the five blocks.
VGGS = {8: (1,) * 5, 11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class Halve(nn.Module):
    """Maps wider than `smallest` pixels, halved by their maxima."""

    def __init__(self, smallest: int):
        super().__init__()
        self.smallest = smallest

    def forward(self, maps: Tensor) -> Tensor:
        return F.max_pool2d(maps, 2) if maps.shape[-1] > self.smallest else maps


def plain(blocks, widths, smallest, grid=1, hidden=(), dropout=0.0, num_classes=10) -> Chain:
    """Blocks of convolutions, each halved, then linear layers.

    `grid` x `grid` means of each map go to linear layers of the widths `hidden`, and from there to
    the head.
    """
    parts, inputs = {}, 3
    for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        parts[f"block{i}"] = nn.Sequential()
        for _ in range(count):
            parts[f"block{i}"].extend([*conv_bn(inputs, width, 3, bias=True), nn.ReLU()])
            inputs = width
        parts[f"halve{i}"] = Halve(smallest)
    parts |= {"pool": Pool(grid), "hidden": nn.Sequential()}
    inputs *= grid**2
    for width in hidden:
        parts["hidden"].extend([nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)])
        inputs = width
    return Chain(**parts, fc=nn.Linear(inputs, num_classes))


def vgg(depth: int, **options) -> Chain:
    return plain(VGGS[depth], (64, 128, 256, 512, 512), **options)


def convnet(depth: int, num_classes: int = 10) -> Chain:
    """The calibration transfer paper's small students, narrower for up to ten classes."""
    few = num_classes <= 10
    first = 16 if few and depth < 10 else 32
    blocks, grid, hidden = {
        **{2: ((1, 1), 8, ()), 4: ((2, 2), 8, ()), 6: ((2, 2, 2), 4 if few else 8, ())},
        **{8: ((2, 2, 2, 2), 2, (64,)), 10: ((2, 2, 2, 4), 2, (128 if few else 512,))},
    }[depth]
    widths = [first if depth == 2 else first << i for i in range(len(blocks))]
    return plain(blocks, widths, grid, grid, hidden, num_classes=num_classes)
