"""A trained net in half precision, as a safetensors file of half the size."""

import torch

from scripts.deployment.exported_net import CalibratedNet, safetensors_of
from utils.program import UserError


def round_to_half(net: torch.nn.Module) -> None:
    """Every float of the net becomes the nearest that half precision (float16) has.

    It goes on computing in float32, as the net of a file of these halves does. Raises UserError
    where one is too large for that.
    """
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
            if not tensor.isfinite().all():
                raise UserError(f"--half: {name} has values beyond 65,504; leave it out")


def half_safetensors(net: CalibratedNet, metadata: dict[str, str]) -> bytes:
    """A file of a net that `round_to_half` has rounded, so that its halves lose nothing."""
    state = net.net.state_dict()
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    return safetensors_of(halves, metadata)
