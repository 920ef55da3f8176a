"""README's examples for those who add a loss, a net or a data set work as they stand there."""

import json
import re
import shutil

import numpy as np
from conftest import ROOT, run_script, write_npz
from scipy.io import savemat

IMPORTS = {
    "brier": "from losses.classification import brier\n",
    "plain": "from models.plain import plain\n",
}
HEAD = re.compile(r"^# (\S+\.py)(?:, in (\w+).*)?\n", re.MULTILINE)
# README's SVHN, whose files torchvision knows by their md5, from files that the test writes.
TRAIN = """
import runpy, sys
from torchvision.datasets import SVHN
SVHN.download, SVHN._check_integrity = lambda self: None, lambda self: True
sys.argv = ["train_teacher.py", *sys.argv[1:]]
runpy.run_path("train_teacher.py", run_name="__main__")
"""


def add(root, file: str, registry: str | None, code: str) -> None:
    """Put a registry's line, with the import it needs, into the registry; other code before it."""
    path = root / file
    text = path.read_text() if path.exists() else ""
    place = re.search(r"^(BASES|MODELS|SOURCES)\b.*{.*\n", text, re.MULTILINE)
    if registry:
        name = re.search(r"(\w+)[,)]", code.split(":", 1)[1])[1]
        code = IMPORTS.get(name, "") + place[0] + code
    before, after = (text[: place.start()], text[place.start() :]) if place else (text, "")
    path.write_text(f"{before}{code}{after.removeprefix(place[0]) if registry else after}")


def test_the_examples(tmp_path):
    for part in ("losses", "models", "utils"):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / "train_teacher.py", tmp_path)
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    files = []
    for block in blocks:
        _, *parts = HEAD.split(block)
        for file, registry, code in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            add(tmp_path, file, registry, code)
            files.append(file)
            assert len(code.strip().splitlines()) < 10
    assert len(files) == 6

    arrays = np.load(write_npz(tmp_path / "source.npz", 10, 150, 40, size=32))
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        content = {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]}
        savemat(tmp_path / f"{part}_32x32.mat", content)
    flags = "--dataset svhn --data_dir . --model plain --loss Brier+MDCA --epochs 1"
    flags += " --train-batch-size 64"
    run_script("python", "-c", TRAIN, *flags.split(), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    [result] = tmp_path.glob("checkpoint/svhn/plain/Brier+MDCA_beta=1_seed=42/result.json")
    assert json.loads(result.read_text())["num_classes"] == 10
