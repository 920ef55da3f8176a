"""Which folder may import which: what README says of it, read from the code."""

import ast
from functools import cache

import pytest
from conftest import ROOT

FOLDERS = ("losses", "models", "utils", "scripts")


def name_of(path):
    """`utils/data/__init__.py` is `utils.data`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
FILES |= {name: ROOT / f"{name}.py" for name in ("train_teacher", "train_student")}


@cache
def imported_by(name):
    """The modules of this project that a module names, also within its functions."""
    names = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & FILES.keys()


def needed_by(name):
    """The same, with all that these import in turn."""
    found = set()
    waiting = {name}
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= imported_by(module) - found
    return found


def within(names, *folders):
    return sorted(name for name in names if name.startswith(tuple(f"{f}." for f in folders)))


@pytest.mark.parametrize("folder", ["losses", "models", "utils.calibration"])
def test_what_stands_alone(folder):
    modules = within(FILES, folder)
    assert len(modules) > 3
    for module in modules:
        strangers = {
            name for name in imported_by(module) if not f"{name}.".startswith(f"{folder}.")
        }
        assert not strangers, module


@pytest.mark.parametrize("script", ["train_teacher", "train_student"])
def test_training_needs_no_analysis(script):
    needed = needed_by(script)
    assert "utils.training" in needed
    assert not within(needed, "utils.analysis", "scripts")


def test_what_teaches_knows_nothing_of_training():
    for module in within(FILES, "utils.teachers"):
        assert not needed_by(module) & {"utils.training", "utils.tasks", "utils.steps"}, module
