"""Nets without shortcuts: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import conv_bn, init_weights, pooled

# Convolutions in each of the five blocks.
VGGS = {8: (1,) * 5, 11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class PlainNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes): blocks of convolutions, then linear layers.

    Maps wider than `smallest` pixels are halved after each block; `grid` x `grid` means of each go
    to linear layers of the widths `hidden`, and from there to the head.
    """

    def __init__(self, blocks, widths, smallest, grid=1, hidden=(), dropout=0.0, num_classes=10):
        super().__init__()
        self.blocks, self.smallest, self.grid, inputs = len(blocks), smallest, grid, 3
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            block = nn.Sequential()
            for _ in range(count):
                block.extend([*conv_bn(inputs, width, 3, bias=True), nn.ReLU()])
                inputs = width
            self.add_module(f"block{i}", block)
        self.hidden, inputs = nn.Sequential(), inputs * grid**2
        for width in hidden:
            self.hidden.extend([nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)])
            inputs = width
        self.fc = nn.Linear(inputs, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        out = images
        for i in range(self.blocks):
            out = getattr(self, f"block{i}")(out)
            if out.shape[-1] > self.smallest:
                out = F.max_pool2d(out, 2)
        return self.fc(self.hidden(pooled(out, self.grid)))


def vgg(depth: int, **options) -> PlainNet:
    return PlainNet(VGGS[depth], (64, 128, 256, 512, 512), **options)


def convnet(depth: int, num_classes: int = 10) -> PlainNet:
    """The calibration transfer paper's small students, narrower for up to ten classes."""
    few = num_classes <= 10
    first = 16 if few and depth < 10 else 32
    blocks, grid, hidden = {
        **{2: ((1, 1), 8, ()), 4: ((2, 2), 8, ()), 6: ((2, 2, 2), 4 if few else 8, ())},
        **{8: ((2, 2, 2, 2), 2, (64,)), 10: ((2, 2, 2, 4), 2, (128 if few else 512,))},
    }[depth]
    widths = [first if depth == 2 else first << i for i in range(len(blocks))]
    return PlainNet(blocks, widths, grid, grid, hidden, num_classes=num_classes)
