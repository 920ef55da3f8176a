"""Losses: logits and labels in, a scalar out. The registry says how a new one is added."""

from losses.modules import ClassificationLoss, DistillationLoss, sum_of
from losses.registry import (
    BASES,
    DISTILLATIONS,
    TERMS,
    Flag,
    LossEntry,
    build_distillation,
    build_loss,
    canonical_loss,
    loss_flags,
    loss_names,
    loss_parameters,
)

__all__ = [
    "BASES",
    "DISTILLATIONS",
    "TERMS",
    "ClassificationLoss",
    "DistillationLoss",
    "Flag",
    "LossEntry",
    "build_distillation",
    "build_loss",
    "canonical_loss",
    "loss_flags",
    "loss_names",
    "loss_parameters",
    "sum_of",
]
