"""What lies in a run folder and how it is called: what a run writes, and its readers rely on.

{checkpoint}/{dataset}/{model}/{run name}/
    config.json  train_log.txt  metrics.jsonl  checkpoint.pth  model_best.pth  model_last.pth
    predictions.npz  reliability.png  result.json
    net.py, where --model names a file: a copy of it, which no program here runs unless told to
"""

from collections.abc import Mapping
from pathlib import Path

# What a run, and what reads it afterwards, leaves in its folder; --overwrite removes first what
# says complete.
OURS = (
    "result.json",
    "config.json",
    "train_log.txt",
    "metrics.jsonl",
    "checkpoint.pth",
    "net.py",
    "model_best.pth",
    "model_last.pth",
    "predictions.npz",
    "reliability.png",
    "posthoc.json",
    "evaluation_*.json",
    "tensorboard",  # of trackers: --log_with
    "wandb",
    "swanlab",
    "dvclive",
)
# What result.json holds in any case, wherever its metrics are.
RESULT_KEYS = {
    "model",
    "dataset",
    "fingerprint",
    "num_classes",
    "loss",
    "loss_parameters",
    "label",
    "seed",
    "split_seed",
    "settings",
    "best",
    "last",
}
# The model of a teacher whose logits a file holds (utils/teachers/stored.py).
STORED = "logits"


def files_of_run(folder: Path) -> list[Path]:
    """What is there of OURS; trackers' as folders."""
    return [path for pattern in OURS for path in folder.glob(pattern)]


def number_text(value: float) -> str:
    """3.0 and 3 are both `3`; every digit that distinguishes two values is kept."""
    return str(int(value)) if value == int(value) else repr(value)


def label_of(name: str, parameters: dict[str, float]) -> str:
    """`FL+MDCA`, {gamma: 3, beta: 1} -> `FL+MDCA_gamma=3_beta=1`."""
    values = [f"{key}={number_text(value)}" for key, value in parameters.items()]
    return "_".join([name, *values])


def temperature_suffix(temperature: float | str) -> str:
    """What the label of a teacher ends in whose logits are divided: `_Tcal=auto`, `_Tcal=2.5`."""
    if temperature == 1:
        return ""
    value = temperature if isinstance(temperature, str) else f"{temperature:g}"
    return f"_Tcal={value}"


def is_complete(result) -> bool:
    """Whether it is the result of a finished run."""
    return isinstance(result, dict) and result.keys() >= RESULT_KEYS


def is_third_party(measured: dict) -> bool:
    """Whether a part of a result is that of a third party's teacher, or of an ensemble with one.

    It may have been trained on the images that validate its student. What is fitted on these, such
    as a temperature, says nothing then, and is not shown.
    """
    return "seed" in measured and measured["seed"] is None


# Settings that follow from others, if a user does not set them.
FOLLOWS_FROM = {
    "mean": ("split_seed", "fingerprint"),
    "std": ("split_seed", "fingerprint"),
    "schedule_steps": ("epochs",),
}


def differences(before: Mapping, now: Mapping, owner: str = "") -> list[str]:
    """`lr was 0.1 and is 0.05`, `teacher's seed was 1 and is 2`: what two settings differ in.

    Not what may follow from another one that differs.
    """
    differing = []
    for key in sorted(before.keys() | now.keys()):
        old = before.get(key)
        new = now.get(key)
        if any(before.get(cause) != now.get(cause) for cause in FOLLOWS_FROM.get(key, ())):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differing += differences(old, new, owner=f"{key}'s ")
        elif old != new and key == "fingerprint":
            differing.append(f"{owner}images or labels are others")  # two hashes say no more
        elif old != new:
            differing.append(f"{owner}{key} was {old} and is {new}")
    return differing
