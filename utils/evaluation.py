"""Logits of a whole split, every metric from them, and the result of a run."""

import math

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from utils.calibration.diagram import reliability_diagrams
from utils.calibration.metrics import classification_metrics, posterior_metrics
from utils.calibration.temperature import fit_temperature
from utils.data import Dataset, Split
from utils.data.views import normalise
from utils.files import atomic, write_json
from utils.runs import Run
from utils.teachers import Teacher


def usual_batch_size(device: torch.device) -> int:
    """Images at once without gradients; more overflow a CPU's caches, at half the rate."""
    return 128 if device.type == "cpu" else 1000


@torch.inference_mode()
def predict(
    net: nn.Module,
    split: Split,
    mean,
    std,
    batch_size: int | None,
    accelerator: Accelerator,
    title: str | None = None,
) -> torch.Tensor:
    """Logits (N, K) of a split, float32 on the CPU, in its order, the same on every process.

    `batch_size` None is the usual one; a progress bar is shown where there is a `title` for it.
    """
    net.eval()
    batch_size = batch_size or usual_batch_size(accelerator.device)
    total, world = len(split.labels), accelerator.num_processes
    # Equal shares can be gathered; the last image stands in where there are not enough.
    share = math.ceil(total / world)
    mine = torch.arange(share) + accelerator.process_index * share
    images = split.images[mine.clamp(max=total - 1).to(split.images.device)]
    logits = []
    hidden = title is None or not accelerator.is_main_process
    for batch in tqdm(images.split(batch_size), title, leave=False, disable=hidden or None):
        with accelerator.autocast():
            output = net(normalise(batch.to(accelerator.device), mean, std))
        logits.append(output.float())
    return accelerator.gather(torch.cat(logits))[:total].cpu()


def evaluate(logits: torch.Tensor, split: Split, temperature: float = 1.0) -> dict[str, float]:
    """Every metric of a split's logits (fractions), those against a known posterior included."""
    metrics = classification_metrics(logits, split.labels.cpu(), temperature)
    if split.posterior is not None:
        metrics |= posterior_metrics(logits, split.posterior, temperature)
    return metrics


def calibrate(val_logits: torch.Tensor, test_logits: torch.Tensor, data: Dataset) -> dict:
    """Test metrics raw and with the temperature that suits the validation logits best."""
    temperature, at_bound = fit_temperature(val_logits, data.val.labels)
    return {
        "temperature": temperature,
        "temperature_at_bound": at_bound,
        "val": evaluate(val_logits, data.val),
        "test": {
            "raw": evaluate(test_logits, data.test),
            "scaled": evaluate(test_logits, data.test, temperature),
        },
    }


def conclude(
    run: Run,
    accelerator: Accelerator,
    net: nn.Module,
    data: Dataset,
    history: list[dict],
    batch_size: int | None,
    teacher: Teacher | None = None,
) -> dict:
    """Read the test split, for the only time; write predictions, picture and, last, the result."""
    arrays = {"val_labels": data.val.labels, "test_labels": data.test.labels}

    def measure(name: str, net: nn.Module, mean, std) -> dict:
        logits = [
            predict(net, split, mean, std, batch_size, accelerator, f"{name}: {title} split")
            for title, split in (("validation", data.val), ("test", data.test))
        ]
        arrays[f"{name}_val_logits"], arrays[f"{name}_test_logits"] = logits
        return calibrate(*logits, data)

    seconds = sum(record["seconds"] for record in history)
    result = {**run.identity, "settings": run.settings, "seconds": seconds}
    net = accelerator.unwrap_model(net)
    for which in ("best", "last"):
        saved = run.load(f"model_{which}.pth")
        net.load_state_dict(saved["state_dict"])
        result[which] = {"epoch": saved["epoch"], **measure(which, net, data.mean, data.std)}
    if teacher is not None:
        measured = measure("teacher", teacher.net, teacher.mean, teacher.std)
        result["teacher"] = teacher.identity | measured
    if run.is_main:
        with atomic(run.folder / "predictions.npz") as file:
            np.savez(file, **{name: array.cpu().numpy() for name, array in arrays.items()})
        with atomic(run.folder / "reliability.png") as file:
            reliability_diagrams(reliability_panels(result, arrays), file)
        write_json(run.folder / "result.json", result)
    return result


def reliability_panels(result: dict, arrays: dict) -> list[tuple]:
    """(title, probabilities, labels) of the test split: best epoch and teacher, raw and scaled."""
    owners = {"best": (result["model"], result["best"])}
    if "teacher" in result:
        owners["teacher"] = ("teacher " + result["teacher"]["model"], result["teacher"])
    return [
        (
            f"{title}, {'raw' if temperature == 1 else f'T = {temperature:.2f}'}",
            (arrays[f"{name}_test_logits"].double() / temperature).softmax(1),
            arrays["test_labels"],
        )
        for name, (title, measured) in owners.items()
        for temperature in (1.0, measured["temperature"])
    ]
