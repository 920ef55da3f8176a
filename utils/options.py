"""The command line that both entry scripts share, and every check of a value."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from losses import canonical_loss
from models import build_model, check_name
from utils.data import NORMALISATION, Dataset, normalisation
from utils.files import available_memory
from utils.program import UserError
from utils.steps import MODES

LARGEST = 10**9


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, but not "(default: None)"."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class CommandLine(argparse.ArgumentParser):
    """argparse with one-line errors, either of `_` and `-`, and a hint for a misspelt flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=Help, **options)

    def parse_args(self, argv=None, namespace=None):
        known = {flag.replace("_", "-"): flag for flag in self._option_string_actions}

        def respell(token: str) -> str:
            flag, equals, value = token.partition("=")
            return known.get(flag.replace("_", "-"), flag) + equals + value

        argv = sys.argv[1:] if argv is None else argv
        argv = [respell(token) if token.startswith("--") else token for token in argv]
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].split("=")[0], known.values(), 1)
            hint = f"did you mean {close[0]}?" if close else "--help lists the flags"
            self.error(f"{unknown[0]!r} is not a flag here; {hint}")
        return args

    def error(self, message: str):
        raise UserError(" ".join(message.removeprefix("argument ").split()))


def number(kind: type, wanted: str, allowed: Callable[[float], bool]):
    """An argparse type: a finite number for which `allowed` holds; `wanted` says so in words."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (-LARGEST <= value <= LARGEST and allowed(value)):
            raise argparse.ArgumentTypeError(f"{text[:80]!r} will not do; give {wanted}")
        return value

    return convert


def name(check: Callable[[str], str]):
    """An argparse type: a name that `check` accepts, else the ValueError's own words."""

    def convert(text: str) -> str:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def printable(longest: int):
    """An argparse type: a text that garbles no message, log or table."""

    def check(text: str) -> str:
        if not (text.strip() and text.isprintable() and len(text) <= longest):
            wanted = f"give 1 to {longest} printable characters"
            raise ValueError(f"{text[:80]!r} will not do; {wanted}")
        return text

    return name(check)


def suffix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9+=.,_-]{1,80}", text):
        raise ValueError(f"{text!r} will not do; give 1 to 80 letters, digits or any of +=.,_-")
    return text


path = printable(4000)


def location(text: str) -> Path:
    """An argparse type: a path, as a Path."""
    return Path(path(text))


count = number(int, "a whole number of at least 1", lambda n: n >= 1)
whole = number(int, "a whole number of at least 0", lambda n: n >= 0)
positive = number(float, "a number above 0", lambda x: x > 0)
weight = number(float, "a number of at least 0", lambda x: x >= 0)
fraction = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
below_one = number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def add_data(parser: CommandLine) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        type=path,
        default="cifar10",
        help="cifar10, cifar100, synthetic, or the path of an .npz file that holds "
        "x_train, y_train, x_test, y_test",
    )
    data.add_argument(
        "--data_dir",
        type=path,
        default=os.environ.get("KD_DATA") or "data",
        help="where data sets lie or are downloaded to; <dataset>.npz in it is used first "
        "($KD_DATA sets the default)",
    )
    data.add_argument(
        "--split-seed",
        type=whole,
        default=0,
        help="which tenth of the training images validates; keep it the same for a teacher and "
        "its students",
    )


def add_model(parser: CommandLine) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        type=name(check_name),
        default="resnet20",
        help="resnet8 to resnet110 (depth 6n+2), resnet56_bottleneck, resnet110_bottleneck, "
        "wrn_DEPTH_WIDTH (depth 6n+4)",
    )


def add_optimisation_and_run(parser: CommandLine) -> None:
    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--epochs", type=count, default=160, help="passes over the training split")
    add("--lr", type=positive, default=0.1, help="learning rate of SGD with Nesterov momentum")
    add("--momentum", type=below_one, default=0.9, help="0 is plain SGD")
    add("--weight-decay", "--wd", type=weight, default=5e-4, help="of all weights")
    add(
        "--scheduler",
        choices=("multistep", "cosine", "warmupcosine"),
        default="multistep",
        help="how the learning rate falls",
    )
    add(
        "--schedule-steps",
        type=count,
        nargs="+",
        metavar="EPOCH",
        help="multistep: epochs after which the rate is multiplied by --lr-decay-factor "
        "(default: half and three quarters of --epochs)",
        default=argparse.SUPPRESS,
    )
    add(
        "--lr-decay-factor",
        type=fraction,
        default=argparse.SUPPRESS,
        help="multistep: the factor (default: 0.1)",
    )
    add(
        "--warmup",
        type=whole,
        default=argparse.SUPPRESS,
        help="warmupcosine: iterations of linear warm-up (default: 0)",
    )
    add("--train-batch-size", type=count, default=128, help="images per step and per process")
    add(
        "--test-batch-size",
        type=count,
        help="images per evaluation step (default: 1000, on a CPU 128)",
    )
    add(
        "--seed",
        type=whole,
        default=42,
        help="of initial weights, order and augmentation; report several",
    )
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--checkpoint", type=path, default="checkpoint", help="root of the run folders")
    add("--exp_name", type=name(suffix), help="a suffix of the run's name, to keep two apart")
    add("--overwrite", action="store_true", help="start a finished or differing run anew")
    add("--log_with", choices=("tensorboard",), help="also write the epochs' metrics to this")
    add(
        "--step",
        choices=MODES,
        default="auto",
        help="how a step is launched: auto replays it as one CUDA graph on a single GPU, and else "
        "it is eager, kernel by kernel; compile also fuses kernels, which takes a while to prepare",
    )
    add(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on the same GPU, more slowly; the CPU does so anyway",
    )
    add(
        "--sync_bn",
        action="store_true",
        help="several GPUs: batch norm over the images of all processes instead of each its own",
    )


def norm(text: str) -> str:
    normalisation(text)
    return text


def auto_or_positive(text: str) -> str | float:
    return text if text == "auto" else positive(text)


def add_teacher(parser: CommandLine, for_cache: bool = False) -> None:
    """`for_cache`: the cache is required, and holds logits that have no temperature yet."""
    teacher = parser.add_argument_group("teacher")
    add = teacher.add_argument
    add(
        "--teacher_path",
        type=path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="a run folder, a folder with exactly one finished run below it, or a weights file "
        "(.pth, .safetensors, ...); several teach together as an ensemble; `pretrained` lets timm "
        "download --teacher timm/NAME",
    )
    add(
        "--teacher",
        type=name(check_name),
        nargs="+",
        metavar="MODEL",
        help="its architecture (of several paths: one for all or one each); may be left out where "
        "the checkpoint names it",
    )
    add(
        "--teacher_loss",
        type=printable(80),
        help="the loss it was trained with: checked where the checkpoint says it, else recorded",
    )
    add(
        "--teacher_select",
        choices=("best", "last"),
        default="best",
        help="which epoch of a run folder",
    )
    add(
        "--teacher_norm",
        type=name(norm),
        help="how a third party's teacher wants its inputs (default: as the data): "
        f"{', '.join(NORMALISATION)}, or mean and std of pixels / 255 as six numbers, such as "
        "0.49,0.48,0.45/0.25,0.24,0.26",
    )
    add(
        "--teacher_key",
        type=printable(200),
        help="which weights of a third party's file that holds several, e.g. model or ema",
    )
    add(
        "--teacher_size",
        type=count,
        metavar="PIXELS",
        help="enlarge the teacher's images to this side, e.g. 224; the student's stay",
    )
    if not for_cache:
        add(
            "--teacher_temperature",
            type=auto_or_positive,
            default=1.0,
            metavar="auto|T",
            help="divide the teacher's logits by this before anything else; auto: by what suits "
            "its validation logits, so that it is calibrated after training",
        )
    add(
        "--teacher_cache",
        type=path,
        metavar="DIR",
        required=for_cache,
        help="keep the teacher's logits here and use those of earlier students: a sweep runs its "
        "teacher once per seed. An epoch takes images x classes x 4 bytes (2 in half precision): "
        "CIFAR-10 1.8 MB, CIFAR-100 18 MB",
    )


def teacher_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of train_teacher.py. Raises UserError."""
    parser = CommandLine(prog="train_teacher.py", description="Train a calibrated classifier.")
    add_data(parser)
    add_model(parser)
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--loss",
        type=name(canonical_loss),
        default="NLL",
        help="NLL, FL or LS, each alone or with +MDCA or +MMCE; FL+MDCA is the strongest teacher "
        "in the literature",
    )
    loss.add_argument("--alpha", type=below_one, default=0.1, help="LS: smoothing")
    loss.add_argument("--beta", type=weight, default=1.0, help="MDCA, MMCE: weight of the term")
    loss.add_argument("--gamma", type=weight, default=1.0, help="FL: focal exponent")
    add_optimisation_and_run(parser)
    return complete(parser.parse_args(argv))


def student_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of train_student.py. Raises UserError."""
    parser = CommandLine(prog="train_student.py", description="Distil a teacher into a student.")
    add_data(parser)
    add_model(parser)
    add_teacher(parser)
    distillation = parser.add_argument_group("distillation")
    distillation.add_argument(
        "--T", type=positive, default=4.0, help="temperature of both softmaxes"
    )
    distillation.add_argument(
        "--Lambda", type=fraction, default=0.9, help="weight of the teacher; 1 - Lambda of labels"
    )
    add_optimisation_and_run(parser)
    return complete(parser.parse_args(argv))


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Check what no single flag can: how flags fit together."""
    readers = {
        "schedule_steps": "multistep",
        "lr_decay_factor": "multistep",
        "warmup": "warmupcosine",
    }
    for flag, scheduler in readers.items():
        if hasattr(args, flag) and args.scheduler != scheduler:
            raise UserError(
                f"--{flag.replace('_', '-')} has no effect with --scheduler {args.scheduler}; "
                f"leave it out or give --scheduler {scheduler}"
            )
    args.warmup = getattr(args, "warmup", 0)
    args.lr_decay_factor = getattr(args, "lr_decay_factor", 0.1)
    default = sorted({args.epochs // 2, args.epochs * 3 // 4} - {0})
    steps = args.schedule_steps = getattr(args, "schedule_steps", default)
    if steps != sorted(set(steps)) or max(steps, default=0) >= args.epochs:
        written = " ".join(map(str, steps))
        raise UserError(
            f"--schedule-steps {written}: must rise and stay below --epochs {args.epochs}"
        )
    return args


def check_steps(args: argparse.Namespace, data: Dataset, processes: int) -> None:
    """Refuse a step of more images than there are, a net too large, a warm-up of more steps."""
    available = len(data.train.labels) // processes
    if args.train_batch_size > available:
        raise UserError(
            f"--train-batch-size {args.train_batch_size}: the training split has only "
            f"{available} images per process; give at most that"
        )
    with torch.device("meta"):
        net = build_model(args.model, data.num_classes)
    # Weights, gradients and momentum in float32.
    needed = 3 * 4 * sum(weight.numel() for weight in net.parameters()) / 2**30
    if needed > available_memory():
        raise UserError(
            f"--model {args.model}: needs more than {needed:.0f} GiB of memory and "
            f"{available_memory():.0f} are free; give a smaller one"
        )
    steps = args.epochs * -(-len(data.train.labels) // (args.train_batch_size * processes))
    if args.warmup >= steps:
        raise UserError(f"--warmup {args.warmup}: the run has only {steps} steps; give fewer")
