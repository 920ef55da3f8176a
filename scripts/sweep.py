"""What the shell scripts of sweeps ask of the code.

    python -m scripts.sweep hypersearch.sh grids FL+MDCA KD     the flags that they read, with grids
    python -m scripts.sweep baselines.sh losses                 every loss, as grid.sh wants it
    python -m scripts.sweep baselines.sh imitations             what there is beside KD
    python -m scripts.sweep cifar10.sh folders cifar10 NET...   where runs of each net lie
    python -m scripts.sweep cifar10.sh check <COMMANDS          refuses commands that are not right
    python -m scripts.sweep cifar10.sh finished 102 FOLDER...   what is said of finished runs
    python -m scripts.sweep cifar10.sh schedule GPU... <COMMANDS    runs them, one on each GPU
    python -m scripts.sweep cifar10.sh ended FILE 102 SECONDS   what is said where a run has ended

They call it, with their own name first, which messages begin with.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/sweep.py`, whatever folder the caller is in
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

import os
import shlex
import time
from datetime import datetime, timedelta

from utils.program import UserError, one_line_errors
from utils.program.source import sweep_lines

# What needs torch is imported where it is used: to speak of finished runs takes no seconds.


def grids(*names: str) -> None:
    """For each "NAME loss" or "NAME distillation", then "NAME flag FLAG VALUE..." for its flags.

    A variable in front of the command, such as T="1 4", replaces a grid; one that no grid reads is
    said to have no effect.
    """
    from losses import BASES, DISTILLATIONS, FEATURES, TERMS, is_distillation, loss_flags

    read = set()
    for name in names:
        try:
            flags = loss_flags(name)
        except ValueError as error:
            raise UserError(f"no grid {name}: {error}") from None
        print(name, "distillation" if is_distillation(name) else "loss")
        for flag in flags:
            print(name, "flag", flag.name, *(f"{value:g}" for value in flag.grid))
            read.add(flag.name)
    entries = (BASES | TERMS | DISTILLATIONS | FEATURES).values()
    unread = {flag.name for entry in entries for flag in entry.flags} - read
    for flag in sorted(unread & os.environ.keys()):
        print(
            f"{flag}={os.environ[flag]} in front has no effect on {', '.join(names)}",
            file=sys.stderr,
        )


def losses() -> None:
    """Every base, every term, and the paper's own: how a run's name begins, then its flags."""
    from losses import BASES, TERMS, loss_parameters
    from utils.run_files import label_of

    with_terms = [f"NLL+{term}" for term in TERMS]
    for name in [*BASES, *with_terms, "FL+MDCA"]:
        chosen = {"gamma": 3} if name in ("FL", "FL+MDCA") else {}
        parameters = loss_parameters(name, chosen)
        flags = [f"--{flag} {value:g}" for flag, value in parameters.items()]
        print(label_of(name, parameters), "--loss", name, *flags)


def imitations() -> None:
    """In a line every distillation but KD, then in a line every term on features."""
    from losses import DISTILLATIONS, FEATURES

    print(*(name for name in DISTILLATIONS if name != "KD"))
    print(*FEATURES)


def folders(dataset: str, *nets: str) -> None:
    """For each net "NET FOLDER": where, below --checkpoint, its runs on the data set lie."""
    from models.own import is_own, net_label
    from utils.data import dataset_label

    for net in nets:
        label = net_label(net) if is_own(net) else net
        print(net, f"{dataset_label(dataset)}/{label}")


def check() -> None:
    """Read commands, one a line, as their own scripts do; UserError before any has started."""
    from utils.options import student_options, teacher_options

    programs = {"train_teacher.py": teacher_options, "train_student.py": student_options}
    runs: dict[str, str] = {}
    for line in dict.fromkeys(sys.stdin.read().splitlines()):
        try:
            words = shlex.split(line)
        except ValueError as error:  # a line break within a word
            raise UserError(f"{line!r} is no command of one line: {error}") from None
        places = [i for i, word in enumerate(words) if os.path.basename(word) in programs]
        if not places:
            raise UserError(f"no command of train_teacher.py or train_student.py: {line!r}")
        place = places[0]
        program = os.path.basename(words[place])
        if {"--help", "-h"} & set(words):
            raise UserError("--help stands among the commands' flags; give it alone")
        try:
            experiment = programs[program](words[place + 1 :])
        except UserError as error:
            raise UserError(f"{program}: {error}") from None
        run = f"{program} {sorted(experiment.arguments.items())}"
        if run in runs:
            raise UserError(f"two commands are the same run, and nothing is started: {line}")
        runs[run] = line


def finished(total: str, *folders: str) -> None:
    print(sweep_lines([Path(folder) for folder in folders], int(total)))


def schedule(*gpus: str) -> None:
    """Run commands, one a line, by simple_gpu_scheduler; a GPU named twice has two at once.

    Ctrl-C reaches the runs, too. They end in order, and nothing more is started.
    """
    try:
        from simple_gpu_scheduler.scheduler import GPUManager, run_command_with_gpu
    except ImportError as error:
        raise UserError(f"{error}; pip install -r requirements.txt brings it") from None

    manager = GPUManager(gpus)
    threads = [run_command_with_gpu(line.rstrip(), manager.get_gpu()) for line in sys.stdin]
    # A signal that meets a join would leave the run behind: Python then takes its thread for ended.
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)


def ended(file: str, total: str, began: str) -> None:
    """One more run has ended, well or not: a line in `file` for each. `began`: Unix time.

    The runs that are left are taken to need as long as those before, side by side as those were.
    """
    with open(file, "a+") as lines:
        lines.write("ended\n")  # a short line is added whole, also by two runs at once
        lines.seek(0)
        done = len(lines.readlines())
    seconds = (time.time() - float(began)) * (int(total) - done) / done
    left = timedelta(seconds=round(seconds))
    end = datetime.now() + left
    expected = f"; about {left} left, until {end:%a %H:%M}" if done < int(total) else ""
    print(f"{done} of {total} runs have ended{expected}", file=sys.stderr)


QUESTIONS = {
    "grids": grids,
    "losses": losses,
    "imitations": imitations,
    "folders": folders,
    "check": check,
    "finished": finished,
    "schedule": schedule,
    "ended": ended,
}


def main(words: list[str]) -> None:
    if not words or words[0] not in QUESTIONS:
        raise UserError("the scripts of sweeps call it; start one, as bash scripts/hypersearch.sh")
    QUESTIONS[words[0]](*words[1:])


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:2]):
        print(__doc__)
    else:
        with one_line_errors(sys.argv[1] if len(sys.argv) > 1 else "python -m scripts.sweep"):
            main(sys.argv[2:])
