"""How other code bases name the tensors of the nets in this zoo."""

import re

from torch import Tensor, nn

COUNTER = "num_batches_tracked"
# How others call what is named fc, downsample and layer1..3 here.
RENAMES = (
    (r"^(linear|classifier)\.", "fc."),
    (r"\.(shortcut|convShortcut)\.", ".downsample."),
    (r"^block(\d)\.layer\.", r"layer\1."),
)


def standard_names(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """`state`, another code base's weights of `net`, under the names that `net` gives them.

    Known names are replaced. Where that does not make them those of `net`, tensors are paired in
    the order in which they stand, if all of them then agree in kind and shape. A head that is a 1x1
    convolution becomes a linear layer. Batch norm's counters are left out: old files lack them, and
    only training reads them. What fits neither way keeps its (replaced) names.
    """
    wanted = without_counters(net.state_dict())
    renamed = without_counters(state)
    for pattern, replacement in RENAMES:
        renamed = {re.sub(pattern, replacement, key): value for key, value in renamed.items()}

    if renamed.keys() != wanted.keys() and traits(renamed) == traits(wanted):
        renamed = dict(zip(wanted, renamed.values(), strict=True))
    if "fc.weight" in renamed and renamed["fc.weight"].ndim == 4:
        renamed["fc.weight"] = renamed["fc.weight"].flatten(1)
    return renamed


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith(COUNTER)}


def variant(state: dict[str, Tensor], name: str) -> dict[str, str | bool]:
    """Options of `build_model(name)` that third parties' names show and tensors do not."""
    has_shortcuts = any(re.search("downsample|shortcut", key) for key in state)
    if name.startswith("resnet") and not has_shortcuts:
        return {"shortcut": "pad"}
    if name.startswith("densenet") and any("dense_block_layer" in key for key in state):
        return {"linear_transitions": True}
    return {}


def traits(state: dict[str, Tensor]) -> list[tuple]:
    """What tensors keep under any name: weight, bias or statistic; the shape, but for ones in it.

    A file sorted by name has biases before weights, so that it is never paired in its order.
    """
    return [(key.rpartition(".")[2], value.squeeze().shape) for key, value in state.items()]
