"""An average of a net's weights over its steps, which is evaluated in the net's place (--ema)."""

import copy

import torch
from torch import nn


class WeightAverage(nn.Module):
    """Beside a net, one whose weights are the exponential moving average of its own.

    After step t the weights are (1 - d) / (1 - d^t) times the sum over the steps i up to t of
    d^(t - i) w_i, with d the `decay`: an average from the first step on, in which the initial
    weights have no part (as Adam corrects its own averages: Kingma and Ba, ICLR 2015, Section 3).
    A step that fp16's scaler has left out counts with the weights as they were.
    Buffers, such as batch norm's statistics, are the net's own when they were last copied.
    """

    def __init__(self, net: nn.Module, decay: float):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.decay = decay
        # d^t lies on the device, where a CUDA graph that is replayed finds it.
        device = next(net.parameters()).device
        self.register_buffer("power", torch.ones((), dtype=torch.float64, device=device))

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """After a step of the net. Nothing in here waits for the device."""
        self.power.mul_(self.decay)
        share = (1 - self.decay) / (1 - self.power)

        averages = list(self.net.parameters())
        changes = torch._foreach_sub(list(net.parameters()), averages)
        torch._foreach_mul_(changes, share.float())
        torch._foreach_add_(averages, changes)

    @torch.no_grad()
    def copy_buffers(self, net: nn.Module) -> None:
        """Before it is evaluated."""
        for own, buffer in zip(self.net.buffers(), net.buffers(), strict=True):
            own.copy_(buffer)
