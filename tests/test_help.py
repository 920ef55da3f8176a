"""--help shows the default of every flag that has one, and it is the one that the code uses."""

import re

import pytest
import torch
from accelerate import Accelerator

import losses
from scripts import benchmark, cache_teacher, evaluate, export, posthoc, predict, report
from utils.data import Split
from utils.evaluation import logits_of
from utils.options import student_options, teacher_options
from utils.program.command_line import CommandLine
from utils.program.hints import ADVICE, MEANT, flags_of_one_script, simple

PROGRAMS = {
    "train_teacher": teacher_options,
    "train_student": student_options,
    **{
        script.__name__.split(".")[-1]: script.options
        for script in (benchmark, cache_teacher, evaluate, export, posthoc, predict, report)
    },
}


class Defined(Exception):
    pass


@pytest.fixture
def parser_of(monkeypatch):
    def parse_args(self, argv=None, namespace=None):
        raise Defined(self)

    # Wide enough that no text is broken: a path may be broken at its hyphens.
    monkeypatch.setenv("COLUMNS", "10000")

    def parser_of(program: str) -> CommandLine:
        with monkeypatch.context() as patch:
            patch.setattr(CommandLine, "parse_args", parse_args)
            with pytest.raises(Defined) as defined:
                PROGRAMS[program]([])
        return defined.value.args[0]

    return parser_of


def help_of(parser: CommandLine) -> dict[str, str]:
    """{flag: its text}, each in one line."""
    blocks = re.split(r"\n  (?=-)", parser.format_help())[1:]
    texts = {}
    for block in blocks:
        text = " ".join(block.split("\n\n")[0].split())
        texts |= dict.fromkeys(re.findall(r"(?<![\w-])(--[A-Za-z][\w-]*)", text)[:1], text)
    return texts


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_default_is_shown(parser_of, program):
    parser = parser_of(program)
    texts = help_of(parser)
    shown = 0
    for action in parser._actions:
        # A switch is off.
        if (
            action.option_strings
            and action.default not in (None, "==SUPPRESS==")
            and action.nargs != 0
        ):
            text = texts[action.option_strings[0]]
            assert f"(default: {action.default})" in text, text
            shown += 1
    # These name their defaults in words alone: what is not given has a meaning of its own.
    assert shown or program in ("cache_teacher", "predict")


def test_the_split_seed_shows_its_default(parser_of):
    text = help_of(parser_of("train_teacher"))["--split-seed"]
    assert "(default: 0)" in text
    assert "without effect on data that bring validation images of their own" in text


def said_default(parser_of, program: str, flag: str) -> str:
    return re.search(r"\(default: (.*?)\)", help_of(parser_of(program))[flag])[1]


def test_defaults_that_depend_on_another_flag(parser_of):
    """Their text says what a run without them is made with."""

    def said(flag: str) -> str:
        return said_default(parser_of, "train_teacher", flag)

    recipe = teacher_options(["--epochs", "80"]).recipe
    assert said("--schedule-steps") == "half and three quarters"
    assert recipe.schedule_steps == (40, 60)
    assert float(said("--lr-decay-factor")) == recipe.lr_decay_factor
    assert float(said("--momentum")) == recipe.momentum
    warm = teacher_options(["--scheduler", "warmupcosine"]).recipe
    assert float(said("--warmup")) == warm.warmup
    assert float(said("--mix_alpha")) == teacher_options(["--mix", "mixup"]).recipe.mix_alpha
    assert "rate is multiplied by" in help_of(parser_of("train_teacher"))["--lr-decay-factor"]


@pytest.mark.parametrize(
    ("program", "flag"),
    [
        ("train_teacher", "--test-batch-size"),
        ("evaluate", "--test-batch-size"),
        ("cache_teacher", "--batch-size"),
    ],
)
def test_the_default_of_an_evaluation_step(parser_of, program, flag):
    """As many images as the text says reach the net at once."""
    on_gpu, on_cpu = re.findall(r"\d+", said_default(parser_of, program, flag))
    assert on_gpu == "1000"
    steps = []

    def forward(images):
        steps.append(len(images))
        return torch.zeros(len(images), 4)

    split = Split(torch.zeros(300, 3, 2, 2, dtype=torch.uint8), torch.zeros(300, dtype=torch.long))
    logits_of(forward, split, Accelerator(cpu=True))
    assert max(steps) == int(on_cpu)


@pytest.mark.parametrize("program", ["train_teacher", "train_student"])
def test_defaults_of_losses(parser_of, program):
    """`--gamma`: focal exponent (default: FL 1, DFL 5)."""
    names = losses.distillation_names() if program == "train_student" else losses.loss_names()
    texts, compared = help_of(parser_of(program)), 0
    for name in names:
        for flag in losses.loss_flags(name):
            value = losses.loss_parameters(name, {}).get(flag.name)
            text = texts[f"--{flag.name}"]
            shown = dict(re.findall(r"(\w+) ([\d.]+)(?=[,)])", text))
            readers = [part for part in name.split("+") if part in shown]
            if value is not None:
                assert any(float(shown[reader]) == value for reader in readers), text
                compared += 1
    assert compared > 5


def test_what_is_meant_exists(parser_of):
    """Every flag that a hint names is one, and no hint hides a flag of ours."""
    flags = {p: set(parser_of(p)._option_string_actions) for p in PROGRAMS}
    every = set().union(*flags.values())
    assert {target for targets in MEANT.values() for target in targets} <= every
    training = {simple(flag) for p in ("train_teacher", "train_student") for flag in flags[p]}
    assert not training & MEANT.keys() and not training & ADVICE.keys()
    for text in ADVICE.values():
        named = set(re.findall(r"--[a-zA-Z][\w-]*", text))
        elsewhere = {"--mixed_precision", "--num_processes", "--seeds"}
        assert named <= every | elsewhere


@pytest.mark.parametrize(
    ("program", "other"), [("train_teacher", "train_student"), ("train_student", "train_teacher")]
)
def test_every_flag_of_the_other_script_is_known(parser_of, program, other):
    """So that whoever types one is told which script has it."""
    own = set(parser_of(program)._option_string_actions)
    alone = set(parser_of(other)._option_string_actions) - own
    scripts = flags_of_one_script()
    named = {f"--{flag}" for flag, script in scripts.items() if script == f"{other}.py"}
    assert alone and named == alone
