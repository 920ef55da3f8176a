"""Runs found below folders: finished ones as records, the others with the reason.

Run folders may also lie in a .zip file, where zipfile.Path reads them as pathlib.Path does.
"""

import json
import os
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from utils.analysis.logit_files import is_logit_file, read_logit_file
from utils.analysis.record import Record, naming, net_of_run
from utils.analysis.taught import find_teachers
from utils.columns import printable
from utils.program import UserError, files
from utils.program.bars import progress_bar
from utils.run_files import is_complete

MARKS = ("result.json", "config.json", ".lock")  # any of them makes a run folder


class LeftOut(NamedTuple):
    """A run that is in no table, and why."""

    folder: Path
    reason: str


def read_runs(roots: Iterable[Path], epoch: str) -> tuple[list[Record], list[LeftOut]]:
    """The nets of the "best" or "last" epoch of every run below `roots`, and runs that have none.

    A root may also be a file of logits. Raises UserError where there is no run below one of them.
    """
    roots = list(dict.fromkeys(roots))
    logit_files = [root for root in roots if is_logit_file(root)]
    folders: dict[str, Path] = {}  # by real path: each counts once, though roots may overlap
    for root in roots:
        if root in logit_files:
            continue
        below = run_folders(root)
        if not below:
            raise UserError(
                f"{root}: no such folder, or no run below it; "
                "name a --checkpoint folder or a run folder"
            )
        for folder in below:
            folders.setdefault(os.path.realpath(str(folder)), folder)

    finished = []
    left_out = []
    in_order = sorted(folders.values(), key=str)
    for folder in progress_bar(in_order, "reading runs"):
        run = read_run(folder, epoch)
        if isinstance(run, Record):
            finished.append(run)
        else:
            left_out.append(run)

    finished += [read_logit_file(file, epoch, finished) for file in logit_files]
    set_titles(finished)
    find_teachers(finished)
    return finished, left_out


def run_folders(root: Path) -> list[Path]:
    """The run folders at or below a folder, also behind symbolic links, or in a .zip file."""
    if zipfile.is_zipfile(root):
        archive = zipfile.ZipFile(root)
        results = [name for name in archive.namelist() if name.endswith("/result.json")]
        return [zipfile.Path(archive, name).parent for name in results]
    return [file.parent for mark in MARKS for file in files.files_below(root, mark)]


def read_run(folder: Path, epoch: str) -> Record | LeftOut:
    """The net of a run folder, or why there is none: whatever is wrong concerns this run alone."""
    result_path = folder / "result.json"
    if not result_path.exists():
        return LeftOut(folder, "; ".join(["unfinished", *end_of_log(folder)]))
    try:
        with naming(result_path):
            result = json.loads(result_path.read_text())
            if not is_complete(result):
                raise ValueError("it is not whole")
        config = read_config(folder / "config.json")
        with naming(result_path):
            return net_of_run(folder, result, config, epoch)
    except UserError as error:
        return LeftOut(folder, files.one_line(error).replace(f"{folder}/", ""))


def read_config(path: Path) -> dict:
    """Empty where there is none. Raises UserError."""
    if not path.exists():
        return {}
    with naming(path):
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or not isinstance(config.get("arguments", {}), dict):
            raise ValueError("it is not as a run writes it")
        return config


def end_of_log(folder: Path) -> list[str]:
    """A remark on where an unfinished run stopped; none where its log does not say."""
    log = ""
    with suppress(OSError):
        log = (folder / "train_log.txt").read_text(errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return [f"its log ends: {line}" for line in lines[-1:]]


def set_titles(records: list[Record]) -> None:
    """Call each run by its folder, without the part that all of them share."""
    if not records:
        return
    places = [os.path.realpath(str(record.folder)) for record in records]
    shared = Path(places[0]).parents[1] if len(places) == 1 else os.path.commonpath(places)
    for record, place in zip(records, places, strict=True):
        record.title = printable(os.path.relpath(place, shared))


def finished_nets(
    paths: Iterable[Path],
    epoch: str,
    with_teacher: bool,
    packed: bool = False,
    logits_alone: bool = False,
) -> list[Record]:
    """The nets of the "best" or "last" epoch of every finished run at or below `paths`.

    Each has its teacher below it where asked for, unless its own run is there; a teacher that
    several students share is there once. `packed`: test logits will do, so a .zip file may be
    named; `logits_alone`: logits will, so a file of them may be. Prints a line for each run that is
    left out; raises UserError where none is finished.
    """
    for path in paths:
        if is_logit_file(path):
            if not (packed or logits_alone):
                raise UserError(
                    f"{path}: a file of logits has no net to run and no folder to write to; name "
                    "run folders"
                )
        elif not packed and zipfile.is_zipfile(path):
            raise UserError(f"{path}: a pack has test logits, and no more; name run folders")
    records, left_out = read_runs(paths, epoch)
    if not records:
        first = left_out[0]
        raise UserError(f"{first.folder}: no finished run ({first.reason}); train it first")
    for run in left_out:
        print(f"left out: {printable(run.folder)}, {printable(run.reason)}")

    nets: dict = {}
    for record in records:
        nets[record.folder] = record
        teacher = record.taught_by
        if with_teacher and teacher and teacher.run_with_logits not in records:
            nets.setdefault((teacher.measured["sha256"], teacher.fingerprint), teacher)
    return list(nets.values())


def finished_net(root: Path, epoch: str) -> Record:
    """The net of the only finished run at or below a folder. Raises UserError."""
    nets = finished_nets([root], epoch, with_teacher=False)
    if len(nets) > 1:
        raise UserError(f"{root}: {len(nets)} finished runs lie there; name one")
    return nets[0]


def write_beside(net: Record, name: str, about: dict, measured: dict) -> str:
    """Write what was measured of a net into a JSON file in its run folder, atomically.

    What the file held of other parts (best, teacher, ...) is kept where it came from the same
    predictions and `about` is the same. Returns what is to be said: the file, and what is gone.
    """
    path = net.folder / name
    about = {"predictions": files.sha256(net.predictions), **about}
    before = {}
    with suppress(Exception):  # absent, or not as it is written here
        before = dict(json.loads(path.read_text()))
    changed = {key for key in about if before.get(key) != about[key]}
    kept = {} if changed else before
    files.write_json(path, {**kept, **about, net.part: measured})
    if not before or not changed:
        return f"written: {path}"
    words = [f"{key} {before.get(key)}" for key in sorted(changed - {"predictions"})]
    if "predictions" in changed:
        words.append("other predictions")
    return f"written: {path}, in place of what was measured with {', '.join(words)}"
