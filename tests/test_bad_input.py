"""Every mistake ends in one line that names the flag or file, exit code 2, and nothing on disk."""

import io
import os
import re
import shlex
import shutil
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import command, fails, write_npz
from hypothesis import given, settings
from hypothesis import strategies as st

import train_student
import train_teacher
from models import build_model
from scripts import benchmark, cache_teacher, evaluate, posthoc, report
from utils.program import UserError, one_line_errors

RUN = "teachers/tiny/resnet8/NLL_seed=42"
TAUGHT = f"--teacher_path {RUN}"
AGAIN = "--model resnet8 --train-batch-size 64 --checkpoint teachers"
# A right command, which a test adds its mistake to.
PROGRAMS = {
    "train_teacher": (train_teacher.main, "--dataset tiny.npz"),
    "train_student": (train_student.main, f"--dataset tiny.npz {TAUGHT}"),
    "evaluate": (evaluate.main, f"--on corruptions {RUN}"),
    "posthoc": (posthoc.main, RUN),
    "report": (report.main, "teachers"),
    "cache_teacher": (cache_teacher.main, f"--dataset tiny.npz {TAUGHT} --teacher_cache cache"),
    "benchmark": (benchmark.options, ""),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_npz, teacher) -> Path:
    """A working folder with whole files and folders beside odd ones."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(tiny_npz, folder / "tiny.npz")
    write_npz(folder / "other.npz", 4, 150, 40, seed=1)
    shutil.copytree(teacher.parents[2], folder / "teachers")
    train_teacher.main(command(tiny_npz, folder / "teachers", "--epochs", "1", "--loss", "FL"))
    (folder / "empty").mkdir()
    for name in ("file", "text.npz"):
        (folder / name).write_text("text\n")
    for name in ("loop", "loop.npz", "loop.pth"):
        (folder / name).symlink_to(name)
    torch.save(build_model("resnet8", 4).state_dict(), folder / "weights.pth")
    for name in ("predictions.npz", "model_best.pth"):
        copy = shutil.copytree(folder / RUN, folder / f"damaged_{Path(name).stem}" / "run")
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
    return folder


@pytest.fixture
def folder(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    return world


def said(capsys, folder: Path, program: str, flags: str) -> str:
    main, right = PROGRAMS[program]
    return fails(capsys, folder, main, shlex.split(right) + shlex.split(flags))


FORM = ["", "fast", "nan", "-inf", "1e99", "-1", "9" * 5000, "1,5", "½"]
NUMBERS = {
    "train_teacher": "--epochs 0 1.5 --train-batch-size 0 --test-batch-size 0 --lr 0 --momentum 1 "
    "--weight-decay --warmup 2.0 --schedule-steps 0 --lr-decay-factor 2 --seed --split-seed "
    "--alpha 1 --beta --gamma --image_size 0",
    "train_student": "--T 0 --Lambda",
    "evaluate": "--test-batch-size 0 --seed 0.5",
    "posthoc": "--folds 1",
    "report": "--resamples 1.5",
    "cache_teacher": "--batch-size 0 --split-seed",
    "benchmark": "--batch-size 0 --seconds 0 --workers --at-once 0 1.5",
}


@pytest.mark.parametrize(
    "program, flag, values",
    [(p, *found) for p in NUMBERS for found in re.findall(r"(--\S+)((?: \d\S*)*)", NUMBERS[p])],
)
def test_numbers(folder, capsys, program, flag, values):
    for value in FORM + values.split():
        error = said(capsys, folder, program, shlex.join([f"{flag}={value}"]))
        assert re.search(rf"{flag}.*{re.escape(repr(value[:80]))} will not do; give a ", error)


CHOICES = {  # of each flag, one that is known
    "train_teacher": "--scheduler multistep --log_with tensorboard --step compile --loss MDCA "
    "--model unknown",
    "train_student": "--teacher unknown --teacher_norm cifar10 --teacher_select last",
    "evaluate": "--on cifar10c --epoch best --corruptions contrast",
    "posthoc": "--epoch best",
    "report": "--columns top1 --select nll --epoch best",
}


@pytest.mark.parametrize(
    "program, flag, known",
    [(p, *found) for p in CHOICES for found in re.findall(r"(--\w+) (\w+)", CHOICES[p])],
)
@pytest.mark.parametrize("value", ["", "none", "BEST", "naïve", "x" * 3000, "a\nb"])
def test_names_of_which_only_some_are_known(folder, capsys, program, flag, known, value):
    error = said(capsys, folder, program, shlex.join([flag, value]))
    assert re.search(rf"{flag}.*{known}", error)
    assert repr(value)[:20] in error or value[:20].replace("\n", " ") in error


TEXTS = {
    "train_teacher": ("--dataset", "--data_dir", "--checkpoint", "--exp_name"),
    "train_student": ("--teacher_path", "--teacher_logits", "--teacher_cache", "--teacher_loss"),
    "evaluate": ("--data_dir", "--dataset", "--out", "RUN"),
    "posthoc": ("RUN",),
    "report": ("--out", "ROOT"),
}


@pytest.mark.parametrize("program, flag", [(p, flag) for p in TEXTS for flag in TEXTS[p]])
def test_texts(folder, capsys, program, flag):
    for value in ("", " ", "a\nb", "\x1b[31m", "x" * 5000, "a\0b", "\udcff"):
        words = [flag, value] if flag.startswith("--") else [value]
        error = said(capsys, folder, program, shlex.join(words))
        assert re.search(rf"{flag}.*give 1 to \d+ ", error)


LONG = "x" * 300  # more than a file's name may have
MISTAKES = {
    "train_teacher": [
        ("--loss MDAC", "--loss.*'MDAC'.*MDCA"),
        ("--dataset svhn --data_dir file", "--data_dir file.*svhn.npz"),
        ("--skip_unreadable", "--skip_unreadable: .*folder of images only; leave it out"),
        (f"--dataset {LONG}.npz", "--dataset x.*check the path"),
        ("--schedule-steps 8 4 --epochs 10", "--schedule-steps 8 4.*--epochs 10"),
        ("--schedule-steps", "--schedule-steps.*at least one"),
        ("--warmup 5", "--warmup.*multistep.*--scheduler warmupcosine"),
        ("--scheduler cosine --lr-decay-factor 0.2", "--lr-decay-factor.*--scheduler multistep"),
        ("--scheduler warmupcosine --warmup 999999", "--warmup 999999.*give fewer"),
        ("--train-batch-size 500", "--train-batch-size 500.*135.*at most"),
        ("--exp_name ../up", "--exp_name.*'../up'.*letters"),
        (f"--exp_name {LONG}", "--exp_name.*'xxx.*1 to 80"),
        ("--epoch 1", "'--epoch'.*--epochs"),
        ("--T 4", "'--T'.*train_student.py.*--help"),
        ("stray", "'stray'.*--dataset takes one value.*--help"),
        ("--overwrite yes", "'yes'.*--overwrite takes no value"),
        ("--lr 0.1 0.2", "'0.2'.*--lr takes one value; start the command once for each"),
        ("--seed 1 2 3", "'2'.*one seed.*SEEDS=\"1 2 3\".*--seeds 3"),
        ("--seed=1 2", "'2'.*one seed"),
        ("--temperature 4", "'--temperature'.*--T is a flag of train_student.py"),
        ("--batch-size 64", "mean --train-batch-size"),
        ("--learning-rate 1", "mean --lr"),
        ("--lamda 1", "'--lamda'.*--help"),
        ("--ema", "--ema: expected one argument"),
        ("--ema-decay 0.9", "mean --ema"),
        ("--early-stopping", "mean --patience"),
        ("--gpu 0", "CUDA_VISIBLE_DEVICES=0"),
        ("--device cuda", "CUDA_VISIBLE_DEVICES=0"),
        ("--optimizer adam", "sgd.*adamw"),
        ("--optimizer adamw --momentum 0.9", "--momentum has no effect with --optimizer adamw"),
        ("--adam", "--optimizer adamw"),
        ("--resume", "same command again"),
        ("--workers 4", "no loader processes"),
        ("--amp", "accelerate launch --mixed_precision"),
        ("--pretrained", "--teacher_path"),
        ("--output here", "mean --checkpoint"),
        ("-lr 0.1", "'-lr'.*mean --lr"),
        (
            "--sched cosine",
            "mean --scheduler or --schedule-steps|mean --schedule-steps or --scheduler",
        ),
        ("--loss FL --beta 3 --margin 4", "--margin 4 has no effect with --loss FL.*MbLS"),
        ("--loss LS --gamma 3", "--gamma 3 has no effect with --loss LS.*FL, DFL"),
        ("--loss FL+MMCE --alpha 0.1", "--alpha 0.1 has no effect with --loss FL.MMCE.*LS"),
        ("--loss Brier --beta 0", "--beta 0 has no effect with --loss Brier"),
        ("--epochs", "--epochs.*expected"),
        ("--checkpoint file/below", "--checkpoint.*file/below.*may write"),
        (f"--checkpoint new/{LONG}", "--checkpoint.*may write"),
        ("--dataset cifar10 --data_dir nowhere/below", "--data_dir nowhere/below.*cifar10.npz"),
        ("--sync_bn", "--sync_bn.*several GPUs.*leave it out"),
        (f"{AGAIN} --epochs 4", r"other settings \(epochs was 3 and is 4\)"),
        (f"{AGAIN} --epochs 3 --split-seed 1", r"other settings \(split_seed was 0 and is 1\)"),
    ],
    "train_student": [
        ("--teacher_path nowhere", "--teacher_path nowhere.*give a run folder"),
        (f"--teacher_path {LONG}", "--teacher_path x.*no such file"),
        ("--teacher_path tiny.npz", "tiny.npz cannot be read.*torch.save.*--teacher_path"),
        ("--teacher_path weights.pth", "--teacher_path weights.pth.*give --teacher"),
        ("--teacher_path teachers", "2 finished runs.*FL_gamma=1_seed=42.*NLL_seed=42"),
        (f"--teacher_path {RUN}/checkpoint.pth", "model_best.pth"),
        ("--dataset other.npz", "trained on other data, tiny.*--dataset other.*another"),
        ("--Lambda 1.5", "--Lambda 1.5.*ce_weight"),
        ("--temperature 4", "mean --T[?]"),
        ("--lamda 1", "mean --Lambda"),
        ("--t 4", "mean --T[?]"),
        ("--loss NLL", "'--loss'.*--loss is a flag of train_teacher.py|mean --distill"),
        ("--alpha 0.5", "--alpha 0.5 has no effect with --distill KD.*DKD.*--Lambda"),
        ("--distill DKD --gamma 1", "--gamma 1 has no effect with --distill DKD.*DIST"),
    ],
    "evaluate": [
        ("nowhere", "nowhere.*no such folder"),
        ("damaged_model_best", "model_best.pth.*again"),
        ("--on cifar10q", "--on.*cifar10q.*cifar10c"),
        ("--on text.npz", "--on text.npz.*numpy.savez"),
        (f"--on {RUN}/predictions.npz", "--on.*x_test"),
        ("--on synthetic", "--on synthetic.*name a run"),
        ("--on cifar10h --data_dir nowhere", "--on cifar10h.*not CIFAR-10's; evaluate a run on"),
        ("--on cifar10c --data_dir file", "--on cifar10c.*not CIFAR-10's; evaluate a run on"),
        ("--on cifar100c --data_dir file", "--on cifar100c.*not CIFAR-100's; evaluate a run on"),
        ("--on svhn --out boxes.png", "--out has no effect"),
        ("--out boxes.pdf", "--out boxes.pdf.*png"),
        ("--out nowhere/boxes.png", "--out nowhere/boxes.png: its folder is not there"),
        ("--dataset other.npz", "other.npz|other data"),
    ],
    "posthoc": [
        ("nowhere", "nowhere.*no such folder"),
        ("damaged_predictions", "predictions.npz.*again"),
    ],
    "report": [
        ("nowhere", "nowhere.*no such folder"),
        ("--columns", "--columns.*at least one"),
        ("--output page", "mean --out"),
        ("--out file/below", "--out file/below.*name a folder"),
        (f"--out new/{LONG}", "--out new/x.*name a folder"),
    ],
    "cache_teacher": [
        ("--teacher_cache file/below", "--teacher_cache file/below.*name a folder"),
        ("--teacher_cache loop", "--teacher_cache loop.*name a folder"),
    ],
    "benchmark": [
        ("--at-once 1 2 --workers 0", "--workers has no effect with --at-once; leave it out"),
        ("stray", "'stray'.*--help"),
    ],
}


@pytest.mark.parametrize(
    "program, flags, pattern", [(p, *each) for p in MISTAKES for each in MISTAKES[p]]
)
def test_mistakes(folder, capsys, no_network, program, flags, pattern):
    error = said(capsys, folder, program, flags)
    assert re.search(pattern, error), error
    assert len(error) < 1500


@pytest.fixture
def no_network(monkeypatch):
    from torchvision.datasets import cifar, svhn

    def fail(url, root, *options, **named):
        os.makedirs(root, exist_ok=True)
        raise OSError("network unreachable")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    monkeypatch.setattr(svhn, "download_url", fail)


WORDS = [
    *("", "0", "1", "2", "0.5", "1e-30", "1000000000", "NaN", "--", "-h", "best", "last", "top1"),
    *("tiny.npz", "loop.npz", "empty", "weights.pth", "teachers", "file", RUN),
    *("NLL", "FL+MDCA", "resnet8", "wrn_10_1", "warmupcosine", "cifar10", "corruptions"),
]
VALUES = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    # What follows could be written to.
).filter(lambda text: not (text.startswith(("/", "~")) or ".." in text))
PARTS = {program: main for program, (main, _) in PROGRAMS.items()}  # without the work
PARTS |= {p.__name__.split(".")[-1]: p.options for p in (evaluate, posthoc, cache_teacher)}


@cache
def flags_of(program: str) -> list[str]:
    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        PARTS[program](["--help"])
    return sorted(set(re.findall(r"--[A-Za-z][\w-]*", shown.getvalue())))


@st.composite
def commands(draw) -> tuple[str, list[str]]:
    program = draw(st.sampled_from(list(PARTS)))
    words = shlex.split(PROGRAMS[program][1]) if draw(st.booleans()) else []
    for flag in draw(st.lists(st.sampled_from(flags_of(program)), max_size=3)):
        words += [flag, *draw(st.tuples(VALUES) | st.lists(VALUES, max_size=3))]
    return program, words


def test_no_command_ends_in_a_traceback(world, tmp_path, monkeypatch, capsys, no_network):
    """Anything but UserError and SystemExit would come through."""

    def enough(*arguments):
        raise UserError("the command is right")

    shutil.copytree(world, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    for script in (train_teacher, train_student):
        monkeypatch.setattr(script, "fit", enough)
    codes = set()

    @settings(max_examples=400, deadline=None, database=None)
    @given(commands())
    def run(command):
        program, words = command
        code = 0
        try:
            with one_line_errors(program):
                PARTS[program](words)
        except SystemExit as stop:
            code = stop.code or 0
        assert capsys.readouterr().err.count("\n") == (code > 0)
        codes.add(code)

    run()
    assert codes == {0, 2}
