"""The end of a run: the test split is read, for the only time, and the result is written."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from utils.calibration.diagram import reliability_diagrams
from utils.calibration.temperature import fit_temperature
from utils.data import Dataset
from utils.data.views import normalise
from utils.evaluation import evaluate, logits_of, without_infinity
from utils.program.files import atomic, write_json
from utils.program.source import MINUTES
from utils.run_files import is_third_party
from utils.runs import Run
from utils.teachers import Teacher


class Measured:
    """Validation and test logits (N, K) of a net, and every metric of them.

    The temperature is the one that suits the validation logits best.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Tensor], Tensor],
        data: Dataset,
        accelerator: Accelerator,
        batch_size: int | None,
    ):
        self.name = name
        self.data = data
        self.val_logits = logits_of(
            forward, data.val, accelerator, batch_size, title=f"{name}: validation split"
        )
        self.test_logits = logits_of(
            forward, data.test, accelerator, batch_size, title=f"{name}: test split"
        )
        self.temperature, self.at_bound = fit_temperature(
            without_infinity(self.val_logits), data.val.labels
        )

    def metrics(self) -> dict:
        """As result.json has them: fractions."""
        return {
            "temperature": self.temperature,
            "temperature_at_bound": self.at_bound,
            "val": evaluate(self.val_logits, self.data.val),
            "test": {
                "raw": evaluate(self.test_logits, self.data.test),
                "scaled": evaluate(self.test_logits, self.data.test, self.temperature),
            },
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """As predictions.npz has them: float32."""
        return {
            f"{self.name}_val_logits": self.val_logits.numpy(),
            f"{self.name}_test_logits": self.test_logits.numpy(),
        }


def conclude(
    run: Run,
    accelerator: Accelerator,
    net: nn.Module,
    data: Dataset,
    history: list[dict],
    teacher: Teacher | None = None,
) -> None:
    """Measure the best and the last epoch and the teacher; write predictions, picture and result.

    `net` ends with the weights of the last epoch.
    """
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

    net.eval()
    for name in ("best", "last"):
        saved = run.load(f"model_{name}.pth")
        net.load_state_dict(saved["state_dict"])
        measured = Measured(name, forward, data, accelerator, batch_size)
        result[name] = {"epoch": saved["epoch"], **measured.metrics()}
        arrays |= measured.arrays()

    if teacher is not None:
        measured = Measured("teacher", teacher.logits, data, accelerator, batch_size)
        result["teacher"] = {**teacher.identity, "seen": teacher.seen, **measured.metrics()}
        arrays |= measured.arrays()
        if teacher.temperature != 1:
            tempered = teacher.tempered(measured.test_logits)
            result["teacher"]["test"]["tempered"] = evaluate(tempered, data.test)

    if run.is_main:
        write_conclusion(run.folder, result, arrays)


def write_conclusion(folder: Path, result: dict, arrays: dict[str, np.ndarray]) -> None:
    """The result comes last: it says that the run is complete."""
    with atomic(folder / "predictions.npz") as file:
        np.savez(file, **arrays)
    with atomic(folder / "reliability.png") as file:
        reliability_diagrams(reliability_panels(result, arrays), file)
    write_json(folder / "result.json", result)


def reliability_panels(result: dict, arrays: dict[str, np.ndarray]) -> list[tuple]:
    """(title, probabilities, labels) of the test split: best epoch and teacher, raw and scaled.

    A third party's teacher is raw only: see `is_third_party`.
    """
    titles = {"best": result["model"]}
    if "teacher" in result:
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
