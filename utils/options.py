"""The command line of both entry scripts, and every check of a value.

A flag says where it is defined whether it `identifies` a run: whether two runs that differ in it
are two experiments. Those values become `args.settings`, which a run is compared by. The flags of
losses come from their registry.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path

from accelerate import Accelerator

from losses import BASES, DISTILLATIONS, TERMS, Entry, canonical_loss, loss_parameters
from models import check_name, model_names
from utils.data import NAMES, NORMALISATION, Dataset, normalisation
from utils.data.mixing import MIXES
from utils.program import UserError
from utils.runs import number_text
from utils.steps import MODES, can_capture
from utils.training import SELECTIONS

LARGEST = 10**9


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, but not "(default: None)"."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class CommandLine(argparse.ArgumentParser):
    """argparse with one-line errors, either of `_` and `-`, and a hint for a misspelt flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=Help, **options)
        self.identifying: list[str] = []

    def group(self, title: str) -> tuple[Callable, Callable]:
        """Two functions that add a flag below this heading: one that only works, one that
        identifies a run. Both take the flag's names in one text, its kind (a type, its choices, or
        bool for a switch), default and help."""
        heading = self.add_argument_group(title)

        def flag(names: str, kind, default, help: str, **options) -> str:
            if kind is bool:
                options.setdefault("action", "store_true")
            elif callable(kind):
                options["type"] = kind
            else:
                options["choices"] = kind
            if default is not None:
                options["default"] = default
            return heading.add_argument(*names.split(), help=help, **options).dest

        def setting(*definition, **options) -> None:
            self.identifying.append(flag(*definition, **options))

        return flag, setting

    def parse_args(self, argv=None, namespace=None):
        known = {flag.replace("_", "-"): flag for flag in self._option_string_actions}

        def respell(token: str) -> str:
            flag, equals, value = token.partition("=")
            return known.get(flag.replace("_", "-"), flag) + equals + value

        argv = sys.argv[1:] if argv is None else argv
        argv = [respell(token) if token.startswith("--") else token for token in argv]
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            hint = did_you_mean(unknown[0].split("=")[0], known.values())
            self.error(f"{unknown[0]!r} is not a flag here; {hint or '--help lists the flags'}")
        return args

    def error(self, message: str):
        raise UserError(" ".join(message.removeprefix("argument ").split()))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean NAME?`, or nothing where none is near."""
    close = get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]}?" if close else ""


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


def path(text: str) -> str:
    """An argparse type: a path, with ~ for the user's folder."""
    return os.path.expanduser(printable(4000)(text))


def location(text: str) -> Path:
    """An argparse type: the same as a Path."""
    return Path(path(text))


count = number(int, "a whole number of at least 1", lambda n: n >= 1)
whole = number(int, "a whole number of at least 0", lambda n: n >= 0)
positive = number(float, "a number above 0", lambda x: x > 0)
weight = number(float, "a number of at least 0", lambda x: x >= 0)
fraction = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
below_one = number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def add_data(parser: CommandLine) -> None:
    flag, setting = parser.group("data")
    flag(
        "--dataset",
        path,
        "cifar10",
        f"{', '.join(NAMES)}, or the path of an .npz file that holds x_train, y_train, x_test, "
        "y_test, or of a folder of images: train/CLASS/*, and val/CLASS/* or test/CLASS/*",
    )
    flag(
        "--data_dir",
        path,
        os.environ.get("KD_DATA") or "data",
        "where data sets lie or are downloaded to; <dataset>.npz in it is used first ($KD_DATA "
        "sets the default)",
    )
    flag(
        "--flip",
        bool,
        None,
        "draw mirrored views too, as suits objects but not digits (default: yes, for svhn no)",
        action=argparse.BooleanOptionalAction,
    )
    flag(
        "--image_size",
        count,
        None,
        "folder of images: resize the shorter side to this and cut out the middle",
        metavar="PIXELS",
    )
    flag("--skip_unreadable", bool, None, "folder of images: leave out those that cannot be read")
    setting(
        "--split-seed",
        whole,
        0,
        "which tenth of the training images validates; the same for a teacher and its students",
    )


def add_model(parser: CommandLine) -> None:
    _, setting = parser.group("model")
    names = ", ".join(model_names())
    setting("--model", name(check_name), "resnet20", f"{names}, or timm/NAME; README says whose")


def add_loss_flags(flag: Callable, entries: dict[str, Entry]) -> None:
    """Each flag that a loss reads, once, with what it means to which loss."""
    readers: dict[str, list] = {}
    for loss, entry in entries.items():
        for own in entry.flags:
            readers.setdefault(own.name, []).append((loss, own))
    for flag_name, pairs in readers.items():
        meanings: dict[str, list[str]] = {}
        for loss, own in pairs:
            default = "1 - Lambda" if own.default is None else number_text(own.default)
            meanings.setdefault(own.help, []).append(f"{loss} {default}")
        texts = (f"{meaning} (default: {', '.join(of)})" for meaning, of in meanings.items())
        flag(f"--{flag_name}", number(float, *pairs[0][1].range), None, "; ".join(texts))


def add_optimisation_and_run(parser: CommandLine) -> None:
    flag, setting = parser.group("optimisation")
    setting("--epochs", count, 160, "passes over the training split")
    setting("--lr", positive, 0.1, "learning rate of SGD with Nesterov momentum")
    setting("--momentum", below_one, 0.9, "0 is plain SGD")
    setting("--weight-decay --wd", weight, 5e-4, "of all weights")
    schedules = ("multistep", "cosine", "warmupcosine")
    setting("--scheduler", schedules, "multistep", "how the learning rate falls")
    setting(
        "--schedule-steps",
        count,
        None,
        "multistep: epochs after which the rate is multiplied by --lr-decay-factor (default: half "
        "and three quarters of --epochs)",
        nargs="+",
        metavar="EPOCH",
    )
    setting("--lr-decay-factor", fraction, None, "multistep: the factor (default: 0.1)")
    warmup = "warmupcosine: iterations of linear warm-up (default: 0)"
    setting("--warmup", whole, None, warmup)
    setting("--train-batch-size", count, 128, "images per step and per process")
    flag(
        "--mix",
        MIXES,
        None,
        "train on mixtures of two images; the label's loss is mixed alike, and a teacher sees what "
        "its student sees",
    )
    shares = "mixtures have the share Beta(a, a) of the first image (default: 1)"
    flag("--mix_alpha", positive, None, shares)
    setting("--seed", whole, 42, "of initial weights, order and augmentation; report several")
    setting(
        "--select",
        SELECTIONS,
        "top1",
        "what makes an epoch the best one, on the validation split: the highest top-1, the least "
        "NLL, or the least NLL after temperature scaling (refinement)",
    )
    setting(
        "--sync_bn",
        bool,
        None,
        "several GPUs: batch norm over the images of all processes instead of each its own",
    )
    flag, _ = parser.group("run")
    flag("--checkpoint", path, "checkpoint", "root of the run folders")
    flag("--exp_name", name(suffix), None, "a suffix of the run's name, to keep two apart")
    flag("--overwrite", bool, None, "start a finished or differing run anew")
    flag("--log_with", ("tensorboard",), None, "also write the epochs' metrics to this")
    evaluated = "images per evaluation step (default: 1000, on a CPU 128)"
    flag("--test-batch-size", count, None, evaluated)
    flag(
        "--step",
        MODES,
        "auto",
        "how a step is launched: auto replays it as one CUDA graph on a single GPU, and else it is "
        "eager, kernel by kernel; compile also fuses kernels, which takes a while to prepare",
    )
    same = "the same bits in every run on the same GPU, more slowly; the CPU does so anyway"
    flag("--deterministic", bool, None, same)


def norm(text: str) -> str:
    normalisation(text)
    return text


def auto_or_positive(text: str) -> str | float:
    return text if text == "auto" else positive(text)


def add_teacher(parser: CommandLine, for_cache: bool = False) -> None:
    """`for_cache`: the cache is required, and holds logits that have no temperature yet."""
    flag, _ = parser.group("teacher")
    flag(
        "--teacher_path",
        path,
        None,
        "a run folder, a folder with exactly one finished run below it, or a weights file (.pth, "
        ".safetensors, ...); several teach together as an ensemble; `pretrained` lets timm "
        "download --teacher timm/NAME",
        nargs="+",
        required=True,
        metavar="PATH",
    )
    flag(
        "--teacher",
        name(check_name),
        None,
        "its architecture (of several paths: one for all or one each); may be left out where the "
        "checkpoint names it",
        nargs="+",
        metavar="MODEL",
    )
    trained = "the loss it was trained with: checked where the checkpoint says it, else recorded"
    flag("--teacher_loss", printable(80), None, trained)
    flag("--teacher_select", ("best", "last"), "best", "which epoch of a run folder")
    flag(
        "--teacher_norm",
        name(norm),
        None,
        "how a third party's teacher wants its inputs (default: as the data): "
        f"{', '.join(NORMALISATION)}, or mean and std of pixels / 255 as six numbers, such as "
        "0.49,0.48,0.45/0.25,0.24,0.26",
    )
    several = "which weights of a third party's file that holds several, e.g. model or ema"
    flag("--teacher_key", printable(200), None, several)
    larger = "enlarge the teacher's images to this side, e.g. 224; the student's stay"
    flag("--teacher_size", count, None, larger, metavar="PIXELS")
    if not for_cache:
        flag(
            "--teacher_temperature",
            auto_or_positive,
            1.0,
            "divide the teacher's logits by this before anything else; auto: by what suits its "
            "validation logits, so that it is calibrated after training",
            metavar="auto|T",
        )
    flag(
        "--teacher_cache",
        path,
        None,
        "keep the teacher's logits here and use those of earlier students: a sweep runs its "
        "teacher once per seed. An epoch takes images x classes x 4 bytes (2 in half precision): "
        "CIFAR-10 1.8 MB, CIFAR-100 18 MB",
        metavar="DIR",
        required=for_cache,
    )


def teacher_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of train_teacher.py. Raises UserError."""
    parser = CommandLine(prog="train_teacher.py", description="Train a calibrated classifier.")
    add_data(parser)
    add_model(parser)
    flag, _ = parser.group("loss")
    flag(
        "--loss",
        name(canonical_loss),
        "NLL",
        f"one of {', '.join(BASES)}, alone or with +{', +'.join(TERMS)}; FL+MDCA is the strongest "
        "teacher in the literature",
    )
    add_loss_flags(flag, BASES | TERMS)
    add_optimisation_and_run(parser)
    args = complete(parser, argv)
    _, _, term = args.loss.partition("+")
    if args.mix and term and TERMS[term].of_batch:
        raise UserError(
            f"--mix {args.mix}: {term} compares a batch's confidences with its labels, and "
            "mixtures have two; leave out one of them"
        )
    return args


def student_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of train_student.py. Raises UserError."""
    parser = CommandLine(prog="train_student.py", description="Distil a teacher into a student.")
    add_data(parser)
    add_model(parser)
    add_teacher(parser)
    flag, _ = parser.group("distillation")
    flag("--distill", DISTILLATIONS, "KD", "how the teacher is imitated")
    add_loss_flags(flag, DISTILLATIONS)
    add_optimisation_and_run(parser)
    args = complete(parser, argv)
    if args.mix and args.teacher_cache:
        raise UserError(
            f"--mix {args.mix}: no cache can hold a teacher's answers to all mixtures; leave out "
            "--teacher_cache"
        )
    return args


def complete(parser: CommandLine, argv: list[str] | None) -> argparse.Namespace:
    """Parse, check how flags fit together, and gather the settings."""
    args = parser.parse_args(argv)
    steps = sorted({args.epochs // 2, args.epochs * 3 // 4} - {0})
    # What is read only where another flag says so, and its default there.
    readers = {
        "schedule_steps": ("scheduler", "multistep", steps),
        "lr_decay_factor": ("scheduler", "multistep", 0.1),
        "warmup": ("scheduler", "warmupcosine", 0),
        "mix_alpha": ("mix", args.mix or " or ".join(MIXES), 1.0),
    }
    for name, (other, wanted, default) in readers.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif getattr(args, other) != wanted:
            given = getattr(args, other)
            now = f"with --{other} {given}" if given else f"without --{other}"
            raise UserError(
                f"--{name.replace('_', '-')} has no effect {now}; leave it out or give --{other} "
                f"{wanted}"
            )
    steps = args.schedule_steps
    if steps != sorted(set(steps)) or max(steps, default=0) >= args.epochs:
        written = " ".join(map(str, steps))
        raise UserError(
            f"--schedule-steps {written}: must rise and stay below --epochs {args.epochs}"
        )
    args.settings = {name: getattr(args, name) for name in parser.identifying}
    return args


def parameters_of(loss: str, args: argparse.Namespace) -> tuple[dict, dict]:
    """What builds the loss, and what names its run: that and how images are mixed. UserError."""
    try:
        parameters = loss_parameters(loss, vars(args))
    except ValueError as error:
        raise UserError(f"--Lambda {args.Lambda:g}: {error}") from None
    return parameters, parameters | ({args.mix: args.mix_alpha} if args.mix else {})


def check_run(args: argparse.Namespace, data: Dataset, accelerator: Accelerator) -> None:
    """Refuse what does not fit the data or the device: steps, warm-up, ways to launch."""
    processes = accelerator.num_processes
    available = len(data.train.labels) // processes
    if args.train_batch_size > available:
        raise UserError(
            f"--train-batch-size {args.train_batch_size}: the training split has only "
            f"{available} images per process; give at most that"
        )
    steps = args.epochs * -(-len(data.train.labels) // (args.train_batch_size * processes))
    if args.warmup >= steps:
        raise UserError(f"--warmup {args.warmup}: the run has only {steps} steps; give fewer")
    if args.step == "graph" and not can_capture(accelerator):
        raise UserError("--step graph: needs one GPU and one process; leave it out")
    if args.sync_bn and (processes == 1 or accelerator.device.type == "cpu"):
        raise UserError("--sync_bn: has an effect on several GPUs only; leave it out")
