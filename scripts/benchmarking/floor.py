"""How fast a device could train at most: its own rates, and what a net asks of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.benchmark.utils.timer import timer  # waits for a GPU

from models import build_model
from scripts.benchmarking.contenders import CLASSES, SIDE
from utils.evaluation import DTYPES

REPEATS = 50


class DeviceRates(NamedTuple):
    products: float  # operations per second in large products
    copies: float  # bytes per second that a copy reads and writes


class Cost(NamedTuple):
    """What one image costs."""

    operations: int  # in a net's products
    numbers: int  # that these read and write


def seconds_of(work: Callable[[], object]) -> float:
    began = timer()
    work()
    return timer() - began


def device_rates(accelerator: Accelerator) -> DeviceRates:
    """The best of many tries."""
    device = accelerator.device
    dtype = DTYPES[accelerator.mixed_precision]
    side = 8192 if device.type == "cuda" else 1024

    def rate(amount: int, work: Callable[[], object]) -> float:
        return amount / min(seconds_of(work) for _ in range(REPEATS))

    # A convolution too: on CPUs it may be faster than the product of matrices.
    images = torch.randn(128, 64, 8, 8, device=device, dtype=dtype)
    kernel = torch.randn(64, 64, 3, 3, device=device, dtype=dtype)
    images = images.to(memory_format=torch.channels_last)
    kernel = kernel.to(memory_format=torch.channels_last)
    convolved = 2 * kernel.numel() * images.numel() // 64
    convolutions = rate(convolved, lambda: nn.functional.conv2d(images, kernel, padding=1))

    matrix = torch.randn(side, side, device=device, dtype=dtype)
    matrices = rate(2 * side**3, lambda: matrix @ matrix)

    source = torch.zeros(side * 2**14, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copies = rate(2 * source.nbytes, lambda: target.copy_(source))
    return DeviceRates(max(convolutions, matrices), copies)


def floor_rate(rates: DeviceRates, cost: Cost, precision: str) -> float:
    """Images/s of a device that does nothing but the products, or nothing but their traffic."""
    computing = cost.operations / rates.products
    moving = DTYPES[precision].itemsize * cost.numbers / rates.copies
    return 1 / max(computing, moving)


def training_cost(model: str, teacher_model: str | None = None) -> Cost:
    """What a step costs for each image; a teacher that is run adds its forward pass.

    Gradients of a layer's inputs and of its weights cost as much again as its forward pass.
    """
    operations, numbers = forward_cost(model)
    teacher = Cost(0, 0) if teacher_model is None else forward_cost(teacher_model)
    return Cost(3 * operations + teacher.operations, 3 * numbers + teacher.numbers)


def forward_cost(model: str) -> Cost:
    """Batch norm, activations, additions and weights count as nothing."""
    net = build_model(model, CLASSES)
    costs = []

    def note(layer, inputs, output):
        operations = 2 * output.numel() * layer.weight[0].numel()
        costs.append(Cost(operations, inputs[0].numel() + output.numel()))

    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(note)
    net.eval()(torch.zeros(1, 3, SIDE, SIDE))
    return Cost(
        operations=sum(cost.operations for cost in costs),
        numbers=sum(cost.numbers for cost in costs),
    )
