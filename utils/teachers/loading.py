"""Teachers from files, by two doors: nets of our own runs, and weights of third parties.

A checkpoint of ours names its architecture and is loaded as it stands. In a third party's file the
weights are looked for (weights.py). No code in a file is ever run.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from os.path import isdir, isfile
from pathlib import Path

from losses import canonical_loss
from models import build_model
from models.own import identity_of_net, is_own, name_of_saved
from utils.data import Dataset, normalisation
from utils.program import UserError
from utils.program.files import files_below, read_json, read_torch, refused, safe_name, sha256
from utils.settings import TeacherSource
from utils.teachers.nets import Member, NetTeacher
from utils.teachers.stored import load_stored
from utils.teachers.teacher import RULES, Teacher
from utils.teachers.weights import find_state, fitting_net, ready, refusal

# What a checkpoint of ours holds, and no third party's.
OUR_KEYS = {
    "state_dict",
    "model",
    "dataset",
    "num_classes",
    "mean",
    "std",
    "loss",
    "label",
    "seed",
    "split_seed",
    "fingerprint",
}
PRETRAINED = "pretrained"  # the --teacher_path that lets timm download
SHOWN = 10  # runs in a message


def load_teacher(source: TeacherSource, data: Dataset) -> Teacher:
    """The teacher that a source describes, of nets or a file of logits. Raises UserError."""
    if source.logits is not None:
        return load_stored(source, data)
    return load_nets(source, data)


def load_nets(source: TeacherSource, data: Dataset) -> NetTeacher:
    """The nets at --teacher_path, checked together. Raises UserError."""
    models = source.models
    if len(models) == 1:
        models = models * len(source.paths)
    if len(models) != len(source.paths):
        raise UserError(
            f"--teacher {' '.join(models)}: {len(models)} names; give one for all or one for each "
            f"of the {len(source.paths)} of --teacher_path"
        )
    members = [
        load_member(path, model, source, data)
        for path, model in zip(source.paths, models, strict=True)
    ]
    check_third_parties(source, members)

    # Whatever their order on the command line, it is the same teacher.
    members.sort(key=lambda member: (member.sha256, member.label))
    for member, other in pairwise(members):
        if member.identity == other.identity:
            raise refusal(other.path, f"the same weights as {member.path}; name each teacher once")

    if source.rule is not None and source.accuracy is None:
        for member in members:
            if member.seed is None:
                raise UserError(
                    f"--teacher_temperature {source.rule}: {member.path} may have been trained on "
                    "the images that validate its student, which say nothing of its temperature "
                    f"then; give {RULES[source.rule]}"
                )
    return NetTeacher(
        members, temperature=source.number, rule=source.rule, accuracy=source.accuracy
    )


def check_third_parties(source: TeacherSource, members: list[Member]) -> None:
    """Refuse what says how third parties' nets are read where there is none. Raises UserError."""
    if any(member.seed is None for member in members):
        return
    for flag, value in {"--teacher_norm": source.norm, "--teacher_key": source.key}.items():
        if value is not None:
            raise UserError(
                f"{flag} {value}: --teacher_path names runs of ours alone, whose files say this "
                f"themselves; leave {flag} out"
            )


def load_member(path: str, model: str | None, source: TeacherSource, data: Dataset) -> Member:
    """The net at `path`, which is a run folder, a folder with one finished run below it, or a file.

    What a checkpoint of ours says is checked against the source and the data. A third party's needs
    --teacher, and --teacher_norm where its inputs were not normalised as the data.
    """
    if str(path) == PRETRAINED:
        return download(model, source, data)
    file = find_weights(path, source.select)
    content = read_torch(file, "--teacher_path names a run folder or a weights file")
    if {"best", "history", "optimizer", "task"} <= content.keys():
        raise refusal(file, "holds what a run resumes from; give its folder or its model_best.pth")
    if content.keys() >= OUR_KEYS:
        return our_member(file, content, model, source, data)
    if model is None:
        raise refusal(file, "does not name its architecture; give --teacher")
    return third_party_member(file, content, model, source, data)


def our_member(
    file: Path, content: Mapping, model: str | None, source: TeacherSource, data: Dataset
) -> Member:
    """The net of a checkpoint of ours, which says all that is to be known of it."""
    check_data(file, content, data)
    check_claims(file, content, model, source)
    try:
        name = name_of_saved(content, flag="--teacher", given=[model] if model else ())
    except ValueError as error:
        raise refusal(file, str(error)) from None
    net = fitting_net(file, name, content["state_dict"], data)
    return Member(
        net=ready(net, file),
        model=content["model"],
        model_sha256=content.get("model_sha256"),
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        label=safe_name(content["label"]),
        sha256=sha256(file),
        path=file,
        loss=content["loss"],
        seed=content["seed"],
        size=source.size,
    )


def third_party_member(
    file: Path, content: Mapping, model: str, source: TeacherSource, data: Dataset
) -> Member:
    """The net of a third party's file, whose own names become ours."""
    state = find_state(file, content, source.key)
    net = fitting_net(file, model, state, data, third_party=True)
    mean, std = data.mean, data.std
    if source.norm:
        mean, std = normalisation(source.norm)
    label = f"{file.stem}_{source.key}" if source.key else file.stem
    return Member(
        net=ready(net, file),
        **identity_of_net(model),
        mean=tuple(mean),
        std=tuple(std),
        label=safe_name(label),
        sha256=sha256(file),
        path=file,
        loss=source.loss,
        size=source.size,
        key=source.key,
    )


def find_weights(path: str | Path, select: str) -> Path:
    """The weights file that `path` means: itself, or that of the finished run at or below it.

    Raises UserError.
    """
    # os.path and not Path's methods: those raise for a name that is too long.
    if isfile(path):
        if select != "best":
            raise refusal(path, f"a file has no {select} epoch; leave out --teacher_select")
        return Path(path)
    if not isdir(path):
        raise refusal(path, "no such file or folder; give a run folder or a weights file")
    file = finished_run_at(path) / f"model_{select}.pth"
    if not file.is_file():
        raise refusal(path, f"the run has no {file.name}; give another --teacher_select or a file")
    return file


def finished_run_at(path: str | Path) -> Path:
    """The folder of the run that is finished, itself or the only one below it. Raises UserError.

    Students may lie in their teacher's root; they are looked at only where there is nothing else,
    so that the same command finds the same teacher.
    """
    folder = Path(path)
    if isfile(folder / "result.json"):
        return folder
    below = [file.parent for file in files_below(folder, "result.json")]
    runs = [run for run in below if not is_student(run)]
    if not runs:
        runs = below
    if not runs:
        raise refusal(
            path,
            "no finished run (result.json) in it; finish the teacher by running its command again, "
            "or name a weights file",
        )
    if len(runs) > 1:
        shown = ", ".join(str(run.relative_to(folder)) for run in runs[:SHOWN])
        more = f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
        raise refusal(path, f"{len(runs)} finished runs lie below it: {shown}{more}; name one")
    return runs[0]


def is_student(run: Path) -> bool:
    with suppress(UserError):  # damaged
        return "teacher" in read_json(run / "result.json", "")
    return False


def check_data(file: Path, content: Mapping, data: Dataset) -> None:
    """Refuse a checkpoint of ours that was trained on other images. Raises UserError."""
    if content["fingerprint"] != data.fingerprint:
        raise refusal(
            file,
            f"trained on other data, {content['dataset']} ({content['num_classes']} classes), "
            f"whose images or labels are not those of --dataset {data.name} "
            f"({data.num_classes} classes); give another teacher or --dataset",
        )
    if content["split_seed"] != data.split_seed:
        raise refusal(
            file,
            f"trained with --split-seed {content['split_seed']}, not {data.split_seed}, so it "
            "has seen images that would validate its student; give --split-seed "
            f"{content['split_seed']} or another teacher",
        )


def check_claims(file: Path, content: Mapping, model: str | None, source: TeacherSource) -> None:
    """Refuse a checkpoint of ours of which a flag says what is not so. Raises UserError."""
    loss = source.loss
    if loss is not None:
        with suppress(ValueError):  # a whole label is no loss
            loss = canonical_loss(loss)
    # A net of its user's own is held against the file that --teacher names (name_of_saved).
    right_model = model if "model_sha256" in content else content["model"]
    # Of each flag, its value and those that the checkpoint agrees with.
    claims = {
        "--teacher": (model, [right_model]),
        "--teacher_loss": (loss, [content["loss"], content["label"]]),
    }
    for flag, (value, agreeing) in claims.items():
        if value is not None and value not in agreeing:
            way_out = f"leave {flag} out"
            if flag == "--teacher" and len(source.paths) > 1:
                one_each = f"give one for each path, {content['model']} for this"
                # An own net's code runs only where it is named.
                way_out = one_each if is_own(model) else f"{one_each}, or {way_out}"
            raise refusal(
                file,
                f"holds one {content['model']}, trained with {content['label']} and its own "
                f"normalisation, not {flag} {value}; {way_out}",
            )


def download(model: str | None, source: TeacherSource, data: Dataset) -> Member:
    """timm's own weights of `timm/NAME`, with timm's own normalisation."""
    if model is None or not model.startswith("timm/"):
        raise refusal(PRETRAINED, "give --teacher timm/NAME, whose weights timm downloads")
    fault = f"--teacher_path {PRETRAINED}: {model} cannot be downloaded"
    with refused(fault, "give a weights file", (OSError, RuntimeError, ValueError)):
        net = build_model(model, data.num_classes, pretrained=True)

    facts = net.pretrained_cfg
    if facts["num_classes"] != data.num_classes:
        raise refusal(
            PRETRAINED,
            f"has {facts['num_classes']} classes but --dataset {data.name} has "
            f"{data.num_classes}; give another teacher",
        )
    mean, std = facts["mean"], facts["std"]
    if source.norm:
        mean, std = normalisation(source.norm)
    weights = b"".join(value.numpy().tobytes() for value in net.state_dict().values())
    return Member(
        net=ready(net, PRETRAINED),
        model=model,
        mean=tuple(mean),
        std=tuple(std),
        label=PRETRAINED,
        sha256=hashlib.sha256(weights).hexdigest(),
        path=Path(PRETRAINED),
        loss=source.loss,
        size=source.size,
    )
