"""The weights in a teacher's file: which of its sets, under whose names, and the net they fit.

In a third party's file the weights are looked for, and their names are translated
(models/spellings.py). They have to fit the net that --teacher names.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models import build_model
from models.own import is_own
from models.spellings import COUNTER, standard_names, variant
from utils.data import Dataset
from utils.program import UserError


def refusal(path: str | Path, reason: str) -> UserError:
    """What is raised of a teacher's file or folder, as one line; `reason` ends in the way out."""
    return UserError(" ".join(f"--teacher_path {path}: {reason}".split()))


def find_state(file: Path, content: Mapping, key: str | None) -> Mapping[str, Tensor]:
    """The one mapping of tensors in a third party's file, or the one that `key` names."""
    states = dict(weight_sets(content))
    if not states:
        holds = ", ".join(map(str, list(content)[:10])) or "nothing"
        raise refusal(
            file,
            f"no state dict in it, it holds {holds}; save one with "
            "torch.save(net.state_dict(), file)",
        )
    if key is None and len(states) == 1:
        return next(iter(states.values()))
    if key not in states:
        names = ", ".join(filter(None, states)) or "one without a name"
        given = f", and not {key}" if key else ""
        raise refusal(file, f"its sets of weights are {names}; --teacher_key names one{given}")
    return states[key]


def weight_sets(content: Mapping, name: str = "", depth: int = 2) -> Iterator[tuple[str, Mapping]]:
    """(dotted name, mapping) of whatever holds tensors and nothing else, some of them weights."""
    named = [type(key) is str and isinstance(value, Tensor) for key, value in content.items()]
    if named and all(named) and max(value.ndim for value in content.values()) > 1:
        yield name, content
    elif depth:  # an optimiser's tensors lie deeper
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from weight_sets(value, f"{name}.{key}".lstrip("."), depth - 1)


def fitting_net(
    file: Path, model: str, state: Mapping[str, Tensor], data: Dataset, third_party: bool = False
) -> nn.Module:
    """The net of that name with these weights; `third_party`: under names of its own.

    A net of the user's own calls its weights as their file does, but for a prefix.
    """
    renamed = third_party and not is_own(model)
    options = variant(state, model) if renamed else {}
    try:
        net = build_model(model, data.num_classes, **options)
    except ValueError as error:
        raise UserError(f"--teacher: {error}") from None

    spellings = list(unprefixed(state)) if third_party else [state]
    if renamed:
        spellings = [standard_names(names, net) for names in spellings]
    faults = []
    for spelling in spellings:
        differing = misfits(net, spelling)
        if not differing:
            net.load_state_dict(spelling, strict=False)  # but for the counters
            return net
        faults.append(differing)

    # The spelling that comes nearest says most about what is wrong.
    name, shape, wanted = min(faults, key=len)[0]
    raise refusal(
        file,
        f"does not fit {model} of {data.num_classes} classes: {name} is {shape} where {wanted} "
        "is wanted; give its --teacher or another file",
    )


def unprefixed(state: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """`state`, then with each prefix taken off that all names share (module., model., ...)."""
    yield state
    while share_a_prefix(state):
        state = {name.partition(".")[2]: value for name, value in state.items()}
        yield state


def share_a_prefix(names: Collection[str]) -> bool:
    """Whether all are called alike up to the first dot."""
    prefixes = {name.partition(".")[0] for name in names}
    return len(prefixes) == 1 and all("." in name for name in names)


def misfits(net: nn.Module, state: Mapping[str, Tensor]) -> list[tuple]:
    """(name, shape in `state`, shape in `net`) of each tensor that differs or is missing in one."""
    shapes = shapes_of(state)
    wanted = shapes_of(net.state_dict())
    return [
        (name, shapes.get(name, "absent"), wanted.get(name, "none"))
        for name in wanted | shapes
        if shapes.get(name) != wanted.get(name)
    ]


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Without batch norm's counters, which old files lack."""
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith(COUNTER)}


def ready(net: nn.Module, file: str | Path) -> nn.Module:
    """The net in the state in which it teaches; refused where it could not."""
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise refusal(file, "some weights are NaN or infinite; train or download it again")
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
