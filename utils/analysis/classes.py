"""Class by class: what the runs of a group measure on the test images of each class (--classes)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.analysis.csv_files import csv_text
from utils.analysis.groups import Group
from utils.analysis.record import KINDS, Record
from utils.analysis.rendering import Table, TableCell
from utils.analysis.rows import statistic
from utils.analysis.sections import Section
from utils.calibration.binning import bin_of
from utils.columns import Column, printable

BINS = 15
PERCENT = Column("%", 100, 2)
NAMES = {"accuracy": "accuracy %", "confidence": "confidence %", "ece": "ECE %"}
NOTES = [
    "Test split, the images of one class in each row. Confidence is the mean probability of the "
    "predicted class; scaled: logits divided by the temperature that fits the validation split "
    "best. Most frequent confusion: the class that most of the wrong predictions name, and the "
    "share of the class's images that they are. Mean ± standard deviation of the runs.",
    "Beware: images are chosen by their label here, so not even a calibrated net has an ECE of 0 "
    "in a class, and few images raise it.",
]


@dataclass(frozen=True)
class Classes:
    """What the runs of a group measured of each class of test.

    `values`: by kind of logits, then by a key of NAMES, (runs, K): fractions, NaN of a class
    without images.
    `confusion`: how many images of a class (rows) were taken for which (columns), summed over runs.
    """

    names: list[str]
    images: np.ndarray  # (K,)
    values: dict[str, dict[str, np.ndarray]]
    confusion: np.ndarray  # (K, K)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The values by a table's heads. Scaling changes no prediction: no accuracy of its own."""
        columns = {}
        for kind, by_name in self.values.items():
            for name, values in by_name.items():
                if kind == "raw":
                    columns[NAMES[name]] = values
                elif name != "accuracy":
                    columns[f"{kind} {NAMES[name]}"] = values
        return columns

    def most_frequent_confusion(self, label: int) -> tuple[int, float] | None:
        """The class, and which share of the images of `label` it is; None without a wrong one."""
        wrong = self.confusion[label].copy()
        wrong[label] = 0
        if not wrong.any():
            return None
        return int(wrong.argmax()), wrong.max() / self.confusion[label].sum()


def classes_of(group: Group) -> Classes | None:
    """None where a run of the group has no stored predictions."""
    if any(record.probabilities("raw") is None for record in group.records):
        return None
    kinds = [kind for kind in KINDS if kind in group.first.temperatures]
    _, labels = group.first.stored("test")
    count = group.first.result["num_classes"]
    return Classes(
        names=class_names(group.first),
        images=torch.bincount(labels.long(), minlength=count).numpy(),
        values={kind: values_of_runs(group.records, kind) for kind in kinds},
        confusion=summed_confusion(group.records),
    )


def values_of_runs(records: list[Record], kind: str) -> dict[str, np.ndarray]:
    """By a key of NAMES, (runs, K)."""
    runs = []
    for record in records:
        probs, labels = record.probabilities(kind)
        runs.append(values_by_class(probs, labels))
    return {name: np.stack([run[name] for run in runs]) for name in NAMES}


def summed_confusion(records: list[Record]) -> np.ndarray:
    """(K, K): how many images of a class (rows) the runs took for which (columns)."""
    count = records[0].result["num_classes"]
    total = np.zeros((count, count), dtype=np.int64)
    for record in records:
        probs, labels = record.probabilities("raw")
        cells = labels.long() * count + probs.argmax(dim=1)
        total += torch.bincount(cells, minlength=count**2).view(count, count).numpy()
    return total


def class_names(record: Record) -> list[str]:
    """As the run's config.json has them, else numbers."""
    count = record.result["num_classes"]
    names = record.config.get("class_names")
    if isinstance(names, list) and len(names) == count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]


def values_by_class(probs: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Accuracy, mean confidence and ECE of the images of each class (K,), NaN where it has none.

    Of probabilities (N, K), float64, and labels (N,). The ECE has the bins of
    `utils.calibration.metrics.ece`.
    """
    count = probs.shape[1]
    labels = labels.long()
    confidence = probs.amax(dim=1)
    right = (probs.argmax(dim=1) == labels).double()
    images = torch.bincount(labels, minlength=count).double()

    cells = labels * BINS + bin_of(confidence, BINS)
    gaps = torch.bincount(cells, weights=right - confidence, minlength=count * BINS)
    sums = {
        "accuracy": torch.bincount(labels, weights=right, minlength=count),
        "confidence": torch.bincount(labels, weights=confidence, minlength=count),
        "ece": gaps.view(count, BINS).abs().sum(dim=1),
    }
    return {name: (total / images).numpy() for name, total in sums.items()}


def class_tables(section: Section) -> list[Table]:
    """A table of each printed net, a row of each class."""
    return [class_table(group) for group in section.printed]


def class_table(group: Group) -> Table:
    title = f"{printable(group.full_name)}, class by class"
    classes = classes_of(group)
    if classes is None:
        return Table([title, ""], [], ["No test logits are stored of this net."], kind="metrics")
    columns = classes.columns
    rows = []
    for label, class_name in enumerate(classes.names):
        row = [TableCell(printable(class_name)), TableCell(str(classes.images[label]))]
        for values in columns.values():
            row.append(TableCell(text_of(values[:, label])))
        row.append(TableCell(confusion_text(classes, label)))
        rows.append(row)
    head = [title, "images", *columns, "most frequent confusion"]
    return Table(head, rows, NOTES, kind="metrics")


def text_of(values: np.ndarray) -> str:
    """Mean and spread of one value for each run, in percent."""
    runs = statistic(values)
    if math.isnan(runs.mean):  # a class without images
        return "–"
    return PERCENT.text_with_spread(runs.mean, runs.sd)


def confusion_text(classes: Classes, label: int) -> str:
    confused = classes.most_frequent_confusion(label)
    if confused is None:
        return "–"
    other, share = confused
    return f"{printable(classes.names[other])} ({PERCENT.text(share)} %)"


def classes_csv(sections: list[Section]) -> str:
    """A line for each net and class, with all digits."""
    lines = []
    for section in sections:
        for group in section.printed:
            classes = classes_of(group)
            if classes is not None:
                lines += csv_lines(section, group, classes)
    return csv_text(lines)


def csv_lines(section: Section, group: Group, classes: Classes) -> list[dict[str, str | int]]:
    lines = []
    for label, class_name in enumerate(classes.names):
        line = {
            "dataset": section.title,
            "net": printable(group.full_name),
            "n": len(group.records),
            "class": printable(class_name),
            "images": int(classes.images[label]),
        }
        for kind, by_name in classes.values.items():
            for name, values in by_name.items():
                mean = values[:, label].mean()
                line[f"{kind} {NAMES[name]}"] = "" if math.isnan(mean) else f"{100 * mean:.10g}"
        confused = classes.most_frequent_confusion(label)
        if confused is not None:
            other, share = confused
            line["most frequent confusion"] = printable(classes.names[other])
            line["its share %"] = f"{100 * share:.10g}"
        lines.append(line)
    return lines
