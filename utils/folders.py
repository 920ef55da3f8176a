"""Folders that are made for what does not come."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def unmade_on_failure(path: Path):
    """`path` and its parents: those that were absent before, and are empty, go again on failure."""
    absent = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        yield
    except Exception:
        for folder in absent:
            with suppress(OSError):
                folder.rmdir()
        raise
