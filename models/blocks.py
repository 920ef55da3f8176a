"""What several families are made of."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A convolution, padded so that only the stride changes the size, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return [conv, nn.BatchNorm2d(outputs)]


def repeated(
    block: Callable[..., nn.Module], count: int, inputs: int, outputs: int, stride: int, **options
) -> nn.Sequential:
    """`count` blocks, of which the first changes channels and size and the others keep them."""
    first = block(inputs, outputs, stride, **options)
    return nn.Sequential(first, *(block(outputs, outputs, 1, **options) for _ in range(count - 1)))


class Pool(nn.Module):
    """Features (B, C * side * side) of maps (B, C, H, W): their means over side x side fields."""

    def __init__(self, side: int = 1):
        super().__init__()
        self.side = side

    def forward(self, maps: Tensor) -> Tensor:
        if self.side == 1:
            return maps.mean((2, 3))
        # Not adaptive_avg_pool2d, whose gradient is not deterministic on a GPU.
        return F.avg_pool2d(maps, maps.shape[-1] // self.side).flatten(1)


class Chain(nn.Sequential):
    """Parts by name, one after the other: images (B, 3, H, W) to logits (B, num_classes).

    Convolutions start from Kaiming's normal distribution, fan out; the rest as torch has it.
    """

    def __init__(self, **parts: nn.Module):
        super().__init__(OrderedDict(parts))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
