"""The nets in weights/: their cards say what the files say, and the files do what they say."""

import json
import os
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from scripts.deployment.card import card_of
from scripts.deployment.certificate import evidence_of
from scripts.deployment.exported_net import open_safetensors
from utils.data import load_dataset
from utils.program.files import safetensors_metadata
from utils.settings import TeacherSource
from utils.teachers.loading import load_teacher

FILES = sorted((ROOT / "weights").glob("*.safetensors"))


def test_they_are_small_and_each_has_a_card():
    sizes = [file.stat().st_size for file in FILES]
    assert max(sizes) < 6e5 and sum(sizes) < 7e6
    assert {file.stem for file in FILES} == {
        card.stem for card in (ROOT / "weights").glob("*.md") if card.name != "README.md"
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_card_says_what_its_file_says(file):
    about = safetensors_metadata(file.read_bytes())
    card = file.with_suffix(".md").read_text()
    title = card.splitlines()[0].removeprefix("# ")
    place = Path("weights", file.name)
    assert card == card_of(title, place, "safetensors", file.read_bytes(), about)
    assert about["precision"] == "half"
    assert not any(Path(word).is_absolute() for word in shlex.split(about["command"]))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_their_figures_come_again(file):
    """On the whole test split, in float32, to what another processor may change."""
    about = safetensors_metadata(file.read_bytes())
    folder = os.environ.get("KD_DATA")
    if folder is None or not Path(folder, f"{about['dataset']}.npz").exists():
        pytest.skip(f"needs {about['dataset']}.npz in the folder that KD_DATA names")
    data = load_dataset(about["dataset"], folder)
    net = open_safetensors(file.read_bytes())
    evidence = evidence_of(net.logits, data, name=file.stem)
    ece = json.loads(about["ece"])
    for logits in ("raw", "scaled"):
        found = evidence.measured["test"][logits]
        assert found["top1"] == pytest.approx(json.loads(about["top1"]), abs=5e-4)
        assert found["ece"] == pytest.approx(ece[logits], abs=5e-4)
    assert evidence.measured["temperature"] == pytest.approx(
        json.loads(about["temperature"]), rel=1e-3
    )
    threshold = json.loads(about["sets"])["0.9"]
    logits, labels = evidence.test
    probabilities = (logits / json.loads(about["temperature"])).softmax(dim=1)
    inside = probabilities.gather(1, labels[:, None]) >= threshold
    expected = json.loads(about["coverage"])["0.9"]
    assert inside.double().mean().item() == pytest.approx(expected, abs=5e-4)

    # As a teacher it gives the same logits.
    teacher = load_teacher(TeacherSource(paths=(str(file),)), data)
    images = data.test.images[:64]
    assert (teacher.logits(images) - net.logits(images)).abs().max() < 1e-3
