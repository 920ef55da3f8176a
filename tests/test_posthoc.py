"""Temperature scaling: the minimum it finds, its bounds, and its promise never to do harm."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_softmax

from utils.calibration.metrics import classification_metrics
from utils.calibration.temperature import T_MAX, T_MIN, fit_temperature

properties = settings(max_examples=40, deadline=None, derandomize=True)


def overconfident(n, classes, factor, seed=0):
    """Labels drawn from softmax(z), and the logits factor * z."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return factor * logits, labels


def nll(logits, labels, temperature):
    return classification_metrics(logits, labels, temperature)["nll"]


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_root_that_brentq_finds(seed):
    """Small and large splits, the latter from the solution of a part."""
    n, classes = (300, 6000)[seed % 2], (3, 10, 40)[seed % 3]
    logits, labels = overconfident(n, classes, np.geomspace(0.2, 8, 20)[seed], seed)
    own = logits[np.arange(n), labels]

    def slope(b):
        return ((np.exp(log_softmax(b * logits, axis=1)) * logits).sum(axis=1) - own).mean()

    expected = 1 / brentq(slope, 1 / T_MAX, 1 / T_MIN, xtol=1e-15, rtol=1e-14)
    assert fit_temperature(logits, labels) == (pytest.approx(expected, rel=1e-12), False)


def test_a_validation_split_takes_milliseconds():
    torch.set_num_threads(1)
    logits, labels = overconfident(4000, 10, 2.0)
    times = []
    for _ in range(5):
        started = time.process_time()
        fit_temperature(logits, labels)
        times.append(time.process_time() - started)
    assert min(times) < 0.01


def test_almost_separable_logits_end():
    """One sample of a million is wrong, by little: the minimum lies near the bound."""
    logits, _ = overconfident(2000, 5, 1.0)
    labels = logits.argmax(axis=1)
    logits[0, labels[0]] -= 1e-9
    logits[1, labels[1]] += 30
    order = logits[2].argsort()
    labels[2], logits[2, order[-1]] = order[-2], logits[2, order[-2]] + 1e-3
    temperature, at_bound = fit_temperature(logits, labels)
    assert T_MIN <= temperature < 0.5 and at_bound == (temperature == T_MIN)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_the_bounds_are_met(scale):
    logits = scale * overconfident(100, 5, 1.0)[0]
    assert fit_temperature(logits, logits.argmax(axis=1)) == (T_MIN, True)
    assert fit_temperature(logits, logits.argmin(axis=1)) == (T_MAX, True)
    assert fit_temperature(logits[:1], logits[:1].argmax(axis=1)) == (T_MIN, True)


def test_logits_that_say_nothing_keep_temperature_one():
    logits = np.repeat(np.arange(6.0)[:, None], 4, axis=1)
    assert fit_temperature(logits, np.arange(6) % 4) == (1.0, False)


@properties
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([0.01, 1.0, 30.0, 1e4]))
def test_never_worse_than_no_scaling(seed, n, scale):
    rng = np.random.default_rng(seed)
    logits, labels = scale * rng.normal(size=(n, 4)), rng.integers(4, size=n)
    temperature, at_bound = fit_temperature(logits, labels)
    assert T_MIN <= temperature <= T_MAX and at_bound == (temperature in (T_MIN, T_MAX))
    raw = nll(logits, labels, 1.0)
    assert nll(logits, labels, temperature) <= raw + 1e-14 * max(1, raw)


def test_types_agree():
    logits, labels = overconfident(200, 5, 2.0)
    half = torch.from_numpy(logits).half()
    expected = fit_temperature(half.double(), torch.from_numpy(labels))
    assert fit_temperature(half, torch.from_numpy(labels)) == expected
    assert fit_temperature(half.numpy(), labels.astype(np.int32)) == expected


def test_bad_values_shapes_and_labels_are_refused():
    bad = [(np.eye(2), labels) for labels in ([0], [0, 2], [0.0, 1.0])]
    bad += [(np.array([[0, value], [1, 0]]), [0, 1]) for value in (np.nan, np.inf, -np.inf)]
    for logits, labels in bad:
        with pytest.raises(ValueError):
            fit_temperature(logits, np.array(labels))
