"""Post-hoc maps of the package probmetrics: with the package where it is, else with a stand-in."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import fails, write_npz
from sklearn.isotonic import IsotonicRegression

import train_teacher
from scripts import posthoc
from utils.calibration.metrics import classification_metrics
from utils.calibration.packaged import packaged_map
from utils.calibration.posthoc import temperature_scaling

# Halves every logit; "zero" also rules class 0 out, "nan", "short" and "shy" are no probabilities.
STAND_IN = """
class Calibrator:
    def __init__(self, method):
        self.method = method

    def fit_torch(self, distribution, labels):
        assert distribution.logits.dtype.is_floating_point and not labels.dtype.is_floating_point
        return self

    def predict_proba_torch(self, distribution):
        return Probabilities(self.method, (distribution.logits / 2).softmax(dim=1))

class Probabilities:
    def __init__(self, method, probs):
        self.method, self.probs = method, probs

    def get_probs(self):
        probs = self.probs.clone()
        if self.method == "zero":
            probs[:, 0] = 0
            probs /= probs.sum(dim=1, keepdim=True)
        if self.method == "nan":
            probs[0, 0] = float("nan")
        return {"short": probs[:, 1:], "shy": probs / 2}.get(self.method, probs)

def get_calibrator(method):
    if method == "bare":
        raise ImportError("The 'other' package is required.")
    if method == "nonsense":
        raise ValueError("Unknown calibration method")
    return Calibrator(method)
"""


@pytest.fixture
def stand_in(tmp_path_factory, monkeypatch):
    """A package of that name, whatever is installed."""
    folder = tmp_path_factory.mktemp("site") / "probmetrics"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "calibrators.py").write_text(STAND_IN)
    (folder / "distributions.py").write_text(
        "class CategoricalLogits:\n    def __init__(self, logits):\n        self.logits = logits\n"
    )
    real = {name: sys.modules.pop(name) for name in loaded()}
    monkeypatch.syspath_prepend(str(folder.parent))
    yield
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(real)


def loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "probmetrics"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data = write_npz(root / "tiny.npz", 4, 300, 80)
    line = f"--dataset {data} --model resnet8 --epochs 1 --checkpoint {root}/runs"
    train_teacher.main(line.split())
    return root / "runs/tiny/resnet8/NLL_seed=42"


def drawn(n: int, classes: int = 4):
    """Logits that are twice too large, and their labels."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(n, classes))
    labels = (logits / 2 + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return torch.from_numpy(logits), torch.from_numpy(labels)


# The command, with a stand-in


def test_a_map_is_a_row_like_ours(stand_in, run, capsys):
    posthoc.main([str(run), "--methods", "half", "--folds", "2", "--write"])
    rows = capsys.readouterr().out.splitlines()
    methods = [row.split("  ")[0] for row in rows if row[:1].isalpha()]
    assert methods[1:6] == ["test split", "none", "temperature", "vector", "Dirichlet ODIR"]
    assert "half" in methods
    written = json.loads((run / "posthoc.json").read_text())["best"]["half"]
    assert written.keys() == {"notes", "val", "test"} and written["notes"] == []
    with np.load(run / "predictions.npz") as stored:
        for split in ("val", "test"):
            logits, labels = stored[f"best_{split}_logits"], stored[f"{split}_labels"]
            wanted = classification_metrics(logits.astype(np.float64) / 2, labels)
            assert written[split] == pytest.approx(wanted, abs=1e-9)


def test_an_infinite_nll_is_said(stand_in, run, capsys):
    posthoc.main([str(run), "--methods", "zero", "--folds", "2", "--write"])
    printed = capsys.readouterr().out
    with np.load(run / "predictions.npz") as stored:
        count = (stored["test_labels"] == 0).sum()
    assert f"zero: the NLL is infinite, for the true class of {count} of 80 test images" in printed
    [row] = [line for line in printed.splitlines() if line.startswith("zero  ")]
    assert row.split().count("inf") == 2  # on validation and on test
    written = json.loads((run / "posthoc.json").read_text())["best"]["zero"]
    assert "nll" not in written["test"] and "nll" not in written["val"]
    assert written["test"]["brier"] > 0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nan", "--methods nan: it cannot be fitted.*NaN.*leave it out"),
        ("short", "--methods short.*3 probabilities for 4 classes.*no validation image"),
        ("shy", "--methods shy.*every row's sum be 1"),
        ("bare", "--methods bare.*'other' package is required.*with pip"),
        ("nonsense", "--methods nonsense.*Unknown.*give sms, svs, isotonic or ivap"),
    ],
)
def test_what_is_no_map_is_refused(stand_in, run, capsys, method, message):
    argv = [str(run), "--methods", method, "--folds", "2", "--write"]
    assert re.search(message, fails(capsys, run, posthoc.main, argv))


def test_the_missing_package_is_named(run, capsys, monkeypatch):
    monkeypatch.setattr(posthoc, "is_installed", lambda: False)
    error = fails(capsys, run, posthoc.main, [str(run), "--methods", "sms", "ivap"])
    assert "--methods sms ivap" in error and error.endswith("pip install probmetrics\n")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_logits_are_refused(stand_in, value):
    logits, labels = drawn(20)
    logits[3, 1] = value
    with pytest.raises(ValueError):
        packaged_map("half", logits, labels)


# The package itself


@pytest.fixture
def package():
    return pytest.importorskip("probmetrics", reason="needs the package probmetrics")


def test_its_temperature_is_ours(package):
    logits, labels = drawn(3000)
    ours = temperature_scaling(logits, labels)
    theirs = packaged_map("temp-scaling", logits, labels)
    torch.testing.assert_close(theirs(logits), ours(logits).log_softmax(1), atol=1e-5, rtol=0)


def test_its_isotonic_map_is_that_of_each_class(package):
    logits, labels = drawn(1000)
    probs = logits.softmax(dim=1).numpy()
    columns = []
    for k in range(4):
        regression = IsotonicRegression(out_of_bounds="clip")
        columns.append(regression.fit(probs[:, k], labels == k).predict(probs[:, k]))
    wanted = np.stack(columns, axis=1)
    wanted /= wanted.sum(axis=1, keepdims=True)
    theirs = packaged_map("isotonic", logits, labels)
    np.testing.assert_allclose(theirs(logits).exp(), wanted, atol=1e-9)


@pytest.mark.parametrize("method", ["sms", "svs"])
def test_structured_scaling_beats_the_temperature_where_classes_differ(package, method):
    logits, labels = drawn(4000)
    tilted = logits + torch.tensor([3.0, 0.0, 0.0, -3.0])
    scaled = temperature_scaling(tilted[:2000], labels[:2000])
    theirs = packaged_map(method, tilted[:2000], labels[:2000])
    before, after = (
        classification_metrics(one(tilted[2000:]), labels[2000:])["nll"] for one in (scaled, theirs)
    )
    best = classification_metrics(logits[2000:] / 2, labels[2000:])["nll"]
    assert best - 0.02 < after < best + 0.02 < before
