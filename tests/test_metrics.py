"""Metrics against plain float64 loops and other packages, at their edges, and by properties."""

import math
import time
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torchmetrics.functional.classification import multiclass_accuracy as torchs_accuracy
from torchmetrics.functional.classification import multiclass_calibration_error as torchs_error

from utils.calibration import metrics, selective
from utils.calibration.metrics import classification_metrics, ece, reliability_bins
from utils.calibration.temperature import fit_temperature
from utils.columns import COLUMNS

BINS = 15

# ---- the definitions, one sample and one class at a time ---------------------------------------


def gaps_loop(values, hits, inner_edges):
    """Count, mean value and mean hit of every bin that is not empty."""
    bins = {}
    for value, hit in zip(values, hits, strict=True):
        bins.setdefault(sum(value > edge for edge in inner_edges), []).append((value, hit))
    return [
        (len(pairs), *(math.fsum(part) / len(pairs) for part in zip(*pairs, strict=True)))
        for pairs in bins.values()
    ]


def error_loop(values, hits, inner_edges):
    found = gaps_loop(values, hits, inner_edges)
    return math.fsum(n * abs(hit - value) for n, value, hit in found) / len(values)


def aurc_loop(confidence, right):
    """Errors of equal confidence shared: risks of the i surest samples, i = 1..N."""
    shared = {c: [] for c in confidence}
    for c, r in zip(confidence, right, strict=True):
        shared[c].append(1 - r)
    errors = [sum(shared[c]) / len(shared[c]) for c in sorted(confidence, reverse=True)]
    return math.fsum(math.fsum(errors[: i + 1]) / (i + 1) for i in range(len(errors))) / len(errors)


def augrc_loop(confidence, right):
    """Of each wrong sample, the share of coverages at which it is kept; equals half of the time."""
    N, kept = len(right), []
    for c, r in zip(confidence, right, strict=True):
        before = math.fsum(0.5 * (c <= other) + 0.5 * (c < other) for other in confidence)
        kept.append((1 - r) * (1 - before / N))
    return math.fsum(kept) / N


def risk_loop(confidence, right):
    """Error rate of the surest 80 %; of those that are equal to the last, as many as are needed."""
    count = math.ceil(8 * len(right) / 10)
    last = sorted(confidence, reverse=True)[count - 1]
    surer = [1 - r for c, r in zip(confidence, right, strict=True) if c > last]
    equal = [1 - r for c, r in zip(confidence, right, strict=True) if c == last]
    return (sum(surer) + (count - len(surer)) * sum(equal) / len(equal)) / count


def coverage_loop(confidence, right):
    """Every confidence tried as a threshold."""
    found = [0.0]
    for threshold in set(confidence):
        kept = [1 - r for c, r in zip(confidence, right, strict=True) if c >= threshold]
        if 20 * sum(kept) <= len(kept):
            found.append(len(kept) / len(right))
    return max(found)


def metrics_loop(probs, labels, bins=BINS):
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
    (N, K), edges = probs.shape, [b / bins for b in range(1, bins)]
    confidence = [max(row) for row in probs.tolist()]
    order = [sorted(range(K), key=lambda k, row=row: (-row[k], k)) for row in probs.tolist()]
    right = [float(classes[0] == y) for classes, y in zip(order, labels, strict=True)]
    reliability = gaps_loop(confidence, right, edges)

    def classwise(edges_of):
        columns = [(probs[:, k].tolist(), [float(y == k) for y in labels]) for k in range(K)]
        return math.fsum(error_loop(*one, edges_of(one[0])) for one in columns) / K

    def noisy(n, value, hit):  # E|normal(hit - value, hit (1 - hit) / n)|
        sd, gap = math.sqrt(hit * (1 - hit) / n), abs(hit - value)
        if sd == 0:
            return gap
        tail = sd * math.sqrt(2 / math.pi) * math.exp(-((gap / sd) ** 2) / 2)
        return gap * math.erf(gap / sd / math.sqrt(2)) + tail

    error = error_loop(confidence, right, edges)
    return {
        "top1": math.fsum(right) / N,
        "top5": sum(y in classes[:5] for classes, y in zip(order, labels, strict=True)) / N,
        "nll": math.fsum(-math.log(probs[i, labels[i]]) for i in range(N)) / N,
        "brier": math.fsum(np.square(probs - np.eye(K)[labels]).ravel()) / N,
        "ece": error,
        "sce": classwise(lambda values: edges),
        "adaece": error_loop(confidence, right, np.quantile(confidence, edges)),
        "mce": max(abs(hit - value) for _, value, hit in reliability),
        "ace": classwise(lambda values: np.quantile(values, edges)),
        "rmsce": math.sqrt(math.fsum(n * (hit - v) ** 2 for n, v, hit in reliability) / N),
        "debiased_ece": 2 * error - math.fsum(one[0] * noisy(*one) for one in reliability) / N,
        "overconfidence": math.fsum(n * max(v - hit, 0) for n, v, hit in reliability) / N,
        "underconfidence": math.fsum(n * max(hit - v, 0) for n, v, hit in reliability) / N,
        "aurc": aurc_loop(confidence, right),
        "augrc": augrc_loop(confidence, right),
        "risk_at_80_coverage": risk_loop(confidence, right),
        "coverage_at_5_risk": coverage_loop(confidence, right),
        "balanced_accuracy": np.mean([np.mean(np.array(right)[labels == k]) for k in set(labels)]),
        "smallest_bin": min(n for n, _, _ in reliability),
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


def of_probs(probs, labels):
    with np.errstate(divide="ignore"):
        return classification_metrics(np.log(probs), labels)


def two_class(confidence, right):
    """Probabilities and labels with the given top-label confidences (>= 0.5)."""
    confidence = np.asarray(confidence, np.float64)
    return np.stack([confidence, 1 - confidence], axis=1), 1 - np.asarray(right, np.int64)


# ---- values ------------------------------------------------------------------------------------

SIZES = [(1, 2), (2, 3), (30, 10), (333, 4), (1000, 10), (300, 50)]


@pytest.mark.parametrize("n, classes", SIZES)
@pytest.mark.parametrize("scale, bins", [(0.5, 15), (2.0, 7), (6.0, 15), (2.0, 1)])
def test_metrics_match_the_loops(n, classes, scale, bins):
    logits, labels = sample(n, classes, 2.0)
    probs = softmax(logits * scale / 2)
    expected = metrics_loop(probs, labels, bins)
    found = classification_metrics(logits, labels, temperature=2 / scale, bins=bins)
    assert all(type(value) is float for value in found.values())
    assert found.keys() - {"smallest_bin"} <= COLUMNS.keys()
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-10)
    assert ece(probs, labels, bins) == pytest.approx(found["ece"], abs=1e-12)


@pytest.mark.parametrize("n, classes", [(200, 3), (1000, 10), (400, 100)])
def test_metrics_match_torchmetrics(n, classes):
    # Its bins are [lo, hi): the same where no confidence falls on an edge.
    logits, labels = map(torch.from_numpy, sample(n, classes, 4.0))
    ours, probs = classification_metrics(logits, labels), logits.softmax(dim=1)
    for name, norm in (("ece", "l1"), ("mce", "max"), ("rmsce", "l2")):
        theirs = torchs_error(probs, labels, classes, n_bins=BINS, norm=norm)
        assert ours[name] == pytest.approx(theirs.item(), abs=1e-6)
    for name, k in (("top1", 1), ("top5", min(5, classes))):
        theirs = torchs_accuracy(probs, labels, classes, top_k=k, average="micro")
        assert ours[name] == pytest.approx(theirs.item(), abs=1e-6)


def test_torchmetrics_sums_in_float32_and_ours_does_not():
    """A million samples: theirs is off by more than rounding, ours is the exact sum."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 1, 1_000_000).clip(0.5, 1)
    probs, labels = two_class(confidence, rng.random(len(confidence)) < confidence - 0.01)
    index = np.ceil(confidence * BINS).astype(int)
    exact = sum(
        abs(math.fsum((1 - labels[index == b]) - confidence[index == b])) for b in set(index)
    ) / len(labels)
    assert ece(probs, labels) == pytest.approx(exact, abs=1e-12)
    theirs = torchs_error(*map(torch.from_numpy, (probs, labels)), 2, n_bins=BINS)
    assert 3e-5 < abs(theirs.item() - exact) < 3e-4


@pytest.mark.parametrize("n, median, largest", [(200, 2e-4, 3e-3), (5000, 5e-5, 1e-3)])
def test_smece_is_relplots(n, median, largest):
    """But for its mesh of 200 points, which matters the less the more samples there are."""
    relplot = pytest.importorskip("relplot")
    differences = []
    for seed, shift in product(range(10), (0.0, 0.02, 0.1)):
        rng = np.random.default_rng(seed)
        confidence = rng.beta(6, 1.5, n)
        right = rng.random(n) < confidence - shift
        ours = metrics.smooth_ece(torch.from_numpy(confidence), torch.from_numpy(right))
        differences.append(abs(ours - relplot.smECE(confidence, right.astype(float))))
    assert np.median(differences) < median and max(differences) < largest


def test_debiased_ece_and_aurc_are_kumars():
    """The package uncertainty-calibration; its draws averaged, without empty bins."""
    kumar = pytest.importorskip("calibration").utils
    logits, labels = sample(4000, 10, 2.6)
    probs, found = softmax(logits), classification_metrics(logits, labels)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    binned = kumar.bin(list(zip(confidence, right, strict=True)), np.arange(1, BINS + 1) / BINS)
    np.random.seed(0)
    theirs = kumar.normal_debiased_ce([one for one in binned if len(one)], resamples=20_000)
    assert found["debiased_ece"] == pytest.approx(theirs, abs=1e-4) and theirs < found["ece"]
    area, _ = kumar.get_selective_stats(confidence, right)
    assert found["aurc"] == pytest.approx(1 - area, abs=1e-12)


@pytest.mark.parametrize("decimals", [9, 1])
def test_augrc_is_scikit_learns_auroc_and_balanced_accuracy_its_own(decimals):
    """Traub et al.: AUGRC = (1 - AUROC) acc (1 - acc) + (1 - acc)^2 / 2, ties counting half."""
    logits, labels = sample(2000, 10)
    logits = logits.round(decimals)  # the second time with many equal confidences
    ordered = np.sort(logits, axis=1)  # so that equal rows in another order are summed alike
    confidence = softmax(ordered)[:, -1]
    predicted = logits.argmax(axis=1)
    found, accuracy = classification_metrics(logits, labels), np.mean(predicted == labels)
    auroc = roc_auc_score(predicted == labels, confidence.round(12))
    expected = (1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert found["augrc"] == pytest.approx(expected, abs=1e-9)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["overconfidence"] + found["underconfidence"] == pytest.approx(found["ece"])


def of_confidence(confidence, right):
    return torch.tensor(confidence).double(), torch.tensor(right, dtype=torch.bool)


def test_risk_and_coverage_at_a_point():
    rising = of_confidence([i / 10 for i in range(1, 11)], [0, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    assert selective.risk_at_coverage(*rising, percent=80) == 1 / 8
    assert selective.risk_at_coverage(*rising, percent=81) == 1 / 9  # rounded up to nine samples
    assert selective.coverage_at_risk(*rising, risk=0.05) == 0.7
    assert selective.coverage_at_risk(*rising, risk=1 / 8) == 0.9  # 1/9 <= 1/8 again
    assert selective.coverage_at_risk(*rising, risk=0.2) == 1.0
    # Nineteen right and one wrong are 5 % exactly, 0.05 being a float.
    exact = of_confidence([i / 20 for i in range(20)], [0] + 19 * [1])
    assert selective.coverage_at_risk(*exact, risk=0.05) == 1.0
    wrong_first = of_confidence([0.5, 0.9], [1, 0])
    assert selective.coverage_at_risk(*wrong_first, risk=0.05) == 0.0


def test_samples_of_equal_confidence_are_kept_together_or_share_their_errors():
    for right in ([0, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 1]):
        tied = of_confidence([0.5, 0.5, 0.5, 0.5, 0.9], right)
        assert selective.coverage_at_risk(*tied, risk=0.05) == 0.2
        assert selective.risk_at_coverage(*tied, percent=60) == 2 * 0.25 / 3
        # The curve rises by 1/5 in a straight line from coverage 1/5 to 1.
        assert selective.augrc(*tied) == pytest.approx(0.8 * 0.2 / 2)


@pytest.mark.parametrize("n, factor", [(1, 1.0), (300, 0.4), (2000, 5.0), (6000, 3.0)])
def test_refinement_and_calibration_are_the_parts_of_the_nll(n, factor):
    logits, labels = sample(n, 6, factor)
    temperature, _ = fit_temperature(logits, labels)
    raw, scaled = (classification_metrics(logits, labels, T) for T in (1.0, temperature))
    assert raw["refinement"] + raw["calibration"] == pytest.approx(raw["nll"], abs=1e-12)
    assert raw["refinement"] == pytest.approx(scaled["nll"], abs=1e-12)
    assert scaled["calibration"] == pytest.approx(0, abs=1e-12)


def test_reliability_bins():
    probs, labels = two_class([0.55, 0.58, 0.95, 0.97, 0.99], [1, 0, 1, 1, 0])
    counts, accuracy, confidence = reliability_bins(probs, labels, bins=10)
    assert counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert accuracy[5] == 0.5 and accuracy[9].item() == pytest.approx(2 / 3)
    assert confidence[5].item() == pytest.approx(0.565) and accuracy[:5].sum() == 0
    assert counts.dtype == accuracy.dtype == confidence.dtype == torch.float64


def test_adaece_where_the_quantiles_are_samples():
    # 16 confidences, 15 bins: the i-th edge is the i-th sample, so the first bin holds two.
    confidence = np.linspace(0.5, 1, 16)
    right = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1]
    gaps = [r - c for r, c in zip(right, confidence, strict=True)]
    expected = (abs(gaps[0] + gaps[1]) + sum(abs(gap) for gap in gaps[2:])) / 16
    assert of_probs(*two_class(confidence, right))["adaece"] == pytest.approx(expected, abs=1e-12)


# ---- edges -------------------------------------------------------------------------------------


def test_certain_and_right_is_perfect_and_certain_and_wrong_is_the_worst():
    certain = np.eye(3)
    perfect = of_probs(certain, np.arange(3))
    assert perfect["top1"] == perfect["top5"] == 1
    assert perfect["coverage_at_5_risk"] == perfect["balanced_accuracy"] == 1
    best_is_high = {"top1", "top5", "coverage_at_5_risk", "balanced_accuracy", "smallest_bin"}
    assert not any(perfect[key] for key in perfect.keys() - best_is_high)
    wrong = of_probs(certain, np.array([1, 2, 0]))
    assert wrong["ece"] == wrong["adaece"] == wrong["mce"] == wrong["rmsce"] == wrong["aurc"] == 1
    assert wrong["overconfidence"] == wrong["risk_at_80_coverage"] == 1 and wrong["augrc"] == 0.5
    assert wrong["underconfidence"] == wrong["coverage_at_5_risk"] == 0
    assert wrong["brier"] == 2 and wrong["nll"] == wrong["refinement"] == math.inf
    assert wrong["sce"] == pytest.approx(2 / 3) and wrong["smece"] == pytest.approx(1, abs=1e-9)


def bin_of(confidence):
    rest = np.full(20, (1 - confidence) / 20)
    counts, *_ = reliability_bins(np.array([[confidence, *rest]]), np.array([0]))
    assert counts.sum() == 1
    return counts.argmax()


def test_a_tie_with_an_edge_belongs_to_the_bin_below():
    for edge in range(2, BINS):
        assert bin_of(edge / BINS) == edge - 1
        assert bin_of(np.nextafter(edge / BINS, 1)) == edge
    assert bin_of(1.0) == BINS - 1


def test_ties_at_an_edge_of_equal_mass_share_a_bin():
    # All but one of the quantiles are 0.8: everything up to it is the first bin, 0.9 the last.
    confidence, right = [0.6] + [0.8] * 28 + [0.9], [0] + [1, 0] * 14 + [1]
    expected = (abs(14 - 0.6 - 28 * 0.8) + abs(1 - 0.9)) / 30
    assert of_probs(*two_class(confidence, right))["adaece"] == pytest.approx(expected, abs=1e-12)
    assert of_probs(*two_class([0.7] * 10, [1] * 5 + [0] * 5))["adaece"] == pytest.approx(0.2)


def test_equal_logits_rank_by_class_number():
    probs = np.full((8, 8), 1 / 8)
    found = of_probs(probs, np.arange(8))
    assert (found["top1"], found["top5"]) == (1 / 8, 5 / 8)
    assert found["ece"] == ece(probs, np.arange(8)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_read_exactly(dtype):
    logits, labels = map(torch.from_numpy, sample(500, 10, 5.0))
    logits = logits.to(dtype)
    assert classification_metrics(logits, labels) == classification_metrics(logits.double(), labels)


def test_logits_rank_where_probabilities_underflow_or_round():
    # Both probabilities underflow to 0; the label's logit is still the second.
    logits = torch.tensor([[-2e4, -1e4, 0.0]])
    found = classification_metrics(logits, torch.tensor([1]))
    assert found["nll"] == 1e4 and found["ece"] == 1.0
    assert classification_metrics(logits, torch.tensor([2]))["nll"] == 0.0
    ascending = torch.arange(-6e4, 1, 1e4).unsqueeze(0)
    assert classification_metrics(ascending, torch.tensor([5]))["top5"] == 1.0
    assert classification_metrics(ascending, torch.tensor([1]))["top5"] == 0.0
    found = classification_metrics(np.array([[0.0, 0.0, 1e-17]]), np.array([2]))
    assert found["top1"] == 1.0 and found["ece"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("n", [1, 50])
def test_numpy_and_tensors_of_any_kind_agree_and_are_left_as_they_are(n):
    logits, labels = sample(n, 4)
    copy = logits.copy()
    expected = classification_metrics(logits, labels)
    tensors = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels)
    assert classification_metrics(*tensors) == expected
    assert classification_metrics(logits, labels.astype(np.uint8)) == expected
    found = classification_metrics(logits[::-1], labels[::-1])
    assert found == pytest.approx(expected, abs=1e-12)
    assert np.array_equal(logits, copy)


def test_large_splits_take_little_time():
    """Two tenths of a million samples; generous, for other work may share the machine."""
    logits, labels = sample(200_000, 10)
    started = time.process_time()
    classification_metrics(logits.astype(np.float32), labels)
    assert time.process_time() - started < 1.5


# ---- refusals ----------------------------------------------------------------------------------

ON_PROBS = [ece, reliability_bins]
GOOD = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])


@pytest.mark.parametrize("function", [*ON_PROBS, classification_metrics])
def test_bad_input_is_refused(function):
    good = [0, 1, 0]
    labels_refused = ([0, 1], [[0], [1], [0]], [0, 1, 2], [0, -1, 0], [0.0, 1.0, 0.0])
    scores_refused = (np.where(GOOD == 0.8, np.nan, GOOD), GOOD[:, :0], GOOD[0], GOOD[None])
    bad = [(GOOD, labels) for labels in labels_refused]
    bad += [(scores, good) for scores in scores_refused] + [(GOOD[:0], np.zeros(0, np.int64))]
    for scores, labels in bad:
        with pytest.raises(ValueError):
            function(scores, np.asarray(labels))


@pytest.mark.parametrize("function", ON_PROBS)
@pytest.mark.parametrize("value", [-0.1, 1.1, np.inf, 0.7, 0.805])
def test_what_is_no_distribution_is_refused(function, value):
    with pytest.raises(ValueError, match="0..1"):
        function(np.where(GOOD == 0.8, value, GOOD), np.array([0, 1, 0]))
    function(np.where(GOOD == 0.8, 0.8005, GOOD), np.array([0, 1, 0]))


@pytest.mark.parametrize("row", [[np.inf, 0], [-np.inf, -np.inf], [np.inf, np.inf], [np.nan, 0]])
def test_logits_whose_softmax_is_nan_are_refused(row):
    with pytest.raises(ValueError, match="NaN"):
        classification_metrics(np.array([[1.0, 2.0], row]), np.array([0, 1]))


def test_a_masked_class_is_no_error():
    found = classification_metrics(np.array([[0.0, -np.inf, 0.0]]), np.array([0]))
    assert found["nll"] == found["refinement"] == pytest.approx(math.log(2))
    found = classification_metrics(np.array([[0.0, -np.inf, 0.0]]), np.array([1]))
    assert found["nll"] == found["refinement"] == math.inf
    assert math.isnan(found["calibration"])  # and not 0, which would be the best


def test_bad_temperatures_and_posteriors_are_refused():
    for temperature in (0, -1, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            classification_metrics(GOOD, np.array([0, 1, 0]), temperature=temperature)
        with pytest.raises(ValueError, match="temperature"):
            metrics.posterior_metrics(GOOD, softmax(GOOD), temperature=temperature)
    for posterior in (GOOD[:2], GOOD * 0.9, GOOD - 0.5, GOOD * np.nan):
        with pytest.raises(ValueError):
            metrics.posterior_metrics(GOOD, posterior)


@pytest.mark.parametrize("seed", range(30))
def test_neither_order_nor_copies_of_the_samples_matter(seed):
    rng = np.random.default_rng(seed)
    n, classes = rng.integers(1, 41), rng.integers(2, 8)
    logits = rng.choice([0.3, 2.0, 20.0]) * rng.normal(size=(n, classes))
    logits, labels = np.round(logits, 9 * (seed % 2)), rng.integers(classes, size=n)  # often ties
    once, order = classification_metrics(logits, labels), rng.permutation(n)
    assert classification_metrics(logits[order], labels[order]) == pytest.approx(once, abs=1e-9)
    twice = classification_metrics(np.repeat(logits, 2, 0), np.repeat(labels, 2))
    # Quantiles, the noise of a bin and the risk of the surest depend on the number of samples.
    of_number = {"adaece", "ace", "debiased_ece", "aurc", "risk_at_80_coverage", "smallest_bin"}
    for key in once.keys() - of_number:
        assert twice[key] == pytest.approx(once[key], abs=1e-9)
