"""Finished runs under shift, on foreign data, and against known label distributions.

    python -m scripts.evaluate RUN... --on cifar10c       CIFAR-10-C in --data_dir (or cifar100c)
    python -m scripts.evaluate RUN... --on corruptions    six corruptions of the test split
    python -m scripts.evaluate RUN... --on svhn           out of distribution (or FILE.npz)
    python -m scripts.evaluate RUN... --on cifar10h       how people label CIFAR-10's test images
    python -m scripts.evaluate RUN... --on synthetic      the posterior that the labels come from

Each net has a raw and a temperature-scaled row; the temperature is the run's own, fitted on its
validation split. --write puts evaluation_*.json beside each run, --out draws corruptions as a box
plot by severity.
"""

import difflib
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from utils.analysis.corruptions import (
    OWN,
    PUBLISHED,
    SEVERITIES,
    SOURCES,
    Corrupted,
    own_corruptions,
    published_corruptions,
)
from utils.analysis.figures import Series, severity_boxes
from utils.analysis.records import MeasuredNet as Subject
from utils.analysis.records import measured_nets as find_subjects
from utils.analysis.records import write_beside
from utils.analysis.shift import foreign_images, human_labels
from utils.calibration.distributions import (
    entropy,
    label_distribution_metrics,
    ood_metrics,
    rank_correlation,
)
from utils.calibration.metrics import classification_metrics
from utils.data import Split, dataset_label, load_dataset
from utils.evaluation import predict
from utils.files import atomic
from utils.options import CommandLine, count, location, name, path, whole
from utils.program import UserError, one_line_errors
from utils.tables import COLUMNS, Column, printable, text_table

DISTRIBUTION = {
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
FOREIGN = {
    f"{score}_{key}": Column(f"{short} {head}", 100, 2, best)
    for score, short in (("confidence", "conf."), ("entropy", "entr."))
    for key, head, best in (
        ("auroc", "AUROC %", "max"),
        ("aupr_in", "AUPR-in %", "max"),
        ("aupr_out", "AUPR-out %", "max"),
        ("fpr95", "FPR95 %", "min"),
    )
}
BOXES = ("top1", "ece", "nll")
CLEAN, MEAN = "clean", "mean"


class Found(NamedTuple):
    """What an evaluation says of each subject, ready for JSON, and the table of all of them."""

    about: dict
    measured: list[dict]
    text: str


def check_target(text: str) -> str:
    if text in EVALUATIONS or (text.endswith(".npz") and os.path.isfile(os.path.expanduser(text))):
        return text
    if text.endswith(".npz"):
        raise ValueError(f"{text}: there is no such file; check the path")
    close = difflib.get_close_matches(text, EVALUATIONS, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"{text!r}: {hint}It is one of {', '.join(EVALUATIONS)}, or an .npz file")


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(
        prog="python -m scripts.evaluate",
        description="Evaluate finished runs under shift, on foreign data, or against known label "
        "distributions.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=location, metavar="RUN", help="run folders, or folders above them")
    add(
        "--on",
        required=True,
        type=name(check_target),
        metavar="WHAT",
        help="cifar10c, cifar100c: the published corruptions; corruptions: our own; svhn or an "
        ".npz file (its x_test): out of distribution; cifar10h: human labels; synthetic: the known "
        "posterior",
    )
    add(
        "--data_dir",
        type=location,
        default=Path(os.environ.get("KD_DATA") or "data"),
        help="where CIFAR-10-C/, cifar10h/, SVHN and the runs' data sets lie ($KD_DATA sets the "
        "default)",
    )
    add("--epoch", choices=("best", "last"), default="best", help="best: by validation top-1")
    add(
        "--with-teacher",
        action="store_true",
        help="also run each student's teacher, from where its command found it (with cifar10h and "
        "synthetic it is always there)",
    )
    add("--test-batch-size", type=count, help="images per step (default: 1000, on a CPU 128)")
    shift = parser.add_argument_group("corruptions")
    shift.add_argument(
        "--corruptions",
        nargs="+",
        choices=dict.fromkeys((*OWN, *PUBLISHED)),
        metavar="NAME",
        help=f"only these; ours are {', '.join(OWN)}",
    )
    shift.add_argument("--seed", type=whole, help="--on corruptions: of the noise (default: 0)")
    shift.add_argument(
        "--dataset",
        type=path,
        help="--on corruptions: the run's .npz file where it is no longer in its place",
    )
    shift.add_argument("--out", type=location, metavar="FILE.png", help="a box plot by severity")
    add("--write", action="store_true", help="also write evaluation_*.json into the run folders")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: Namespace) -> None:
    """Refuse flags that this --on does not read, and names that it does not know."""
    ours, shift = args.on == "corruptions", EVALUATIONS.get(args.on) is under_corruptions
    read = {"seed": ours, "dataset": ours, "corruptions": shift, "out": shift}
    for flag, is_read in read.items():
        if getattr(args, flag) is not None and not is_read:
            raise UserError(f"--{flag} has no effect with --on {args.on}; leave it out")
    known = list(OWN if ours else PUBLISHED)
    args.corruptions = list(dict.fromkeys(args.corruptions or known))
    unknown = [one for one in args.corruptions if one not in known]
    if unknown:
        raise UserError(f"--corruptions {unknown[0]}: --on {args.on} has only {', '.join(known)}")
    if args.out is not None:
        if args.out.suffix != ".png":
            raise UserError(f"--out {args.out}: give the name of a .png file")
        if os.path.isdir(args.out) or not os.path.isdir(args.out.absolute().parent):
            raise UserError(f"--out {args.out}: give a file in a folder that exists")


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    evaluation = EVALUATIONS.get(args.on, out_of_distribution)
    stored = evaluation in (against_humans, against_posterior)
    subjects = find_subjects(args.runs, args.epoch, args.with_teacher or stored)
    found = evaluation(args, subjects)
    print(found.text)
    for subject in subjects:
        if subject.measured["temperature_at_bound"]:
            name = subject.title.strip()
            print(f"{name}: T lies at the bound of its range, do not trust its scaled rows")
    if args.out is not None:
        draw(args.out, subjects, found.measured)
        print(f"written: {args.out}")
    if args.write:
        about = {"on": args.on, **found.about}
        file = f"evaluation_{dataset_label(args.on)}.json"
        for subject, measured in zip(subjects, found.measured, strict=True):
            part = {subject.owner: {"temperature": subject.temperature, **measured}}
            print(f"written: {write_beside(subject.record, file, about, part)}")


def both_ways(measure: Callable[[float], dict[str, float]], subject: Subject) -> dict[str, dict]:
    """Raw and temperature-scaled: `measure` is given the temperature."""
    return {"raw": measure(1.0), "scaled": measure(subject.temperature)}


def flat_table(
    title: str, columns: dict[str, Column], subjects: list[Subject], measured: list[dict]
) -> str:
    """Two rows for each subject. A metric that none of them has gets no column."""
    known = [name for name in columns if any(name in ways["raw"] for ways in measured)]
    rows = []
    for subject, ways in zip(subjects, measured, strict=True):
        for way, metrics in ways.items():
            temperature = subject.temperature if way == "scaled" else 1.0
            cells = [columns[name].text(metrics[name]) if name in metrics else "" for name in known]
            rows.append([subject.title if way == "raw" else "", way, f"{temperature:.3f}", *cells])
    return f"{title}\n" + text_table(
        ["", "logits", "T", *(columns[name].head for name in known)], rows
    )


# Against label distributions, from stored logits


def against_humans(args: Namespace, subjects: list[Subject]) -> Found:
    title = (
        "CIFAR-10H: test images against how people label them (cal. error: mean |confidence - "
        "share of people who agree|; entropy in nats, gap: net - people)"
    )
    distributions = [human_labels(args.data_dir, subject.test[1]) for subject in subjects]
    return against(title, subjects, distributions)


def against_posterior(args: Namespace, subjects: list[Subject]) -> Found:
    data = load_dataset("synthetic", args.data_dir)
    for subject in subjects:
        if subject.record.result.get("fingerprint") != data.fingerprint:
            raise UserError(
                f"--on synthetic: {subject.record.folder} was trained on "
                f"{subject.record.result['dataset']}, whose posterior is not known, or on an older "
                "version of synthetic; name a run of --dataset synthetic"
            )
    title = (
        "synthetic: test images against the posterior that their labels are drawn from "
        "(cal. error: mean |confidence - its probability|; entropy in nats, gap: net - posterior)"
    )
    return against(title, subjects, [data.test.posterior] * len(subjects))


def against(title: str, subjects: list[Subject], distributions: list[Tensor]) -> Found:
    measured = []
    for subject, distribution in zip(subjects, distributions, strict=True):
        logits = subject.test[0]
        ways = both_ways(partial(label_distribution_metrics, logits, distribution), subject)
        if subject.owner != "teacher" and "teacher" in subject.record.result:
            teacher = Subject(subject.record, "teacher", "")
            for way, metrics in ways.items():
                own, other = (entropies(one, way) for one in (subject, teacher))
                metrics["teacher_entropy_correlation"] = rank_correlation(own, other)
        measured.append(ways)
    return Found({}, measured, flat_table(title, DISTRIBUTION, subjects, measured))


def entropies(subject: Subject, way: str) -> Tensor:
    temperature = subject.temperature if way == "scaled" else 1.0
    return entropy((subject.test[0].double() / temperature).softmax(dim=1))


# On other images


def out_of_distribution(args: Namespace, subjects: list[Subject]) -> Found:
    images = foreign_images(args.on, args.data_dir)
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    accelerator = Accelerator()
    measured = []
    for subject in subjects:
        net, mean, std = subject.load(accelerator.device)
        batch_size, title = args.test_batch_size, subject.title
        outside = predict(net, split, mean, std, batch_size, accelerator, title)
        measured.append(both_ways(partial(ood_metrics, subject.test[0], outside), subject))
    inside = {len(subject.test[1]) for subject in subjects}
    title = (
        f"{printable(args.on)}: its {len(images)} images, out of distribution, mixed with "
        f"{' or '.join(map(str, sorted(inside)))} of the test split, which are the positive class"
    )
    about = {"images": len(images)}
    return Found(about, measured, flat_table(title, FOREIGN, subjects, measured))


def under_corruptions(args: Namespace, subjects: list[Subject]) -> Found:
    """Each corrupted image is made once, for all nets that were trained on the same data."""
    together: dict[str, list[Subject]] = {}
    for subject in subjects:
        together.setdefault(subject.record.result["fingerprint"], []).append(subject)
    # Every stream is opened before the first net is run: an absent file is said at once.
    streams = [corrupted_images(args, same[0]) for same in together.values()]
    found = {}
    steps = len(args.corruptions) * len(SEVERITIES) * len(subjects)
    with tqdm(total=steps, desc="corruptions", leave=False, disable=None) as bar:
        for same, stream in zip(together.values(), streams, strict=True):
            found |= measure_stream(args, same, stream, bar)
    measured = [
        {
            CLEAN: both_ways(partial(classification_metrics, *subject.test), subject),
            "corruptions": found[subject],
            "means": means_of(found[subject]),
        }
        for subject in subjects
    ]
    own = "own corruptions of the test split, made here (not CIFAR-10-C)"
    title = SOURCES[args.on][0] if args.on in SOURCES else own
    title = f"{title}: {len(args.corruptions)} corruptions x {len(SEVERITIES)} severities"
    about = {"title": title, "corruptions": args.corruptions, "seed": args.seed or 0}
    return Found(about, measured, f"{title}\n{corruption_tables(subjects, measured)}")


def measure_stream(
    args: Namespace, subjects: list[Subject], stream: Iterator[Corrupted], bar: tqdm
) -> dict[Subject, dict]:
    """Metrics of subjects of one data set: subject -> corruption -> severity -> way."""
    accelerator = Accelerator()
    nets = {subject: subject.load(accelerator.device) for subject in subjects}
    found = {subject: {} for subject in subjects}
    for corrupted in stream:
        split = Split(corrupted.images, subjects[0].test[1])
        title = f"{corrupted.name} {corrupted.severity}"
        for subject, (net, mean, std) in nets.items():
            logits = predict(net, split, mean, std, args.test_batch_size, accelerator, title)
            ways = both_ways(partial(classification_metrics, logits, split.labels), subject)
            found[subject].setdefault(corrupted.name, {})[str(corrupted.severity)] = ways
            bar.update()
    return found


def corrupted_images(args: Namespace, subject: Subject) -> Iterator[Corrupted]:
    """The corruptions asked for, of the subject's test split. Raises UserError."""
    result = subject.record.result
    if args.on in SOURCES:
        return published_corruptions(args.on, args.data_dir, subject.test[1], args.corruptions)
    given = subject.record.config.get("arguments", {}).get("dataset", result["dataset"])
    data = load_dataset(args.dataset or given, args.data_dir)
    if data.fingerprint != result["fingerprint"]:
        raise UserError(
            f"--on corruptions: {subject.record.folder} was trained on other data than "
            f"{args.dataset or given} holds now; name its data by --dataset or --data_dir"
        )
    return own_corruptions(data.test.images, args.corruptions, args.seed or 0)


def means_of(corruptions: dict[str, dict]) -> dict[str, dict]:
    """Over corruptions, for each severity and for all of them."""
    by_severity = {
        str(severity): mean([by_name[str(severity)] for by_name in corruptions.values()])
        for severity in SEVERITIES
    }
    return by_severity | {MEAN: mean(list(by_severity.values()))}


def mean(measured: list[dict[str, dict]]) -> dict[str, dict]:
    return {
        way: {key: sum(one[way][key] for one in measured) / len(measured) for key in metrics}
        for way, metrics in measured[0].items()
    }


def corruption_tables(subjects: list[Subject], measured: list[dict]) -> str:
    """Every corruption and severity, and then the means over corruptions."""
    known = [name for name in COLUMNS if name in measured[0][CLEAN]["raw"]]
    heads = [COLUMNS[name].head for name in known]

    def row(before: list[str], metrics: dict[str, float]) -> list[str]:
        return [*before, *(COLUMNS[name].text(metrics[name]) for name in known)]

    every, means = [], []
    for subject, one in zip(subjects, measured, strict=True):
        for way in ("raw", "scaled"):
            for corruption, by_name in one["corruptions"].items():
                for severity, ways in (by_name | {MEAN: mean(list(by_name.values()))}).items():
                    every.append(row([subject.title, way, corruption, severity], ways[way]))
            for severity, ways in ({CLEAN: one[CLEAN]} | one["means"]).items():
                means.append(row([subject.title, way, severity], ways[way]))
    every_head = ["", "logits", "corruption", "severity", *heads]
    means_head = ["means over corruptions", "logits", "severity", *heads]
    return "\n\n".join(
        text_table(head, without_repeats(rows))
        for head, rows in ((every_head, every), (means_head, means))
    )


def without_repeats(rows: list[list[str]]) -> list[list[str]]:
    """The name of a net only in its first row."""
    before = ["", *(row[0] for row in rows)]
    return [
        ["" if row[0] == above else row[0], *row[1:]]
        for row, above in zip(rows, before, strict=False)
    ]


def draw(path: Path, subjects: list[Subject], measured: list[dict]) -> None:
    series = []
    for place, (subject, one) in enumerate(zip(subjects, measured, strict=True)):
        by_severity = {CLEAN: [one[CLEAN]]} | {
            severity: [by_name[severity] for by_name in one["corruptions"].values()]
            for severity in map(str, SEVERITIES)
        }
        for way in ("raw", "scaled"):
            boxes = {
                metric: [[ways[way][metric] for ways in found] for found in by_severity.values()]
                for metric in BOXES
            }
            title = f"{subject.title.strip()}, {way}"
            series.append(Series(title, place, way == "scaled", boxes))
    with atomic(path) as file:
        severity_boxes(series, list(by_severity), {name: COLUMNS[name] for name in BOXES}, file)


EVALUATIONS: dict[str, Callable[[Namespace, list[Subject]], Found]] = {
    "cifar10c": under_corruptions,
    "cifar100c": under_corruptions,
    "corruptions": under_corruptions,
    "svhn": out_of_distribution,
    "cifar10h": against_humans,
    "synthetic": against_posterior,
}


if __name__ == "__main__":
    with one_line_errors("python -m scripts.evaluate"):
        main()
