"""What a sample can say: intervals, the floor of the ECE, paired differences and their errors."""

import numpy as np
import pytest
import torch
from scipy import stats

from utils.calibration.bootstrap import (
    PAIRED,
    basic_interval,
    calibrated_ece,
    gaps,
    holm,
    paired_difference,
    resample_counts,
    resampled,
)
from utils.calibration.metrics import classification_metrics, ece


def predictions(n, classes=3, sharpness=1.0, seed=0):
    """Probabilities (n, classes) and labels that are drawn from softmax(logits)."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return torch.from_numpy(sharpness * logits).softmax(dim=1), torch.from_numpy(labels)


@pytest.mark.parametrize("metric", PAIRED)
@pytest.mark.parametrize("samples, classes", [(1, 2), (17, 3), (400, 10)])
def test_columns_sum_to_the_metric(metric, samples, classes):
    probs, labels = predictions(samples, classes, 1.5)
    value = np.abs(PAIRED[metric](probs, labels).mean(axis=0, dtype=np.float64)).sum()
    expected = classification_metrics(probs.log(), labels)[metric]
    assert value == pytest.approx(expected, abs=1e-6)


def test_edges_fall_into_the_bin_below():
    rows = [[1 / 3, 1 / 3, 1 / 3], [1.0, 0, 0], [0.6, 0.4, 0]]
    probs = torch.tensor(rows, dtype=torch.float64)
    assert gaps(probs, torch.ones(3)).nonzero()[1].tolist() == [4, 14, 8]


# ---- the interval of an ECE --------------------------------------------------------------------


def interval_of(runs, resamples=1000):
    draws = np.mean([resampled(gaps(*run), resamples) for run in runs], axis=0)
    return basic_interval(np.mean([ece(*run) for run in runs]), draws)


def test_a_plain_loop_gives_the_same_interval():
    runs = [predictions(200, sharpness=s, seed=3) for s in (1.0, 3.0)]
    labels = runs[0][1]
    values = []
    for count in resample_counts(200, 50).astype(int):
        taken = np.repeat(np.arange(200), count)
        assert len(taken) == 200
        values.append(np.mean([ece(probs[taken], labels[taken]) for probs, _ in runs]))
    estimate = np.mean([ece(*run) for run in runs])
    low, high = np.quantile(values, [0.025, 0.975])
    expected = (max(0, 2 * estimate - high), max(estimate, 2 * estimate - low))
    assert interval_of(runs, 50) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shift", [0.03, 0.1])
def test_it_covers_the_truth(shift):
    """Confidence exceeds accuracy by `shift` everywhere, so the ECE is `shift`."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        confidence = rng.uniform(0.5, 1, 1000)
        probs = torch.from_numpy(np.stack([confidence, 1 - confidence], 1))
        labels = torch.from_numpy(rng.random(1000) >= confidence - shift).long()
        low, high = interval_of([(probs, labels)], 200)
        covered += low <= shift <= high
    assert 0.85 <= covered / 200 <= 0.99


# ---- the ECE of a calibrated net ---------------------------------------------------------------


def test_the_floor_is_that_of_labels_drawn_class_by_class():
    """Only whether the predicted class is right matters, so whole labels give the same."""
    probs, _ = predictions(1000, 5)
    rng = np.random.default_rng(5)
    drawn = [(probs.log().numpy() + rng.gumbel(size=probs.shape)).argmax(1) for _ in range(300)]
    values = [ece(probs, labels) for labels in drawn]
    mean, high = calibrated_ece(probs)
    assert mean == pytest.approx(np.mean(values), rel=0.05)
    assert high == pytest.approx(np.quantile(values, 0.95), rel=0.08)


# ---- paired differences ------------------------------------------------------------------------


def test_one_run_each_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    first, second = (rng.random(5000) < p for p in (0.80, 0.78))
    runs = [[one.astype(np.float32)[:, None]] for one in (first, second)]
    found = paired_difference(*runs, resamples=4000)
    theirs = stats.ttest_rel(first.astype(float), second.astype(float))
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.p == pytest.approx(theirs.pvalue, abs=0.01)
    interval = theirs.confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=1e-3)
    same = paired_difference(runs[0], runs[0])
    assert same == pytest.approx((0, 0, 0, 1), abs=1e-12)


def null_run(rng, kind, difficulty, skill):
    """A net on images of shared difficulty; `skill` is what its seed gave it."""
    chance = stats.norm.cdf(0.8 + difficulty + skill)
    right = rng.random(len(difficulty)) < chance
    if kind == "top1":
        return right.astype(np.float32)[:, None]
    confidence = np.clip(chance + 0.08, 0.5, 1)
    probs = torch.from_numpy(np.stack([confidence, 1 - confidence], axis=1))
    return gaps(probs, torch.from_numpy(~right).long())


@pytest.mark.parametrize("kind, seeds, spread", [
    ("top1", (1, 1), 0.0), ("top1", (3, 3), 0.2), ("top1", (1, 3), 0.2), ("top1", (2, 1), 0.1),
    ("ece", (3, 3), 0.1),
])  # fmt: skip
def test_false_alarms_of_the_interval(kind, seeds, spread):
    """Rows of nets from one distribution: 5 % of the intervals leave out 0."""
    rng = np.random.default_rng(5)
    trials, alarms = 600, 0
    for _ in range(trials):
        difficulty = rng.normal(size=400)
        runs = [null_run(rng, kind, difficulty, spread * rng.normal()) for _ in range(sum(seeds))]
        found = paired_difference(runs[: seeds[0]], runs[seeds[0] :], resamples=200)
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
        alarms += found.p < 0.05
    assert 0.03 <= alarms / trials <= 0.07


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []
    rng = np.random.default_rng(3)
    for _ in range(50):
        p = rng.random(5) ** 3
        # Its closed form: rejected are all up to the first that fails.
        fails = np.sort(p) * np.arange(5, 0, -1) > 0.05
        assert sum(q <= 0.05 for q in holm(p)) == np.append(fails, True).argmax()
