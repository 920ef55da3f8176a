"""Teachers by two doors: nets of our own runs, and other people's weights; one or several.

A checkpoint of ours names its architecture and is loaded as it stands. In anyone else's file the
weights are looked for, their names are translated (models/spellings.py), and they have to fit the
net that --teacher names. No code in a file is ever run.
"""

import hashlib
import math
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import expanduser, isdir, isfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import canonical_loss
from models import build_model
from models.spellings import standard_names, variant
from utils.data import Dataset, Statistics, normalisation
from utils.data.views import normalise
from utils.files import files_below, one_line, read_bytes, read_json, safe_name, sha256, unpack
from utils.program import UserError

# What a checkpoint of ours holds, and nobody else's.
OUR_KEYS = {
    *("state_dict", "model", "dataset", "num_classes", "mean", "std"),
    *("loss", "label", "seed", "split_seed", "fingerprint"),
}
COUNTER = "num_batches_tracked"  # files of an older torch lack it, and only training reads it
PRETRAINED = "pretrained"  # the --teacher_path that lets timm download
# On a CPU a logit's last bits depend on how many images it was computed with, so it is always
# this many. Larger pieces are no faster (they leave the caches), and would be filled up more often.
PIECE = 64


@dataclass
class Member:
    """A net ready to teach (eval mode, no gradients), and where it comes from.

    Its inputs are pixels / 255, normalised with its own `mean` and `std` and then enlarged to
    `size` pixels a side, if given. `label` says how it was trained, or is the file's stem and the
    `key` of the weights in it; `seed` is None for other people's files, whose `loss` is what
    --teacher_loss says.
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

    @property
    def foreign(self) -> bool:
        """Other people's: who knows which images it was trained on."""
        return self.seed is None

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

    def to(self, device: torch.device) -> None:
        for member in self.members:
            member.net.to(device)

    @property
    def model(self) -> str:
        """`resnet56`, `3xresnet20`, `2xresnet20+resnet56`."""
        counts = Counter(sorted(member.model for member in self.members))
        return safe_name("+".join(f"{n}x{name}" if n > 1 else name for name, n in counts.items()))

    @property
    def label(self) -> str:
        """How its members were trained, whatever their seeds, and their temperature."""
        label = safe_name("_and_".join(sorted({member.label for member in self.members})))
        if self.fitted or self.temperature != 1:
            label += f"_Tcal={'auto' if self.fitted else f'{self.temperature:g}'}"
        return label

    @property
    def identity(self) -> dict:
        """What a student's result says of its teacher; of several, the seed is `42+43+44`."""
        members = [member.identity for member in self.members]
        known = members[0] | {"path": str(self.members[0].path), "loss": self.members[0].loss}
        if len(members) > 1:
            seeds = [member.seed for member in self.members]
            hashes = "".join(member.sha256 for member in self.members).encode()
            known = {
                "seed": None if None in seeds else "+".join(map(str, sorted(seeds))),
                "sha256": hashlib.sha256(hashes).hexdigest(),
                "path": [str(member.path) for member in self.members],
                "loss": "+".join(sorted({m.loss for m in self.members} - {None})) or None,
                **{"mean": None, "std": None, "members": members},
            }
        if self.fitted or self.temperature != 1:
            known["teacher_temperature"] = "auto" if self.fitted else self.temperature
        return known | {"model": self.model, "label": self.label}


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
    for one, other in zip(members, members[1:], strict=False):
        if one.identity == other.identity:
            raise refusal(other.path, f"the same weights as {one.path}; name each teacher once")
    if args.teacher_temperature != "auto":
        return Teacher(members, args.teacher_temperature)
    for member in filter(lambda member: member.foreign, members):
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
    content, digest = read_weights(file)
    if content.keys() >= OUR_KEYS:
        check_ours(file, content, model, args, dataset)
        net = fitting_net(file, content["model"], content["state_dict"], dataset)
        known = {name: content[name] for name in ("model", "loss", "seed")}
        mean, std, label = content["mean"], content["std"], content["label"]
    else:
        if model is None:
            raise refusal(file, "does not name its architecture; give --teacher")
        state = find_state(file, content, args.teacher_key)
        net = fitting_net(file, model, state, dataset, foreign=True)
        norm, key = args.teacher_norm, args.teacher_key
        mean, std = normalisation(norm) if norm else (dataset.mean, dataset.std)
        known = {"model": model, "loss": args.teacher_loss, "key": key}
        label = "_".join(filter(None, (file.stem, key)))
    known |= {"label": safe_name(label), "sha256": digest, "size": args.teacher_size}
    return Member(ready(net, file), mean=tuple(mean), std=tuple(std), path=file, **known)


def find_weights(path: str | Path, select: str) -> Path:
    """The weights file that `path` means."""
    if not str(path).strip():
        raise UserError("--teacher_path is empty; give a run folder or a weights file")
    path = Path(expanduser(path))
    # os.path and not Path's methods: those raise for a name that is too long.
    if isfile(path):
        if select != "best":
            raise refusal(path, f"a file has no {select} epoch; leave out --teacher_select")
        return path
    if not isdir(path):
        raise refusal(path, "no such file or folder; give a run folder or a weights file")
    file = one_run(path) / f"model_{select}.pth"
    if not file.is_file():
        raise refusal(path, f"the run has no {file.name}; give another --teacher_select or a file")
    return file


def one_run(folder: Path) -> Path:
    """The finished run that `folder` is, or the only one below it, those it taught left aside."""
    if (folder / "result.json").is_file():
        return folder
    runs = [file.parent for file in files_below(folder, "result.json")]
    if len(runs) > 1:
        runs = originals(runs)
    if not runs:
        way_out = "finish the teacher by running its command again, or name a weights file"
        raise refusal(folder, f"no finished run (result.json) in it; {way_out}")
    if len(runs) > 1:
        shown = ", ".join(str(run.relative_to(folder)) for run in runs[:10])
        more = f" and {len(runs) - 10} more" if len(runs) > 10 else ""
        raise refusal(folder, f"{len(runs)} finished runs lie below it: {shown}{more}; name one")
    return runs[0]


def originals(runs: list[Path]) -> list[Path]:
    """Those that learned from none of the others.

    Students may lie in their teacher's root, and the same command is to find the same teacher
    again: no student is its own.
    """
    weights = {sha256(file) for run in runs for file in run.glob("model_*.pth")}

    def taught(run: Path) -> bool:
        try:
            teacher = read_json(run / "result.json", "")["teacher"]
        except (UserError, KeyError):  # damaged, or trained from the labels alone
            return False
        hashes = {member["sha256"] for member in teacher.get("members", [teacher])}
        return not hashes.isdisjoint(weights)

    return [run for run in runs if not taught(run)]


def read_weights(file: Path) -> tuple[Mapping, str]:
    """What `file` holds, and the SHA-256 of its bytes. Nothing in it is executed."""
    try:
        data = read_bytes(file)
        content = unpack(data)
    except OSError as error:
        raise refusal(file, f"cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise refusal(file, str(error)) from error
    if not isinstance(content, Mapping):
        raise refusal(file, f"holds a {type(content).__name__}; give a file with a state dict")
    if "best" in content and "optimizer" in content:
        raise refusal(file, "holds what a run resumes from; give its folder or its model_best.pth")
    return content, hashlib.sha256(data).hexdigest()


def check_ours(
    file: Path, content: Mapping, model: str | None, args: Namespace, dataset: Dataset
) -> None:
    """Refuse a checkpoint of ours that is not the teacher which the command describes."""
    trained, here = content["fingerprint"], dataset.fingerprint
    same_data = trained == here if trained and here else content["dataset"] == dataset.name
    loss, norm, split = args.teacher_loss, args.teacher_norm, content["split_seed"]
    own = [content["mean"], content["std"]]
    checks = {
        "holds one net; leave --teacher_key out": args.teacher_key is None,
        f"trained on other data, {content['dataset']} ({content['num_classes']} classes), and not "
        f"on this --dataset {dataset.name} ({dataset.num_classes} classes); give another teacher "
        "or --dataset": same_data,
        f"holds {content['model']}, not --teacher {model}; leave --teacher out": (
            model in (None, content["model"])
        ),
        f"trained with --split-seed {split}, not {args.split_seed}, so it has seen images that "
        f"would validate its student; give --split-seed {split} or another teacher": (
            split == args.split_seed
        ),
        f"trained with {content['label']}, which --teacher_loss {loss} contradicts; leave "
        "--teacher_loss out or give another teacher": loss is None or same_loss(loss, content),
        f"carries its own normalisation, which --teacher_norm {norm} contradicts; leave "
        "--teacher_norm out": norm is None or np.allclose(normalisation(norm), own, atol=1e-4),
    }
    for reason, holds in checks.items():
        if not holds:
            raise refusal(file, reason)


def same_loss(given: str, content: Mapping) -> bool:
    """Whether --teacher_loss, a loss in any spelling or a whole label, is what the teacher had."""
    with suppress(ValueError):
        given = canonical_loss(given)
    return given in (content["loss"], content["label"])


def find_state(file: Path, content: Mapping, key: str | None) -> Mapping[str, Tensor]:
    """The one mapping of tensors in other people's file, or the one that `key` names."""
    found = dict(weight_sets(content))
    if not found:
        holds = ", ".join(map(str, list(content)[:10])) or "nothing"
        reason = f"no state dict in it, it holds {holds}"
        raise refusal(file, f"{reason}; save one with torch.save(net.state_dict(), file)")
    if key is None and len(found) == 1:
        return next(iter(found.values()))
    names = ", ".join(filter(None, found)) or "one set without a name"
    if key is None:
        raise refusal(file, f"holds several sets of weights: {names}; --teacher_key names one")
    if key not in found:
        raise refusal(file, f"no weights under --teacher_key {key}; it holds {names}")
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
    differing = []
    try:
        net = build_model(model, dataset.num_classes, **(variant(state, model) if foreign else {}))
    except ValueError as error:
        raise UserError(f"--teacher: {error}") from None
    for stripped in unprefixed(state) if foreign else [state]:
        named = standard_names(stripped, net) if foreign else stripped
        differing.append(misfits(net, named))
        if not differing[-1]:
            net.load_state_dict(named, strict=False)  # but for the counters
            return net
    closest = min(differing, key=len)
    name, found, wanted = closest[0]
    classes = dataset.num_classes
    if all(there[1:] == here[1:] and here[:1] == (classes,) for _, there, here in closest):
        raise other_classes(file, found[0], dataset)
    reason = f"does not fit {model}: {name} is {found} where {wanted} is wanted"
    raise refusal(file, f"{reason}; give the right --teacher, or copy the file again")


def other_classes(file: Path, found: int, dataset: Dataset) -> UserError:
    wanted = f"--dataset {dataset.name} has {dataset.num_classes}"
    return refusal(file, f"has {found} classes but {wanted}; give another teacher")


def unprefixed(state: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """`state`, then with each prefix taken off that all names share (module., model., ...)."""
    yield state
    while len({name.partition(".")[0] for name in state}) == 1 and all("." in n for n in state):
        state = {name.partition(".")[2]: value for name, value in state.items()}
        yield state


def misfits(net: nn.Module, state: Mapping[str, Tensor]) -> list[tuple]:
    """(name, shape in `state`, shape in `net`) of each tensor that differs or is missing in one."""
    wanted, found = (
        {name: tuple(value.shape) for name, value in each.items() if not name.endswith(COUNTER)}
        for each in (net.state_dict(), state)
    )
    return [
        (name, found.get(name, "absent"), wanted.get(name, "none"))
        for name in dict.fromkeys([*wanted, *found])
        if found.get(name) != wanted.get(name)
    ]


def ready(net: nn.Module, file: str | Path) -> nn.Module:
    """The net in the state in which it teaches; refused where it could not."""
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise refusal(file, "some weights are NaN or infinite; train or download it again")
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def download(model: str | None, args: Namespace, dataset: Dataset) -> Member:
    """timm's own weights of `timm/NAME`, with timm's own normalisation."""
    if model is None or not model.startswith("timm/"):
        raise refusal(PRETRAINED, "give --teacher timm/NAME, whose weights timm downloads")
    try:
        net = build_model(model, dataset.num_classes, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = f"{model} cannot be downloaded ({one_line(error)}); give a weights file"
        raise refusal(PRETRAINED, reason) from error
    source = net.pretrained_cfg
    if source["num_classes"] != dataset.num_classes:
        raise other_classes(PRETRAINED, source["num_classes"], dataset)
    mean, std = source["mean"], source["std"]
    if args.teacher_norm is not None:
        mean, std = normalisation(args.teacher_norm)
    weights = b"".join(value.numpy().tobytes() for value in net.state_dict().values())
    digest = hashlib.sha256(weights).hexdigest()
    known = {"label": PRETRAINED, "sha256": digest, "path": Path(PRETRAINED)}
    known |= {"loss": args.teacher_loss, "size": args.teacher_size}
    return Member(ready(net, PRETRAINED), model, tuple(mean), tuple(std), **known)
