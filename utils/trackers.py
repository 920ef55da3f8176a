"""Trackers that follow a run: those that accelerate knows, by --log_with.

They get the run's settings, the record of each epoch and the test metrics of its end. One that
fails ends no run: a line says so, and the run goes on without it. What can work without a network
does, until its own environment variable says otherwise.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from utils.program import UserError
from utils.program.files import one_line
from utils.runs import Run

PROJECT = "calibration-transfer"
NAMES = tuple(LOGGER_TYPE_TO_CLASS)


def wandb(run: Run) -> dict:
    return {
        "name": title(run),
        "tags": tags(run),
        "dir": str(run.folder),
        "mode": os.environ.get("WANDB_MODE", "offline"),
    }


def swanlab(run: Run) -> dict:
    return {
        "experiment_name": title(run),
        "tags": tags(run),
        "logdir": str(run.folder / "swanlab"),
        "mode": os.environ.get("SWANLAB_MODE", "offline"),
    }


def trackio(run: Run) -> dict:
    return {"name": title(run)}


def mlflow(run: Run) -> dict:
    identity = run.identity
    return {
        "run_name": title(run),
        "tags": {name: identity[name] for name in ("dataset", "model", "loss")},
    }


def clearml(run: Run) -> dict:
    return {"task_name": title(run), "tags": tags(run)}


def aim(run: Run) -> dict:
    return {"experiment": PROJECT}


def dvclive(run: Run) -> dict:
    return {"dir": str(run.folder / "dvclive"), "save_dvc_exp": False}


# What a tracker is started with, besides the project's name.
OPTIONS: dict[str, Callable[[Run], dict]] = {
    "wandb": wandb,
    "swanlab": swanlab,
    "trackio": trackio,
    "mlflow": mlflow,
    "clearml": clearml,
    "aim": aim,
    "dvclive": dvclive,
}


def check_installed(name: str) -> None:
    """Raises UserError where the tracker of that name, one of NAMES, is not installed."""
    installed = {str(tracker) for tracker in get_available_trackers()}
    if name not in installed:
        raise UserError(f"--log_with {name}: it is not installed; pip install {name}")


def start_tracker(run: Run, history: list[dict]) -> None:
    """Begin to follow a run that has this history; without --log_with nothing happens.

    TensorBoard goes on in the run's folder. The others begin anew and are told all epochs before.
    """
    name = run.experiment.run.log_with
    if name is None or not run.is_main:
        return
    goes_on = name == "tensorboard" and history
    project = {"tensorboard": "tensorboard", "aim": title(run)}.get(name, PROJECT)
    folder = run.folder if name == "tensorboard" else run.experiment.run.checkpoint
    options = OPTIONS[name](run) if name in OPTIONS else {}
    with surviving(run):
        run.accelerator.project_configuration.logging_dir = str(folder)
        run.accelerator.init_trackers(
            project,
            config=None if goes_on else config(run),
            init_kwargs={name: options},
        )
    # The epoch that was kept last may not have been told before the run ended: it is told again.
    for record in history[-1:] if goes_on else history:
        track(run, record, record["epoch"])


def track(run: Run, values: dict[str, float], step: int) -> None:
    """Tell the tracker what was measured after that many epochs."""
    with surviving(run):
        run.accelerator.log(values, step=step)


def finish_tracker(run: Run, result: dict) -> None:
    """Tell the tracker the test metrics of a result (fractions), and let it write all that it has.

    `test_best_raw/ece` is the ECE of the best epoch's logits as they are.
    """
    values = {}
    for epoch in ("best", "last"):
        values[f"test_{epoch}/epoch"] = result[epoch]["epoch"]
        values[f"test_{epoch}/temperature"] = result[epoch]["temperature"]
        for logits, metrics in result[epoch]["test"].items():
            for metric, value in metrics.items():
                values[f"test_{epoch}_{logits}/{metric}"] = value
    track(run, values, result["last"]["epoch"])
    with surviving(run):
        for tracker in run.accelerator.trackers:
            tracker.finish()
    run.accelerator.trackers.clear()


@contextmanager
def surviving(run: Run):
    """Whatever a tracker raises is said, and the run goes on without it."""
    try:
        yield
    except Exception as error:
        run.accelerator.trackers.clear()
        run.say(
            f"--log_with {run.experiment.run.log_with}: it has failed "
            f"({one_line(error)[:300] or type(error).__name__}); the run goes on without it"
        )


def title(run: Run) -> str:
    return f"{run.identity['dataset']}/{run.identity['model']}/{run.name}"


def tags(run: Run) -> list[str]:
    return [run.identity["dataset"], run.identity["model"], run.identity["loss"]]


def config(run: Run) -> dict[str, str | float | bool]:
    """What the run is made from, flat: what a part of a part is called has a dot in its name."""
    return {
        "run": run.name,
        "dataset": run.identity["dataset"],
        "num_classes": run.identity["num_classes"],
        "loss": run.identity["loss"],
        **flat(run.identity["loss_parameters"]),
        **flat(run.settings),
    }


def flat(values: dict, prefix: str = "") -> dict[str, str | float | bool]:
    """Numbers and texts as they are, parts of dictionaries by name, all else as text."""
    flattened = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flattened |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, str | bool | int | float):
            flattened[prefix + name] = value
        else:
            flattened[prefix + name] = str(value)
    return flattened
