"""A teacher from one of our run folders or from a third party's weights file."""

import hashlib
import math
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from losses import canonical_loss
from models import MODELS, build_model, check_name
from models.spellings import COUNTER, head, standard_names, variant
from utils.data import NORMALISATION, Dataset
from utils.data.views import normalise
from utils.files import read_bytes, safe_name, unpack
from utils.program import UserError

WRAPPERS = r"^((module|_orig_mod)\.)+"
OUR_KEYS = {
    **{"state_dict": Mapping, "num_classes": int, "mean": list, "std": list, "seed": int},
    **{"model": str, "dataset": str, "loss": str, "label": str, "split_seed": int},
}
WEIGHT_SUFFIXES = {".pth", ".th", ".pt", ".tar", ".ckpt", ".bin"}


@dataclass
class Teacher:
    """A net ready to teach (eval mode, no gradients), and where it comes from.

    Its inputs are pixels / 255 normalised with its own `mean` and `std`. `label` says how it was
    trained, or is the file's stem; `seed` and `split_seed` are None for a third party's file, whose
    `loss` is what --teacher_loss says.
    """

    net: nn.Module
    model: str
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    label: str
    loss: str | None
    seed: int | None
    split_seed: int | None
    sha256: str
    path: Path

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images uint8 (B, 3, H, W), each the same in any batch on the CPU."""
        # A lone image goes through other kernels, whose last bits differ: give it company.
        batch = images.expand(max(2, len(images)), -1, -1, -1)
        return self.net(normalise(batch, self.mean, self.std))[: len(images)]

    @property
    def identity(self) -> dict:
        """What a student's result says of its teacher; ready for JSON."""
        return {
            "model": self.model,
            "path": str(self.path),
            "label": self.label,
            "loss": self.loss,
            "seed": self.seed,
            "mean": list(self.mean),
            "std": list(self.std),
            "sha256": self.sha256,
        }


def refusal(path: str | Path, reason: str) -> UserError:
    return UserError(" ".join(f"--teacher_path {path}: {reason}".split()))


def teacher_of(args: Namespace, dataset: Dataset) -> Teacher:
    """The teacher that a command line describes. Raises UserError."""
    return load_teacher(
        args.teacher_path,
        dataset,
        args.split_seed,
        model=args.teacher,
        loss=args.teacher_loss,
        select=args.teacher_select,
        norm=args.teacher_norm,
    )


def load_teacher(
    path: str | Path,
    dataset: Dataset,
    split_seed: int,
    model: str | None = None,
    loss: str | None = None,
    select: str = "best",
    norm: str | None = None,
) -> Teacher:
    """The teacher at `path`: a run folder, a folder with one finished run below it, or a file.

    A checkpoint of ours says what it is; `model`, `loss`, `norm`, the data set and `split_seed`
    are checked against it. A third party's file needs `model`, and `norm` (a name in
    NORMALISATION) where its inputs were not normalised as the data set is. No code in a file is
    ever run. Raises UserError.
    """
    file = find_weights(path, select)
    content, sha256 = read_weights(file)
    if content.keys() >= OUR_KEYS.keys():
        check_ours(file, content, dataset, split_seed, model, loss, norm)
        model, mean, std = content["model"], content["mean"], content["std"]
        label, seed, trained_split = content["label"], content["seed"], content["split_seed"]
        loss = content["loss"]
    else:
        mean, std = normalisation(norm, dataset)
        label, seed, trained_split = file.stem, None, None
    state = standard_state(file, content)
    net = build_teacher(file, state, model, dataset)
    return Teacher(
        net=net,
        model=model,
        num_classes=dataset.num_classes,
        mean=tuple(mean),
        std=tuple(std),
        label=safe_name(label),
        loss=loss,
        seed=seed,
        split_seed=trained_split,
        sha256=sha256,
        path=file,
    )


def find_weights(path: str | Path, select: str) -> Path:
    """The weights file that `path` means."""
    if not str(path).strip():
        raise UserError("--teacher_path is empty; give a run folder or a weights file")
    path = Path(os.path.expanduser(path))
    # os.path and not Path's methods: those raise for a name that is too long.
    if os.path.isfile(path):
        if select != "best":
            raise refusal(path, f"a file has no {select} epoch; leave out --teacher_select")
        return path
    if not os.path.isdir(path):
        raise refusal(path, "no such file or folder; give a run folder or a weights file")
    file = one_run(path) / f"model_{select}.pth"
    if not file.is_file():
        raise refusal(path, f"the run has no {file.name}; give another --teacher_select or a file")
    return file


def one_run(folder: Path) -> Path:
    """The finished run that `folder` is, or the only one below it."""
    if (folder / "result.json").is_file():
        return folder
    runs = sorted(file.parent for file in folder.rglob("result.json"))
    if len(runs) == 1:
        return runs[0]
    if runs:
        reason = f"{len(runs)} finished runs lie below it: {listing(runs, folder)}; name one"
        raise refusal(folder, reason)
    weights = sorted(file for file in folder.rglob("*") if file.suffix in WEIGHT_SUFFIXES)
    found = listing(weights, folder) or "no weights file"
    way_out = "finish the teacher by running its command again, or name a file"
    raise refusal(folder, f"no finished run (result.json) in it, found {found}; {way_out}")


def listing(paths: list[Path], folder: Path, limit: int = 10) -> str:
    shown = [str(path.relative_to(folder)) for path in paths[:limit]]
    more = [f"and {len(paths) - limit} more"] if len(paths) > limit else []
    return ", ".join(shown + more)


def read_weights(file: Path) -> tuple[Mapping, str]:
    """What `file` holds, and the SHA-256 of its bytes. Nothing in it is executed."""
    try:
        data = read_bytes(file)
    except OSError as error:
        raise refusal(file, f"cannot be read ({error.strerror}); check its permissions") from None
    if not data:
        raise refusal(file, "the file is empty; copy or train it again")
    try:
        content = unpack(data)
    # Damaged bytes raise whatever the unpickler stumbles over, from KeyError to UnicodeDecodeError.
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            reason = "damaged, or not written by torch.save; copy or download it again"
        else:
            reason = (
                f"refused, it holds more than tensors ({foreign[1]}) and loading that could run "
                "code; save the weights alone: torch.save(net.state_dict(), file)"
            )
        raise refusal(file, reason) from error
    if not isinstance(content, Mapping):
        raise refusal(file, f"holds a {type(content).__name__}; give a file with a state dict")
    best = content.get("best")
    if isinstance(best, Mapping) and best.keys() >= OUR_KEYS.keys():
        raise refusal(file, "holds what a run resumes from; give its folder or its model_best.pth")
    return content, hashlib.sha256(data).hexdigest()


def check_ours(
    file: Path,
    content: Mapping,
    dataset: Dataset,
    split_seed: int,
    model: str | None,
    loss: str | None,
    norm: str | None,
) -> None:
    """Refuse a checkpoint of ours that is not the teacher which the command describes."""
    wrong = [key for key, kind in OUR_KEYS.items() if not isinstance(content[key], kind)]
    wrong = wrong or [key for key in ("mean", "std") if not is_triple(content[key])]
    if wrong or not isinstance(content.get("fingerprint", ""), str):
        reason = f"its {wrong[0] if wrong else 'fingerprint'} is not what a run writes"
        raise refusal(file, f"{reason}; copy or train it again")
    if model is not None and model != content["model"]:
        reason = f"holds {content['model']}, not --teacher {model}; leave --teacher out"
        raise refusal(file, reason)
    check_data(file, content, dataset)
    if split_seed != content["split_seed"]:
        trained = content["split_seed"]
        raise refusal(
            file,
            f"trained with --split-seed {trained}, not {split_seed}, so it has seen images that "
            f"would validate its student; give --split-seed {trained} or another teacher",
        )
    if loss is not None and not same_loss(loss, content):
        reason = f"trained with {content['label']}, which --teacher_loss {loss} contradicts"
        raise refusal(file, f"{reason}; leave --teacher_loss out or give another teacher")
    own = [content["mean"], content["std"]]
    if norm is not None and not np.allclose(normalisation(norm, dataset), own, atol=1e-4):
        reason = f"carries its own normalisation, which --teacher_norm {norm} contradicts"
        raise refusal(file, f"{reason}; leave --teacher_norm out")


def is_triple(numbers: list) -> bool:
    return len(numbers) == 3 and all(
        isinstance(number, float) and math.isfinite(number) for number in numbers
    )


def check_data(file: Path, content: Mapping, dataset: Dataset) -> None:
    """The same images, whatever the data set is called where both fingerprints are known."""
    trained, here = content.get("fingerprint"), dataset.fingerprint
    if trained == here if trained and here else content["dataset"] == dataset.name:
        return
    other = content["dataset"]
    if other == dataset.name:
        other = f"other data of the name {other}"
    reason = f"trained on {other} ({content['num_classes']} classes), not on this --dataset"
    here = f"{dataset.name} ({dataset.num_classes} classes)"
    raise refusal(file, f"{reason} {here}; give another teacher or --dataset")


def same_loss(given: str, content: Mapping) -> bool:
    """Whether --teacher_loss, a loss in any spelling or a whole label, is what the teacher had."""
    if given in (content["loss"], content["label"]):
        return True
    if given == "KD" or "=" in given:
        return False
    try:
        return canonical_loss(given) == content["loss"]
    except ValueError as error:
        raise UserError(f"--teacher_loss {given}: {error}") from None


def normalisation(norm: str | None, dataset: Dataset) -> tuple:
    """(mean, std) of that name; the data set's own where none is given."""
    if norm is None:
        return dataset.mean, dataset.std
    if norm not in NORMALISATION:
        raise UserError(f"--teacher_norm {norm}: give one of {', '.join(NORMALISATION)}")
    return NORMALISATION[norm]


def standard_state(file: Path, content: Mapping) -> dict[str, Tensor]:
    """The state dict in `content`, bare or under a usual key, without wrappers in names."""
    wrapped = (content.get(key) for key in ("state_dict", "model", "net"))
    state = next((value for value in wrapped if isinstance(value, Mapping)), content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(map(str, list(content)[:10])) or "nothing"
        reason = f"no state dict in it, bare or under state_dict, model or net; it holds {keys}"
        raise refusal(file, f"{reason}; save one with torch.save(net.state_dict(), file)")
    return {re.sub(WRAPPERS, "", str(key)): value for key, value in state.items()}


def build_teacher(
    file: Path, state: dict[str, Tensor], model: str | None, dataset: Dataset
) -> nn.Module:
    """The net of that name with these weights, ready to teach."""
    last = head(state)
    if last is None:
        reason = "no linear head in it"
        raise refusal(file, f"{reason}; give a teacher of this zoo's architectures")
    if len(last) != dataset.num_classes:
        wanted = f"--dataset {dataset.name} has {dataset.num_classes}"
        raise refusal(file, f"has {len(last)} classes but {wanted}; give another teacher")
    if model is None:
        reason = f"does not name its architecture, {resemblance(state)}"
        raise refusal(file, f"{reason}; give --teacher")
    try:
        check_name(model)
    except ValueError as error:
        raise UserError(f"--teacher: {error}") from None
    net = bare_net(model, state)
    state = standard_names(state, net)
    wanted, found = shapes(net.state_dict()), shapes(state)
    for key in [*wanted, *found]:
        if wanted.get(key) != found.get(key):
            here, there = found.get(key, "absent"), wanted.get(key, "absent")
            reason = f"does not fit --teacher {model}, {key} is {here} where {there} is wanted"
            raise refusal(file, f"{reason}; {resemblance(state)}; give the right --teacher")
    net.load_state_dict(state)
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise refusal(file, "some weights are NaN or infinite; train or download it again")
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def bare_net(model: str, state: dict[str, Tensor]) -> nn.Module:
    return build_model(model, len(head(state)), **variant(state, model))


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith(COUNTER)}


def resemblance(state: dict[str, Tensor]) -> str:
    """What the weights look like, for an error's text."""
    found = shapes(state)
    with torch.device("meta"):
        for name in MODELS:
            net = bare_net(name, state)
            if shapes(net.state_dict()) == shapes(standard_names(state, net)):
                return f"it looks like {name}"
    stem = found.get("conv1.weight", "absent")
    return f"it looks like no net of this zoo: {len(found)} tensors, conv1.weight {stem}"
