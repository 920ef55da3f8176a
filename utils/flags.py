"""The flags of both entry scripts: names, types, defaults and help, in reading order.

Spellings are those of published commands; either of - and _ is taken. Defaults are those of
utils/settings.py. A flag that one loss, distillation or schedule alone reads has none here: so it
is seen whether it was given. Those of a teacher stand in utils/teacher_flags.py.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence

from losses import DISTILLATIONS, FEATURES, Flag, LossEntry, check_distillation
from models import FORM, MODELS, WRN_PATTERN, check_name
from utils.data import NAMES
from utils.data.mixing import MIXES
from utils.optimizers import OPTIMIZERS, SCHEDULES
from utils.program.command_line import (
    CommandLine,
    below_one,
    between_zero_and_one,
    checked,
    count,
    fraction,
    number,
    path,
    positive,
    short_text,
    suffix,
    weight,
    whole,
)
from utils.run_files import number_text
from utils.selection import SELECTIONS
from utils.settings import DataChoice, Recipe, RunChoice
from utils.steps import MODES
from utils.trackers import NAMES as TRACKERS


def add_data(parser: CommandLine) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        type=path,
        default=DataChoice.dataset,
        help=f"{', '.join(NAMES)}, an .npz file or a folder of images",
    )
    data.add_argument(
        "--data_dir",
        type=path,
        default=os.environ.get("KD_DATA") or DataChoice.data_dir,
        help="where data lie or are downloaded to ($KD_DATA sets it)",
    )
    data.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="draw mirrored views too, not for digits (default: yes, for svhn no)",
    )
    data.add_argument(
        "--image_size",
        type=count,
        metavar="PIXELS",
        help="folder of images: resize the shorter side to so many pixels and cut out the middle",
    )
    data.add_argument(
        "--skip_unreadable",
        action="store_true",
        help="folder of images: leave out those that cannot be read",
    )
    data.add_argument(
        "--split-seed",
        type=whole,
        default=DataChoice.split_seed,
        help="which tenth of the training images validates, for a teacher and its students alike; "
        "without effect on data that bring validation images of their own",
    )


def add_model(parser: CommandLine) -> None:
    owned: dict[str, list[str]] = {}
    for net, entry in MODELS.items():
        owned.setdefault(entry.origin, []).append(net)
    nets = "; ".join(f"{', '.join(names)} ({origin})" for origin, names in owned.items())

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        type=checked(check_name),
        default=Recipe.model,
        help=f"{nets}; any {WRN_PATTERN}; timm/NAME; {FORM}, a net of your own",
    )


def add_loss_flags(group: argparse._ArgumentGroup, entries: Mapping[str, LossEntry]) -> None:
    """Each flag that a loss reads, once, with what it means to which loss."""
    readers: dict[str, list[tuple[str, Flag]]] = {}
    for loss, entry in entries.items():
        for flag in entry.flags:
            readers.setdefault(flag.name, []).append((loss, flag))

    for name, pairs in readers.items():
        meanings: dict[str, list[str]] = {}
        for loss, flag in pairs:
            default = "1 - Lambda" if flag.default is None else number_text(flag.default)
            meanings.setdefault(flag.help, []).append(f"{loss} {default}")
        texts = [f"{text} (default: {', '.join(losses)})" for text, losses in meanings.items()]
        group.add_argument(f"--{name}", type=value_of_any(pairs), help="; ".join(texts))


def value_of_any(readers: Sequence[tuple[str, Flag]]) -> Callable[[str], float]:
    """An argparse type: what some loss takes for this flag. The chosen loss checks it again."""
    # Losses may read one name in ranges of their own; each is said once.
    ranges = dict(flag.range for _, flag in readers)
    return number(
        float,
        wanted=", or ".join(ranges),
        allowed=lambda value: any(allowed(value) for allowed in ranges.values()),
    )


def add_distillation(parser: CommandLine) -> None:
    distillation = parser.add_argument_group("distillation")
    distillation.add_argument(
        "--distill",
        type=checked(check_distillation),
        default="KD",
        help=f"how the teacher's logits are imitated: {', '.join(DISTILLATIONS)}; with "
        f"+{', +'.join(FEATURES)} also what lies within it",
    )
    add_loss_flags(distillation, DISTILLATIONS | FEATURES)
    # As the help says them: `AT every stage`.
    usual = [
        f"{term} {entry.pairing.__name__.replace('_', ' ')}" for term, entry in FEATURES.items()
    ]
    distillation.add_argument(
        "--feature_layer",
        type=checked(layer_text),
        metavar="NAME",
        help="the layer of both nets whose maps are compared, such as layer2, or STUDENT:TEACHER "
        f"(default: {', '.join(usual)})",
    )


def layer_text(text: str) -> str:
    """The text itself where it names a layer, or two. Raises ValueError."""
    text = short_text(200)(text)
    if "" in text.split(":"):
        raise ValueError(f"{text!r} will not do; give NAME, such as layer2, or STUDENT:TEACHER")
    return text


def add_optimisation(parser: CommandLine) -> None:
    optimisation = parser.add_argument_group("optimisation")
    add_optimizer(optimisation)
    add_schedule(optimisation)
    optimisation.add_argument(
        "--ema",
        type=between_zero_and_one,
        metavar="DECAY",
        help="evaluate and keep an exponential moving average of the weights, over about "
        "1 / (1 - DECAY) steps; such as 0.99",
    )
    add_augmentation(optimisation)
    optimisation.add_argument(
        "--train-batch-size",
        type=count,
        default=Recipe.train_batch_size,
        help="images per step and per process",
    )
    optimisation.add_argument(
        "--seed",
        type=whole,
        default=Recipe.seed,
        help="of initial weights, order and augmentation; report several: "
        "bash scripts/hypersearch.sh NLL --seeds 3 -- FLAGS trains them",
    )
    add_selection(optimisation)
    optimisation.add_argument(
        "--sync_bn",
        action="store_true",
        help="several GPUs: batch norm over the images of all processes",
    )


def add_optimizer(optimisation: argparse._ArgumentGroup) -> None:
    optimisation.add_argument(
        "--epochs", type=count, default=Recipe.epochs, help="passes over the training split"
    )
    optimisation.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default=Recipe.optimizer,
        help="sgd: with Nesterov momentum; adamw: wants a smaller --lr, such as 0.001",
    )
    optimisation.add_argument(
        "--lr", type=positive, default=Recipe.lr, help="learning rate at the start"
    )
    optimisation.add_argument(
        "--momentum",
        type=below_one,
        help=f"sgd: 0 is plain SGD without Nesterov (default: {Recipe.momentum})",
    )
    optimisation.add_argument(
        "--weight-decay", "--wd", type=weight, default=Recipe.weight_decay, help="of all weights"
    )


def add_schedule(optimisation: argparse._ArgumentGroup) -> None:
    optimisation.add_argument(
        "--scheduler",
        choices=SCHEDULES,
        default=Recipe.scheduler,
        help="how the learning rate falls",
    )
    optimisation.add_argument(
        "--schedule-steps",
        type=count,
        nargs="+",
        metavar="EPOCH",
        help="multistep: epochs after which the rate falls (default: half and three quarters)",
    )
    optimisation.add_argument(
        "--lr-decay-factor",
        type=fraction,
        help="multistep: the rate is multiplied by this at each of those epochs "
        f"(default: {Recipe.lr_decay_factor})",
    )
    optimisation.add_argument(
        "--warmup",
        type=whole,
        metavar="STEPS",
        help=f"warmupcosine: steps of linear warm-up (default: {Recipe.warmup})",
    )


def add_augmentation(optimisation: argparse._ArgumentGroup) -> None:
    optimisation.add_argument(
        "--mix",
        choices=MIXES,
        help="train on mixtures of two images, a teacher and its student alike",
    )
    optimisation.add_argument(
        "--mix_alpha",
        type=positive,
        help=f"a of Beta(a, a), the first image's share (default: {Recipe.mix_alpha:g})",
    )
    optimisation.add_argument(
        "--cutout",
        type=count,
        metavar="PIXELS",
        help="blot out a square of this side in every training image, such as 16 of 32 pixels",
    )


def add_selection(optimisation: argparse._ArgumentGroup) -> None:
    optimisation.add_argument(
        "--select",
        choices=SELECTIONS,
        default=Recipe.select,
        help="the best epoch by validation: top-1, NLL, or NLL after temperature scaling "
        "(refinement)",
    )
    optimisation.add_argument(
        "--patience",
        type=count,
        metavar="EPOCHS",
        help="stop after so many epochs without a better --select; the rate falls as --epochs says",
    )


def add_run(parser: CommandLine) -> None:
    run = parser.add_argument_group("run")
    run.add_argument(
        "--checkpoint",
        type=path,
        default=RunChoice.checkpoint,
        help="root of the run folders",
    )
    run.add_argument(
        "--exp_name", type=checked(suffix), help="a suffix of the run's name, to keep two apart"
    )
    run.add_argument(
        "--overwrite", action="store_true", help="start a finished or differing run anew"
    )
    run.add_argument(
        "--log_with",
        choices=TRACKERS,
        help="tell a tracker that is installed the settings, the epochs and the test metrics",
    )
    run.add_argument(
        "--test-batch-size",
        type=count,
        help="images per evaluation step (default: 1000, on a CPU 128)",
    )
    run.add_argument(
        "--step",
        choices=MODES,
        default=RunChoice.step,
        help="auto: one CUDA graph on one GPU, else eager, kernel by kernel; compile also fuses; "
        "auto compiles long runs in bf16 on a CPU with AMX",
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on the same GPU, more slowly; the CPU does so anyway",
    )
