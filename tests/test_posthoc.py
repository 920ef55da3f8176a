"""Post-hoc maps: the minimum they find, their bounds, and the promise never to do harm."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from scipy.special import log_softmax
from written_runs import predictions

from utils.calibration import posthoc
from utils.calibration.metrics import classification_metrics
from utils.calibration.posthoc import (
    METHODS,
    dirichlet_calibration,
    temperature_scaling,
    vector_scaling,
)
from utils.calibration.temperature import T_MAX, T_MIN, fit_temperature

MAPS = pytest.mark.parametrize("fit", [vector_scaling, dirichlet_calibration])


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


def nll(calibration, logits, labels):
    return classification_metrics(calibration(logits), labels)["nll"]


# Temperature scaling


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_root_that_brentq_finds(seed):
    """Small and large splits, the latter from the solution of a part."""
    n, classes = (300, 6000)[seed % 2], (3, 10, 40)[seed % 3]
    true = np.random.default_rng(seed).normal(size=(n, classes))
    labels, logits = drawn(true, seed), np.geomspace(0.2, 8, 20)[seed] * true
    own = logits[np.arange(n), labels]

    def slope(b):
        return ((np.exp(log_softmax(b * logits, axis=1)) * logits).sum(axis=1) - own).mean()

    expected = 1 / brentq(slope, 1 / T_MAX, 1 / T_MIN, xtol=1e-15, rtol=1e-14)
    assert fit_temperature(logits, labels) == (pytest.approx(expected, rel=1e-12), False)


def test_a_validation_split_takes_milliseconds_whatever_its_type():
    true = np.random.default_rng(0).normal(size=(4000, 10))
    half, labels, times = torch.from_numpy(2 * true).half(), drawn(true), []
    for _ in range(5):
        started = time.process_time()
        found = fit_temperature(half.double(), torch.from_numpy(labels))
        times.append(time.process_time() - started)
    assert min(times) < 0.01
    assert fit_temperature(half, torch.from_numpy(labels)) == found
    assert fit_temperature(half.numpy(), labels.astype(np.int32)) == found


def test_almost_separable_logits_end():
    """One sample of a million is wrong, by little: the minimum lies near the bound."""
    logits = np.random.default_rng(0).normal(size=(2000, 5))
    labels = logits.argmax(axis=1)
    logits[0, labels[0]] -= 1e-9
    logits[1, labels[1]] += 30
    order = logits[2].argsort()
    labels[2], logits[2, order[-1]] = order[-2], logits[2, order[-2]] + 1e-3
    temperature, at_bound = fit_temperature(logits, labels)
    assert T_MIN <= temperature < 0.5 and at_bound == (temperature == T_MIN)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_bounds_are_met(scale):
    logits = scale * np.random.default_rng(0).normal(size=(100, 5))
    assert fit_temperature(logits, logits.argmax(axis=1)) == (T_MIN, True)
    assert fit_temperature(logits, logits.argmin(axis=1)) == (T_MAX, True)
    assert fit_temperature(logits[:1], logits[:1].argmax(axis=1)) == (T_MIN, True)
    silent = scale * np.repeat(np.arange(6.0)[:, None], 4, axis=1)
    assert fit_temperature(silent, np.arange(6) % 4) == (1.0, False)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([0.01, 1.0, 30.0, 1e4]))
def test_never_worse_than_no_scaling(seed, n, scale):
    rng = np.random.default_rng(seed)
    logits, labels = scale * rng.normal(size=(n, 4)), rng.integers(4, size=n)
    temperature, at_bound = fit_temperature(logits, labels)
    assert T_MIN <= temperature <= T_MAX and at_bound == (temperature in (T_MIN, T_MAX))
    raw, scaled = (classification_metrics(logits, labels, t)["nll"] for t in (1.0, temperature))
    assert scaled <= raw + 1e-14 * max(1, raw)


# All maps


@pytest.mark.parametrize("n, scale", [(1, 1e4), (40, 0.01), (30, 1.0), (50, 30.0)])
def test_never_worse_than_none_on_validation(n, scale):
    rng = np.random.default_rng(n)
    logits, labels = scale * rng.normal(size=(n, 3)), rng.integers(3, size=n)
    raw = nll(METHODS["none"](logits, labels), logits, labels)
    for method, fit in METHODS.items():
        calibrated = fit(logits, labels)
        assert calibrated(logits).isfinite().all(), method
        assert nll(calibrated, logits, labels) <= raw + 1e-14 * max(1, raw), method


def test_perfect_separation_is_named():
    logits = gaussian_logits(60, 3).astype(np.float32)
    notes = {
        temperature_scaling: posthoc.AT_BOUND,
        vector_scaling: posthoc.FROM_BOUND,
        dirichlet_calibration: posthoc.FROM_BOUND,
    }
    for fit, note in notes.items():
        fitted = fit(torch.from_numpy(logits), torch.from_numpy(logits.argmax(axis=1)))
        assert note in fitted.notes
        assert fitted(logits).isfinite().all()


@pytest.mark.parametrize("fit", [fit_temperature, *list(METHODS.values())[1:]])
def test_bad_values_shapes_and_labels_are_refused(fit):
    bad = [(np.eye(2), labels) for labels in ([0], [0, 2], [0.0, 1.0])]
    bad += [(np.array([[0, value], [1, 0]]), [0, 1]) for value in (np.nan, np.inf, -np.inf)]
    for logits, labels in bad:
        with pytest.raises(ValueError):
            fit(logits, np.array(labels))


# Vector and Dirichlet


def test_the_gradient_vanishes_at_the_vector_map():
    logits = 2 * torch.from_numpy(gaussian_logits(500, 6))
    labels = torch.from_numpy(drawn(logits.numpy() / 2))
    calibration = vector_scaling(logits, labels)
    weight = calibration.weight.diagonal().clone().requires_grad_()
    bias = calibration.bias.clone().requires_grad_()
    F.cross_entropy(logits * weight + bias, labels).backward()
    assert weight.grad.abs().max() < 1e-6 and bias.grad.abs().max() < 1e-6
    assert bias.sum().item() == pytest.approx(0, abs=1e-12)


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


def test_noise_is_regularised_away():
    """Few samples of a net that only needs a temperature: a free matrix learns them by heart."""
    true = gaussian_logits(5200, 8)
    labels, logits = torch.from_numpy(drawn(true)), torch.from_numpy(2 * true)
    fitted = dirichlet_calibration(logits[:200], labels[:200])
    assert fitted.facts["lambda"] >= 1
    problem = posthoc._Dirichlet(logits[:200], labels[:200])
    free, _ = problem.fit(1e-3, 1e-4, posthoc.TOLERANCE)
    unregularised = F.cross_entropy(problem.inputs(logits[200:]) @ free.T, labels[200:])
    assert nll(fitted, logits[200:], labels[200:]) < unregularised - 0.05


def test_cross_validation_takes_the_least_held_out_nll():
    logits = 2 * gaussian_logits(400, 4)
    labels = drawn(logits / 2)
    fitted = dirichlet_calibration(logits, labels, folds=4)
    facts = fitted.facts
    tried = {(one["lambda"], one["mu"]): one["held_out_nll"] for one in facts["cross_validation"]}
    assert facts["folds"] == 4
    # The map is that of the strengths that were chosen.
    problem = posthoc._Dirichlet(torch.from_numpy(logits), torch.from_numpy(labels))
    parameters, _ = problem.fit(facts["lambda"], facts["mu"], posthoc.TOLERANCE)
    expected = problem.inputs(torch.from_numpy(logits)) @ parameters.T
    torch.testing.assert_close(
        fitted(logits).log_softmax(dim=1), expected.log_softmax(dim=1), rtol=0, atol=1e-6
    )
    assert tried[facts["lambda"], facts["mu"]] == min(tried.values()) < facts["identity_nll"]


def test_a_class_with_one_image_does_not_spoil_the_cross_validation():
    logits = gaussian_logits(600, 5)
    labels = drawn(logits)
    keep = np.flatnonzero((labels != 4) | (np.cumsum(labels == 4) == 1))
    fitted = dirichlet_calibration(2 * logits[keep], labels[keep])
    assert fitted.facts["held_out_nll"] < fitted.facts["identity_nll"] and not fitted.notes


def test_a_map_that_is_no_better_is_turned_away():
    """Uninformative features: every map only fits noise."""
    logits = 1e-3 * np.random.default_rng(5).normal(size=(40, 3))
    fitted = dirichlet_calibration(logits, np.arange(40) % 3)
    assert fitted.notes == (posthoc.IDENTITY,)
    assert torch.equal(fitted(logits), torch.from_numpy(logits))


@MAPS
def test_a_fit_that_does_not_converge_says_so(fit, monkeypatch):
    monkeypatch.setattr(posthoc, "MAX_ITERATIONS", 1)
    logits = 3 * gaussian_logits(300, 4)
    fitted = fit(logits, drawn(logits / 3 + [1.0, 0, 0, 0]))
    assert not fitted.facts["converged"]
    assert any("did not converge: gradient" in note for note in fitted.notes)


@MAPS
def test_a_class_without_images_keeps_its_probability(fit):
    """Or every test image of that class would cost some fifty nats."""
    true = gaussian_logits(4000, 4)
    labels, logits = drawn(true), 2 * true
    seen = np.flatnonzero(labels[:2000] != 3)
    fitted = fit(logits[seen], labels[seen])
    assert any("class 3" in note for note in fitted.notes)
    scaled = temperature_scaling(logits[seen], labels[seen])
    before, after = (nll(one, logits[2000:], labels[2000:]) for one in (scaled, fitted))
    assert after < before + 0.05
    before, after = (one(logits).softmax(1)[:, 3].mean().item() for one in (scaled, fitted))
    assert after > before / 2


def test_where_a_class_without_images_spoils_the_fit_temperature_scaling_stands_in():
    """The fit does not see that class; with it, its map is worse than what it began as."""
    logits, labels = predictions(np.random.default_rng(3), images=1000, excess=0.0)
    assert set(labels) == {0, 1}
    scaled = temperature_scaling(logits, labels)
    fitted = vector_scaling(logits, labels)
    assert torch.equal(fitted.weight, scaled.weight) and not fitted.bias.any()
    assert fitted.notes == (posthoc.FELL_BACK,)
    assert nll(fitted, logits, labels) < nll(lambda rows: torch.as_tensor(rows), logits, labels)
