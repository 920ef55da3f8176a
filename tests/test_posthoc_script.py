"""Vector scaling and Dirichlet calibration against known answers; the script on real runs."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails, run_script
from scipy.optimize import minimize

import train_student
import train_teacher
from scripts import posthoc as script
from utils.calibration import posthoc
from utils.calibration.metrics import classification_metrics
from utils.calibration.posthoc import (
    METHODS,
    dirichlet_calibration,
    no_calibration,
    temperature_scaling,
    vector_scaling,
)


def drawn(logits, seed=1):
    """Labels drawn from softmax(logits)."""
    rng = np.random.default_rng(seed)
    return (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


def gaussian_logits(n, classes, seed=0):
    """Logits of which each has a class that it is rather sure of."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), rng.integers(classes, size=n)] += 3
    return logits


def log_softmax(logits):
    return torch.from_numpy(np.asarray(logits)).double().log_softmax(dim=1)


def nll(calibration, logits, labels):
    return classification_metrics(calibration(logits), labels)["nll"]


# --- known answers --------------------------------------------------------------------------------


def test_three_times_the_logits_come_back():
    true = gaussian_logits(20_000, 5)
    labels = drawn(true)
    logits = 3 * true
    assert temperature_scaling(logits, labels).facts["temperature"] == pytest.approx(3, rel=0.03)
    for fit in (vector_scaling, dirichlet_calibration):
        calibration = fit(logits, labels)
        error = calibration(logits).softmax(dim=1) - log_softmax(true).exp()
        assert error.abs().mean() < 0.01
        weight = calibration.weight.diagonal()
        assert torch.allclose(weight, torch.full((5,), 1 / 3).double(), atol=0.03)


@pytest.mark.parametrize("strength, mu", [(0.01, 0.01), (1.0, 100.0), (1e4, 0.1)])
def test_the_penalised_minimum_is_scipys(strength, mu):
    classes = 4
    logits = 2 * torch.from_numpy(gaussian_logits(300, classes))
    labels = torch.from_numpy(drawn(logits.numpy() / 2 + [0.5, 0, 0, -0.5]))
    log_probs, off = logits.log_softmax(dim=1), 1 - torch.eye(classes)

    def objective(flat):
        flat = torch.tensor(flat, requires_grad=True)
        weight, bias = flat[:-classes].reshape(classes, classes), flat[-classes:]
        value = F.cross_entropy(log_probs @ weight.T + bias, labels)
        value = value + strength * (off * weight**2).sum() / (classes * (classes - 1))
        value = value + mu * bias.square().mean()
        value.backward()
        return value.item(), flat.grad.numpy()

    start = np.concatenate([np.eye(classes).ravel() / 2, np.zeros(classes)])
    theirs = minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-8})
    problem = posthoc._Dirichlet(logits, labels)
    parameters, facts = problem.fit(strength, mu, posthoc.TOLERANCE)
    weight, bias = parameters[:, :-1] / problem.temperature, parameters[:, -1]
    ours, _ = objective(np.concatenate([weight.numpy().ravel(), bias.numpy()]))
    assert facts["converged"]
    assert ours == pytest.approx(theirs.fun, abs=1e-9)
    assert np.allclose(weight.numpy().ravel(), theirs.x[:-classes], atol=1e-3)


def test_the_gradient_vanishes_at_the_vector_map():
    logits = 2 * torch.from_numpy(gaussian_logits(500, 6))
    labels = torch.from_numpy(drawn(logits.numpy() / 2))
    calibration = vector_scaling(logits, labels)
    weight = calibration.weight.diagonal().clone().requires_grad_()
    bias = calibration.bias.clone().requires_grad_()
    F.cross_entropy(logits * weight + bias, labels).backward()
    assert weight.grad.abs().max() < 1e-6 and bias.grad.abs().max() < 1e-6
    assert bias.sum().item() == pytest.approx(0, abs=1e-12)


# --- never worse, and what is said ----------------------------------------------------------------


@pytest.mark.parametrize("n, scale", [(1, 1e4), (40, 0.01), (30, 1.0), (50, 30.0)])
def test_never_worse_than_none_on_validation(n, scale):
    rng = np.random.default_rng(n)
    logits, labels = scale * rng.normal(size=(n, 3)), rng.integers(3, size=n)
    raw = nll(METHODS["none"](logits, labels), logits, labels)
    for method, fit in METHODS.items():
        calibrated = fit(logits, labels)
        assert calibrated(logits).isfinite().all(), method
        assert nll(calibrated, logits, labels) <= raw + 1e-14 * max(1, raw), method


def test_noise_is_regularised_away():
    """Few samples of a net that only needs a temperature: a free matrix learns them by heart."""
    true = gaussian_logits(5200, 8)
    labels = drawn(true)
    logits = 2 * true
    fitted = dirichlet_calibration(logits[:200], labels[:200])
    assert fitted.facts["lambda"] >= 1
    problem = posthoc._Dirichlet(torch.from_numpy(logits[:200]), torch.from_numpy(labels[:200]))
    free, _ = problem.fit(1e-3, 1e-4, posthoc.TOLERANCE)
    held_out = torch.from_numpy(logits[200:])
    unregularised = F.cross_entropy(
        problem.inputs(held_out) @ free.T, torch.from_numpy(labels[200:])
    )
    assert nll(fitted, logits[200:], labels[200:]) < unregularised - 0.05


def test_cross_validation_takes_the_least_held_out_nll():
    logits = 2 * gaussian_logits(400, 4)
    facts = dirichlet_calibration(logits, drawn(logits / 2), folds=4).facts
    tried = {(one["lambda"], one["mu"]): one["held_out_nll"] for one in facts["cross_validation"]}
    assert facts["folds"] == 4
    assert tried[facts["lambda"], facts["mu"]] == min(tried.values()) < facts["identity_nll"]


def test_a_map_that_is_no_better_is_turned_away():
    """Uninformative features: every map only fits noise."""
    logits = 1e-3 * np.random.default_rng(5).normal(size=(40, 3))
    fitted = dirichlet_calibration(logits, np.arange(40) % 3)
    assert fitted.notes == (posthoc.IDENTITY,)
    assert torch.equal(fitted(logits), torch.from_numpy(logits))


@pytest.mark.parametrize("fit", [vector_scaling, dirichlet_calibration])
def test_a_fit_that_does_not_converge_says_so(fit, monkeypatch):
    monkeypatch.setattr(posthoc, "MAX_ITERATIONS", 1)
    logits = 3 * gaussian_logits(300, 4)
    fitted = fit(logits, drawn(logits / 3 + [1.0, 0, 0, 0]))
    assert not fitted.facts["converged"]
    assert any("did not converge: gradient" in note for note in fitted.notes)


@pytest.mark.parametrize("fit", [vector_scaling, dirichlet_calibration])
def test_a_class_without_images_keeps_its_probability(fit):
    """Or every test image of that class would cost some fifty nats."""
    true = gaussian_logits(4000, 4)
    labels = drawn(true)
    logits = 2 * true
    seen = np.flatnonzero(labels[:2000] != 3)
    fitted = fit(logits[seen], labels[seen])
    assert any("class 3" in note for note in fitted.notes)
    scaled = temperature_scaling(logits[seen], labels[seen])
    before, after = (nll(one, logits[2000:], labels[2000:]) for one in (scaled, fitted))
    assert after < before + 0.05
    share = log_softmax(fitted(logits)).exp()[:, 3].mean().item()
    assert share > log_softmax(scaled(logits)).exp()[:, 3].mean().item() / 2


def test_a_class_with_one_image_does_not_spoil_the_cross_validation():
    logits = gaussian_logits(600, 5)
    labels = drawn(logits)
    keep = np.flatnonzero((labels != 4) | (np.cumsum(labels == 4) == 1))
    fitted = dirichlet_calibration(2 * logits[keep], labels[keep])
    assert fitted.facts["held_out_nll"] < fitted.facts["identity_nll"] and not fitted.notes


def test_perfect_separation_is_named():
    logits = gaussian_logits(60, 3).astype(np.float32)
    for fit in (temperature_scaling, vector_scaling, dirichlet_calibration):
        fitted = fit(torch.from_numpy(logits), torch.from_numpy(logits.argmax(axis=1)))
        assert posthoc.AT_BOUND in fitted.notes
        assert fitted(logits).isfinite().all()


@pytest.mark.parametrize("fit", list(METHODS.values())[1:])
def test_bad_values_are_refused(fit):
    for logits, labels in (([[0.0, np.nan]], [0]), ([[0.0, 1.0]], [2]), ([[0.0, 1.0]], [0, 1])):
        with pytest.raises(ValueError):
            fit(np.array(logits), np.array(labels))


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_npz):
    """A finished teacher and its student."""
    root = tmp_path_factory.mktemp("runs")
    common = f"--dataset {tiny_npz} --model resnet8 --epochs 1 --train-batch-size 32".split()
    train_teacher.main([*common, "--checkpoint", str(root / "teachers")])
    students = ["--checkpoint", str(root / "students"), "--teacher_path", str(root)]
    train_student.main([*common, *students])
    return root


def run_of(runs, kind):
    return next((runs / kind).rglob("result.json")).parent


def test_a_table_for_each_run_that_is_finished(runs, capsys):
    stopped = runs / "teachers" / "stopped"
    stopped.mkdir()
    (stopped / "config.json").write_text("{}")
    script.main([str(runs), "--with-teacher", "--folds", "2"])
    printed = capsys.readouterr().out
    assert printed.count("val NLL") == 3 and f"left out: {stopped}, unfinished" in printed
    for method in METHODS:
        assert printed.count(f"\n{method} ") == 3
    assert not list(runs.rglob("posthoc.json"))
    assert "no finished run" in fails(capsys, runs, script.main, [str(stopped)])
    (stopped / "config.json").unlink()
    stopped.rmdir()


def test_the_stored_logits_are_what_counts(runs, tmp_path):
    """As a user runs it; the rows none and temperature repeat the run's own result."""
    run = run_of(runs, "teachers")
    result = json.loads((run / "result.json").read_text())
    done = run_script("python", "-m", "scripts.posthoc", run, "--write", cwd=tmp_path)
    assert "Dirichlet ODIR" in done.stdout and done.stderr == ""
    found = json.loads((run / "posthoc.json").read_text())
    assert found["folds"] == 5
    predictions = (run / "predictions.npz").read_bytes()
    assert found["predictions"] == hashlib.sha256(predictions).hexdigest()
    best = found["best"]
    assert best["temperature"]["temperature"] == result["best"]["temperature"]
    assert best["none"]["val"] == pytest.approx(result["best"]["val"])
    assert best["none"]["test"] == pytest.approx(result["best"]["test"]["raw"])
    assert best["temperature"]["test"] == pytest.approx(result["best"]["test"]["scaled"])
    for method in METHODS:
        assert best[method]["val"]["nll"] <= best["none"]["val"]["nll"] + 1e-12
    with np.load(run / "predictions.npz") as stored:
        logits, labels = stored["best_test_logits"], stored["test_labels"]
    one = best["vector"]
    mapped = logits.astype(np.float64) * one["weight"] + one["bias"]
    assert classification_metrics(mapped, labels) == pytest.approx(one["test"])
    (run / "posthoc.json").unlink()


def test_epochs_and_teachers_are_kept_side_by_side(runs, monkeypatch):
    # What the fits find is not looked at here: the fast ones will do.
    monkeypatch.setattr(script, "dirichlet_calibration", lambda *data, folds: no_calibration(*data))
    run = run_of(runs, "students")
    script.main([str(run), "--write", "--with-teacher"])
    script.main([str(run), "--write", "--epoch", "last"])
    found = json.loads((run / "posthoc.json").read_text())
    assert found.keys() == {"predictions", "folds", "best", "teacher", "last"}
    script.main([str(run), "--write", "--folds", "3"])
    assert json.loads((run / "posthoc.json").read_text()).keys() == {"predictions", "folds", "best"}
    (run / "posthoc.json").unlink()
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize("argv, said", [
    ("nowhere", "nowhere"), (".", "no run below it"), (". --folds 1", "--folds"),
    (". --fold 3", "'--fold'"), (". --epoch first", "--epoch"),
])  # fmt: skip
def test_bad_input(tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, tmp_path, script.main, argv.split())


@pytest.mark.parametrize("damage", ["absent", "cut short", "no logits", "not finite", "classes"])
def test_damaged_predictions(tmp_path, capsys, runs, damage):
    run = run_of(runs, "teachers")
    for name in ("result.json", "config.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    path, key = tmp_path / "predictions.npz", "best_val_logits"
    with np.load(run / "predictions.npz") as stored:
        arrays = dict(stored)
    changed = {
        "no logits": {"val_labels": np.zeros(3)},
        "not finite": arrays | {key: np.full_like(arrays[key], np.nan)},
        "classes": arrays | {key: arrays[key][:, :2]},
    }
    if damage in changed:
        np.savez(path, **changed[damage])
    elif damage == "cut short":
        path.write_bytes((run / "predictions.npz").read_bytes()[:2000])
    assert "predictions.npz" in fails(capsys, tmp_path, script.main, [str(tmp_path)])
