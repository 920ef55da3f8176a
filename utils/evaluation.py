"""Logits of a whole split, every metric from them, and the result of a run."""

import math
import time
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from utils.calibration.diagram import reliability_diagrams
from utils.calibration.metrics import classification_metrics, posterior_metrics
from utils.calibration.temperature import T_MIN, fit_temperature
from utils.data import NORMALISATION, Dataset, Split
from utils.data.views import normalise
from utils.files import atomic, write_json
from utils.objectives import Distillation
from utils.program import UserError
from utils.runs import Run
from utils.source import MINUTES
from utils.tables import is_third_party
from utils.teachers import Member, Teacher


def predict(net: nn.Module, split: Split, mean, std, *options) -> torch.Tensor:
    """Logits of a split, as below, of a net whose inputs are normalised with `mean` and `std`."""
    net.eval()
    return logits_of(lambda images: net(normalise(images, mean, std)), split, *options)


@torch.inference_mode()
def logits_of(
    forward, split: Split, batch_size: int | None, accelerator: Accelerator, title=None
) -> torch.Tensor:
    """Logits (N, K) of a split, float32 on the CPU, in its order, the same on every process.

    `forward` takes images uint8 (B, 3, H, W), by default 1000 at once; on a CPU 128, for more
    overflow its caches, at half the rate. A progress bar is shown where there is a `title` for it.
    """
    batch_size = batch_size or (128 if accelerator.device.type == "cpu" else 1000)
    total, world = len(split.labels), accelerator.num_processes
    # Equal shares can be gathered; the last image stands in where there are not enough.
    share = math.ceil(total / world)
    mine = torch.arange(share) + accelerator.process_index * share
    images = split.images[mine.clamp(max=total - 1).to(split.images.device)]
    logits = []
    hidden = title is None or not accelerator.is_main_process
    for batch in tqdm(images.split(batch_size), title, leave=False, disable=hidden or None):
        with accelerator.autocast():
            logits.append(forward(batch.to(accelerator.device)).float())
    return accelerator.gather(torch.cat(logits))[:total].cpu()


def evaluate(logits: torch.Tensor, split: Split, temperature: float = 1.0) -> dict[str, float]:
    """Every metric of a split's logits (fractions), those against a known posterior included.

    One that is infinite is left out, as the NLL of a teacher that rules a label out.
    """
    metrics = classification_metrics(logits, split.labels.cpu(), temperature)
    if split.posterior is not None:
        metrics |= posterior_metrics(logits, split.posterior, temperature)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def without_infinity(logits: torch.Tensor) -> torch.Tensor:
    """For a fit: -inf, a class that a teacher rules out, as a number of the same probability, 0."""
    return logits.clamp_min(torch.finfo(logits.dtype).min)


def conclude(
    run: Run, accelerator: Accelerator, net, data: Dataset, history, batch_size, teacher=None
) -> dict:
    """Read the test split, for the only time; write predictions, picture and, last, the result."""
    arrays = {"val_labels": data.val.labels, "test_labels": data.test.labels}

    def measure(name: str, forward) -> dict:
        """Test metrics raw and with the temperature that suits the validation logits best."""
        val = logits_of(forward, data.val, batch_size, accelerator, f"{name}: validation split")
        test = logits_of(forward, data.test, batch_size, accelerator, f"{name}: test split")
        arrays[f"{name}_val_logits"], arrays[f"{name}_test_logits"] = val, test
        temperature, at_bound = fit_temperature(without_infinity(val), data.val.labels)
        found = {"raw": evaluate(test, data.test)}
        found["scaled"] = evaluate(test, data.test, temperature)
        fit = {"temperature": temperature, "temperature_at_bound": at_bound}
        return fit | {"val": evaluate(val, data.val), "test": found}

    seconds = sum(record["seconds"] for record in history)
    result = {
        **run.identity,
        "settings": run.settings,
        "seconds": seconds,
        "finished": time.strftime(MINUTES),
    }
    net = accelerator.unwrap_model(net).eval()
    for which in ("best", "last"):
        saved = run.load(f"model_{which}.pth")
        net.load_state_dict(saved["state_dict"])
        result[which] = {"epoch": saved["epoch"]}
        result[which] |= measure(which, lambda images: net(normalise(images, data.mean, data.std)))
    if teacher is not None:
        result["teacher"] = teacher.identity | measure("teacher", teacher.logits)
        if teacher.temperature != 1:
            logits = teacher.tempered(arrays["teacher_test_logits"])
            result["teacher"]["test"]["tempered"] = evaluate(logits, data.test)
    if run.is_main:
        with atomic(run.folder / "predictions.npz") as file:
            np.savez(file, **{name: array.cpu().numpy() for name, array in arrays.items()})
        with atomic(run.folder / "reliability.png") as file:
            reliability_diagrams(reliability_panels(result, arrays), file)
        write_json(run.folder / "result.json", result)
    return result


def inspect_teacher(
    teacher: Teacher,
    data: Dataset,
    accelerator: Accelerator,
    batch_size: int | None,
    objective: Distillation | None = None,
) -> str:
    """What a teacher is worth on the validation split, in lines to be read before training.

    Fits its temperature where that is asked for. Other people's teachers are also tried on up to
    1,000 images with every known normalisation: with a wrong one they are silently worse. Raises
    UserError where it cannot teach: its logits are not finite, no temperature suits it, or it
    rules classes out and the `objective` has no value for that.
    """
    logits = logits_of(teacher.logits, data.val, batch_size, accelerator, "teacher")
    if not logits.amax(dim=1).isfinite().all():
        raise UserError(
            f"--teacher_path {teacher.members[0].path}: its outputs are NaN or infinite for some "
            "validation images; give another teacher, or another precision if this is bf16 or fp16"
        )
    if teacher.fitted:
        teacher.temperature = suiting_temperature(logits, data.val)
    if objective is not None and logits.isneginf().any():
        know_nothing = torch.zeros_like(logits)
        objective.of_target(know_nothing, teacher.tempered(logits), data.val.labels.cpu())
    raw = evaluate(logits, data.val)
    line = f"teacher {teacher.model} {teacher.label}: "
    line += f"validation top-1 {100 * raw['top1']:.2f} %, ECE {100 * raw['ece']:.2f} %"
    if teacher.temperature != 1:
        tempered = evaluate(logits, data.val, teacher.temperature)
        line += f", with T = {teacher.temperature:.4g} {100 * tempered['ece']:.2f} %"
    step = math.ceil(len(data.val.labels) / 1000)
    some = Split(data.val.images[::step], data.val.labels[::step])
    foreign = (member for member in teacher.members if member.seed is None)
    advice = (norm_advice(member, some, accelerator) for member in foreign)
    return "\n".join([line, *filter(None, advice)])


def suiting_temperature(logits: torch.Tensor, val: Split) -> float:
    """The T of --teacher_temperature auto. Raises UserError where it lies at its bound."""
    temperature, at_bound = fit_temperature(without_infinity(logits), val.labels)
    if not at_bound:
        return temperature
    if temperature == T_MIN:
        reason = "it is right on so many validation images that its NLL falls with T without end"
    else:
        reason = "its logits are no better than a guess"
    raise UserError(
        f"--teacher_temperature auto: the T that suits this teacher lies at the bound of its "
        f"range, {temperature:g} ({reason}); give a number, such as 1"
    )


def norm_advice(member: Member, some: Split, accelerator: Accelerator) -> str:
    """A line where another normalisation makes a teacher right far more often, else nothing."""

    def percent(mean, std) -> float:
        teacher = Teacher([replace(member, mean=mean, std=std)])
        logits = logits_of(teacher.logits, some, None, accelerator)
        return 100 * (logits.argmax(1) == some.labels.cpu()).double().mean().item()

    own = percent(member.mean, member.std)
    others = {norm: percent(*statistics) for norm, statistics in NORMALISATION.items()}
    best, n = max(others, key=others.get), len(some.labels)
    # A handful of images decides nothing.
    if others[best] - own <= max(5, 1000 / n):
        return ""
    better = f"with --teacher_norm {best} {others[best]:.1f} %"
    return f"{member.path}: is {own:.1f} % right on {n} validation images, and {better}"


def reliability_panels(result: dict, arrays: dict) -> list[tuple]:
    """(title, probabilities, labels) of the test split: best epoch and teacher, raw and scaled.

    A third party's teacher is raw only, see `is_third_party`.
    """
    titles = {"best": result["model"]}
    if "teacher" in result:
        titles["teacher"] = "teacher " + result["teacher"]["model"]
    panels = []
    for name, title in titles.items():
        temperatures = {"raw": 1.0}
        if not is_third_party(result[name]):
            fitted = result[name]["temperature"]
            temperatures[f"T = {fitted:.2f}"] = fitted
        for text, temperature in temperatures.items():
            logits = arrays[f"{name}_test_logits"].double()
            probabilities = (logits / temperature).softmax(1)
            panels.append((f"{title}, {text}", probabilities, arrays["test_labels"]))
    return panels
