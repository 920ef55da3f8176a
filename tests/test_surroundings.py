"""What surrounds a program: streams and terminals that go away, ~, accelerate's configuration."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, assert_same_run, command, run_script, wait_for

import train_student
import train_teacher
from utils import training
from utils.program import UserError, environment, wheels
from utils.program.environment import check_gpu
from utils.program.errors import Lasting, own_program
from utils.program.processes import start

NAME = "tiny/resnet8/NLL_seed=42"


def test_streams_closed_from_the_start(tiny_npz, tmp_path):
    line = f"python {ROOT}/train_teacher.py {' '.join(command(tiny_npz, tmp_path))} >&- 2>&-"
    run_script("bash", "-c", line, cwd=tmp_path)
    assert (tmp_path / NAME / "result.json").exists()


@pytest.mark.parametrize("stream, writes", [(1, 1), (2, 6)])
def test_a_disk_that_fills_below_the_output(teacher, tiny_npz, tmp_path, forks, stream, writes):
    hook = ["at_rename", writes, "after", "stream_to", stream, "/dev/full"]
    assert forks.run(["train_teacher.py", *command(tiny_npz, tmp_path)], hook=hook).code == 0
    assert_same_run(teacher, tmp_path / NAME)


def test_a_terminal_that_is_closed(teacher, tiny_npz, tmp_path):
    """Its shell sends SIGHUP, and every write fails from then on."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        script = str(ROOT / "train_teacher.py")
        os.execv(sys.executable, [sys.executable, script, *command(tiny_npz, tmp_path)])
    printed = b""
    while b"epoch" not in printed:
        printed += os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_same_run(teacher, tmp_path / NAME)


def test_a_mistake_is_one_line_and_a_traceback_on_request(tiny_npz, tmp_path, forks):
    line = ["train_teacher.py", *command(tiny_npz, tmp_path, "--loss", "MDAC")]
    child = forks.run(line)
    assert child.code == 2 and child.out == "" and child.err.count("\n") == 1
    assert child.err.startswith("train_teacher.py: error: --loss")
    assert "Traceback" in forks.run(line, KD_TRACEBACK="1").err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_the_progress_bar_and_how_often_it_moves(teacher, tiny_npz, tmp_path, monkeypatch, seconds):
    """The teacher was trained without a terminal, and so without a bar."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(training, "REPORT_SECONDS", seconds)
        patch.setattr("sys.stderr", terminal)
        train_teacher.main(command(tiny_npz, tmp_path))
    shown = terminal.getvalue()
    assert "epoch 2/3" in shown and ("left of the run" in shown) == (seconds == 0)
    assert_same_run(teacher, tmp_path / NAME)


def test_a_tilde_that_no_shell_has_expanded(tiny_npz, tmp_path, forks):
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home / "data", work):
        folder.mkdir(parents=True)
    shutil.copy(tiny_npz, home / "data/cifar10.npz")
    common = command("~/data/cifar10.npz", "~/runs", "--epochs", "1")
    taught = ("--teacher_path=~/runs/cifar10/resnet8/NLL_seed=42", "--teacher_cache=~/cache")
    for line in (["train_teacher.py", *common], ["train_student.py", *common, *taught]):
        assert forks.run(line, cwd=str(work), HOME=str(home)).code == 0
    assert not list(work.iterdir())
    assert {path.name for path in home.iterdir()} == {"data", "runs", "cache"}


@pytest.mark.parametrize(
    "said, variable",
    [
        ("gradient accumulation", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}),
        ("--step compile", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}),
    ],
)
def test_what_a_foreign_configuration_would_change(tiny_npz, tmp_path, forks, said, variable):
    child = forks.run(["train_teacher.py", *command(tiny_npz, tmp_path)], **variable)
    assert child.code == 2 and child.err.count("\n") == 1
    assert said in child.err and "accelerate config" in child.err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The driver of a machine whose GPU torch does not find, and nothing hides it."""
    file = tmp_path / "driver"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n")
    monkeypatch.setattr(wheels, "DRIVER", file)
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_that_torch_does_not_find_is_no_reason_to_use_the_cpu(driver, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\n..")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError) as refused:
        start()
    said = str(refused.value)
    assert "\n" not in said and "too old (found version 12040);" in said
    assert "wheel index cu126" in said and "torch<2.8" in said and "bash setup_env.sh" in said
    assert "CUDA_VISIBLE_DEVICES= in front" in said and "--cpu" in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match="no GPU with CUDA_VISIBLE_DEVICES=7"):
        start()


@pytest.mark.parametrize(
    "name, value",
    [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("ACCELERATE_USE_CPU", "true")],
)
def test_a_gpu_that_is_not_wanted(driver, monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert start().device.type == "cpu"
    assert capsys.readouterr().out.startswith("device: cpu (")


def gpu_of(monkeypatch, capability: tuple, archs: str, cuda: str | None = "13.0") -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    stand_ins = {
        "is_available": True,
        "device_count": 2,
        "get_device_capability": capability,
        "get_device_name": "Tesla",
        "get_arch_list": archs.split(),
    }
    for name, answer in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, answer=answer: answer)


@pytest.mark.parametrize(
    "capability, archs, runs",
    [
        ((7, 0), "sm_75 sm_80 sm_90", False),  # V100
        ((6, 1), "sm_50 sm_60 sm_70", True),  # GTX 1080
        ((8, 9), "sm_75 sm_80 sm_86 sm_90", True),
        ((8, 0), "sm_75 sm_86 sm_90", False),
        ((12, 0), "sm_90 compute_90", True),
        ((8, 0), "compute_90 sm_90a", False),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for(driver, monkeypatch, capability, archs, runs):
    """As NVIDIA documents it: machine code runs within its major version, from its minor one on;
    intermediate code on all that came later."""
    gpu_of(monkeypatch, capability, archs)
    if runs:
        return check_gpu()
    with pytest.raises(UserError, match=f"built for {archs}, not for Tesla .sm_{capability[0]}"):
        check_gpu()
    gpu_of(monkeypatch, capability, archs, cuda=None)  # AMD's
    check_gpu()


def test_the_recorded_command_repeats_the_run(tiny_npz, tmp_path, forks):
    line = [f"{ROOT}/train_teacher.py", *command(tiny_npz, tmp_path, "--epochs", "1")]
    assert forks.run(line, ACCELERATE_MIXED_PRECISION="bf16").code == 0
    recorded = json.loads((tmp_path / NAME / "config.json").read_text())["command"]
    assert "--mixed_precision bf16" in recorded
    done = run_script("bash", "-c", recorded, cwd=tmp_path)
    assert "best, scaled" in done.stdout


def test_a_finished_student_needs_no_teacher(teacher, tiny_npz, tmp_path, capsys):
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    line = command(tiny_npz, tmp_path / "runs", "--epochs", "1", "--teacher_path", str(copy))
    train_student.main(line)
    (tmp_path / "teacher/model_best.pth").unlink()
    capsys.readouterr()
    train_student.main(line)
    assert "best, scaled" in capsys.readouterr().out
    with pytest.raises(UserError, match="--teacher_path"):
        train_student.main([*line, "--T", "2"])


def test_overwrite_leaves_nothing_of_the_old_run(tiny_npz, tmp_path):
    line = command(tiny_npz, tmp_path, "--epochs", "1", "--log_with", "tensorboard")
    train_teacher.main(line)
    folder = tmp_path / NAME
    events = set(folder.rglob("events.out*"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "wandb").symlink_to(elsewhere)  # a tracker's folder on another disk
    for name in ("posthoc.json", "evaluation_svhn.json", "notes.txt"):
        (folder / name).write_text("{}")
    train_teacher.main([*line, "--overwrite"])
    left = {path.name for path in folder.iterdir()}
    assert "notes.txt" in left and elsewhere.exists()
    assert not left & {"posthoc.json", "evaluation_svhn.json", "wandb"}
    assert events and not events & set(folder.rglob("events.out*"))


def test_a_file_system_without_locks(teacher, tiny_npz, tmp_path, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    train_teacher.main(command(tiny_npz, tmp_path))
    assert "no locks" in capsys.readouterr().out
    assert_same_run(teacher, tmp_path / NAME)


NOTEBOOK = """
import io, runpy, signal, sys
class Stream(io.TextIOBase):  # what a notebook puts in the place of both: no reconfigure, no file
    def __init__(self, to): self.to = to
    def write(self, text): return self.to.write(text)
streams = sys.stdout, sys.stderr = Stream(sys.__stdout__), Stream(sys.__stderr__)
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
before = [signal.getsignal(number) for number in numbers]
sys.path.insert(0, ROOT)
for _ in range(2):
    sys.argv = ["train_teacher.py", *COMMAND]
    runpy.run_path(ROOT + "/train_teacher.py", run_name="__main__")
    assert (sys.stdout, sys.stderr) == streams
    assert before == [signal.getsignal(number) for number in numbers]
"""


def test_a_notebook(tiny_npz, tmp_path):
    """`%run train_teacher.py`, twice: its streams can do less, and it gets everything back."""
    line = command(tiny_npz, tmp_path, "--epochs", "1")
    code = f"ROOT, COMMAND = {str(ROOT)!r}, {line!r}\n{NOTEBOOK}"
    done = run_script(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.count("best, scaled") == 2 and "shown, not trained" in done.stdout


def test_a_stream_without_a_file_that_fails(capsys):
    class Broken(io.TextIOBase):
        def write(self, text):
            raise OSError("gone")

    stream = Lasting(Broken())
    assert stream.write("text") == 4
    stream.flush()


# Those that are started; the others are imported by them.
SCRIPTS = sorted(
    path.name for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_is_started_by_its_path(tmp_path, script):
    """`python scripts/report.py` does what `python -m scripts.report` does."""
    line = [sys.executable, ROOT / "scripts" / script, "--help"]
    done = run_script(*line, cwd=tmp_path, PYTHONPATH="")
    assert f"scripts.{script.removesuffix('.py')}" in done.stdout and done.stderr.count("\n") < 2


# Is found in the place of torch, and takes as long to import as it does on a slow disk.
SLOW_TORCH = """
import pathlib, time
pathlib.Path(FILE).touch()
time.sleep(60)
"""
PROGRAMS = [["train_teacher.py"], ["train_student.py"], ["-m", "scripts.report", "x"]]


@pytest.mark.parametrize("words", PROGRAMS, ids=lambda words: words[-1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported(tmp_path, words, number):
    (tmp_path / "torch.py").write_text(f"FILE = {str(tmp_path / 'began')!r}\n{SLOW_TORCH}")
    program = words[0] if words[0] != "-m" else "python -m scripts.report"
    # sitecustomize comes before a script's own folder.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class First:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            import importlib.util\n"
        f"            file = {str(tmp_path / 'torch.py')!r}\n"
        "            return importlib.util.spec_from_file_location(name, file)\n"
        "sys.meta_path.insert(0, First())\n"
    )
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        # The suite may run in the background, where shells have SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(tmp_path / "began")
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert error == f"{program}: stopped by {number.name}; give the same command again\n"
    assert process.returncode == 128 + number


def test_a_signal_that_is_ignored_while_torch_is_imported():
    """A job in the background: what the shell has it ignore stays ignored."""
    line = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    line += "sys.orig_argv = ['python', 'train_teacher.py']; import utils\n"
    line += "print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    assert run_script(sys.executable, "-c", line, cwd=ROOT).stdout == "True\n"


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (["python", "train_teacher.py", "--lr", "1"], "train_teacher.py"),
        (["python", "-u", "./train_student.py"], "train_student.py"),
        (["python", "scripts/report.py", "runs"], "python -m scripts.report"),
        (["python", "-m", "scripts.report"], "python -m scripts.report"),
        (["python", "-m", "pytest", "train_teacher.py"], None),
        (["python", "-m", "ipykernel_launcher", "-f", "kernel.json"], None),
        (["python", "tests/forks.py"], None),
        (["python", "-c", "import utils"], None),
        (["python"], None),
    ],
)
def test_only_a_program_of_ours_ends_so(monkeypatch, words, program):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "orig_argv", words)
    assert own_program() == program


@pytest.mark.parametrize(
    "flags, is_said", [("fma avx2", True), ("avx512_bf16", False), ("amx_bf16", False)]
)
def test_bf16_that_the_processor_lacks_is_said(monkeypatch, tmp_path, flags, is_said):
    info = tmp_path / "cpuinfo"
    info.write_text(f"model name : a processor\nflags : {flags}\n")
    monkeypatch.setattr(environment, "CPU_INFO", info)
    bf16 = Namespace(device=torch.device("cpu"), mixed_precision="bf16")
    assert ("float32" in environment.precision_note(bf16)) is is_said
    assert not environment.precision_note(Namespace(device=bf16.device, mixed_precision="no"))
    info.unlink()  # not Linux: it does not say
    assert not environment.precision_note(bf16)
