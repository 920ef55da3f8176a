"""A pack: all that a report needs of its runs, in a .zip file that it reads like folders."""

import hashlib
import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.analysis.record import Record

COPIED = ("result.json", "config.json", "metrics.jsonl")
LEAST_FLOAT16 = np.finfo(np.float16).min


def is_pack(path: Path) -> bool:
    """Whether a file is a pack, and not another .zip file: an .npz, a .docx, somebody's photos."""
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return any(name.endswith("/result.json") for name in archive.namelist())
    return False


def pack(records: list[Record], file) -> None:
    """Write what a report needs of runs, test logits as float16, as a .zip file for `read_runs`.

    A run whose best and whose last epoch are shown is in `records` twice, and in the file once.
    """
    runs: dict[Path, list[Record]] = {}
    for record in records:
        runs.setdefault(record.folder, []).append(record)
    stored = {(record.folder, record.part) for record in records}

    with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2) as archive:
        for nets in runs.values():
            run = nets[0]
            for name, content in contents_of_run(run, nets, stored).items():
                archive.writestr(f"{run.title}/{name}", content)


def contents_of_run(
    run: Record, nets: list[Record], stored: set[tuple[Path, str]]
) -> dict[str, bytes | str]:
    """By name, the files that a pack keeps of a run with these nets.

    `stored`: folder and part of all nets whose logits the pack holds.
    """
    contents = {}
    for name in COPIED:
        if (run.folder / name).exists():
            contents[name] = (run.folder / name).read_bytes()
    if not run.predictions.exists():
        return contents

    _, labels = run.stored("test")
    arrays = {}
    for net in [*nets, run.taught_by]:
        if net is None:
            continue
        # A teacher with a run of its own is in that.
        run_of_teacher = net.run_with_logits
        if run_of_teacher and (run_of_teacher.folder, run_of_teacher.part) in stored:
            continue
        logits, _ = net.stored("test")
        arrays[f"{net.part}_test_logits"] = half_precision(logits)
    predictions = io.BytesIO()
    np.savez(predictions, test_labels=labels.numpy(), **arrays)
    contents["predictions.npz"] = predictions.getvalue()

    # Post-hoc rows belong to the predictions that lie beside them: now to these.
    digest = hashlib.sha256(predictions.getvalue()).hexdigest()
    contents["posthoc.json"] = json.dumps({**run.posthoc_content, "predictions": digest})
    return contents


def half_precision(logits: Tensor) -> np.ndarray:
    """Logits (N, K) as float16 (N, K), each row's largest taken off, which no softmax sees.

    So the digits go to the classes that have a probability. What is below float16's range has none
    at any temperature, and becomes the least number.
    """
    values = logits.double()
    below_top = values - values.amax(dim=1, keepdim=True)
    return below_top.clamp_min(LEAST_FLOAT16).numpy().astype(np.float16)
