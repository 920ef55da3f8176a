"""From the command lines of train_teacher.py and train_student.py to what they ask for.

Flags (utils/flags.py) become the frozen values of utils/settings.py. One that belongs to a loss, a
distillation, an optimiser or a schedule is named in its registry entry and refused where another
one is chosen: no flag is accepted that nothing reads, but for gamma and beta in the published
commands, where a line says so.
"""

import argparse
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields

from losses import (
    BASES,
    DISTILLATIONS,
    FEATURES,
    TERMS,
    LossEntry,
    base_of,
    canonical_loss,
    loss_flags,
    loss_parameters,
    term_of,
)
from utils.data.mixing import MIXES
from utils.flags import (
    add_data,
    add_distillation,
    add_loss_flags,
    add_model,
    add_optimisation,
    add_run,
)
from utils.optimizers import OPTIMIZERS, SCHEDULES
from utils.program import UserError
from utils.program.command_line import CommandLine, checked
from utils.settings import (
    DataChoice,
    Experiment,
    LossChoice,
    Recipe,
    RunChoice,
    TeacherSource,
)
from utils.teacher_flags import add_teacher
from utils.trackers import check_installed

# The commands that the paper's authors published give both flags with each of these losses.
PUBLISHED_LOSSES = ("NLL", "NLL+MDCA", "FL", "FL+MDCA")
PUBLISHED_FLAGS = ("gamma", "beta")
# What says how a teacher's net is read and run, with the defaults: a file of logits has no net.
FLAGS_OF_NETS = {
    "teacher": None,
    "teacher_select": TeacherSource.select,
    "teacher_norm": None,
    "teacher_key": None,
    "teacher_size": None,
    "teacher_cache": None,
}


def teacher_options(argv: list[str] | None = None) -> Experiment:
    """What a command line of train_teacher.py asks for. Raises UserError."""
    parser = CommandLine(prog="train_teacher.py", description="Train a calibrated classifier.")
    add_data(parser)
    add_model(parser)
    losses = parser.add_argument_group("loss")
    losses.add_argument(
        "--loss",
        type=checked(canonical_loss),
        default="NLL",
        help=f"one of {', '.join(BASES)}, alone or with +{', +'.join(TERMS)}",
    )
    add_loss_flags(losses, BASES | TERMS)
    add_optimisation(parser)
    add_run(parser)
    args = parser.parse_args(argv)

    term = term_of(args.loss)
    if args.mix and term is not None and TERMS[term].of_batch:
        raise UserError(
            f"--mix {args.mix}: {term} compares a batch's confidences with its labels, and "
            "mixtures have two; leave out one of them"
        )
    notes = notes_on_loss_flags(args, "loss", BASES | TERMS)
    return experiment_of(args, args.loss, notes, words=words_of(parser.prog, argv))


def student_options(argv: list[str] | None = None) -> Experiment:
    """What a command line of train_student.py asks for. Raises UserError."""
    parser = CommandLine(prog="train_student.py", description="Distil a teacher into a student.")
    add_data(parser)
    add_model(parser)
    add_teacher(parser)
    add_distillation(parser)
    add_optimisation(parser)
    add_run(parser)
    args = parser.parse_args(argv)

    check_source(args)
    check_mixtures(args)
    check_cutout(args)
    check_accuracy(args)
    check_feature_flags(args)
    notes = notes_on_loss_flags(args, "distill", DISTILLATIONS | FEATURES)
    return experiment_of(
        args,
        args.distill,
        notes,
        words=words_of(parser.prog, argv),
        teacher=TeacherSource.of(vars(args)),
    )


def words_of(script: str, argv: list[str] | None) -> tuple[str, ...]:
    """The script and its flags; where a program or a notebook gave these, they are not typed."""
    return tuple(sys.argv) if argv is None else (script, *argv)


def check_mixtures(args: argparse.Namespace) -> None:
    """Refuse what mixtures of images do not go with in a student's run. Raises UserError."""
    if args.mix and args.teacher_cache:
        raise UserError(
            f"--mix {args.mix}: no cache can hold a teacher's answers to all mixtures; leave out "
            "--teacher_cache"
        )
    if args.mix and args.teacher_temperature == "views":
        raise UserError(
            f"--mix {args.mix}: no accuracy is known on mixtures of images, which "
            "--teacher_temperature views would match; give auto or a number"
        )


def check_cutout(args: argparse.Namespace) -> None:
    """Refuse what blotted images do not go with in a student's run. Raises UserError."""
    if not args.cutout:
        return
    for flag in ("teacher_cache", "teacher_logits"):
        if getattr(args, flag):
            raise UserError(
                f"--cutout {args.cutout}: --{flag} cannot hold a teacher's answers to all squares; "
                "leave out one of them"
            )
    if args.teacher_temperature == "views":
        raise UserError(
            f"--cutout {args.cutout}: no accuracy is known on images with a square blotted out, "
            "which --teacher_temperature views would match; give auto or a number"
        )


def check_accuracy(args: argparse.Namespace) -> None:
    """Refuse --teacher_accuracy where nothing is matched with it. Raises UserError."""
    if args.teacher_accuracy is not None and args.teacher_temperature != "views":
        raise UserError(
            f"--teacher_accuracy {args.teacher_accuracy:g} has no effect with "
            f"--teacher_temperature {args.teacher_temperature}; leave it out or give "
            "--teacher_temperature views"
        )


def check_feature_flags(args: argparse.Namespace) -> None:
    """Refuse what a term on features does not go with, or what has no effect without one.

    Raises UserError.
    """
    has_features = term_of(args.distill) is not None
    if args.feature_layer and not has_features:
        raise UserError(
            f"--feature_layer {args.feature_layer} has no effect with --distill {args.distill}; "
            f"leave it out or add a term on features: --distill {args.distill}+AT"
        )
    if args.teacher_cache and has_features:
        raise UserError(
            f"--distill {args.distill}: compares the teacher's maps, and the cache holds logits "
            "(maps are thousands of times as large); leave out --teacher_cache"
        )
    if args.teacher_logits and has_features:
        raise UserError(
            f"--distill {args.distill}: compares the teacher's maps, and --teacher_logits has "
            f"logits alone; give --distill {base_of(args.distill)} or --teacher_path"
        )


def check_source(args: argparse.Namespace) -> None:
    """Either nets teach or a file of logits, on which most flags have no effect.

    Raises UserError.
    """
    if bool(args.teacher_path) == bool(args.teacher_logits):
        raise UserError(
            "--teacher_path or --teacher_logits: exactly one of them says who teaches, a net or a "
            "file of logits; give one"
        )
    if not args.teacher_logits:
        return

    if args.mix:
        raise UserError(
            f"--mix {args.mix}: --teacher_logits has no logits of mixtures; leave out one of them"
        )
    for flag, default in FLAGS_OF_NETS.items():
        if getattr(args, flag) != default:
            raise UserError(
                f"--{flag} has no effect with --teacher_logits, which is read as it is; leave it "
                "out"
            )


def experiment_of(
    args: argparse.Namespace,
    loss: str,
    notes: list[str],
    words: tuple[str, ...],
    teacher: TeacherSource | None = None,
) -> Experiment:
    """All that a parsed command line asks for, checked as a whole. Raises UserError."""
    # A flag that nothing would read is refused, so that no flag is without effect.
    refuse_unread(args, "optimizer", {name: entry.reads for name, entry in OPTIMIZERS.items()})
    refuse_unread(args, "scheduler", {name: entry.reads for name, entry in SCHEDULES.items()})
    refuse_unread(args, "mix", {name: ("mix_alpha",) for name in MIXES})
    if args.cutout and args.mix:
        raise UserError(
            f"--cutout {args.cutout}: images are blotted out or mixed, not both; leave out "
            "--cutout or --mix"
        )
    if args.log_with:
        check_installed(args.log_with)

    try:
        parameters = loss_parameters(loss, vars(args))
    except ValueError as error:
        raise UserError(str(error)) from None

    recipe = recipe_of(args)
    return Experiment(
        data=DataChoice.of(vars(args)),
        recipe=recipe,
        loss=LossChoice(loss, parameters, vars(args).get("feature_layer")),
        run=RunChoice(
            checkpoint=args.checkpoint,
            exp_name=args.exp_name,
            overwrite=args.overwrite,
            log_with=args.log_with,
            test_batch_size=args.test_batch_size,
            step=args.step,
            deterministic=args.deterministic,
        ),
        teacher=teacher,
        arguments=vars(args) | recipe.jsonable(),
        notes=tuple(notes),
        words=words,
    )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What is not given takes the Recipe's default. Raises UserError."""
    given = {}
    for field in fields(Recipe):
        value = getattr(args, field.name)
        if value is not None:
            given[field.name] = value
    if args.schedule_steps:
        given["schedule_steps"] = tuple(args.schedule_steps)
    else:
        milestones = {args.epochs // 2, args.epochs * 3 // 4} - {0}
        given["schedule_steps"] = tuple(sorted(milestones))
    recipe = Recipe(**given)

    steps = recipe.schedule_steps
    rises = list(steps) == sorted(set(steps))
    if not rises or max(steps, default=0) >= recipe.epochs:
        raise UserError(
            f"--schedule-steps {' '.join(map(str, steps))}: must rise and stay below "
            f"--epochs {recipe.epochs}"
        )
    longest_patience = recipe.epochs - 2  # the first epoch is always the best so far
    if recipe.patience is not None and recipe.patience > longest_patience:
        fewer = f"give at most {longest_patience} or " if longest_patience > 0 else ""
        raise UserError(
            f"--patience {recipe.patience}: cannot stop a run of --epochs {recipe.epochs} before "
            f"its end; {fewer}leave it out"
        )
    return recipe


def refuse_unread(
    args: argparse.Namespace, chooser: str, reads: Mapping[str, Collection[str]]
) -> None:
    """Refuse a given flag that the choice --`chooser` does not read, but others do.

    `reads`: the flags of each choice. Raises UserError.
    """
    chosen = getattr(args, chooser)
    for flag in sorted({flag for flags in reads.values() for flag in flags}):
        readers = [choice for choice, flags in reads.items() if flag in flags]
        if getattr(args, flag) is not None and chosen not in readers:
            now = f"with --{chooser} {chosen}" if chosen else f"without --{chooser}"
            raise UserError(
                f"--{flag.replace('_', '-')} has no effect {now}; leave it out or give "
                f"--{chooser} {' or '.join(readers)}"
            )


def notes_on_loss_flags(
    args: argparse.Namespace, chooser: str, entries: Mapping[str, LossEntry]
) -> list[str]:
    """Refuse a given flag that the chosen loss or distillation does not read, but others do.

    Where the paper's published commands give such a flag, the lines that say so instead. Raises
    UserError.
    """
    chosen = getattr(args, chooser)
    notes = []
    for flag, readers in unread_loss_flags(args, chosen, entries).items():
        fault = f"--{flag} {getattr(args, flag):g} has no effect with --{chooser} {chosen}"
        if chosen in PUBLISHED_LOSSES and flag in PUBLISHED_FLAGS:
            notes.append(f"{fault} (read by {', '.join(readers)})")
            continue
        # Many call the distillation's weight so.
        is_weight = chooser == "distill" and flag == "alpha"
        weight_hint = "; the weight of the distillation is --Lambda" if is_weight else ""
        raise UserError(
            f"{fault}; leave it out or give another --{chooser} "
            f"(read by {', '.join(readers)}){weight_hint}"
        )
    return notes


def unread_loss_flags(
    args: argparse.Namespace, chosen: str, entries: Mapping[str, LossEntry]
) -> dict[str, list[str]]:
    """The given flags that a loss does not read, each with those of `entries` that do."""
    read = {flag.name for flag in loss_flags(chosen)}
    unread: dict[str, list[str]] = {}
    for name, entry in entries.items():
        is_term = name in TERMS or name in FEATURES
        for flag in entry.flags:
            if flag.name not in read and getattr(args, flag.name) is not None:
                unread.setdefault(flag.name, []).append(f"+{name}" if is_term else name)
    return unread
