"""How many images a second several runs of train_teacher.py train on, side by side."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.benchmarking.contenders import RATE
from utils.columns import text_table
from utils.data import Dataset
from utils.program import RunFailed
from utils.program.bars import progress_bar
from utils.program.source import ROOT

TRAIN_TEACHER = ROOT / "train_teacher.py"
MODEL = "resnet8"
SECONDS = 30  # of each run: starting takes some 8, and they are to overlap
FEWEST_EPOCHS = 6


def runs_at_once(
    numbers: Sequence[int], data: Dataset, batch_size: int, mode: str, seconds: float
) -> str:
    """A table: for each number of runs, what they train on in a second, all together.

    `mode`: their --step; `seconds`: how long each run is to last, roughly.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "random.npz")
        write_npz(file, data)
        command = [
            sys.executable,
            TRAIN_TEACHER,
            f"--dataset={file}",
            f"--model={MODEL}",
            f"--lr={RATE}",
            f"--step={mode}",
            f"--train-batch-size={batch_size}",
        ]
        [alone] = histories([*command, "--epochs=3"], Path(folder, "alone"), 1)
        epochs = epochs_of(alone, seconds)
        for number in progress_bar(numbers, "runs at once"):
            root = Path(folder, str(number))
            runs = histories([*command, f"--epochs={epochs}"], root, number)
            rows.append([str(number), f"{total_rate(runs):,.0f}"])
    return text_table(["runs at once", f"{MODEL}, images/s"], rows)


def write_npz(file: Path, data: Dataset) -> None:
    """What --dataset reads."""
    np.savez(
        file,
        x_train=data.train.images.numpy(),
        y_train=data.train.labels.numpy(),
        x_test=data.test.images.numpy(),
        y_test=data.test.labels.numpy(),
    )


def epochs_of(records: list[dict], seconds: float) -> int:
    """As many epochs as make that long a run, judged by the records of a short one."""
    fastest = min(record["seconds"] for record in records[1:])
    return max(FEWEST_EPOCHS, math.ceil(seconds / fastest))


def histories(command: list, root: Path, number: int) -> list[list[dict]]:
    """The epochs' records of that many runs below `root`, all started at once. RunFailed."""
    # Threads that are more than the cores wait for each other.
    threads = max(1, os.cpu_count() // number)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    runs = []
    for seed in range(number):
        line = [*command, f"--checkpoint={root}", f"--seed={seed}"]
        runs.append(subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment))
    # All are waited for, also where one has failed: none is to outlive its folder.
    exit_codes = [run.wait() for run in runs]
    if any(exit_codes):
        raise RunFailed("a run has ended with an error, which stands above; try fewer at once")
    return [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in root.rglob("metrics.jsonl")
    ]


def total_rate(runs: list[list[dict]]) -> float:
    """The sum of the runs' median rates, each in its middle half: there all run side by side."""
    total = 0.0
    for records in runs:
        quarter = len(records) // 4
        middle = records[quarter : len(records) - quarter]
        total += float(np.median([record["images_per_second"] for record in middle]))
    return total
