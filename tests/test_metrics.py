"""Metrics against plain float64 loops and torchmetrics, at their edges, and by their properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from utils.calibration.metrics import (
    adaece,
    brier,
    classification_metrics,
    ece,
    mce,
    nll,
    posterior_metrics,
    reliability_bins,
    sce,
    top_k,
)

BINS = 15
KEYS = ["top1", "top5", "nll", "brier", "ece", "sce", "adaece", "mce"]
properties = settings(max_examples=40, deadline=None, derandomize=True)

# ---- the definitions, one sample and one class at a time ---------------------------------------


def bin_of(value, inner_edges):
    return sum(1 for edge in inner_edges if value > edge)


def gaps_loop(values, hits, inner_edges):
    """|mean hit - mean value| and the count of every bin that is not empty."""
    bins = {}
    for value, hit in zip(values, hits, strict=True):
        bins.setdefault(bin_of(value, inner_edges), []).append((value, hit))
    return [
        (abs(math.fsum(h for _, h in pairs) - math.fsum(v for v, _ in pairs)) / len(pairs), pairs)
        for pairs in bins.values()
    ]


def error_loop(values, hits, inner_edges):
    gaps = gaps_loop(values, hits, inner_edges)
    return math.fsum(gap * len(pairs) for gap, pairs in gaps) / len(values)


def metrics_loop(probs, labels, bins=BINS):
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
    (N, K), edges = probs.shape, [b / bins for b in range(1, bins)]
    confidence = [max(row) for row in probs.tolist()]
    order = [sorted(range(K), key=lambda k, row=row: (-row[k], k)) for row in probs.tolist()]
    right = [float(classes[0] == y) for classes, y in zip(order, labels, strict=True)]
    quantiles = np.quantile(confidence, [b / bins for b in range(1, bins)])
    return {
        "top1": math.fsum(right) / N,
        "top5": sum(y in classes[:5] for classes, y in zip(order, labels, strict=True)) / N,
        "nll": math.fsum(-math.log(probs[i, labels[i]]) for i in range(N)) / N,
        "brier": math.fsum(
            (probs[i, k] - (k == labels[i])) ** 2 for i in range(N) for k in range(K)
        )
        / N,
        "ece": error_loop(confidence, right, edges),
        "sce": math.fsum(
            error_loop(probs[:, k].tolist(), [float(y == k) for y in labels], edges)
            for k in range(K)
        )
        / K,
        "adaece": error_loop(confidence, right, quantiles),
        "mce": max(gap for gap, _ in gaps_loop(confidence, right, edges)),
    }


def from_probs(probs, labels, bins=BINS):
    return {
        "top1": top_k(probs, labels, 1),
        "top5": top_k(probs, labels, 5),
        "nll": nll(probs, labels),
        "brier": brier(probs, labels),
        "ece": ece(probs, labels, bins),
        "sce": sce(probs, labels, bins),
        "adaece": adaece(probs, labels, bins),
        "mce": mce(probs, labels, bins),
    }


def sample(n, classes, scale=2.0, seed=0):
    """Logits, and labels that agree with them about as often as they claim at scale 2."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes))
    labels = (2 * logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return scale * logits, labels


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def two_class(confidence, right):
    """Probabilities and labels with the given top-label confidences (>= 0.5)."""
    confidence = np.asarray(confidence, np.float64)
    return np.stack([confidence, 1 - confidence], axis=1), 1 - np.asarray(right, np.int64)


# ---- values ------------------------------------------------------------------------------------

SIZES = [(1, 2), (2, 3), (30, 10), (333, 4), (1000, 10), (400, 100)]


@pytest.mark.parametrize("n, classes", SIZES)
@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("bins", [15, 7])
def test_metrics_match_the_loops(n, classes, scale, bins):
    logits, labels = sample(n, classes, scale)
    expected = metrics_loop(softmax(logits), labels, bins)
    for metrics in (
        classification_metrics(logits, labels, bins=bins),
        from_probs(softmax(logits), labels, bins),
    ):
        assert list(metrics) == KEYS and all(type(v) is float for v in metrics.values())
        assert metrics == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("n, classes", [(200, 3), (1000, 10), (400, 100)])
def test_metrics_match_torchmetrics(n, classes):
    # Its bins are [lo, hi): the same where no confidence falls on an edge.
    logits, labels = map(torch.from_numpy, sample(n, classes, 4.0))
    probs = logits.softmax(dim=1)
    ours = classification_metrics(logits, labels)
    for name, norm in (("ece", "l1"), ("mce", "max")):
        theirs = multiclass_calibration_error(probs, labels, classes, n_bins=BINS, norm=norm)
        assert ours[name] == pytest.approx(theirs.item(), abs=1e-6)
    for name, k in (("top1", 1), ("top5", min(5, classes))):
        theirs = multiclass_accuracy(probs, labels, classes, top_k=k, average="micro")
        assert ours[name] == pytest.approx(theirs.item(), abs=1e-6)
    assert ours["nll"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-12
    )


def test_temperature_divides_the_logits():
    logits, labels = sample(300, 6)
    scaled = classification_metrics(logits, labels, temperature=2.5)
    assert scaled == pytest.approx(classification_metrics(logits / 2.5, labels), abs=1e-12)


def test_reliability_bins():
    probs, labels = two_class([0.55, 0.58, 0.95, 0.97, 0.99], [1, 0, 1, 1, 0])
    counts, accuracy, confidence = reliability_bins(probs, labels, bins=10)
    assert counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert accuracy[5] == 0.5 and accuracy[9].item() == pytest.approx(2 / 3)
    assert confidence[5].item() == pytest.approx(0.565) and accuracy[:5].sum() == 0
    assert counts.dtype == accuracy.dtype == confidence.dtype == torch.float64
    error = (counts / counts.sum() * (accuracy - confidence).abs()).sum().item()
    assert ece(probs, labels, bins=10) == pytest.approx(error)


@pytest.mark.parametrize("n", [17, 100, 1234])
def test_adaece_edges_are_numpys_quantiles(n):
    rng = np.random.default_rng(n)
    probs, labels = two_class(rng.uniform(0.5, 1, n), rng.integers(2, size=n))
    assert adaece(probs, labels) == pytest.approx(metrics_loop(probs, labels)["adaece"], abs=1e-12)


def test_adaece_where_the_quantiles_are_samples():
    # 16 confidences, 15 bins: the i-th edge is the i-th sample, so the first bin holds two.
    confidence = np.linspace(0.5, 1, 16)
    right = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1]
    gaps = [r - c for r, c in zip(right, confidence, strict=True)]
    expected = (abs(gaps[0] + gaps[1]) + sum(abs(gap) for gap in gaps[2:])) / 16
    assert adaece(*two_class(confidence, right)) == pytest.approx(expected, abs=1e-12)


def test_posterior_metrics():
    logits, _ = sample(200, 4, seed=1)
    posterior = softmax(sample(200, 4, seed=2)[0])
    posterior[0] = [1, 0, 0, 0]
    metrics = posterior_metrics(logits, torch.from_numpy(posterior), temperature=2.0)
    gaps, kls = [], []
    for p, true in zip(softmax(logits / 2), posterior, strict=True):
        gaps.append(abs(max(p) - true[p.argmax()]))
        kls.append(sum(q * math.log(q / p_k) for q, p_k in zip(true, p, strict=True) if q > 0))
    assert metrics["true_calibration_error"] == pytest.approx(np.mean(gaps), abs=1e-12)
    assert metrics["true_kl"] == pytest.approx(np.mean(kls), abs=1e-12)
    perfect = posterior_metrics(np.log(posterior[1:]), posterior[1:])
    assert perfect == pytest.approx({"true_calibration_error": 0, "true_kl": 0}, abs=1e-12)


# ---- edges -------------------------------------------------------------------------------------


def test_certain_and_right_is_perfect_and_certain_and_wrong_is_the_worst():
    certain = np.eye(3)
    assert from_probs(certain, np.arange(3)) == pytest.approx(
        {k: float(k in ("top1", "top5")) for k in KEYS}, abs=0
    )
    wrong = from_probs(certain, np.array([1, 2, 0]))
    assert wrong["ece"] == wrong["adaece"] == wrong["mce"] == 1.0
    assert wrong["brier"] == 2.0 and wrong["nll"] == math.inf
    assert wrong["sce"] == pytest.approx(2 / 3)


def test_confidence_zero_and_one_lie_in_the_outer_bins():
    probs = np.array([[0.0, 0.0], [1.0, 0.0]])
    counts, accuracy, confidence = reliability_bins(probs, np.array([0, 1]))
    assert counts.tolist() == [1.0, *[0.0] * 13, 1.0]
    assert accuracy[0] == 1 and confidence[0] == 0 and accuracy[-1] == 0 and confidence[-1] == 1
    assert ece(probs, np.array([0, 1])) == adaece(probs, np.array([0, 1])) == 1.0


@pytest.mark.parametrize("edge", range(1, BINS))
def test_a_tie_with_an_edge_belongs_to_the_bin_below(edge):
    value = edge / BINS
    above = np.nextafter(value, 1)
    for confidence, index in ((value, edge - 1), (above, edge)):
        counts, *_ = reliability_bins(np.array([[confidence, 0.0]]), np.array([0]))
        assert counts.argmax() == index and counts.sum() == 1


def test_ties_at_an_edge_of_equal_mass_share_a_bin():
    # All but one of the quantiles fall on the same value.
    confidence = [0.6] + [0.8] * 28 + [0.9]
    right = [0] + [1, 0] * 14 + [1]
    probs, labels = two_class(confidence, right)
    # Edge 1 is 0.8 (position 29/15): everything up to 0.8 is the first bin, 0.9 the last.
    expected = (abs(14 - 0.6 - 28 * 0.8) + abs(1 - 0.9)) / 30
    assert adaece(probs, labels) == pytest.approx(expected, abs=1e-12)
    assert adaece(*two_class([0.7] * 10, [1] * 5 + [0] * 5)) == pytest.approx(0.2)


def test_equal_probabilities_rank_by_class_number():
    probs, labels = np.full((4, 4), 0.25), np.arange(4)
    assert [top_k(probs, labels, k) for k in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert ece(probs, labels) == 0.0


def test_a_class_that_never_occurs_counts():
    probs = np.array([[0.5, 0.1, 0.4]] * 10)
    labels = np.array([0] * 5 + [1] * 5)
    assert sce(probs, labels) == pytest.approx((0 + 0.4 + 0.4) / 3)
    assert sce(probs, labels) == pytest.approx(metrics_loop(probs, labels)["sce"])


def test_one_sample():
    probs, labels = np.array([[0.2, 0.7, 0.1]]), np.array([1])
    metrics = from_probs(probs, labels)
    assert metrics == pytest.approx(metrics_loop(probs, labels), abs=1e-12)
    assert metrics["ece"] == pytest.approx(0.3) == metrics["adaece"] == metrics["mce"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_read_exactly(dtype):
    logits, labels = map(torch.from_numpy, sample(500, 10, 5.0))
    logits = logits.to(dtype)
    assert classification_metrics(logits, labels) == classification_metrics(logits.double(), labels)


def test_huge_logits_rank_by_the_logits():
    # Both probabilities underflow to 0; the label's logit is still the second.
    logits = torch.tensor([[-2e4, -1e4, 0.0]])
    assert top_k(logits, torch.tensor([1]), 2) == 1.0
    metrics = classification_metrics(logits, torch.tensor([1]))
    assert metrics["nll"] == 1e4 and metrics["ece"] == 1.0
    assert classification_metrics(logits, torch.tensor([2]))["nll"] == 0.0
    ascending = torch.arange(-6e4, 1, 1e4).unsqueeze(0)
    assert classification_metrics(ascending, torch.tensor([5]))["top5"] == 1.0


def test_logits_that_differ_by_less_than_their_probabilities_can():
    logits = np.array([[0.0, 0.0, 1e-17]])
    metrics = classification_metrics(logits, np.array([2]))
    assert metrics["top1"] == 1.0 and metrics["ece"] == pytest.approx(2 / 3)


def test_numpy_and_tensors_of_any_kind_agree():
    logits, labels = sample(50, 4)
    expected = classification_metrics(logits, labels)
    assert classification_metrics(torch.from_numpy(logits), torch.from_numpy(labels)) == expected
    reversed_twice = classification_metrics(
        logits[::-1], np.ascontiguousarray(labels[::-1]).astype(np.uint8)
    )
    assert reversed_twice == pytest.approx(expected, abs=1e-12)
    with_gradient = torch.from_numpy(logits).requires_grad_()
    assert classification_metrics(with_gradient, labels) == expected


def test_a_thousand_classes():
    logits, labels = sample(10_000, 1000, 1.0)
    logits = logits.astype(np.float32)
    assert classification_metrics(logits, labels)["sce"] < 1e-3


# ---- refusals ----------------------------------------------------------------------------------

ON_PROBS = [ece, sce, adaece, mce, brier, nll, reliability_bins, lambda p, y: top_k(p, y, 1)]
GOOD = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])


@pytest.mark.parametrize("function", [*ON_PROBS, classification_metrics])
@pytest.mark.parametrize(
    "scores, labels",
    [
        pytest.param(np.where(GOOD == 0.8, np.nan, GOOD), [0, 1, 0], id="nan"),
        pytest.param(GOOD, [0, 1], id="too few labels"),
        pytest.param(GOOD, [[0], [1], [0]], id="labels in a column"),
        pytest.param(GOOD, [0, 1, 2], id="label too high"),
        pytest.param(GOOD, [0, -1, 0], id="label negative"),
        pytest.param(GOOD, [0.0, 1.0, 0.0], id="label not whole"),
        pytest.param(GOOD[:0], np.zeros(0, np.int64), id="no sample"),
        pytest.param(GOOD[:, :0], [0, 0, 0], id="no class"),
        pytest.param(GOOD[0], [0, 1], id="one dimension"),
        pytest.param(GOOD[None], [0], id="three dimensions"),
    ],
)
def test_bad_input_is_refused(function, scores, labels):
    with pytest.raises(ValueError):
        function(scores, np.asarray(labels))


@pytest.mark.parametrize("function", ON_PROBS[:-1])
@pytest.mark.parametrize("value", [-0.1, 1.1, np.inf])
def test_logits_in_place_of_probabilities_are_refused(function, value):
    with pytest.raises(ValueError, match="0..1"):
        function(np.where(GOOD == 0.8, value, GOOD), np.array([0, 1, 0]))


@pytest.mark.parametrize("row", [[np.inf, 0], [-np.inf, -np.inf], [np.inf, np.inf], [np.nan, 0]])
def test_logits_whose_softmax_is_nan_are_refused(row):
    with pytest.raises(ValueError, match="NaN"):
        classification_metrics(np.array([[1.0, 2.0], row]), np.array([0, 1]))


def test_a_masked_class_is_no_error():
    logits = np.array([[0.0, -np.inf, 0.0]])
    assert classification_metrics(logits, np.array([0]))["nll"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        classification_metrics(GOOD, np.array([0, 1, 0]), temperature=temperature)


@pytest.mark.parametrize("posterior", [GOOD[:2], GOOD * 0.9, GOOD - 0.5, GOOD * np.nan])
def test_bad_posteriors_are_refused(posterior):
    with pytest.raises(ValueError):
        posterior_metrics(GOOD, posterior)


# ---- properties --------------------------------------------------------------------------------


@st.composite
def splits(draw):
    """Logits from a coarse grid, so that ties are common, and any labels."""
    n, classes = draw(st.integers(1, 40)), draw(st.integers(2, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coarse = draw(st.booleans())
    logits = draw(st.sampled_from([0.3, 2.0, 20.0])) * rng.normal(size=(n, classes))
    return np.round(logits) if coarse else logits, rng.integers(classes, size=n)


@properties
@given(splits(), st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(split, random):
    logits, labels = split
    order = list(range(len(labels)))
    random.shuffle(order)
    shuffled = classification_metrics(logits[order], labels[order])
    assert shuffled == pytest.approx(classification_metrics(logits, labels), abs=1e-12)


@properties
@given(splits(), st.integers(2, 4))
def test_duplicating_every_sample_changes_nothing(split, times):
    logits, labels = split
    once = classification_metrics(logits, labels)
    repeated = classification_metrics(np.repeat(logits, times, 0), np.repeat(labels, times))
    for key in set(KEYS) - {"adaece"}:
        assert repeated[key] == pytest.approx(once[key], abs=1e-12)


@properties
@given(st.integers(1, 300), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_duplicating_every_sample_moves_one_sample_per_edge_of_adaece(n, times, seed):
    rng = np.random.default_rng(seed)
    confidence, right = rng.uniform(0.5, 1, n), rng.integers(2, size=n)
    once = adaece(*two_class(confidence, right))
    repeated = adaece(*two_class(np.repeat(confidence, times), np.repeat(right, times)))
    tolerance = 0 if (n - 1) % BINS == 0 else 2 * (BINS - 1) / n
    assert abs(repeated - once) <= tolerance + 1e-12


@properties
@given(splits(), st.floats(0.05, 20))
def test_temperature_keeps_the_ranking(split, temperature):
    logits, labels = split
    raw = classification_metrics(logits, labels)
    scaled = classification_metrics(logits, labels, temperature=temperature)
    assert (scaled["top1"], scaled["top5"]) == (raw["top1"], raw["top5"])


@properties
@given(splits())
def test_ranges(split):
    metrics = classification_metrics(*split)
    assert all(0 <= metrics[k] <= 1 + 1e-12 for k in KEYS if k not in ("nll", "brier"))
    assert 0 <= metrics["brier"] <= 2 + 1e-12 and metrics["nll"] >= 0
    assert metrics["top1"] <= metrics["top5"] and metrics["ece"] <= metrics["mce"] + 1e-12


@pytest.mark.parametrize("classes", [2, 10])
def test_labels_drawn_from_the_probabilities_are_calibrated(classes):
    rng = np.random.default_rng(3)
    errors = []
    for n in (300, 10_000, 300_000):
        logits = 2 * rng.normal(size=(n, classes))
        labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
        metrics = classification_metrics(logits, labels)
        errors.append([metrics[k] for k in ("ece", "sce", "adaece")])
    for first, second, third in zip(*errors, strict=True):
        assert first > second > third and third < 0.004
