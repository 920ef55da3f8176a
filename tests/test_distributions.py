"""Foreign data told apart, and label distributions: metrics as torchmetrics and scipy have them."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from scipy.stats import mannwhitneyu, spearmanr
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_specificity_at_sensitivity,
)

from utils.calibration.distributions import (
    entropy,
    label_distribution_metrics,
    ood_metrics,
)
from utils.calibration.metrics import classification_metrics


@pytest.mark.parametrize("ties", [False, True])
def test_detection_metrics_are_torchmetrics_and_scipys(ties):
    rng = np.random.default_rng(0)
    inside, outside = 3 * rng.normal(size=(300, 5)), rng.normal(size=(200, 5))
    if ties:
        inside, outside = inside.round(), outside.round()
    found = ood_metrics(inside, outside, temperature=2.0)
    probs = (torch.from_numpy(np.concatenate([inside, outside])) / 2).softmax(1)
    target = (torch.arange(500) < 300).int()
    for name, score in {"confidence": probs.amax(1), "entropy": -entropy(probs)}.items():
        # Between 0 and 1, or torchmetrics takes a sigmoid, which rounds; equal ones stay equal.
        preds = ((score - score.min()) / (score.max() - score.min())).mul(1e9).round() / 1e9
        high, low = preds[target == 1].numpy(), preds[target == 0].numpy()
        specificity, _ = binary_specificity_at_sensitivity(preds, target, min_sensitivity=0.95)
        expected = {
            "auroc": mannwhitneyu(high, low).statistic / (len(high) * len(low)),
            "aupr_in": binary_average_precision(preds, target).item(),
            "aupr_out": binary_average_precision(1 - preds, 1 - target).item(),
            "fpr95": 1 - specificity.item(),
        }
        own = {metric: found[f"{name}_{metric}"] for metric in expected}
        assert own == pytest.approx(expected, abs=1e-6)


def test_ood_metrics_at_their_edges():
    near, far = np.array([[60.0, 0, 0], [70, 0, 0]]), np.array([[50.0, 0, 0], [45, 0, 0]])
    # Confidences that round to 1 are still ranked.
    assert ood_metrics(near, far)["confidence_auroc"] == 1.0
    for bad in (np.zeros((0, 3)), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError):
            ood_metrics(bad, near)


@pytest.mark.parametrize("classes, temperature", [(2, 1.0), (100, 2.5)])
def test_equal_confidences_tie_whatever_class_they_predict(classes, temperature):
    rng = np.random.default_rng(0)
    inside = 3 * rng.normal(size=(300, classes)).astype(np.float32)
    outside = inside[:200][:, rng.permutation(classes)]
    outside[:50] += 0.5 * rng.normal(size=(50, classes)).astype(np.float32)
    found = ood_metrics(inside, outside, temperature)

    def confidence(logits):  # summed in the order of size, and rounded for good measure
        ordered = np.sort(logits.astype(np.float64) / temperature, axis=1)
        return np.round(1 / np.exp(ordered - ordered[:, -1:]).sum(axis=1), 12)

    expected = mannwhitneyu(confidence(inside), confidence(outside)).statistic / (300 * 200)
    assert found["confidence_auroc"] == pytest.approx(expected, abs=1e-12)
    same = ood_metrics(inside, inside[:, rng.permutation(classes)], temperature)
    assert [same["confidence_auroc"], same["entropy_auroc"]] == pytest.approx([0.5, 0.5])


def test_label_distribution_metrics_are_scipys():
    rng = np.random.default_rng(0)
    distribution = rng.dirichlet(np.full(6, 0.3), size=300)
    distribution[:20] = np.eye(6)[rng.integers(6, size=20)]
    logits = np.log(distribution + 0.05) + 0.3 * rng.normal(size=(300, 6))
    found = label_distribution_metrics(logits, distribution, 1.7)
    probs = torch.from_numpy(logits / 1.7).softmax(1).numpy()
    predicted = np.arange(len(probs)), probs.argmax(1)
    own, true = scipy_entropy(probs, axis=1), scipy_entropy(distribution, axis=1)
    expected = {
        "kl": scipy_entropy(distribution, probs, axis=1).mean(),
        "tv": np.abs(distribution - probs).sum(1).mean() / 2,
        "calibration_error": np.abs(probs[predicted] - distribution[predicted]).mean(),
        "expected_top1": distribution[predicted].mean(),
        "entropy": own.mean(),
        "entropy_gap": (own - true).mean(),
        "entropy_correlation": spearmanr(own, true).statistic,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_soft_ece_of_certain_labels_is_the_ece():
    logits, labels = np.random.default_rng(1).normal(size=(300, 6)), np.arange(300) % 6
    found = label_distribution_metrics(logits, np.eye(6)[labels])
    expected = classification_metrics(logits, labels)
    assert (found["soft_ece"], found["kl"]) == pytest.approx((expected["ece"], expected["nll"]))
