"""The flags of whatever teaches: where it lies, how it is read, what its logits are divided by.

All others stand in utils/flags.py.
"""

import argparse

from models import FORM, check_name
from utils.data import NORMALISATION, normalisation
from utils.program.command_line import (
    CommandLine,
    between_zero_and_one,
    checked,
    count,
    path,
    positive,
    short_text,
)
from utils.settings import TeacherSource
from utils.teachers.teacher import RULES


def add_teacher(parser: CommandLine, for_cache: bool = False) -> None:
    """`for_cache`: a net and the cache are required; it holds logits without a temperature."""
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument(
        "--teacher_path",
        type=path,
        nargs="+",
        required=for_cache,
        metavar="PATH",
        help="a run folder, a folder with exactly one finished run below it, or a weights file "
        "(.pth, .safetensors, ...); several are an ensemble; `pretrained` lets timm download",
    )
    if not for_cache:
        add_teacher_logits(teacher)
    add_teacher_net(teacher)
    if not for_cache:
        add_teacher_temperature(teacher)
    teacher.add_argument(
        "--teacher_cache",
        type=path,
        metavar="DIR",
        required=for_cache,
        help="keep the teacher's logits here, and use those of earlier students (docs/cache.md)",
    )


def add_teacher_logits(teacher: argparse._ArgumentGroup) -> None:
    teacher.add_argument(
        "--teacher_logits",
        type=path,
        metavar="FILE",
        help="in place of --teacher_path: an .npy or .npz file of logits or probabilities of "
        "the training images, (N, K), or (V, N, K) for V views that the epochs take in turn "
        "(162: by their numbers); docs/teachers.md",
    )


def add_teacher_net(teacher: argparse._ArgumentGroup) -> None:
    """How a net is found in its file, and how it wants its inputs."""
    teacher.add_argument(
        "--teacher",
        type=checked(check_name),
        nargs="+",
        metavar="MODEL",
        help="its architecture (one for all paths or one each); a checkpoint of ours names its "
        f"own, but {FORM}, a net of yours, is to be named in any case",
    )
    teacher.add_argument(
        "--teacher_loss",
        type=short_text(80),
        help="the loss it was trained with: checked where the checkpoint says it, else recorded",
    )
    teacher.add_argument(
        "--teacher_select",
        choices=("best", "last"),
        default=TeacherSource.select,
        help="which epoch of a run folder",
    )
    teacher.add_argument(
        "--teacher_norm",
        type=checked(normalisation_text),
        help="how a third party's teacher wants its inputs (default: as the data): "
        f"{', '.join(NORMALISATION)}, or six numbers, such as 0.49,0.48,0.45/0.25,0.24,0.26",
    )
    teacher.add_argument(
        "--teacher_key",
        type=short_text(200),
        help="which weights of a third party's file that holds several, e.g. model or ema",
    )
    teacher.add_argument(
        "--teacher_size",
        type=count,
        metavar="PIXELS",
        help="enlarge the teacher's images to this side, e.g. 224; the student's stay",
    )


def add_teacher_temperature(teacher: argparse._ArgumentGroup) -> None:
    teacher.add_argument(
        "--teacher_temperature",
        type=rule_or_positive,
        default=TeacherSource.temperature,
        metavar="auto|views|T",
        help="divide its logits by this first; auto: by what suits its validation logits; "
        "views: so that it is as sure of training images as it is right on validation images",
    )
    teacher.add_argument(
        "--teacher_accuracy",
        type=between_zero_and_one,
        metavar="FRACTION",
        help="views: as right as this instead, as 0.7263; needed for a third party's teacher",
    )


def rule_or_positive(text: str) -> str | float:
    return text if text in RULES else positive(text)


def normalisation_text(text: str) -> str:
    """The text itself where it names or holds a normalisation. Raises ValueError."""
    normalisation(text)
    return text
