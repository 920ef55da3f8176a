"""Teachers by two doors: nets of our own runs, and other people's weights; one or several.

A checkpoint of ours names its architecture and is loaded as it stands. In anyone else's file the
weights are looked for, their names are translated (models/spellings.py), and they have to fit the
net that --teacher names. No code in a file is ever run.
"""

import copy
import hashlib
import math
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from os.path import isdir, isfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import canonical_loss
from models import build_model
from models.spellings import COUNTER, standard_names, variant
from utils.data import Dataset, Statistics, normalisation
from utils.data.views import normalise
from utils.files import files_below, read_json, read_torch, refused, safe_name, sha256
from utils.program import UserError

# What a checkpoint of ours holds, and nobody else's.
OUR_KEYS = {"state_dict", "model", "dataset", "num_classes", "mean", "std", "loss", "label"}
OUR_KEYS |= {"seed", "split_seed", "fingerprint"}
PRETRAINED = "pretrained"  # the --teacher_path that lets timm download
# On a CPU a logit's last bits depend on how many images it was computed with, so it is always
# this many. Larger pieces are no faster (they leave the caches), and would be filled up more often.
PIECE = 64
TRIED_SIZE = 32  # pixels a side of the images that a folded net is compared on
SAME_LOGITS = 1e-9  # of the largest logit, in float64


@dataclass
class Member:
    """A net ready to teach (eval mode, no gradients), and where it comes from.

    Its inputs are pixels / 255, normalised with `mean` and `std` and then enlarged to `size` pixels
    a side, if given. `label` says how it was trained, or is the file's stem and the `key` of the
    weights in it; of other people's files `seed` is None, and `loss` what --teacher_loss says.
    `folded`: its batch norms lie in its convolutions, which changes a logit's last bits.
    """

    net: nn.Module
    model: str
    mean: Statistics
    std: Statistics
    label: str
    sha256: str
    path: Path
    loss: str | None = None
    seed: int | None = None
    size: int | None = None
    key: str | None = None
    folded: bool = False

    def logits(self, images: Tensor) -> Tensor:
        pixels = normalise(images, self.mean, self.std)
        if self.size is not None:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear")
        return self.net(pixels)

    @property
    def identity(self) -> dict:
        """What decides its logits, and what it is called; ready for JSON."""
        known = {name: getattr(self, name) for name in ("model", "label", "seed", "sha256")}
        known |= {"mean": list(self.mean), "std": list(self.std)}
        rare = {"size": self.size, "key": self.key}
        return known | {name: value for name, value in rare.items() if value is not None}


@dataclass
class Teacher:
    """One net or several that teach together, and the temperature that divides their logits.

    With --teacher_temperature auto (`fitted`) that is None until it has been fitted.
    """

    members: Sequence[Member]
    temperature: float | None = 1.0
    fitted: bool = False

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images uint8 (B, 3, H, W), before the temperature.

        Of several members the log of their mean probabilities (Lakshminarayanan et al., "Deep
        Ensembles", NeurIPS 2017). On a CPU a row's bits do not depend on its batch.
        """
        size = PIECE if images.device.type == "cpu" else len(images)
        filling = images[-1:].expand(-len(images) % size, -1, -1, -1)
        pieces = torch.cat([images, filling]).split(size)
        return torch.cat([self.piece_logits(piece) for piece in pieces])[: len(images)]

    def piece_logits(self, images: Tensor) -> Tensor:
        logits = [member.logits(images) for member in self.members]
        if len(logits) == 1:
            return logits[0]
        log_probabilities = torch.stack([each.float().log_softmax(1) for each in logits])
        return (log_probabilities.logsumexp(0) - math.log(len(logits))).to(logits[0].dtype)

    def tempered(self, logits: Tensor) -> Tensor:
        """What the student learns from: this teacher's logits (B, K) over its temperature."""
        return logits if self.temperature == 1 else logits.float() / self.temperature

    def to(self, device: torch.device) -> "Teacher":
        """Move its nets there, ready to be run often: with their batch norms folded."""
        for member in self.members:
            net = folded(member.net, member.size or TRIED_SIZE)
            member.folded = member.folded or net is not member.net
            member.net = net.to(device)
        return self

    @property
    def model(self) -> str:
        """`resnet56`, `3xresnet20`, `2xresnet20+resnet56`."""
        counts = Counter(sorted(member.model for member in self.members))
        return safe_name("+".join(f"{n}x{name}" if n > 1 else name for name, n in counts.items()))

    @property
    def said_temperature(self) -> float | str:
        return "auto" if self.fitted else self.temperature

    @property
    def label(self) -> str:
        """How its members were trained, whatever their seeds, and their temperature."""
        label = safe_name("_and_".join(sorted({member.label for member in self.members})))
        said = self.said_temperature
        return label if said == 1 else f"{label}_Tcal={said if self.fitted else f'{said:g}'}"

    @property
    def identity(self) -> dict:
        """What a student's result says of its teacher; of several, the seed is `42+43+44`."""
        first, members = self.members[0], [member.identity for member in self.members]
        known = members[0] | {"path": str(first.path), "loss": first.loss}
        if len(members) > 1:
            seeds = [member.seed for member in self.members]
            hashes = "".join(member.sha256 for member in self.members).encode()
            losses = {member.loss for member in self.members} - {None}
            known = {
                "seed": None if None in seeds else "+".join(map(str, sorted(seeds))),
                "sha256": hashlib.sha256(hashes).hexdigest(),
                "path": [str(member.path) for member in self.members],
                "loss": "+".join(sorted(losses)) or None,
                **{"mean": None, "std": None, "members": members},
            }
        if self.said_temperature != 1:
            known["teacher_temperature"] = self.said_temperature
        return known | {"model": self.model, "label": self.label}


def folded(net: nn.Module, size: int = TRIED_SIZE) -> nn.Module:
    """The net with batch norms in the convolutions before them; itself where that fails.

    It fails where its code cannot be traced, where it does not take images of `size` pixels a
    side, or where the folded net is another one, as of a convolution that is called twice.
    """
    with suppress(Exception):  # a stranger's code may do anything, and the library is experimental
        from torch.fx.experimental.optimization import fuse

        # In float64 folding costs no more than its rounding, so any real difference shows.
        exact = copy.deepcopy(net).double()
        if agree(exact, fuse(exact), size):
            return fuse(net)
    return net


@torch.no_grad()
def agree(net: nn.Module, other: nn.Module, size: int) -> bool:
    """Whether two nets in float64 have the same logits of a batch of noise, but for rounding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    logits, others = net(images), other(images)
    allowed = SAME_LOGITS * logits.abs().max().item()
    return torch.allclose(others, logits, rtol=0, atol=allowed)


def refusal(path: str | Path, reason: str) -> UserError:
    return UserError(" ".join(f"--teacher_path {path}: {reason}".split()))


def teacher_of(args: Namespace, dataset: Dataset) -> Teacher:
    """The teacher that the flags of a command line describe. Raises UserError."""
    paths, models = args.teacher_path, args.teacher or [None]
    models = models * len(paths) if len(models) == 1 else models
    if len(models) != len(paths):
        wanted = f"one for all or one for each of the {len(paths)} of --teacher_path"
        raise UserError(f"--teacher {' '.join(models)}: {len(models)} names; give {wanted}")
    members = [load_member(*each, args, dataset) for each in zip(paths, models, strict=True)]
    # Whatever their order on the command line, it is the same teacher.
    members.sort(key=lambda member: (member.sha256, member.label))
    for one, other in pairwise(members):
        if one.identity == other.identity:
            raise refusal(other.path, f"the same weights as {one.path}; name each teacher once")
    if args.teacher_temperature != "auto":
        return Teacher(members, args.teacher_temperature)
    for member in members:
        if member.seed is None:
            reason = "may have been trained on the images that validate its student"
            way_out = "on which no temperature can be fitted then; give a number"
            raise UserError(f"--teacher_temperature auto: {member.path} {reason}, {way_out}")
    return Teacher(members, None, fitted=True)


def load_member(path: str, model: str | None, args: Namespace, dataset: Dataset) -> Member:
    """The net at `path`, which is a run folder, a folder with one finished run below it, or a file.

    Against what a checkpoint of ours says, the command line and the data are checked. Other
    people's needs --teacher, and --teacher_norm where its inputs were not normalised as the data.
    """
    if str(path) == PRETRAINED:
        return download(model, args, dataset)
    file = find_weights(path, args.teacher_select)
    content = read_torch(file, "--teacher_path names a run folder or a weights file")
    if {"best", "optimizer"} <= content.keys():
        raise refusal(file, "holds what a run resumes from; give its folder or its model_best.pth")
    if content.keys() >= OUR_KEYS:
        check_ours(file, content, model, args, dataset)
        net = fitting_net(file, content["model"], content["state_dict"], dataset)
        known = {name: content[name] for name in ("model", "loss", "seed")}
        mean, std, label = content["mean"], content["std"], content["label"]
    else:
        if model is None:
            raise refusal(file, "does not name its architecture; give --teacher")
        key, norm = args.teacher_key, args.teacher_norm
        net = fitting_net(file, model, find_state(file, content, key), dataset, foreign=True)
        known = {"model": model, "loss": args.teacher_loss, "key": key}
        mean, std = normalisation(norm) if norm else (dataset.mean, dataset.std)
        label = "_".join(filter(None, (file.stem, key)))
    known |= {"label": safe_name(label), "sha256": sha256(file), "size": args.teacher_size}
    return Member(ready(net, file), mean=tuple(mean), std=tuple(std), path=file, **known)


def find_weights(path: str | Path, select: str) -> Path:
    """The weights file that `path` means: itself, or that of the finished run at or below it.

    Students may lie in their teacher's root; they are looked at only where there is nothing else,
    so that the same command finds the same teacher.
    """
    # os.path and not Path's methods: those raise for a name that is too long.
    if isfile(path):
        if select != "best":
            raise refusal(path, f"a file has no {select} epoch; leave out --teacher_select")
        return Path(path)
    if not isdir(path):
        raise refusal(path, "no such file or folder; give a run folder or a weights file")
    runs = [Path(path)]
    if not isfile(f"{path}/result.json"):
        below = [file.parent for file in files_below(Path(path), "result.json")]
        runs = [run for run in below if not is_student(run)] or below
    if not runs:
        way_out = "finish the teacher by running its command again, or name a weights file"
        raise refusal(path, f"no finished run (result.json) in it; {way_out}")
    if len(runs) > 1:
        shown = ", ".join(str(run.relative_to(path)) for run in runs[:10])
        more = f" and {len(runs) - 10} more" if len(runs) > 10 else ""
        raise refusal(path, f"{len(runs)} finished runs lie below it: {shown}{more}; name one")
    file = runs[0] / f"model_{select}.pth"
    if not file.is_file():
        raise refusal(path, f"the run has no {file.name}; give another --teacher_select or a file")
    return file


def is_student(run: Path) -> bool:
    with suppress(UserError):  # damaged
        return "teacher" in read_json(run / "result.json", "")
    return False


def check_ours(file: Path, content: Mapping, model, args: Namespace, dataset: Dataset) -> None:
    """Refuse a checkpoint of ours that is not the teacher which the command describes."""
    if content["fingerprint"] != dataset.fingerprint:
        trained_on = f"{content['dataset']} ({content['num_classes']} classes)"
        here = f"--dataset {dataset.name} ({dataset.num_classes} classes)"
        way_out = "give another teacher or --dataset"
        raise refusal(file, f"trained on other data, {trained_on}, and not on {here}; {way_out}")
    if content["split_seed"] != args.split_seed:
        own = f"--split-seed {content['split_seed']}"
        seen = f"not {args.split_seed}, so it has seen images that would validate its student"
        raise refusal(file, f"trained with {own}, {seen}; give {own} or another teacher")
    loss = args.teacher_loss
    with suppress(ValueError):  # a whole label is no loss
        loss = loss and canonical_loss(loss)
    fits = {
        f"--teacher {model}": model in (None, content["model"]),
        f"--teacher_loss {loss}": loss in (None, content["loss"], content["label"]),
        f"--teacher_norm {args.teacher_norm}": args.teacher_norm is None,
        f"--teacher_key {args.teacher_key}": args.teacher_key is None,
    }
    own = f"{content['model']}, trained with {content['label']} and its own normalisation"
    for given, holds in fits.items():
        if not holds:
            raise refusal(file, f"holds one {own}, not {given}; leave {given.split()[0]} out")


def find_state(file: Path, content: Mapping, key: str | None) -> Mapping[str, Tensor]:
    """The one mapping of tensors in other people's file, or the one that `key` names."""
    found = dict(weight_sets(content))
    if not found:
        holds = ", ".join(map(str, list(content)[:10])) or "nothing"
        reason = f"no state dict in it, it holds {holds}"
        raise refusal(file, f"{reason}; save one with torch.save(net.state_dict(), file)")
    if key is None and len(found) == 1:
        return next(iter(found.values()))
    if key not in found:
        names = ", ".join(filter(None, found)) or "one without a name"
        given = f", and not {key}" if key else ""
        raise refusal(file, f"its sets of weights are {names}; --teacher_key names one{given}")
    return found[key]


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
    file: Path, model: str, state: Mapping[str, Tensor], dataset: Dataset, foreign: bool = False
) -> nn.Module:
    """The net of that name with these weights; `foreign`: under other people's names."""
    try:
        net = build_model(model, dataset.num_classes, **(variant(state, model) if foreign else {}))
    except ValueError as error:
        raise UserError(f"--teacher: {error}") from None
    states = (standard_names(each, net) for each in unprefixed(state)) if foreign else [state]
    differing = []
    for named in states:
        differing.append(misfits(net, named))
        if not differing[-1]:
            net.load_state_dict(named, strict=False)  # but for the counters
            return net
    name, found, wanted = min(differing, key=len)[0]
    reason = f"does not fit {model} of {dataset.num_classes} classes: {name} is {found} where"
    raise refusal(file, f"{reason} {wanted} is wanted; give its --teacher or another file")


def unprefixed(state: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """`state`, then with each prefix taken off that all names share (module., model., ...)."""
    yield state
    while len({name.partition(".")[0] for name in state}) == 1 and all("." in n for n in state):
        state = {name.partition(".")[2]: value for name, value in state.items()}
        yield state


def misfits(net: nn.Module, state: Mapping[str, Tensor]) -> list[tuple]:
    """(name, shape in `state`, shape in `net`) of each tensor that differs or is missing in one."""
    found, wanted = (
        {name: tuple(value.shape) for name, value in each.items() if not name.endswith(COUNTER)}
        for each in (state, net.state_dict())
    )
    names = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    return [(name, found.get(name, "absent"), wanted.get(name, "none")) for name in names]


def ready(net: nn.Module, file: str | Path) -> nn.Module:
    """The net in the state in which it teaches; refused where it could not."""
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise refusal(file, "some weights are NaN or infinite; train or download it again")
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def download(model: str | None, args: Namespace, dataset: Dataset) -> Member:
    """timm's own weights of `timm/NAME`, with timm's own normalisation."""
    if model is None or not model.startswith("timm/"):
        raise refusal(PRETRAINED, "give --teacher timm/NAME, whose weights timm downloads")
    fault = f"--teacher_path {PRETRAINED}: {model} cannot be downloaded"
    with refused(fault, "give a weights file", (OSError, RuntimeError, ValueError)):
        net = build_model(model, dataset.num_classes, pretrained=True)
    source, norm = net.pretrained_cfg, args.teacher_norm
    if source["num_classes"] != dataset.num_classes:
        wanted = f"--dataset {dataset.name} has {dataset.num_classes}; give another teacher"
        raise refusal(PRETRAINED, f"has {source['num_classes']} classes but {wanted}")
    mean, std = normalisation(norm) if norm else (source["mean"], source["std"])
    weights = b"".join(value.numpy().tobytes() for value in net.state_dict().values())
    known = {"sha256": hashlib.sha256(weights).hexdigest(), "path": Path(PRETRAINED)}
    known |= {"label": PRETRAINED, "loss": args.teacher_loss, "size": args.teacher_size}
    return Member(ready(net, PRETRAINED), model, tuple(mean), tuple(std), **known)
