"""Finished runs on foreign images and on corrupted images.

The run's own test images are run as well, in the precision of the run and on the same machine, so
that what differs comes from the images alone.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.datasets import SVHN

from utils.analysis import corruptions
from utils.analysis.corruptions import CLEAN, MEAN, SEVERITIES, Corrupted
from utils.analysis.nets import forward_of
from utils.analysis.record import Record
from utils.calibration.distributions import ood_metrics
from utils.calibration.metrics import classification_metrics
from utils.columns import COLUMNS, Column, metrics_table, printable
from utils.data import Dataset, Split, load_dataset
from utils.data.npz import channels_last
from utils.evaluation import DTYPES, logits_of
from utils.program import UserError
from utils.program.bars import progress_bar
from utils.program.environment import check_gpu
from utils.program.files import open_npz, refused

FOREIGN_COLUMNS = {
    "confidence_auroc": Column("conf. AUROC %", 100, 2),
    "confidence_aupr_in": Column("conf. AUPR-in %", 100, 2),
    "confidence_aupr_out": Column("conf. AUPR-out %", 100, 2),
    "confidence_fpr95": Column("conf. FPR95 %", 100, 2),
    "entropy_auroc": Column("entr. AUROC %", 100, 2),
    "entropy_aupr_in": Column("entr. AUPR-in %", 100, 2),
    "entropy_aupr_out": Column("entr. AUPR-out %", 100, 2),
    "entropy_fpr95": Column("entr. FPR95 %", 100, 2),
}

# Metrics (fractions) of raw logits and, but for a third party's net, of scaled ones.
ByLogits = dict[str, dict[str, float]]
# By corruption, and below it by severity.
ByCorruption = dict[str, dict[str, ByLogits]]


class Measurement(NamedTuple):
    """What was measured of a net, and the cells that say of what images."""

    metrics: ByLogits
    about: tuple[str, ...] = ()


def table(
    title: str,
    nets: list[Record],
    measurements: list[list[Measurement]],
    columns: dict[str, Column],
    heads: Sequence[str] = (),
) -> str:
    """For each net and each kind of its logits a row for each of its measurements.

    What these are `about` stands below `heads`.
    """
    rows = []
    for net, of_net in zip(nets, measurements, strict=True):
        name = net.title
        for logits, temperature in net.temperatures.items():
            for measurement in of_net:
                cells = [name, logits, f"{temperature:.3f}", *measurement.about]
                rows.append((cells, measurement.metrics[logits]))
                name = ""  # said once
    return f"{title}\n{metrics_table(['', 'logits', 'T', *heads], rows, columns)}"


def data_dir_of(nets: list[Record], given: Path | None) -> Path:
    """Where data lie: as given, else where the first run found its own if that is still there."""
    own = nets[0].config.get("arguments", {}).get("data_dir")
    if given is None and own is not None and Path(own).is_dir():
        return Path(own)
    return given or Path(os.environ.get("KD_DATA") or "data")


def data_of(nets: list[Record], data_dir: Path, dataset: str | None = None) -> Dataset:
    """The data that all of the nets were trained on, in their splits. Raises UserError.

    `dataset` names their data set where it is no longer in its place.
    """
    arguments = nets[0].config.get("arguments", {})
    name = dataset or arguments.get("dataset", nets[0].dataset)
    data = load_dataset(
        name,
        data_dir,
        split_seed=nets[0].result["split_seed"],
        # Runs of older versions name neither.
        image_size=arguments.get("image_size"),
        skip_unreadable=arguments.get("skip_unreadable", False),
    )
    advice = f"--dataset {name}; name its own by that or --data_dir, and one data set at a time"
    return trained_on(nets, data, advice)


def trained_on(nets: list[Record], data: Dataset, advice: str) -> Dataset:
    """The data, where all of the nets were trained on them. Raises UserError."""
    for net in nets:
        if net.fingerprint != data.fingerprint:
            raise UserError(f"{net.folder}: was trained on other data than {advice}")
    return data


def logits_in_precision(net: Record, batch_size: int | None) -> Callable[[Tensor], Tensor]:
    """What gives a net's logits (N, K) of images uint8 (N, 3, H, W), in the run's precision.

    Raises UserError where there is a GPU that torch cannot use: the CPU would take hours.
    """
    check_gpu()
    accelerator = Accelerator(mixed_precision="no")  # the launcher's is not the run's
    device = accelerator.device
    precision = net.result["settings"]["mixed_precision"]
    forward = forward_of(net, device)

    def logits(images: Tensor) -> Tensor:
        no_labels = torch.zeros(len(images), dtype=torch.int64)
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "no"):
            return logits_of(
                forward,
                Split(images, no_labels),
                accelerator,
                batch_size=batch_size,
                title=net.title.strip(),
            )

    return logits


def out_of_distribution(
    nets: list[Record],
    on: str,
    data_dir: Path,
    dataset: str | None = None,
    batch_size: int | None = None,
) -> tuple[str, list[ByLogits]]:
    """How well each net tells its test images from those of `on`: svhn or an .npz file.

    The table, and what was measured of each net, ready for JSON. Raises UserError.
    """
    foreign = foreign_images(on, data_dir)
    test = data_of(nets, data_dir, dataset).test
    height, width = foreign.shape[2:]
    measured = []
    for net in nets:
        logits_of_images = logits_in_precision(net, batch_size)

        # A net of other image sizes fails in a way of its own: one image tells before all do.
        with refused(
            f"--on {on}: {net.title.strip()} cannot take its images of {height} x {width} pixels",
            "give images of the size that it was trained on",
        ):
            logits_of_images(foreign[:1])

        inside = logits_of_images(test.images)
        outside = logits_of_images(foreign)
        if not (inside.isfinite().all() and outside.isfinite().all()):
            raise UserError(
                f"--on {on}: {net.title.strip()} rules classes out by a logit of -inf, for which "
                "this is not defined; leave out --with-teacher"
            )
        measured.append(net.raw_and_scaled(ood_metrics, inside, outside))

    are_the_same = torch.equal(foreign, test.images.cpu())
    what = "THE TEST SPLIT ITSELF" if are_the_same else "out of distribution"
    title = (
        f"{printable(on)}: its {len(foreign)} images, {what}, mixed with "
        f"{len(test.labels)} of the test split, which are the positive class"
    )
    rows = [[Measurement(metrics)] for metrics in measured]
    return table(title, nets, rows, FOREIGN_COLUMNS), measured


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


def under_corruptions(
    nets: list[Record],
    on: str,
    names: list[str],
    data_dir: Path,
    dataset: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> tuple[str, list[ByCorruption]]:
    """Corruptions of these names, of the published ones or of our own, at every severity.

    `on`: a key of corruptions.SOURCES, or `corruptions` for our own. The table, and what was
    measured of each net, ready for JSON: with the clean images, and with the means over severities,
    over corruptions and over both. Raises UserError.
    """
    test = data_of(nets, data_dir, dataset).test
    if on in corruptions.SOURCES:
        title = corruptions.SOURCES[on].title
        corrupted = corruptions.published_corruptions(on, data_dir, test.labels, names)
    else:
        title = "own corruptions (not CIFAR-10-C)"
        corrupted = corruptions.own_corruptions(test.images, names, seed)

    clean = Corrupted(CLEAN, severity=0, images=test.images)
    bar = progress_bar(chain([clean], corrupted), on, total=1 + len(names) * len(SEVERITIES))
    measured = measure_stream(nets, bar, test.labels, batch_size)
    for by_corruption in measured:
        add_means(by_corruption, names)

    title += f": {len(names)} corruptions x {len(SEVERITIES)} severities"
    each = corruption_table(title, nets, measured, names)
    means = corruption_table("\nmeans over corruptions", nets, measured, [CLEAN, MEAN])
    return f"{each}\n{means}", measured


def measure_stream(
    nets: list[Record], stream: Iterator[Corrupted], labels: Tensor, batch_size: int | None
) -> list[ByCorruption]:
    """Every metric of each net on all that the stream corrupts, a split in memory at a time."""
    forwards = [logits_in_precision(net, batch_size) for net in nets]
    measured: list[ByCorruption] = [{} for _ in nets]
    for corrupted in stream:
        for net, forward, by_corruption in zip(nets, forwards, measured, strict=True):
            logits = forward(corrupted.images)
            by_severity = by_corruption.setdefault(corrupted.name, {})
            by_severity[str(corrupted.severity)] = net.raw_and_scaled(
                classification_metrics, logits, labels
            )
    return measured


def add_means(by_corruption: ByCorruption, names: list[str]) -> None:
    """Over the severities of each corruption, and over corruptions."""
    for name in names:
        severities = list(by_corruption[name].values())
        by_corruption[name][MEAN] = mean(severities)
    by_corruption[MEAN] = mean([by_corruption[name] for name in names])


def corruption_table(
    title: str, nets: list[Record], measured: list[ByCorruption], names: list[str]
) -> str:
    """A table of the corruptions that are named: a row for each of their severities."""
    measurements = []
    for by_corruption in measured:
        of_net = []
        for name in names:
            for severity, metrics in by_corruption[name].items():
                of_net.append(Measurement(metrics, about=(name, severity)))
        measurements.append(of_net)
    return table(title, nets, measurements, COLUMNS, heads=("corruption", "severity"))


def mean(values: list):
    """The mean of numbers, or of dictionaries with the same keys, key by key."""
    if isinstance(values[0], dict):
        return {key: mean([value[key] for value in values]) for key in values[0]}
    return sum(values) / len(values)
