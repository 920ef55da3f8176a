"""docs/notebook.md: its lines run as they stand there, on a small data set."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

PAGE = (ROOT / "docs/notebook.md").read_text()
TRAINING, TRAINED, PARTS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def run(code: str, **names) -> dict:
    """The names that a cell leaves, as a notebook keeps them."""
    exec(compile(code, "docs/notebook.md", "exec"), names)
    return names


def test_a_teacher_a_student_and_a_table(tmp_path, monkeypatch, capsys, tiny_npz):
    monkeypatch.chdir(tmp_path)
    assert TRAINING.count("synthetic") == 2  # the data set, and its name in a folder's
    code = TRAINING.replace("--dataset synthetic", f"--dataset {tiny_npz}")
    names = run(code.replace("runs/synthetic", "runs/tiny"))
    student = names["student"]
    (file,) = (tmp_path / "runs/tiny/resnet8").glob("*/result.json")
    assert student == json.loads(file.read_text())
    assert student["teacher"]["model"] == "resnet14"
    output = capsys.readouterr().out
    assert "resnet14 FL+MDCA gamma=1 beta=1" in output  # a row of the report
    *_, last = output.strip().splitlines()
    assert float(last) == student["best"]["test"]["scaled"]["ece"]

    # The next cell, with images of the size that this data set has.
    code = TRAINED.replace("runs/synthetic", "runs/tiny").replace("weights/", f"{ROOT}/weights/")
    names = run(code)
    stored = np.load(file.with_name("predictions.npz"))
    images = torch.from_numpy(np.load(tiny_npz)["x_test"]).movedim(-1, 1)
    logits = names["logits_of"](images)
    torch.testing.assert_close(
        logits, torch.from_numpy(stored["best_test_logits"]), rtol=1e-4, atol=1e-4
    )
    assert names["calibrated"].shape == (64, 4)
    assert names["probabilities"].shape == (64, 100)
    torch.testing.assert_close(names["probabilities"].sum(dim=1), torch.ones(64))


def test_losses_nets_and_metrics_without_a_command_line(capsys):
    names = run(PARTS)
    logits, labels = names["logits"].detach(), names["labels"]
    top1, ece = map(float, capsys.readouterr().out.split())
    assert top1 == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item())
    assert ece == names["metrics"]["ece"]
    assert all(weight.grad is not None for weight in names["net"].parameters())
