"""Finished runs on corrupted images, on foreign images, and against known label distributions.

Where images are run, the run's own test images are run as well, in the precision of the run and on
the same machine, so that what differs comes from the images alone. `args` are the flags of
scripts/evaluate.py.
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.datasets import SVHN
from tqdm import tqdm

from utils.analysis import corruptions
from utils.analysis.columns import COLUMNS, Column, metrics_table, printable
from utils.analysis.corruptions import CLEAN, MEAN, SEVERITIES
from utils.analysis.nets import forward
from utils.analysis.record import Record
from utils.calibration import distributions
from utils.calibration.metrics import classification_metrics
from utils.data import Dataset, Split, load_dataset
from utils.data.npz import channels_last
from utils.evaluation import logits_of
from utils.program import UserError
from utils.program.files import open_npz, refused
from utils.teacher_cache import DTYPES

DISTRIBUTION_COLUMNS = {
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
HEADS = {"auroc": "AUROC %", "aupr_in": "AUPR-in %", "aupr_out": "AUPR-out %", "fpr95": "FPR95 %"}
FOREIGN_COLUMNS = {
    f"{score}_{metric}": Column(f"{score[:4]}. {head}", 100, 2)
    for score in ("confidence", "entropy")
    for metric, head in HEADS.items()
}
AGREEMENT = 0.9  # of people's majority with the labels; 0.99 on CIFAR-10

Evaluation = tuple[str, list[dict]]  # the table; what was measured of each net, ready for JSON


def table(title: str, nets: list[Record], measured: list, columns: dict, *heads) -> str:
    """`measured`, for each net: the row's first cells, under `heads` -> raw, scaled -> metrics."""
    rows = []
    for net, found in zip(nets, measured, strict=True):
        name = net.title
        for (logits, temperature), first in product(net.temperatures.items(), found):
            rows.append(([name, logits, f"{temperature:.3f}", *first], found[first][logits]))
            name = ""
    return f"{title}\n{metrics_table(['', 'logits', 'T', *heads], rows, columns)}"


def against_labels(nets: list[Record], args: Namespace) -> Evaluation:
    """Stored test logits against the true share of each label of --on: cifar10h, synthetic."""
    if args.on == "cifar10h":
        title = "CIFAR-10H: test images against how people label them"
        shares = [human_labels(args.data_dir, net.stored("test")[1]) for net in nets]
    else:
        title = "synthetic: test images against the posterior that their labels are drawn from"
        advice = "--on synthetic; name a run of --dataset synthetic, of this version"
        data = load_dataset("synthetic", args.data_dir)
        shares = [trained_on(nets, data, advice).posterior] * len(nets)
    measured = []
    for net, share in zip(nets, shares, strict=True):
        metrics, (logits, _) = distributions.label_distribution_metrics, net.stored("test")
        found = net.raw_and_scaled(metrics, logits, share)
        shared = set(net.taught_by.temperatures) if net.taught_by else ()
        for kind, one in ((kind, found[kind]) for kind in found if kind in shared):
            probs = [each.probabilities(kind)[0] for each in (net, net.taught_by)]
            correlation = distributions.rank_correlation(*map(distributions.entropy, probs))
            one["teacher_entropy_correlation"] = correlation
        measured.append(found)
    title += " (cal. error: mean |confidence - its true share|; entropy in nats, gap: net - truth)"
    return table(title, nets, [{(): one} for one in measured], DISTRIBUTION_COLUMNS), measured


def human_labels(data_dir: Path, labels: Tensor) -> Tensor:
    """The share of people who gave each label to each test image: float64 (N, K).

    `labels` (N,) are those of the run's test split, to tell whether it is CIFAR-10's in its own
    order. Raises UserError. Peterson et al., ICCV 2019.
    """
    places = (data_dir.glob(name) for name in ("cifar10h/cifar10h-*.npy", "cifar10h-*.npy"))
    file = next(chain(*places), data_dir / "cifar10h" / "cifar10h-counts.npy")
    if not file.exists():
        corruptions.refuse_other_data("cifar10h", labels)
    way_out = "take it from https://github.com/jcpeterson/cifar-10h, or give another --data_dir"
    votes = corruptions.mapped(file, way_out).astype(np.float64)
    fits = votes.ndim == 2 and len(votes) == len(labels)
    if not fits or (votes.argmax(axis=1) == labels.numpy()).mean() < AGREEMENT:
        other = f"the run's test split, {len(labels)} images, is not CIFAR-10's: not these in their"
        found = f"{file} has shape {votes.shape}, and {other} order"
        raise UserError(f"--on cifar10h: {found}; evaluate a run on CIFAR-10")
    return torch.from_numpy(votes / votes.sum(axis=1, keepdims=True))


def test_split(nets: list[Record], args: Namespace) -> Split:
    """The test split that all of the nets were measured on. Raises UserError."""
    told = nets[0].config.get("arguments", {})
    name = args.dataset or told.get("dataset", nets[0].dataset)
    folder_flags = {flag: told[flag] for flag in ("image_size", "skip_unreadable") if flag in told}
    advice = f"--dataset {name}; name its own by that or --data_dir, and one data set at a time"
    return trained_on(nets, load_dataset(name, args.data_dir, **folder_flags), advice)


def trained_on(nets: list[Record], data: Dataset, advice: str) -> Split:
    for net in nets:
        if net.fingerprint != data.fingerprint:
            raise UserError(f"{net.folder}: was trained on other data than {advice}")
    return data.test


def in_precision(net: Record, batch_size: int | None) -> Callable[[Tensor], Tensor]:
    """What gives a net's logits (N, K) of images uint8 (N, 3, H, W), in the run's precision."""
    accelerator = Accelerator(mixed_precision="no")
    device, precision = accelerator.device, net.result["settings"]["mixed_precision"]
    forward_net = forward(net, device)

    def logits(images: Tensor) -> Tensor:
        split = Split(images, torch.zeros(len(images), dtype=torch.int64))
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "no"):
            return logits_of(forward_net, split, accelerator, batch_size, net.title.strip())

    return logits


def out_of_distribution(nets: list[Record], args: Namespace) -> Evaluation:
    """How well a net tells its test images from those of --on: svhn or an .npz file."""
    foreign, test = foreign_images(args.on, args.data_dir), test_split(nets, args)
    size = "{} x {} pixels".format(*foreign.shape[2:])
    measured = []
    for net in nets:
        logits = in_precision(net, args.test_batch_size)
        fault = f"--on {args.on}: {net.title.strip()} cannot take its images of {size}"
        with refused(fault, "give images of the size that it was trained on"):
            logits(foreign[:1])
        both = logits(test.images), logits(foreign)
        measured.append(net.raw_and_scaled(distributions.ood_metrics, *both))
    title = f"{printable(args.on)}: its {len(foreign)} images, out of distribution, mixed with "
    title += f"{len(test.labels)} of the test split, which are the positive class"
    return table(title, nets, [{(): one} for one in measured], FOREIGN_COLUMNS), measured


def foreign_images(name: str, data_dir: Path) -> Tensor:
    """The test images, uint8 (N, 3, H, W), of `svhn` or of the .npz file that `name` is.

    Of a file x_test, or the only array. They are not resized. Raises UserError.
    """
    file = data_dir / "svhn.npz" if name == "svhn" else Path(name).expanduser()
    way_out = "write it with numpy.savez(file, x_test=images), uint8 (N, H, W, 3) and square"
    with refused(f"--on {name}: no images in {file}", way_out):
        if name == "svhn" and not file.is_file():
            return torch.from_numpy(SVHN(data_dir, split="test", download=True).data)
        with open_npz(file) as archive:
            key = archive.files[0] if len(archive.files) == 1 else "x_test"
            return torch.from_numpy(channels_last(archive[key])).permute(0, 3, 1, 2)


def under_corruptions(nets: list[Record], args: Namespace) -> Evaluation:
    """The --corruptions of --on, of the published ones or of our own, at every severity.

    Measured: corruption -> severity -> raw and scaled, with the means over either and both.
    """
    names, test = args.corruptions, test_split(nets, args)
    if args.on in corruptions.SOURCES:
        title, _ = corruptions.SOURCES[args.on]
        stream = corruptions.published_corruptions(args.on, args.data_dir, test.labels, names)
    else:
        title = "own corruptions (not CIFAR-10-C)"
        stream = corruptions.own_corruptions(test.images, names, args.seed)
    all_logits = [in_precision(net, args.test_batch_size) for net in nets]
    measured = [{name: {} for name in (CLEAN, *names)} for _ in nets]
    stream = chain([(CLEAN, 0, test.images)], stream)
    total = 1 + len(names) * len(SEVERITIES)
    for name, severity, images in tqdm(stream, args.on, total, leave=False, disable=None):
        for net, logits, one in zip(nets, all_logits, measured, strict=True):
            found = net.raw_and_scaled(classification_metrics, logits(images), test.labels)
            one[name][str(severity)] = found
    for one in measured:
        for name in names:
            one[name][MEAN] = mean(list(one[name].values()))
        one[MEAN] = mean([one[name] for name in names])
    shown = []
    title += f": {len(names)} corruptions x {len(SEVERITIES)} severities"
    for head, part in ((title, names), ("\nmeans over corruptions", (CLEAN, MEAN))):
        rows = [{(name, s): by for name in part for s, by in one[name].items()} for one in measured]
        shown.append(table(head, nets, rows, COLUMNS, "corruption", "severity"))
    return "\n".join(shown), measured


def mean(values: list):
    """Of numbers, or of dictionaries with the same keys, key by key."""
    if isinstance(values[0], dict):
        return {key: mean([one[key] for one in values]) for key in values[0]}
    return sum(values) / len(values)
