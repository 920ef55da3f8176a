"""Conformal sets against loops from the papers and MAPIE, their guarantee, properties, refusals."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from utils.calibration import scores, sets
from utils.calibration.sets import (
    FREE_RANKS,
    METHODS,
    PENALTY,
    PREFIX,
    conformal_threshold,
    fit_sets,
    set_metrics,
)

NAMES = list(METHODS)


def sample(n, classes, scale=2.0, seed=0):
    """Logits, and labels drawn from their softmax at scale 2: over-confident above it."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes))
    labels = (2 * logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return scale * logits, labels


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


# ---- the definitions, one image and one class at a time ----------------------------------------


def score_loop(method, probs, k, counted):
    """The papers' score of class k for one image; `counted` is the part of p_k that counts."""
    if method == "LAC":
        return 1 - probs[k]
    more_likely = [j for j in range(len(probs)) if (-probs[j], j) < (-probs[k], k)]
    mass = math.fsum(probs[j] for j in more_likely) + counted * probs[k]
    rank = len(more_likely) + 1
    return mass + (PENALTY * max(0, rank - FREE_RANKS) if method == "RAPS" else 0)


def sets_loop(method, val_logits, val_labels, test_logits, alpha, randomised, extra=1):
    """Sets of classes at T = 2, with the randomness that the code under test draws.

    `extra`: 1 where the next image is new, 0 where the level is that of these images themselves.
    """
    val_part, test_part = (
        1 - sets._left_out(torch.from_numpy(logits), randomised).squeeze(1).numpy()
        for logits in (val_logits, test_logits)
    )
    val, test = softmax(val_logits / 2), softmax(test_logits / 2)
    scores = sorted(
        score_loop(method, probs, y, part)
        for probs, y, part in zip(val.tolist(), val_labels, val_part, strict=True)
    )
    quantile = scores[math.ceil((len(scores) + extra) * (1 - alpha) - 1e-9) - 1]
    return [
        {k for k in range(len(p)) if score_loop(method, p, k, part) <= quantile + 1e-12}
        for p, part in zip(test.tolist(), test_part, strict=True)
    ]


def metrics_loop(found, labels, alpha):
    covered = [y in members for y, members in zip(labels, found, strict=True)]
    sizes = [len(members) for members in found]
    of_class, strata = {}, {}
    for y, size, hit in zip(labels, sizes, covered, strict=True):
        of_class.setdefault(y, []).append(hit)
        stratum = sum(size > largest for largest in (1, 3, 10, 100))
        strata.setdefault(stratum, []).append(hit)
    return {
        "coverage": np.mean(covered),
        "set_size": np.mean(sizes),
        "set_singletons": sizes.count(1) / len(sizes),
        "set_empty": sizes.count(0) / len(sizes),
        "set_worst_class_coverage": min(np.mean(hits) for hits in of_class.values()),
        "set_stratified_violation": max(
            abs(np.mean(hits) - (1 - alpha)) for hits in strata.values()
        ),
        "set_smallest_stratum": min(len(hits) for hits in strata.values()),
    }


@pytest.mark.parametrize("randomised", [True, False])
@pytest.mark.parametrize(
    "n, classes, scale, alpha",
    [(9, 3, 2.0, 0.1), (50, 10, 4.0, 0.1), (200, 30, 1.0, 0.05), (30, 120, 2.0, 0.3)],
)
def test_sets_and_metrics_match_the_loops(n, classes, scale, alpha, randomised):
    (val, val_labels), (test, labels) = sample(n, classes, scale), sample(80, classes, scale, 1)
    measured = set_metrics(val, val_labels, test, labels, 2.0, alpha, randomised)
    assert all(type(value) is float for value in measured.values())
    for method in NAMES:
        expected = sets_loop(method, val, val_labels, test, alpha, randomised)
        fitted = fit_sets(val, val_labels, method, alpha, temperature=2.0, randomised=randomised)
        members = fitted(test)
        assert members.dtype == torch.bool
        assert [set(np.flatnonzero(row)) for row in members.numpy()] == expected
        for name, value in metrics_loop(expected, labels, alpha).items():
            assert measured[PREFIX[method] + name] == pytest.approx(value, abs=1e-12)
        matched = sets_loop(method, test, labels, test, alpha, randomised, extra=0)
        size = np.mean([len(members) for members in matched])
        assert measured[PREFIX[method] + "set_size_matched"] == pytest.approx(size, abs=1e-12)
        covered = sum(y in found for y, found in zip(labels, matched, strict=True))
        assert covered >= len(labels) * (1 - alpha) - 1e-9
    assert len(measured) == 8 * len(NAMES)


# ---- MAPIE -------------------------------------------------------------------------------------


class Draws(np.random.RandomState):
    """MAPIE's generator; with `none`, one whose every draw is 0: then nothing is left to chance."""

    def __init__(self, none: bool):
        super().__init__(0)
        self.none = none

    def uniform(self, *args, size=None, **kwargs):
        draws = super().uniform(*args, size=size, **kwargs)
        return 0 * draws if self.none else draws


def mapies_sets(score, val, val_labels, test, alpha, draws, **params):
    """bool (N, K) of the package MAPIE, given probabilities in the place of a fitted net."""
    classification = pytest.importorskip("mapie.classification")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        classes_ = np.arange(val.shape[1])

        def fit(self, inputs, labels):
            return self

        def __sklearn_is_fitted__(self):
            return True

        def predict_proba(self, inputs):
            return inputs

        def predict(self, inputs):
            return inputs.argmax(axis=1)

    mapie = classification.SplitConformalClassifier(
        Given(), confidence_level=1 - alpha, conformity_score=score, prefit=True, random_state=draws
    )
    mapie.conformalize(val, val_labels)
    return mapie.predict_set(test, conformity_score_params=params)[1][:, :, 0]


@pytest.mark.parametrize("classes, alpha", [(10, 0.1), (100, 0.1), (20, 0.25)])
def test_lac_and_aps_are_mapies(classes, alpha, monkeypatch):
    (val, val_labels), (test, _) = sample(900, classes, 3.0), sample(700, classes, 3.0, 1)
    probs = softmax(val), val_labels, softmax(test)
    theirs = mapies_sets("lac", *probs, alpha, 0)
    assert np.array_equal(fit_sets(val, val_labels, "LAC", alpha)(test), theirs)

    # Both of its draws start from the same seed, and are of a whole split.
    monkeypatch.setattr(scores, "PIECE", 10**6)

    def drawn(logits, randomised):
        return torch.from_numpy(np.random.RandomState(0).uniform(size=(len(logits), 1)))

    monkeypatch.setattr(sets, "_left_out", drawn)
    theirs = mapies_sets("aps", *probs, alpha, 0, include_last_label="randomized")
    assert np.array_equal(fit_sets(val, val_labels, "APS", alpha)(test), theirs)


@pytest.mark.parametrize("classes, alpha", [(10, 0.1), (100, 0.1), (30, 0.25)])
def test_raps_without_chance_is_mapies(classes, alpha):
    raps = pytest.importorskip("mapie.conformity_scores.sets.raps")

    class Fixed(raps.RAPSConformityScore):
        """With lambda and k given, where MAPIE would tune both."""

        def _find_lambda_star(self, *args):
            self.k_star = np.array([FREE_RANKS])
            return PENALTY

    # It keeps a part of the validation images for tuning: the others alone set the threshold.
    (val, val_labels), (test, _) = sample(1000, classes, 3.0), sample(500, classes, 3.0, 1)
    score = Fixed()
    probs = softmax(val), val_labels, softmax(test)
    theirs = mapies_sets(score, *probs, alpha, Draws(none=True), include_last_label=False)
    tuned_on = {row.tobytes() for row in score.X_raps}
    kept = np.array([row.tobytes() not in tuned_on for row in probs[0]])
    assert 0 < kept.sum() < len(kept)
    ours = fit_sets(val[kept], val_labels[kept], "RAPS", alpha, randomised=False)
    assert np.array_equal(ours(test, never_empty=True), theirs)


# ---- the guarantee -----------------------------------------------------------------------------


@pytest.mark.parametrize("randomised", [True, False])
@pytest.mark.parametrize("scale", [0.7, 2.0, 8.0])
def test_coverage_over_resampled_splits(scale, randomised):
    """The mean over splits of one sample is at least 1 - alpha, up to the error of that mean."""
    logits, labels = sample(3000, 8, scale)
    rng, alpha, found = np.random.default_rng(0), 0.1, {method: [] for method in NAMES}
    for _ in range(60):
        order = rng.permutation(len(labels))
        val, test = order[:300], order[300:]
        measured = set_metrics(
            logits[val], labels[val], logits[test], labels[test], 1.0, alpha, randomised
        )
        for method in NAMES:
            found[method].append(measured[PREFIX[method] + "coverage"])
    for coverages in found.values():
        error = np.std(coverages, ddof=1) / math.sqrt(len(coverages))
        assert np.mean(coverages) >= 1 - alpha - 3 * error
        # Randomised scores have no ties: coverage is also at most 1 - alpha + 1 / (n + 1).
        assert np.mean(coverages) <= 1 - alpha + 1 / 301 + 3 * error
        # One split's coverage has the beta distribution's spread, here 1.8 %.
        assert 0.01 < np.std(coverages) < 0.03


@pytest.mark.parametrize("n", [9, 50])
def test_coverage_over_new_samples(n):
    """What is left to chance averages out over samples, as it did not with fixed numbers."""
    coverages = {method: [] for method in NAMES}
    for seed in range(300):
        logits, labels = sample(n + 200, 10, 8.0, seed)
        measured = set_metrics(logits[:n], labels[:n], logits[n:], labels[n:])
        for method in NAMES:
            coverages[method].append(measured[PREFIX[method] + "coverage"])
    expected = math.ceil((n + 1) * 0.9) / (n + 1)
    for method in NAMES:
        error = np.std(coverages[method], ddof=1) / math.sqrt(300)
        assert abs(np.mean(coverages[method]) - expected) < 3 * error


def test_what_is_left_to_chance_is_uniform():
    logits, _ = sample(5000, 10, 8.0)
    left_out = sets._left_out(torch.from_numpy(logits), True).squeeze(1).numpy()
    assert kstest(left_out, "uniform").pvalue > 0.01


def test_coverage_of_shuffled_validation_labels_is_kept_by_larger_sets():
    """A net that knows nothing: the sets still cover, with nearly all the classes."""
    logits, labels = sample(4000, 10)
    labels = np.random.default_rng(1).permutation(labels)
    measured = set_metrics(logits[:2000], labels[:2000], logits[2000:], labels[2000:])
    for prefix in PREFIX.values():
        assert measured[prefix + "coverage"] > 0.87 and measured[prefix + "set_size"] > 8.5


# ---- properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("randomised", [True, False])
def test_sets_grow_as_alpha_falls(method, randomised):
    (val, labels), (test, _) = sample(400, 12, 3.0), sample(300, 12, 3.0, 1)
    before = torch.zeros(test.shape, dtype=torch.bool)
    for alpha in (0.9, 0.5, 0.3, 0.1, 0.05, 0.01):
        members = fit_sets(val, labels, method, alpha, randomised=randomised)(test)
        assert (members >= before).all() and members.sum() > before.sum()
        before = members


@pytest.mark.parametrize("method", NAMES)
def test_a_set_that_is_not_empty_holds_the_likeliest_classes(method):
    (val, labels), (test, _) = sample(400, 12, 6.0), sample(500, 12, 3.0, 1)
    fitted = fit_sets(val, labels, method, alpha=0.5)
    members, filled = fitted(test), fitted(test, never_empty=True)
    sizes = members.sum(dim=1)
    assert (sizes == 0).any() and (sizes > 1).any()
    likeliest_first = members.gather(1, torch.from_numpy(test).argsort(dim=1, descending=True))
    assert (likeliest_first[:, :-1] >= likeliest_first[:, 1:]).all()
    assert torch.equal(filled[sizes > 0], members[sizes > 0])
    assert (filled.sum(dim=1) == sizes.clamp_min(1)).all()
    assert filled[torch.arange(len(test)), torch.from_numpy(test).argmax(dim=1)].all()


@pytest.mark.parametrize("method", NAMES)
def test_a_constant_added_to_a_row_changes_nothing(method):
    (val, labels), (test, _) = sample(300, 12, 3.0), sample(300, 12, 3.0, 1)
    val, test = np.round(val, 6), np.round(test, 6)  # sums are then exact enough to leave no ties
    shift = np.random.default_rng(2).integers(-50, 50, (300, 1))
    plain = fit_sets(val, labels, method, randomised=False)
    moved = fit_sets(val + shift, labels, method, randomised=False)
    assert moved.threshold == pytest.approx(plain.threshold, abs=1e-12)
    # The image whose score is the threshold itself is not in the test split.
    assert torch.equal(plain(test), moved(test + shift))


def test_randomised_sets_are_the_same_each_time_and_smaller_on_average():
    (val, val_labels), (test, labels) = sample(1000, 20, 4.0), sample(1000, 20, 4.0, 1)
    first, second = (set_metrics(val, val_labels, test, labels) for _ in range(2))
    assert first == second
    full = set_metrics(val, val_labels, test, labels, randomised=False)
    for name in ("set_size", "set_empty", "coverage"):
        assert full[name] == first[name]  # LAC leaves nothing to chance
    assert full["aps_set_size"] > first["aps_set_size"]
    assert full["raps_set_size"] > first["raps_set_size"]
    # The set of an image does not depend on the others, nor on its place.
    fitted = fit_sets(val, val_labels, "APS")
    assert torch.equal(fitted(test)[5:15], fitted(test[5:15]))


@pytest.mark.parametrize("method", NAMES)
def test_sets_without_chance_do_not_depend_on_the_order(method):
    (val, labels), (test, _) = sample(300, 6, 3.0), sample(200, 6, 3.0, 1)
    val, test = np.round(val), np.round(test)  # many ties
    order, test_order = (np.random.default_rng(3).permutation(n) for n in (300, 200))
    plain = fit_sets(val, labels, method, randomised=False)
    moved = fit_sets(val[order], labels[order], method, randomised=False)
    assert plain == moved
    assert torch.equal(plain(test)[test_order], moved(test[test_order]))


def test_equal_logits_rank_by_class_number():
    logits, labels = np.zeros((200, 80)), np.arange(200) % 80
    members = fit_sets(logits, labels, "APS", alpha=0.5, randomised=False)(logits)
    [size] = set(members.sum(dim=1).tolist())
    assert 0 < size < 80 and members[:, :size].all()
    measured = set_metrics(logits, labels, logits, labels, alpha=0.5, randomised=False)
    assert measured["aps_set_size"] == size
    assert measured["aps_coverage"] == np.mean(labels < size)


def test_raps_is_aps_where_no_class_is_penalised():
    (val, val_labels), (test, labels) = sample(300, FREE_RANKS), sample(300, FREE_RANKS, seed=1)
    found = set_metrics(val, val_labels, test, labels)
    assert {name[4:]: found[name] for name in found if name.startswith("aps_")} == {
        name[5:]: found[name] for name in found if name.startswith("raps_")
    }


def test_probabilities_that_round_to_1_still_rank():
    """1 - p is below the rounding of 1: scores as sums of p would all be 1, and all sets full."""
    lead = np.linspace(40, 60, 100)
    logits = np.zeros((100, 4))
    logits[:, 0] = lead
    labels = np.zeros(100, np.int64)
    with localcontext(prec=60):
        # Of each image, the probability of the classes after each class, the least likely last.
        small = [(-Decimal(z)).exp() / (1 + 3 * (-Decimal(z)).exp()) for z in lead.tolist()]
        conformity = [[3 * p, 2 * p, p, 0 * p] for p in small]
        threshold = sorted((row[0] for row in conformity), reverse=True)[91 - 1]
        sizes = [sum(value >= threshold for value in row) for row in conformity]
    assert 0 in sizes and 4 not in sizes
    found = set_metrics(logits, labels, logits, labels, randomised=False)
    assert found["aps_set_size"] == np.mean(sizes) and found["aps_coverage"] == 0.91


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_any_kind_are_read_exactly_and_left_as_they_are(dtype):
    (val, val_labels), (test, labels) = sample(200, 10, 3.0), sample(200, 10, 3.0, 1)
    val, test = (torch.from_numpy(logits).to(dtype) for logits in (val, test))
    copy = val.clone()
    found = set_metrics(val.requires_grad_(), val_labels, test, labels.astype(np.uint8))
    assert torch.equal(val, copy)
    doubled = val.detach().double(), torch.from_numpy(val_labels), test.double(), labels
    assert set_metrics(*doubled) == found


def test_a_masked_class_is_in_no_set():
    (val, labels), (test, _) = sample(300, 5), sample(100, 5, seed=1)
    val, test = np.pad(val, ((0, 0), (0, 1))), np.pad(test, ((0, 0), (0, 1)))
    val[:, 5] = test[:, 5] = -np.inf
    for method in NAMES:
        members = fit_sets(val, labels, method)(test)
        assert not members[:, 5].any() and members[:, :5].any()


# ---- refusals ----------------------------------------------------------------------------------


def test_too_few_validation_images_are_refused():
    logits, labels = sample(9, 3)
    assert fit_sets(logits, labels, alpha=0.1).threshold > 0
    for alpha, needed in ((0.1, 9), (0.05, 19), (0.3, 3), (0.15, 6)):
        conformity = torch.rand(needed).double()
        assert conformal_threshold(conformity, alpha) == conformity.min()
        with pytest.raises(ValueError, match=f"need {needed} validation samples .* got"):
            conformal_threshold(conformity[1:], alpha)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.7, 0.9, 0.99])
def test_the_threshold_is_not_moved_by_a_rounding(alpha):
    """(n + 1) (1 - alpha) is a whole number here; floats put some a rounding above it."""
    for n in (99, 999, 9999):
        conformity = torch.arange(n).double()
        rank = (n + 1) * (100 - round(100 * alpha)) // 100
        assert conformal_threshold(conformity, alpha) == n - rank


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, math.nan])
def test_levels_outside_0_and_1_are_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        fit_sets(*sample(50, 3), alpha=alpha)


def test_bad_input_is_refused():
    logits, labels = sample(50, 3)
    broken = logits.copy()
    broken[7, 1] = np.nan
    infinite = logits.copy()
    infinite[7, 1] = np.inf
    for bad in (broken, infinite):
        for call in (
            lambda bad=bad: fit_sets(bad, labels),
            lambda bad=bad: fit_sets(logits, labels)(bad),
            lambda bad=bad: set_metrics(logits, labels, bad, labels),
            lambda bad=bad: set_metrics(bad, labels, logits, labels),
        ):
            with pytest.raises(ValueError, match="NaN"):
                call()
    for temperature in (0, -1, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            fit_sets(logits, labels, temperature=temperature)
    for wrong in (labels[1:], labels + 3, labels - 5, labels.astype(float)):
        with pytest.raises(ValueError, match="labels"):
            fit_sets(logits, wrong)
    with pytest.raises(ValueError, match="number of classes"):
        set_metrics(logits, labels, logits[:, :2], labels % 2)
