"""The tables that cifar100.csv determines, those of README.md and most of those of cifar100.md.

python -m docs.results.cifar100_tables      from the repository's root
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t as student_t

from utils.analysis.rendering import markdown_table
from utils.columns import Column

RUNS = Path(__file__).with_name("cifar100.csv")
PRECISION_CHECK = "runs/bf16/scratch/cifar100/resnet8/NLL_seed=42"  # repeats a run in float32

# Rows: a run's net and name, and what the page calls it.
PUBLISHED = "Lambda=0.9_from_resnet20_cifar100_resnet20-chenyaofo"
OURS = "Lambda=0.9_from_resnet20_NLL"
TOGETHER = "Lambda=0.9_from_3xresnet20_NLL"
CALIBRATED = "FL+MDCA_gamma=1_beta=1"
NETS = {
    f"resnet8 KD_T=4_{PUBLISHED}": "student of the published teacher, T = 4",
    f"resnet8 KD_T=1_{PUBLISHED}": "the same at T = 1",
    f"resnet8 KD_T=4_{PUBLISHED}_Tcal=views": (
        "student of its logits divided by 1.590 (`views`), T = 4"
    ),
    f"resnet8 KD_T=4_{OURS}": "student of our ResNet-20 with NLL, T = 4",
    f"resnet8 KD_T=1_{OURS}": "the same at T = 1",
    f"resnet8 KD_T=4_{OURS}_Tcal=auto": "student of its logits divided by 1.19 (`auto`), T = 4",
    f"resnet8 KD_T=4_{TOGETHER}": "student of our three ResNet-20 with NLL together, T = 4",
    f"resnet8 KD_T=1_{TOGETHER}": "the same at T = 1",
    f"resnet8 KD_T=4_Lambda=0.9_from_resnet20_{CALIBRATED}": (
        "student of our ResNet-20 with FL+MDCA, T = 4"
    ),
    "resnet8 NLL": "from scratch, NLL",
    f"resnet8 {CALIBRATED}": "from scratch, FL+MDCA (γ = 1, β = 1)",
    "resnet8 AdaFocal": "from scratch, AdaFocal",
    "resnet8 NLL+CPC_beta=0.1_exclusion=10": "from scratch, CPC",
    "resnet20 NLL": "*teacher: our ResNet-20 with NLL*",
    "3xresnet20 NLL": "*teacher: the three together*",
    f"resnet20 {CALIBRATED}": "*teacher: our ResNet-20 with FL+MDCA*",
}
STUDENT = "resnet8 "  # and not resnet20
T4, T1, VIEWS, OURS_T4, OURS_T1, OURS_AUTO, *_, OURS_CALIBRATED = list(NETS)[:9]
SCRATCH = "resnet8 NLL"
SCRATCH_CALIBRATED = f"resnet8 {CALIBRATED}"
DIFFERENCES = {
    (T1, SCRATCH): "student at T = 1, from the net from scratch",
    (T4, SCRATCH): "student at T = 4, from the net from scratch",
    (OURS_T4, SCRATCH): "student of our NLL teacher at T = 4, from the net from scratch",
    (OURS_T1, SCRATCH): "the same at T = 1, from the net from scratch",
    (OURS_AUTO, SCRATCH): "student of its logits, divided (`auto`), from the net from scratch",
    (OURS_CALIBRATED, SCRATCH): "student of our FL+MDCA teacher, from the net from scratch",
    (SCRATCH_CALIBRATED, SCRATCH): "FL+MDCA, from NLL, both from scratch",
    (T1, SCRATCH_CALIBRATED): "student at T = 1, from FL+MDCA from scratch",
    (T4, SCRATCH_CALIBRATED): "student at T = 4, from FL+MDCA from scratch",
    (T1, T4): "student at T = 1, from that at T = 4",
    (VIEWS, T4): "student of the divided logits (`views`), from that as they are",
    (OURS_T1, OURS_T4): "student of our NLL teacher at T = 1, from that at T = 4",
    (OURS_AUTO, OURS_T4): "student of its divided logits (`auto`), from that as they are",
    (OURS_AUTO, OURS_T1): "student of its divided logits (`auto`), from that at T = 1",
    (OURS_CALIBRATED, OURS_T4): "student of our FL+MDCA teacher, from that of our NLL teacher",
    (OURS_CALIBRATED, OURS_T1): "student of our FL+MDCA teacher, from that of NLL at T = 1",
    (OURS_CALIBRATED, SCRATCH_CALIBRATED): (
        "student of our FL+MDCA teacher, from FL+MDCA from scratch"
    ),
}


class Metric(NamedTuple):
    logits: str  # raw or scaled
    name: str  # in cifar100.csv
    column: Column
    is_compared: bool = True


# No ECE is called the best: the lowest ones are such as calibrated nets have by chance.
METRICS = (
    Metric("raw", "top-1 %", Column("top-1 %", 1, 2, best="max")),
    Metric("raw", "ECE %", Column("ECE %, raw", 1, 2, best="")),
    Metric("scaled", "T", Column("T that suits it", 1, 3, best=""), is_compared=False),
    Metric("scaled", "ECE %", Column("ECE %, scaled", 1, 2, best=""), is_compared=False),
    Metric("raw", "NLL", Column("NLL, raw", 1, 3)),
    Metric("scaled", "NLL", Column("NLL, scaled", 1, 3)),
)

Run = dict[Metric, float]
Runs = dict[str, dict[str, Run]]  # of each net, seed by seed


def main() -> None:
    runs = read_runs()
    for table in tables_of_page(runs):
        print(table, end="\n\n")
    print("In README.md:", table_of_readme(runs), sep="\n\n")


def read_runs() -> Runs:
    runs: Runs = {net: {} for net in NETS}
    with RUNS.open(newline="") as file:
        for row in csv.DictReader(file):
            net = f"{row['model']} {row['label']}"
            if net not in runs or row["folder"] == PRECISION_CHECK:
                continue
            run = runs[net].setdefault(row["seeds"], {})
            for metric in METRICS:
                if metric.logits == row["logits"]:
                    run[metric] = float(row[metric.name])
    return runs


def tables_of_page(runs: Runs) -> list[str]:
    return [table_of_nets(runs, METRICS), table_of_differences(runs)]


def table_of_readme(runs: Runs) -> str:
    """Without the teachers, of which README has a sentence, and without raw NLL."""
    students = {net: of_net for net, of_net in runs.items() if net.startswith(STUDENT)}
    metrics = [metric for metric in METRICS if metric.column.head != "NLL, raw"]
    return table_of_nets(students, metrics)


def table_of_nets(runs: Runs, metrics: Sequence[Metric]) -> str:
    """Mean ± standard deviation over seeds; bold: the best mean of the students with every seed."""
    every_seed = max(len(of_net) for of_net in runs.values())
    ranked = [net for net in runs if net.startswith(STUDENT) and len(runs[net]) == every_seed]
    best = {metric: best_of(metric, ranked, runs) for metric in metrics}

    rows = []
    for net, of_net in runs.items():
        cells = [NETS[net], str(len(of_net))]
        for metric in metrics:
            cell = mean_and_spread(metric, of_net)
            cells.append(f"**{cell}**" if net == best[metric] else cell)
        rows.append(cells)
    return markdown_table(["ResNet-8", "n", *(metric.column.head for metric in metrics)], rows)


def best_of(metric: Metric, nets: list[str], runs: Runs) -> str | None:
    if not metric.column.best:
        return None
    choose = max if metric.column.best == "max" else min
    return choose(nets, key=lambda net: mean(run[metric] for run in runs[net].values()))


def mean_and_spread(metric: Metric, of_net: dict[str, Run]) -> str:
    values = [run[metric] for run in of_net.values()]
    spread = stdev(values) if len(values) > 1 else math.nan
    if metric.name == "T":
        spread = math.nan
    return metric.column.text_with_spread(mean(values), spread)


def table_of_differences(runs: Runs) -> str:
    """Over the seeds that both nets have, in pairs; 95 % intervals of Student's t."""
    compared = [metric for metric in METRICS if metric.is_compared]
    rows = []
    for (net, other), name in DIFFERENCES.items():
        seeds = runs[net].keys() & runs[other].keys()
        if len(seeds) < 2:  # no spread is known
            continue
        cells = [name, str(len(seeds))]
        for metric in compared:
            values = [runs[net][seed][metric] - runs[other][seed][metric] for seed in seeds]
            cells.append(difference(metric.column, values))
        rows.append(cells)
    return markdown_table(["ResNet-8", "seeds", *(metric.column.head for metric in compared)], rows)


def difference(column: Column, values: list[float]) -> str:
    """The mean and its interval; bold where 0 lies outside of it."""
    middle = mean(values)
    reach = stdev(values) / math.sqrt(len(values)) * student_t.ppf(0.975, df=len(values) - 1)
    sign = "+" if middle > 0 else ""
    interval = f"[{column.text(middle - reach)}, {column.text(middle + reach)}]"
    cell = f"{sign}{column.text(middle)} {interval}".replace("-", "−")
    return f"**{cell}**" if abs(middle) > reach else cell


if __name__ == "__main__":
    main()
