"""The metrics' folder serves whoever wants it alone: copied out, or imported without the rest."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from utils.calibration import adaece, classification_metrics, ece, fit_temperature, sce

RANDOM = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(400, 5, generator=RANDOM, dtype=torch.float64)
LABELS = (LOGITS / 2).softmax(dim=1).multinomial(1, generator=RANDOM).squeeze(1)


def python(code: str, cwd) -> str:
    """What a fresh interpreter prints that finds no project but in its own folder."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_can_be_copied_out_under_another_name(tmp_path):
    shutil.copytree(ROOT / "utils/calibration", tmp_path / "worth")
    torch.save((LOGITS, LABELS), tmp_path / "data.pt")
    code = """
import importlib, json, pkgutil, sys, torch, worth
for file in pkgutil.iter_modules(worth.__path__):
    importlib.import_module(f"worth.{file.name}")
logits, labels = torch.load("data.pt")
with open("picture.png", "wb") as file:
    worth.reliability_diagrams([("net", logits.softmax(1), labels)], file)
sets = worth.fit_sets(logits, labels)(logits)
print(json.dumps({
    "ece": worth.ece(logits.softmax(dim=1), labels),
    "temperature": worth.fit_temperature(logits, labels)[0],
    "metrics": worth.classification_metrics(logits, labels),
    "coverage": sets[range(len(labels)), labels].double().mean().item(),
    "project": [name for name in sys.modules if name.split(".")[0] in ("utils", "losses")],
}))
"""
    values = json.loads(python(code, tmp_path))
    assert values["project"] == []
    assert values["ece"] == pytest.approx(ece(LOGITS.softmax(dim=1), LABELS))
    assert values["temperature"] == pytest.approx(fit_temperature(LOGITS, LABELS)[0])
    assert values["metrics"] == pytest.approx(classification_metrics(LOGITS, LABELS))
    assert values["coverage"] >= 0.9
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_load_neither_the_launcher_nor_the_command_line():
    code = """
import sys
from utils.calibration import classification_metrics, ece, fit_sets, fit_temperature
heavy = ("accelerate", "matplotlib", "sklearn", "torchvision")
project = ("utils.program.command_line", "utils.program.processes", "utils.options", "losses")
print([name for name in (*heavy, *project) if name in sys.modules])
from utils.calibration import ood_metrics, vector_scaling
print("sklearn" in sys.modules, callable(ood_metrics), callable(vector_scaling))
"""
    assert python(code, ROOT).split("\n")[:2] == ["[]", "True True True"]


def test_all_exported_names_are_there():
    import utils.calibration

    for name in utils.calibration.__all__:
        assert callable(getattr(utils.calibration, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'brie'"):
        utils.calibration.brie  # noqa: B018


def test_single_metrics_are_those_of_the_whole_list():
    """Of probabilities, and these are left as they are."""
    probs = LOGITS.softmax(dim=1)
    for dtype in (torch.float64, torch.float32):
        given = probs.to(dtype)
        before = given.clone()
        expected = classification_metrics(given.log(), LABELS)
        for metric in (ece, sce, adaece):
            tolerance = 1e-9 if dtype == torch.float64 else 1e-5
            assert metric(given, LABELS) == pytest.approx(
                expected[metric.__name__], abs=tolerance
            ), metric
        assert torch.equal(given, before)
