"""What several families are made of."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A convolution, padded so that only the stride changes the size, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
    return [conv, nn.BatchNorm2d(outputs)]


def repeated(
    block: Callable[..., nn.Module], count: int, inputs: int, outputs: int, stride: int, **options
) -> nn.Sequential:
    """`count` blocks, of which the first changes channels and size and the others keep them."""
    blocks = [block(inputs, outputs, stride, **options)]
    for _ in range(count - 1):
        blocks.append(block(outputs, outputs, 1, **options))
    return nn.Sequential(*blocks)


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
    """Layers by name, one after the other: images (B, 3, H, W) to logits (B, num_classes).

    `stages`, kept as `stage_names`, names the layers whose maps a distillation of features compares
    by default: the ends of the net's stages; a layer of a layer is `stages.2`. Convolutions start
    from Kaiming's normal distribution, fan out; the rest as torch has it.
    """

    def __init__(self, layers: dict[str, nn.Module], stages: Sequence[str]):
        super().__init__(OrderedDict(layers))
        self.stage_names = tuple(stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, keep: Sequence[str] = ()):
        """Logits (B, K); with `keep` also {name: maps (B, C, h, w)} of the layers so named.

        Raises ValueError, with the names that there are, for one that is none of the net's layers.
        """
        if not keep:
            return super().forward(images)
        maps: dict[str, Tensor] = {}
        logits = run_and_keep(self, images, keep, maps)
        missing = [name for name in keep if name not in maps]
        if missing:
            raise ValueError(
                f"no layer of the net is called {missing[0]!r}; its layers are "
                f"{', '.join(layer_names(self))}"
            )
        return logits, maps


def run_and_keep(
    chain: nn.Sequential, values: Tensor, keep: Sequence[str], maps: dict[str, Tensor], prefix=""
) -> Tensor:
    """What a chain makes of its input; the outputs of the layers named in `keep` go into `maps`."""
    for name, layer in chain.named_children():
        inner_is_kept = any(wanted.startswith(f"{prefix}{name}.") for wanted in keep)
        if inner_is_kept and isinstance(layer, nn.Sequential):
            values = run_and_keep(layer, values, keep, maps, f"{prefix}{name}.")
        else:
            values = layer(values)
        if prefix + name in keep:
            maps[prefix + name] = values
    return values


def layer_names(chain: nn.Sequential) -> list[str]:
    """The names that `keep` takes: of layers, and of the layers of those that are chains too."""
    names = []
    for name, layer in chain.named_children():
        names.append(name)
        if isinstance(layer, nn.Sequential):
            names += [f"{name}.{inner}" for inner, _ in layer.named_children()]
    return names
