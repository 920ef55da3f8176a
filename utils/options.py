"""The command line of both entry scripts, and every check of a value.

A flag says where it is defined whether it `identifies` a run: whether two runs that differ in it
are two experiments. Those values become `args.settings`, which a run is compared by. The flags of
losses come from their registry.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from losses import (
    BASES,
    DISTILLATIONS,
    TERMS,
    Entry,
    canonical_loss,
    loss_flags,
    loss_parameters,
)
from models import MODELS, WRN_PATTERN, check_name
from utils.data import NAMES, NORMALISATION, Dataset, normalisation
from utils.data.mixing import MIXES
from utils.hints import flag_hint, stray_hint
from utils.program import UserError
from utils.runs import number_text
from utils.steps import MODES, can_capture
from utils.training import SELECTIONS

LARGEST = 10**9
# The paper's page has a command with both flags for whichever of these losses.
PAGE_LOSSES = ("NLL", "NLL+MDCA", "FL", "FL+MDCA")
PAGE_FLAGS = ("gamma", "beta")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, but not "(default: None)"."""

    def _get_help_string(self, action):
        # 0 is a default, though it equals False.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


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
            word, actions = unknown[0], self._option_string_actions
            if word.startswith("-"):
                hint = flag_hint(word, actions)
            else:
                takes_value = {flag: action.nargs != 0 for flag, action in actions.items()}
                hint = stray_hint(word, argv, takes_value)
            self.error(f"{word!r} is not a flag here; {hint}")
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


def auto_or_positive(text: str) -> str | float:
    return text if text == "auto" else positive(text)


def add_data(parser: CommandLine) -> None:
    flag, setting = parser.group("data")
    data_dir = os.environ.get("KD_DATA") or "data"
    flag("--dataset", path, "cifar10", f"{', '.join(NAMES)}, an .npz file or a folder of images")
    flag("--data_dir", path, data_dir, "where data lie or are downloaded to ($KD_DATA sets it)")
    mirrored = "draw mirrored views too, not for digits (default: yes, for svhn no)"
    flag("--flip", bool, None, mirrored, action=argparse.BooleanOptionalAction)
    side = "folder of images: resize the shorter side to so many pixels and cut out the middle"
    flag("--image_size", count, None, side)
    flag("--skip_unreadable", bool, None, "folder of images: leave out those that cannot be read")
    setting("--split-seed", whole, 0, "which tenth validates; a teacher's and its students' alike")


def add_model(parser: CommandLine) -> None:
    _, setting = parser.group("model")
    owned: dict[str, list[str]] = {}
    for net, entry in MODELS.items():
        owned.setdefault(entry.origin, []).append(net)
    nets = "; ".join(f"{', '.join(names)} ({origin})" for origin, names in owned.items())
    setting("--model", name(check_name), "resnet20", f"{nets}; any {WRN_PATTERN}; timm/NAME")


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
    milestones = "multistep: epochs after which the rate falls (default: half and three quarters)"
    setting("--schedule-steps", count, None, milestones, nargs="+", metavar="EPOCH")
    falls = "multistep: the rate is multiplied by this at each of those epochs (default: 0.1)"
    setting("--lr-decay-factor", fraction, None, falls)
    setting("--warmup", whole, None, "warmupcosine: iterations of linear warm-up (default: 0)")
    setting("--train-batch-size", count, 128, "images per step and per process")
    flag("--mix", MIXES, None, "train on mixtures of two images, a teacher and its student alike")
    flag("--mix_alpha", positive, None, "of Beta(a, a), the first image's share (default: 1)")
    setting("--seed", whole, 42, "of initial weights, order and augmentation; report several")
    best = "the best epoch by validation: top-1, NLL, or NLL after temperature scaling (refinement)"
    setting("--select", SELECTIONS, "top1", best)
    setting("--sync_bn", bool, None, "several GPUs: batch norm over the images of all processes")
    flag, _ = parser.group("run")
    flag("--checkpoint", path, "checkpoint", "root of the run folders")
    flag("--exp_name", name(suffix), None, "a suffix of the run's name, to keep two apart")
    flag("--overwrite", bool, None, "start a finished or differing run anew")
    flag("--log_with", ("tensorboard",), None, "also write the epochs' metrics to this")
    evaluated = "images per evaluation step (default: 1000, on a CPU 128)"
    flag("--test-batch-size", count, None, evaluated)
    launched = "auto: one CUDA graph on one GPU, else eager, kernel by kernel; compile also fuses"
    flag("--step", MODES, "auto", launched)
    same = "the same bits in every run on the same GPU, more slowly; the CPU does so anyway"
    flag("--deterministic", bool, None, same)


def add_teacher(parser: CommandLine, for_cache: bool = False) -> None:
    """`for_cache`: the cache is required, and holds logits that have no temperature yet."""
    flag, _ = parser.group("teacher")
    paths = (
        "a run folder, a folder with exactly one finished run below it, or a weights file (.pth, "
        ".safetensors, ...); several are an ensemble; `pretrained` lets timm download"
    )
    flag("--teacher_path", path, None, paths, nargs="+", required=True, metavar="PATH")
    nets = "its architecture (one for all paths or one each); a checkpoint of ours names its own"
    flag("--teacher", name(check_name), None, nets, nargs="+", metavar="MODEL")
    trained = "the loss it was trained with: checked where the checkpoint says it, else recorded"
    flag("--teacher_loss", printable(80), None, trained)
    flag("--teacher_select", ("best", "last"), "best", "which epoch of a run folder")
    inputs = (
        "how a third party's teacher wants its inputs (default: as the data): "
        f"{', '.join(NORMALISATION)}, or six numbers, such as 0.49,0.48,0.45/0.25,0.24,0.26"
    )
    flag("--teacher_norm", name(lambda text: normalisation(text) and text), None, inputs)
    several = "which weights of a third party's file that holds several, e.g. model or ema"
    flag("--teacher_key", printable(200), None, several)
    larger = "enlarge the teacher's images to this side, e.g. 224; the student's stay"
    flag("--teacher_size", count, None, larger, metavar="PIXELS")
    if not for_cache:
        divided = "divide its logits by this first; auto: by what suits its validation logits"
        flag("--teacher_temperature", auto_or_positive, 1.0, divided, metavar="auto|T")
    kept = "keep the teacher's logits here, and use those of earlier students (README, Sweeps)"
    flag("--teacher_cache", path, None, kept, metavar="DIR", required=for_cache)


def teacher_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of train_teacher.py. Raises UserError."""
    parser = CommandLine(prog="train_teacher.py", description="Train a calibrated classifier.")
    add_data(parser)
    add_model(parser)
    flag, _ = parser.group("loss")
    grammar = f"one of {', '.join(BASES)}, alone or with +{', +'.join(TERMS)}"
    flag("--loss", name(canonical_loss), "NLL", grammar)
    add_loss_flags(flag, BASES | TERMS)
    add_optimisation_and_run(parser)
    args = complete(parser, argv)
    args.notes = unread_flags(args, "loss", BASES | TERMS)
    _, _, term = args.loss.partition("+")
    if args.mix and term and TERMS[term].of_batch:
        reason = f"{term} compares a batch's confidences with its labels, and mixtures have two"
        raise UserError(f"--mix {args.mix}: {reason}; leave out one of them")
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
    args.notes = unread_flags(args, "distill", DISTILLATIONS)
    if args.mix and args.teacher_cache:
        reason = "no cache can hold a teacher's answers to all mixtures"
        raise UserError(f"--mix {args.mix}: {reason}; leave out --teacher_cache")
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
            fault = f"--{name.replace('_', '-')} has no effect {now}"
            raise UserError(f"{fault}; leave it out or give --{other} {wanted}")
    steps = args.schedule_steps
    if steps != sorted(set(steps)) or max(steps, default=0) >= args.epochs:
        wanted = f"must rise and stay below --epochs {args.epochs}"
        raise UserError(f"--schedule-steps {' '.join(map(str, steps))}: {wanted}")
    args.settings = {name: getattr(args, name) for name in parser.identifying}
    return args


def unread_flags(args: argparse.Namespace, chooser: str, entries: dict[str, Entry]) -> list[str]:
    """Refuse flags of the losses `entries` that the chosen one does not read.

    The paper's page gives two of them with four losses, whether they are read or not: of these,
    the lines that say that they have no effect.
    """
    chosen, notes = getattr(args, chooser), []
    read = {flag.name for flag in loss_flags(chosen)}
    readers: dict[str, list[str]] = {}
    for loss, entry in entries.items():
        for flag in entry.flags:
            readers.setdefault(flag.name, []).append(f"+{loss}" if loss in TERMS else loss)
    for flag, losses in readers.items():
        value = getattr(args, flag)
        if flag in read or value is None:
            continue
        fault = f"--{flag} {value:g} has no effect with --{chooser} {chosen}"
        by = f"read by {', '.join(losses)}"
        if chosen in PAGE_LOSSES and flag in PAGE_FLAGS:
            notes.append(f"{fault} ({by})")
            continue
        # Many call the distillation's weight so.
        is_weight = chooser == "distill" and flag == "alpha"
        weight = "; the weight of the distillation is --Lambda" if is_weight else ""
        raise UserError(f"{fault}; leave it out or give another --{chooser} ({by}){weight}")
    return notes


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
        fault = f"the training split has only {available} images per process; give at most that"
        raise UserError(f"--train-batch-size {args.train_batch_size}: {fault}")
    steps = args.epochs * -(-len(data.train.labels) // (args.train_batch_size * processes))
    if args.warmup >= steps:
        raise UserError(f"--warmup {args.warmup}: the run has only {steps} steps; give fewer")
    if args.step == "graph" and not can_capture(accelerator):
        raise UserError(
            "--step graph: needs one GPU, one process and no --deterministic; leave it out"
        )
    if args.sync_bn and (processes == 1 or accelerator.device.type == "cpu"):
        raise UserError("--sync_bn: has an effect on several GPUs only; leave it out")
