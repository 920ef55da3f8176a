"""Nets without shortcuts: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Chain, Pool, conv_bn

# Convolutions in each of the five blocks.
VGGS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class Halve(nn.Module):
    """Maps wider than `smallest` pixels, halved by their maxima."""

    def __init__(self, smallest: int):
        super().__init__()
        self.smallest = smallest

    def forward(self, maps: Tensor) -> Tensor:
        return F.max_pool2d(maps, 2) if maps.shape[-1] > self.smallest else maps


def plain(
    blocks: Sequence[int],
    widths: Sequence[int],
    smallest: int,
    grid: int = 1,
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    num_classes: int = 10,
) -> Chain:
    """Blocks of convolutions, each halved down to `smallest` pixels, then linear layers.

    `grid` x `grid` means of each map go to linear layers of the widths `hidden`, and from there to
    the head.
    """
    layers = {}
    inputs = 3
    for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        block = nn.Sequential()
        for _ in range(count):
            block.extend([*conv_bn(inputs, width, 3, bias=True), nn.ReLU()])
            inputs = width
        layers[f"block{i}"] = block
        layers[f"halve{i}"] = Halve(smallest)

    layers["pool"] = Pool(grid)
    inputs *= grid**2
    hidden_layers = nn.Sequential()
    for width in hidden:
        hidden_layers.extend([nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)])
        inputs = width
    layers["hidden"] = hidden_layers
    layers["fc"] = nn.Linear(inputs, num_classes)
    return Chain(layers, stages=[f"block{i}" for i in range(len(blocks))])


def vgg(depth: int, **options) -> Chain:
    return plain(VGGS[depth], widths=(64, 128, 256, 512, 512), **options)


class ConvNet(NamedTuple):
    """What sets one of the paper's small students apart from the others."""

    blocks: tuple[int, ...]  # convolutions in each
    grid: int  # pixels a side of the last maps
    hidden: tuple[int, ...] = ()  # widths of the linear layers before the head


def convnet(depth: int, num_classes: int = 10) -> Chain:
    """The calibration transfer paper's small students, narrower for up to ten classes."""
    few_classes = num_classes <= 10
    nets = {
        2: ConvNet(blocks=(1, 1), grid=8),
        4: ConvNet(blocks=(2, 2), grid=8),
        6: ConvNet(blocks=(2, 2, 2), grid=4 if few_classes else 8),
        8: ConvNet(blocks=(2, 2, 2, 2), grid=2, hidden=(64,)),
        10: ConvNet(blocks=(2, 2, 2, 4), grid=2, hidden=(128 if few_classes else 512,)),
    }
    net = nets[depth]
    first_width = 16 if few_classes and depth < 10 else 32
    growth = 1 if depth == 2 else 2
    return plain(
        net.blocks,
        widths=[first_width * growth**i for i in range(len(net.blocks))],
        smallest=net.grid,
        grid=net.grid,
        hidden=net.hidden,
        num_classes=num_classes,
    )
