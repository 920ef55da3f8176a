"""How other code bases name the tensors of these nets."""

import re

from torch import Tensor, nn

RENAMES = (
    (r"^(linear|classifier)\.", "fc."),
    (r"\.(shortcut|convShortcut)\.", ".downsample."),
    (r"^block(\d)\.layer\.", r"layer\1."),
)


def standard_names(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """The same tensors under the names that `net` uses."""

    def standard_name(name: str) -> str:
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        return name

    return {standard_name(name): tensor for name, tensor in state.items()}
