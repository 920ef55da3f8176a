"""What a sample can say: intervals, the floor of the ECE, paired differences and their errors."""

import numpy as np
import pytest
import torch
from scipy import stats

from utils.calibration.bootstrap import (
    bins_of,
    calibrated_error,
    debiased,
    error_interval,
    gaps,
    measured_error,
)
from utils.calibration.metrics import classification_metrics, ece
from utils.calibration.paired import PAIRED, holm, paired_difference


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


# ---- nets of which everything is known ---------------------------------------------------------


# Confidences of a net, as of CIFAR nets, by its accuracy in % where it is calibrated.
CONFIDENCE = {97: stats.beta(4, 0.124), 90: stats.beta(2.5, 0.278), 65: stats.beta(1.3, 0.7)}
QUANTILES = {
    accuracy: beta.ppf((np.arange(50_000) + 0.5) / 50_000) for accuracy, beta in CONFIDENCE.items()
}


def nets(rng, samples, accuracies, excess=0.0, shared=0.7):
    """Gaps of nets on the same images, whose confidence is too high by `excess` everywhere.

    So their true ECE is `excess`, but for confidences below it. `shared`: correlation of the nets,
    in confidence and, given that, in the luck of the labels.
    """
    difficulty, luck = rng.normal(size=(2, samples, 1))
    own = rng.normal(size=(2, samples, len(accuracies)))
    weight = np.sqrt(shared), np.sqrt(1 - shared)
    rank = stats.norm.cdf(weight[0] * difficulty + weight[1] * own[0])
    threshold = stats.norm.cdf(weight[0] * luck + weight[1] * own[1])
    found = []
    for column, accuracy in enumerate(accuracies):
        confidence = QUANTILES[accuracy][(rank[:, column] * 50_000).astype(int)]
        right = threshold[:, column] < confidence - excess
        bins = np.ceil(15 * confidence).astype(int) - 1
        matrix = np.zeros((samples, 15), np.float32)
        matrix[np.arange(samples), bins] = right - confidence
        found.append(matrix)
    return found


def true_ece(accuracy, excess):
    confidence = QUANTILES[accuracy]
    gap = np.maximum(confidence - excess, 0) - confidence
    bins = np.ceil(15 * confidence).astype(int) - 1
    return np.abs(np.bincount(bins, gap)).sum() / len(confidence)


# ---- the noise of a sample ---------------------------------------------------------------------


def test_the_draws_are_those_of_a_bootstrap_over_images():
    """Also between bins and between runs: of resamples of whole images, in a plain loop."""
    runs = nets(np.random.default_rng(0), 400, [65, 90])
    bins = bins_of(runs, 20_000)
    rng = np.random.default_rng(1)
    images = np.concatenate(runs, axis=1)
    resamples = [images[rng.integers(0, 400, 400)].mean(axis=0) for _ in range(4000)]
    expected = np.cov(resamples, rowvar=False)
    drawn = np.cov(bins.noise.reshape(-1, 30), rowvar=False)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal())) + 1e-12
    assert np.abs(drawn - expected).max() < 0.1 * scale.max()
    assert np.abs((drawn - expected) / scale)[scale > 1e-7].max() < 0.15
    assert bins.sd.ravel() == pytest.approx(bins.noise.reshape(-1, 30).std(axis=0), rel=0.03)
    assert np.array_equal(bins.noise, bins_of(runs, 20_000).noise)


@pytest.mark.parametrize("true", [0.0, 0.3, 1.0, 2.0, 4.0])
def test_the_debiased_error_is_that_of_split_samples(true):
    """Its mean is that of sign times gap of two samples, a fifth and four fifths; 0 where it is."""
    rng = np.random.default_rng(0)
    gap = true + rng.normal(size=400_000)
    values = debiased(gap[:, None], np.ones((1, 1)))
    sign = np.sign(true + rng.normal(size=400_000) * np.sqrt(5 / 4))
    size = true + rng.normal(size=400_000) * np.sqrt(5)
    assert values.mean() == pytest.approx((sign * size).mean(), abs=0.015)
    assert true - 0.38 < values.mean() < true + 0.01
    assert values.mean() == pytest.approx(true, abs=0.01) or 0 < true < 4


# ---- the interval of an ECE --------------------------------------------------------------------


@pytest.mark.parametrize("accuracy", CONFIDENCE)
@pytest.mark.parametrize("excess", [0.0, 0.003, 0.03])
def test_the_interval_covers_the_truth(accuracy, excess):
    """In 93 of 100 cases or more, also where the error is below the noise."""
    rng = np.random.default_rng(2)
    truth = true_ece(accuracy, excess)
    covered = 0
    for _ in range(100):
        low, high = error_interval(bins_of(nets(rng, 2000, [accuracy], excess), 200))
        covered += low <= truth <= high
    assert covered >= 93


def test_the_interval_says_something():
    """It leaves out 0 where a net is miscalibrated, and narrows as images come in."""
    rng = np.random.default_rng(0)
    widths = []
    for samples in (2000, 32_000):
        low, high = error_interval(bins_of(nets(rng, samples, [90] * 3, 0.03)))
        assert 0.01 < low < true_ece(90, 0.03) < high < 0.055
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_ends_are_where_a_test_rejects():
    """The same from their definition: as many draws under the true error as there should be."""
    [run] = nets(np.random.default_rng(3), 2000, [90], 0.03)
    bins = bins_of([run])
    low, high = error_interval(bins)
    estimate = np.abs(run.mean(axis=0, dtype=float)).sum()
    above = high / bins.sd.sum() * bins.sd + bins.noise
    assert np.mean(np.abs(above).sum(axis=2) < estimate) == pytest.approx(0.025, abs=0.002)
    shrunk = np.sqrt(np.maximum(bins.mean**2 - bins.sd**2, 0)) * np.sign(bins.mean)
    below = low / np.abs(shrunk).sum() * shrunk + bins.noise
    assert np.mean(np.abs(below).sum(axis=2) > estimate) == pytest.approx(0.025, abs=0.002)


def test_few_or_perfect_predictions_have_an_interval():
    for confidence, right in ((1.0, 1), (1.0, 0), (0.8, 1)):
        probs = torch.tensor([[confidence, 1 - confidence]], dtype=torch.float64)
        bins = bins_of([gaps(probs, torch.tensor([1 - right]))])
        low, high = error_interval(bins)
        assert 0 <= low <= abs(right - confidence) <= high <= 1
        assert np.isfinite(calibrated_error(bins)).all()


@pytest.mark.parametrize("images, accuracy", [(100, 0.99), (500, 0.999), (2000, 0.995)])
@pytest.mark.parametrize("sureness", [1.0, 0.1])
def test_the_interval_covers_the_truth_where_hardly_any_prediction_is_wrong(
    images, accuracy, sureness
):
    """Errors of a gamma distribution; the net thinks them `sureness` times as likely."""
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(100):
        risk = np.clip((1 - accuracy) * rng.gamma(0.3, 1 / 0.3, images), 0, 0.49)
        confidence = torch.from_numpy(1 - sureness * risk)
        wrong = torch.from_numpy(rng.random(images) < risk).long()
        run = gaps(torch.stack([confidence, 1 - confidence], dim=1), wrong)
        low, high = error_interval(bins_of([run], 200))
        bins = np.ceil(15 * confidence.numpy()).astype(int) - 1
        gap = np.bincount(bins, (1 - risk) - confidence.numpy())
        covered += low <= np.abs(gap).sum() / images <= high
    assert covered >= 93


def test_all_right_is_no_proof_of_calibration():
    probs = torch.tensor([[0.9999, 0.0001]], dtype=torch.float64).expand(100, 2)
    low, high = error_interval(bins_of([gaps(probs, torch.zeros(100, dtype=torch.long))]))
    exact = 0.9999 - stats.beta.ppf(0.025, 100, 1)
    assert low == 0 and high == pytest.approx(exact, rel=1e-6) and high > 0.035


# ---- the ECE of a calibrated net ---------------------------------------------------------------


def test_the_floor_is_that_of_labels_drawn_class_by_class():
    """Only whether the predicted class is right matters, so whole labels give the same."""
    probs, labels = predictions(1000, 5)
    rng = np.random.default_rng(5)
    drawn = [(probs.log().numpy() + rng.gumbel(size=probs.shape)).argmax(1) for _ in range(300)]
    values = [ece(probs, labels) for labels in drawn]
    mean, high = calibrated_error(bins_of([gaps(probs, labels)]))
    assert mean == pytest.approx(np.mean(values), rel=0.05)
    assert high == pytest.approx(np.quantile(values, 0.95), rel=0.08)


@pytest.mark.parametrize("shared", [0.0, 0.7, 0.99])
def test_one_calibrated_row_in_twenty_lies_above_its_floor(shared):
    """Rows of three nets that have nothing, something or nearly everything in common."""
    rng = np.random.default_rng(6)
    above = 0
    for _ in range(400):
        bins = bins_of(nets(rng, 1000, [90] * 3, shared=shared), 200)
        above += measured_error(bins.mean) > calibrated_error(bins)[1]
    assert 0.025 <= above / 400 <= 0.085


# ---- paired differences ------------------------------------------------------------------------


def test_one_run_each_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    first, second = (rng.random(5000) < p for p in (0.80, 0.78))
    runs = [[one.astype(np.float32)[:, None]] for one in (first, second)]
    found = paired_difference(*runs)
    theirs = stats.ttest_rel(first.astype(float), second.astype(float))
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.p == pytest.approx(theirs.pvalue, abs=1e-3)
    interval = theirs.confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=1e-5)
    same = paired_difference(runs[0], runs[0])
    assert same == pytest.approx((0, 0, 0, 1), abs=1e-12)


def test_so_it_is_where_there_are_few_images():
    first, second = np.random.default_rng(1).random((2, 6)).astype(np.float32)
    found = paired_difference([first[:, None]], [second[:, None]])
    theirs = stats.ttest_rel(first.astype(float), second.astype(float))
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-9)


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
        found = paired_difference(runs[: seeds[0]], runs[seeds[0] :], draws=200)
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
        alarms += found.p < 0.05
    assert 0.03 <= alarms / trials <= 0.07


@pytest.mark.parametrize("accuracies", [(97, 90), (90, 65)])
@pytest.mark.parametrize("seeds", [1, 3])
def test_calibrated_nets_of_unequal_accuracy_do_not_differ(accuracies, seeds):
    """Though the less accurate measures twice the ECE: their true errors are 0 alike."""
    rng = np.random.default_rng(7)
    trials, alarms, measured = 300, 0, []
    for _ in range(trials):
        runs = nets(rng, 2000, np.repeat(accuracies, seeds))
        found = paired_difference(runs[:seeds], runs[seeds:], draws=200)
        alarms += found.p < 0.05
        errors = [np.abs(run.mean(axis=0)).sum() for run in runs]
        measured.append(np.mean(errors[seeds:]) / np.mean(errors[:seeds]))
    assert np.mean(measured) > 1.5
    assert 0.02 <= alarms / trials <= 0.08


def test_calibration_errors_that_differ_are_told_apart():
    rng = np.random.default_rng(8)
    for samples, least in ((2000, 0.3), (10_000, 0.9)):
        seen = []
        for _ in range(40):
            pair = [nets(rng, samples, [90] * 2, excess) for excess in (0.04, 0.015)]
            seen.append(paired_difference(*pair, draws=200).p < 0.05)
        assert np.mean(seen) >= least


def constant_runs(values):
    """Of metrics that are the same in every image: all their spread is that of seeds."""
    return [np.full((50, 1), value, np.float32) for value in values]


@pytest.mark.parametrize("counts", [(3, 3), (2, 5), (10, 3)])
def test_without_noise_of_images_it_is_a_t_test_of_runs(counts):
    """Welch's, where the rows have unequal numbers of runs: their spreads may differ."""
    rng = np.random.default_rng(2)
    first, second = (rng.normal(size=count) for count in counts)
    found = paired_difference(constant_runs(first), constant_runs(second))
    theirs = stats.ttest_ind(first, second, equal_var=counts[0] == counts[1])
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-4)
    interval = theirs.confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(interval), rel=1e-4)


def test_false_alarms_where_the_row_of_fewer_runs_spreads_more():
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(300):
        difficulty = rng.normal(size=200)
        skills = [*0.5 * rng.normal(size=3), *0.1 * rng.normal(size=10)]
        runs = [null_run(rng, "top1", difficulty, skill) for skill in skills]
        alarms += paired_difference(runs[:3], runs[3:]).p < 0.05
    assert alarms / 300 <= 0.11  # one spread for both rows gives 0.24


def test_the_students_of_a_teacher_count_as_one_run():
    """The same as their mean; where one teacher taught all, each counts."""
    rng = np.random.default_rng(4)
    runs = [rng.random((100, 1)).astype(np.float32) for _ in range(8)]
    first, second = runs[:5], runs[5:]
    own = [None, None, None]
    found = paired_difference(first, second, teachers=(["a", "b", "a", "b", "b"], own))
    means = [(first[0] + first[2]) / 2, (first[1] + first[3] + first[4]) / 3]
    assert found == pytest.approx(paired_difference(means, second), rel=1e-5)
    alone = paired_difference(first, second)
    assert paired_difference(first, second, teachers=(["a"] * 5, own)) == alone
    assert paired_difference(first, second, teachers=(list("abcde"), own)) == alone


def test_errors_of_the_students_of_several_teachers_that_are_calibrated():
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(120):
        runs = nets(rng, 1000, [90] * 6)
        found = paired_difference(runs[:4], runs[4:], 100, teachers=("aabb", "cd"))
        alarms += found.p < 0.05
    assert alarms / 120 <= 0.1


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []
    rng = np.random.default_rng(3)
    for _ in range(50):
        p = rng.random(5) ** 3
        # Its closed form: rejected are all up to the first that fails.
        fails = np.sort(p) * np.arange(5, 0, -1) > 0.05
        assert sum(q <= 0.05 for q in holm(p)) == np.append(fails, True).argmax()
