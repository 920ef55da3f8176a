"""A finished run's net, and its teacher, made ready to run again from their weights."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from models import FORM, build_model, check_own
from models.own import is_own, name_of_saved, net_label, own_net
from utils.analysis.record import Record, naming
from utils.data import Dataset
from utils.data.views import normalise
from utils.program import UserError, files
from utils.program.command_line import CommandLine, checked
from utils.run_files import STORED
from utils.settings import TeacherSource
from utils.teachers.loading import load_nets
from utils.teachers.nets import NetTeacher

# What a teacher needs of config.json and earlier versions did not write, at its default.
OLDER_ARGUMENTS = {
    "teacher_key": None,
    "teacher_size": None,
    "teacher_temperature": 1.0,
}


def add_own_nets(parser: CommandLine) -> None:
    """The flag by which the files of runs' own nets are named that may be run."""
    parser.add_argument(
        "--model",
        type=checked(check_own),
        nargs="+",
        metavar=FORM,
        help="the net of a run that was trained with one: no run makes code run by itself",
    )


def own_files(names: Iterable[str]) -> list[Path]:
    """The files of what --model names."""
    return [own_net(name).file for name in names]


def check_own_nets(nets: list[Record], names: Collection[str]) -> None:
    """Refuse a net of a run's user's own whose file is not among those that --model names.

    `names`: FILE.py:function; one that no net needs is refused, too. Raises UserError.
    """
    used = set()
    for net in nets:
        for identity in own_identities(net):
            try:
                used.add(name_of_saved(identity, flag="--model", given=names))
            except ValueError as error:
                raise UserError(f"{net.folder}: {error}") from None
    for name in names:
        if name not in used:
            raise UserError(f"--model {name}: no net here was made by that file; leave it out")


def own_identities(net: Record) -> list[dict]:
    """What a run says of those nets of a record that are made by a file of a user's own."""
    members = net.identity.get("members") or [net.identity]
    return [identity for identity in members if "model_sha256" in identity]


def forward_of(net: Record, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What gives the net's logits (B, K) of images uint8 (B, 3, H, W) on the device.

    Raises UserError where its weights are gone or damaged.
    """
    if net.measured_by_student:
        return load_teacher(net).to(device).logits

    module, saved = load_net(net)
    module.to(device)

    def logits(images: Tensor) -> Tensor:
        return module(normalise(images, saved["mean"], saved["std"]))

    return logits


def load_net(net: Record) -> tuple[nn.Module, dict]:
    """A run's own net in eval mode, and what else its file holds. Raises UserError."""
    path = net.folder / f"model_{net.part}.pth"
    saved = files.read_torch(path, "copy it again or train the run again")
    with naming(path):
        name = name_of_saved(saved, flag="--model")
        module = build_model(name, saved["num_classes"])
        module.load_state_dict(saved.pop("state_dict"))
    return module.to(memory_format=torch.channels_last).eval(), saved


def named_again(net: Record, models: list[str] | None) -> list[str | None] | None:
    """--teacher of the student's command, with files of a user's own as they are named now.

    None stands for a net of a run, which is found by its hash.
    """
    if models is None:
        return None
    names = {
        identity["model"]: name_of_saved(identity, flag="--model")
        for identity in own_identities(net)
    }
    return [names.get(net_label(model)) if is_own(model) else model for model in models]


def load_teacher(net: Record) -> NetTeacher:
    """A student's teacher, from where its command found it; checked by its hash.

    Raises UserError.
    """
    arguments = {**OLDER_ARGUMENTS, **net.config.get("arguments", {})}
    if net.model == STORED:
        raise UserError(
            f"{net.folder}: a file of logits taught it, which cannot be run on other images; leave "
            "out --with-teacher"
        )
    for flag in ("teacher", "teacher_path"):  # before ensembles they were texts
        if isinstance(arguments.get(flag), str):
            arguments[flag] = [arguments[flag]]
    arguments["teacher"] = named_again(net, arguments["teacher"])

    # What a teacher is checked against; its images are not needed.
    data = Dataset(
        name=net.dataset,
        num_classes=net.result["num_classes"],
        train=None,
        val=None,
        test=None,
        mean=net.result["mean"],
        std=net.result["std"],
        fingerprint=net.fingerprint,
        split_seed=net.result["split_seed"],
    )
    way_out = "put it back, run where the student was trained, or leave out --with-teacher"
    fault = f"{net.folder}: its teacher is not where its command found it"
    with files.refused(fault, way_out):  # also where config.json is of another version
        teacher = load_nets(TeacherSource.of(arguments), data)
        if teacher.identity["sha256"] != net.measured["sha256"]:
            raise ValueError(f"{arguments['teacher_path']} is no longer what it learned from")
    return teacher
