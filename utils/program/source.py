"""Which code a run was made with, and whether it is still the code that lies here.

A run keeps the commit and a checksum of every file that decides its numbers. So a finished run
that is only shown, and one that goes on, can say that the code has changed in the meantime.
Needs no torch.
"""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What decides the numbers of a run: nets, losses, data, teachers, the step, the metrics. The
# command line, messages, files and tables do not.
FOLDERS = ("losses", "models", "utils/data", "utils/calibration", "utils/teachers")
FILES = (
    "train_teacher.py",
    "train_student.py",
    "utils/averaging.py",
    "utils/conclusion.py",
    "utils/evaluation.py",
    "utils/features.py",
    "utils/keeping.py",
    "utils/optimizers.py",
    "utils/preparing.py",
    "utils/program/processes.py",
    "utils/selection.py",
    "utils/split_metrics.py",
    "utils/steps.py",
    "utils/sums.py",
    "utils/tasks.py",
    "utils/training.py",
)
SHOWN = 4  # names of files in a message
MINUTES = "%Y-%m-%d %H:%M"


def commit() -> str:
    """The commit of this code, with -dirty where files differ from it; `unknown` without git."""
    if not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    git.append("--exclude=*")  # else it would name the nearest tag where there is one
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def short(commit: str) -> str:
    """`20d2211` or `20d2211-dirty`, for a message."""
    name, dirty, _ = commit.partition("-dirty")
    return name[:7] + dirty


def training_code() -> dict[str, str]:
    """{file: checksum} of what decides the numbers of a run."""
    paths = [ROOT / file for file in FILES]
    for folder in FOLDERS:
        paths += (ROOT / folder).rglob("*.py")
    return {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(paths)
    }


def changed_files(config: Mapping) -> list[str] | None:
    """The files that are not as when this config.json was written; None where it does not say."""
    before = config.get("training_code")
    if not isinstance(before, dict):
        return None
    now = training_code()
    return [
        file for file in sorted(before.keys() | now.keys()) if before.get(file) != now.get(file)
    ]


def listed(files: Sequence[str]) -> str:
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return ", ".join(files[:SHOWN]) + more


def finished_line(folder: Path, config: Mapping, result: Mapping) -> str:
    """What is said of a finished run that is shown and not trained; loud where the code differs."""
    finished = result.get("finished")
    if finished is None:  # a run of an older version
        written = datetime.fromtimestamp((folder / "result.json").stat().st_mtime)
        finished = written.strftime(MINUTES)
    before = short(str(config.get("git", "unknown")))
    now = short(commit())
    line = (
        f"finished on {finished} at commit {before} (the code is now {now}): shown, not trained; "
        "--overwrite trains anew"
    )
    changed = changed_files(config)
    if changed is None:
        # A run of an older version: only an equal, clean commit tells that the code is the same.
        if before == now and before != "unknown" and "dirty" not in before:
            return line
        return f"{line}\nits training code was not recorded, so it may differ from today's"
    if not changed:
        return line
    return (
        f"{line}\nWARNING: the training code has changed since: {listed(changed)}. These are the "
        "numbers of the OLD code; --overwrite trains anew, --exp_name NAME keeps both"
    )


def resumed_line(config: Mapping) -> str:
    """What is said of a run that goes on with other code than it began with; else nothing."""
    changed = changed_files(config)
    if changed:
        return (
            f"WARNING: the training code has changed since this run began: {listed(changed)}. Its "
            "first epochs are the OLD code's; --overwrite starts it anew"
        )
    if changed is None and short(str(config.get("git", "unknown"))) != short(commit()):
        return "this run began with a version that did not record its code, which may differ"
    return ""


def sweep_lines(folders: Sequence[Path], total: int) -> str:
    """What is said of the runs of a sweep that are complete before it starts."""
    changed_code: dict[Path, list[str]] = {}
    changed_inputs: dict[Path, list[str]] = {}
    for folder in folders:
        # What is wrong with a config.json is said when the run is read. Old ones lack arguments.
        with suppress(OSError, ValueError, AttributeError, LookupError):
            config = json.loads((folder / "config.json").read_text())
            changed_code[folder] = changed_files(config) or []
            changed_inputs[folder] = newer_inputs(folder, config)

    lines = [f"{len(folders)} of {total} runs are complete from before: not trained again"]
    way_out = "ROOT=... in front of the sweep trains them anew"
    if any(changed_code.values()):
        began, files = summary_of(changed_code)
        lines.append(
            f"WARNING: the training code has changed since {began} of them began: "
            f"{files}. {way_out}"
        )
    if any(changed_inputs.values()):
        began, files = summary_of(changed_inputs)
        lines.append(
            f"WARNING: what {began} of them read was written after they began: {files}. {way_out}"
        )
    return "\n".join(lines)


def summary_of(changed: Mapping[Path, Sequence[str]]) -> tuple[int, str]:
    """For how many runs something has changed, and all that has."""
    runs = [folder for folder, files in changed.items() if files]
    return len(runs), listed(sorted({file for folder in runs for file in changed[folder]}))


def newer_inputs(folder: Path, config: Mapping) -> list[str]:
    """What a run's command reads, as the command has it, and was written after the run began.

    Of a folder of images it is seen where one has come or gone, not where one was written over.
    """
    arguments = config["arguments"]
    dataset = arguments["dataset"]
    teachers = arguments.get("teacher_path") or ()
    # A net of the user's own is named as FILE.py:function.
    nets = [arguments.get("model"), *(arguments.get("teacher") or ())]
    own_nets = [name.rpartition(":")[0] for name in nets if name]
    names = [dataset, *own_nets, *teachers, arguments.get("teacher_logits")]
    paths = {name: [Path(name)] for name in names if name}
    for name in teachers:
        if Path(name).is_dir():
            paths[name] = list(Path(name).rglob("result.json"))
    if Path(dataset).is_dir():
        paths[dataset] += [*Path(dataset).glob("*/"), *Path(dataset).glob("*/*/")]
    paths[f"{dataset}.npz"] = [Path(arguments["data_dir"], f"{dataset}.npz")]

    began = (folder / "config.json").stat().st_mtime
    return [
        name
        for name, read in paths.items()
        if any(path.exists() and path.stat().st_mtime > began for path in read)
    ]
