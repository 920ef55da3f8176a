"""Optimisers and learning rates by name, each with the flags that it reads.

A new one is a function and its entry; the command line refuses its flags where it is not chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from utils.settings import Recipe


class OptimizerEntry(NamedTuple):
    build: Callable[[list[nn.Parameter], Recipe], torch.optim.Optimizer]
    reads: tuple[str, ...] = ()  # fields of the Recipe that no other optimiser reads


class ScheduleEntry(NamedTuple):
    build: Callable[[torch.optim.Optimizer, Recipe, int], LRScheduler]
    reads: tuple[str, ...] = ()  # fields of the Recipe that no other schedule reads


def sgd(weights: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum; without momentum it is plain SGD."""
    optimizer = torch.optim.SGD(
        weights,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
        fused=True,
    )
    if recipe.momentum > 0:
        # The fused optimiser would leave its buffers as it found the memory, were its first step
        # one that fp16's scaler skips. From 0 on, the first step is the same.
        for weight in weights:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def adamw(weights: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay: Loshchilov and Hutter, ICLR 2019, Algorithm 2."""
    return torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def multistep(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int):
    """The rate times lr_decay_factor after each epoch of schedule_steps."""
    milestones = [epoch * steps_per_epoch for epoch in recipe.schedule_steps]
    return MultiStepLR(optimizer, milestones, recipe.lr_decay_factor)


def cosine(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int):
    """Half a cosine from the full rate to 0. Loshchilov and Hutter, ICLR 2017, Equation 5."""
    return CosineAnnealingLR(optimizer, recipe.epochs * steps_per_epoch)


def warmup_cosine(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int):
    """A linear rise over `warmup` steps, then the cosine over the steps that are left."""
    if recipe.warmup == 0:
        return cosine(optimizer, recipe, steps_per_epoch)
    steps_after = recipe.epochs * steps_per_epoch - recipe.warmup  # above 0: check_run
    rise = LinearLR(optimizer, start_factor=1 / (recipe.warmup + 1), total_iters=recipe.warmup)
    fall = CosineAnnealingLR(optimizer, steps_after)
    return SequentialLR(optimizer, [rise, fall], milestones=[recipe.warmup])


OPTIMIZERS = {
    "sgd": OptimizerEntry(sgd, reads=("momentum",)),
    "adamw": OptimizerEntry(adamw),
}
SCHEDULES = {
    "multistep": ScheduleEntry(multistep, reads=("schedule_steps", "lr_decay_factor")),
    "cosine": ScheduleEntry(cosine),
    "warmupcosine": ScheduleEntry(warmup_cosine, reads=("warmup",)),
}


def build_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of all weights of a module that lie on its device already."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    return OPTIMIZERS[recipe.optimizer].build(weights, recipe)


def build_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> LRScheduler:
    """The learning rate as a function of the step, not of the epoch."""
    return SCHEDULES[recipe.scheduler].build(optimizer, recipe, steps_per_epoch)
