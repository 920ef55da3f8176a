"""Finished runs against known label distributions: their stored test logits, no net is run."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.analysis import corruptions
from utils.analysis.record import Record
from utils.analysis.shift import ByLogits, Measurement, table, trained_on
from utils.calibration.distributions import entropy, label_distribution_metrics, rank_correlation
from utils.columns import Column
from utils.data import load_dataset
from utils.program import UserError

COLUMNS_OF_SHARES = {
    "kl": Column("KL", 1, 4),
    "tv": Column("total variation %", 100, 2),
    "calibration_error": Column("cal. error %", 100, 2),
    "soft_ece": Column("soft ECE %", 100, 2),
    "expected_top1": Column("expected top-1 %", 100, 2, "max"),
    "entropy": Column("entropy", 1, 4),
    "entropy_gap": Column("entropy gap", 1, 4),
    "entropy_correlation": Column("entropy corr.", 1, 3, "max"),
    "teacher_entropy_correlation": Column("... with teacher's", 1, 3, "max"),
}
AGREEMENT = 0.9  # of people's majority with the labels; 0.99 on CIFAR-10


def against_people(nets: list[Record], data_dir: Path) -> tuple[str, list[ByLogits]]:
    """Against the labels that people gave CIFAR-10's test images (CIFAR-10H).

    The table, and what was measured of each net, ready for JSON. Raises UserError.
    """
    title = "CIFAR-10H: test images against how people label them"
    shares = []
    for net in nets:
        _, labels = net.stored("test")
        shares.append(human_labels(data_dir, labels))
    return against_shares(nets, shares, title)


def against_posterior(nets: list[Record], data_dir: Path) -> tuple[str, list[ByLogits]]:
    """Against the posterior that the labels of --dataset synthetic are drawn from; likewise."""
    title = "synthetic: test images against the posterior that their labels are drawn from"
    data = trained_on(
        nets,
        load_dataset("synthetic", data_dir),
        "--on synthetic; name a run of --dataset synthetic, of this version",
    )
    return against_shares(nets, [data.test.posterior] * len(nets), title)


def against_shares(
    nets: list[Record], shares: list[Tensor], title: str
) -> tuple[str, list[ByLogits]]:
    """`shares`: for each net the true share of each label, (N, K), of each test image."""
    measured = []
    for net, share in zip(nets, shares, strict=True):
        logits, _ = net.stored("test")
        by_logits = net.raw_and_scaled(label_distribution_metrics, logits, share)
        for kind, correlation in correlation_with_teacher(net).items():
            by_logits[kind]["teacher_entropy_correlation"] = correlation
        measured.append(by_logits)
    title += " (cal. error: mean |confidence - its true share|; entropy in nats, gap: net - truth)"
    rows = [[Measurement(metrics)] for metrics in measured]
    return table(title, nets, rows, COLUMNS_OF_SHARES), measured


def correlation_with_teacher(net: Record) -> dict[str, float]:
    """How the entropies of student and teacher correlate, by kind of logits that both have."""
    teacher = net.taught_by
    if teacher is None:
        return {}
    correlations = {}
    for kind in net.temperatures:
        if kind in teacher.temperatures:
            own, _ = net.probabilities(kind)
            teachers, _ = teacher.probabilities(kind)
            correlations[kind] = rank_correlation(entropy(own), entropy(teachers))
    return correlations


def human_labels(data_dir: Path, labels: Tensor) -> Tensor:
    """The share of people who gave each label to each test image: float64 (N, K).

    `labels` (N,) are those of the run's test split, to tell whether it is CIFAR-10's in its own
    order. Raises UserError. Peterson et al., ICCV 2019.
    """
    files = [*data_dir.glob("cifar10h/cifar10h-*.npy"), *data_dir.glob("cifar10h-*.npy")]
    file = files[0] if files else data_dir / "cifar10h" / "cifar10h-counts.npy"
    if not file.exists():
        corruptions.refuse_other_data("cifar10h", labels)
    way_out = "take it from https://github.com/jcpeterson/cifar-10h, or give another --data_dir"
    votes = corruptions.mapped(file, way_out).astype(np.float64)

    fits = votes.ndim == 2 and len(votes) == len(labels)
    if not fits or (votes.argmax(axis=1) == labels.numpy()).mean() < AGREEMENT:
        raise UserError(
            f"--on cifar10h: {file} has shape {votes.shape}, and the run's test split, "
            f"{len(labels)} images, is not CIFAR-10's: not these in their order; evaluate a run "
            "on CIFAR-10"
        )
    return torch.from_numpy(votes / votes.sum(axis=1, keepdims=True))
