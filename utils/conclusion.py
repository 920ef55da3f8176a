"""The end of a run: the test split is read, for the only time, and the result is written."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.data import Split
from utils.data.views import normalise
from utils.evaluation import logits_of_splits
from utils.program.files import atomic, write_json
from utils.program.source import MINUTES
from utils.run_files import is_third_party
from utils.runs import Run
from utils.split_metrics import evaluate, metrics_of
from utils.teachers.teacher import Teacher
from utils.trackers import finish_tracker


def arrays_of(name: str, logits: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """As predictions.npz has the logits of a net: float32."""
    return {f"{name}_{split}_logits": values.numpy() for split, values in logits.items()}


def conclude(run: Run, net: nn.Module, history: list[dict], teacher: Teacher | None = None) -> None:
    """Measure the best and the last epoch and the teacher; write predictions, picture and result.

    `net` ends with the weights of the last epoch.
    """
    accelerator = run.accelerator
    data = run.data
    batch_size = run.experiment.run.test_batch_size
    result = {
        **run.identity,
        "settings": run.settings,
        "seconds": sum(record["seconds"] for record in history),
        "finished": time.strftime(MINUTES),
    }
    arrays = {
        "val_labels": data.val.labels.cpu().numpy(),
        "test_labels": data.test.labels.cpu().numpy(),
    }

    def forward(images: Tensor) -> Tensor:
        return net(normalise(images, data.mean, data.std))

    # The one time that a run reads the test split.
    splits = {"val": data.val, "test": data.test}
    net.eval()
    for name in ("best", "last"):
        saved = run.load(f"model_{name}.pth")
        net.load_state_dict(saved["state_dict"])
        logits = logits_of_splits(forward, data, accelerator, batch_size, name=name)
        result[name] = {"epoch": saved["epoch"], **metrics_of(logits, splits)}
        arrays |= arrays_of(name, logits)

    if teacher is not None:
        logits = teacher.logits_of_splits(data, accelerator, batch_size)
        result["teacher"] = teacher_result(teacher, logits, splits)
        arrays |= arrays_of("teacher", logits)

    if run.is_main:
        write_conclusion(run.folder, result, arrays)
        finish_tracker(run, result)


def teacher_result(teacher: Teacher, logits: dict[str, Tensor], splits: dict[str, Split]) -> dict:
    """What a student's result says of its teacher: who it is, and how it does on these splits.

    `logits`: by split, before the temperature; that of test or both may be unknown.
    """
    result = {
        **teacher.identity,
        "seen": teacher.confidences,
        **metrics_of(logits, splits),
    }
    if teacher.temperature != 1 and "test" in logits:
        tempered = teacher.tempered(logits["test"])
        result["test"]["tempered"] = evaluate(tempered, splits["test"])
    return result


def write_conclusion(folder: Path, result: dict, arrays: dict[str, np.ndarray]) -> None:
    """The result comes last: it says that the run is complete."""
    from utils.calibration.diagram import reliability_diagrams  # matplotlib takes a second to load

    with atomic(folder / "predictions.npz") as file:
        np.savez(file, **arrays)
    with atomic(folder / "reliability.png") as file:
        reliability_diagrams(reliability_panels(result, arrays), file)
    write_json(folder / "result.json", result)


def reliability_panels(result: dict, arrays: dict[str, np.ndarray]) -> list[tuple]:
    """(title, probabilities, labels) of the test split: best epoch and teacher, raw and scaled.

    A third party's teacher is raw only (see `is_third_party`), and absent where it has no logits.
    """
    titles = {"best": result["model"]}
    if "teacher_test_logits" in arrays:
        titles["teacher"] = f"teacher {result['teacher']['model']}"
    panels = []
    for name, title in titles.items():
        temperatures = {"raw": 1.0}
        if not is_third_party(result[name]):
            own_temperature = result[name]["temperature"]
            temperatures[f"T = {own_temperature:.2f}"] = own_temperature
        logits = torch.from_numpy(arrays[f"{name}_test_logits"]).double()
        labels = torch.from_numpy(arrays["test_labels"])
        for scaling, temperature in temperatures.items():
            probabilities = (logits / temperature).softmax(dim=1)
            panels.append((f"{title}, {scaling}", probabilities, labels))
    return panels
