"""What a student's result says of its teacher: the epoch that taught, and what a seed decides."""

import json
from pathlib import Path

EPOCHS = ("best", "last")


def epoch_of_files(identity: dict) -> str | None:
    """best or last, where every file that a teacher was read from is that epoch's of a run."""
    paths = identity.get("path")
    if not isinstance(paths, list):  # of a single net, and None in runs of older versions
        paths = [str(paths)]
    names = {Path(path).name for path in paths}
    for epoch in EPOCHS:
        if names == {f"model_{epoch}.pth"}:
            return epoch
    return None


def teacher_settings(identity: dict, recorded: dict) -> dict:
    """All that a student's settings say of its teacher but for the seed, ready for JSON.

    `identity` stands in its result and names the files; `recorded` in its settings. The weights of
    one of our runs follow from its seed; a third party's file stands for itself.
    """
    settings = without_seed(recorded, identity["seed"])
    if identity["seed"] is not None and epoch_of_files(identity) is None:
        settings["epoch"] = "unknown"
    if "members" in recorded:
        members = [without_seed(member, member["seed"]) for member in recorded["members"]]
        settings["members"] = sorted(members, key=in_json)
    return settings


def in_json(value) -> str:
    """One text for all equal values."""
    return json.dumps(value, sort_keys=True)


def without_seed(identity: dict, seed: int | str | None) -> dict:
    """What stays of a net's identity when its seed changes: not the weights, if it has a seed."""
    changing = {"seed", "path", "loss", "members"}
    if seed is not None:
        changing.add("sha256")
    return {key: value for key, value in identity.items() if key not in changing}
