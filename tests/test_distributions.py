"""Foreign data: equal confidences tie whatever class they are for."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from utils.calibration.distributions import ood_metrics


@pytest.mark.parametrize("classes, temperature", [(2, 1.0), (7, 1.0), (100, 2.5)])
def test_equal_confidences_tie_whatever_class_they_predict(classes, temperature):
    rng = np.random.default_rng(0)
    inside = 3 * rng.normal(size=(300, classes)).astype(np.float32)
    outside = inside[:200][:, rng.permutation(classes)]
    outside[:50] += 0.5 * rng.normal(size=(50, classes)).astype(np.float32)
    found = ood_metrics(inside, outside, temperature)

    def confidence(logits):  # summed in the order of size, and rounded for good measure
        ordered = np.sort(logits.astype(np.float64) / temperature, axis=1)
        return np.round(1 / np.exp(ordered - ordered[:, -1:]).sum(axis=1), 12)

    scores = [confidence(logits) for logits in (inside, outside)]
    expected = mannwhitneyu(*scores).statistic / (300 * 200)
    assert found["confidence_auroc"] == pytest.approx(expected, abs=1e-12)
    same = ood_metrics(inside, inside[:, rng.permutation(classes)], temperature)
    assert same["confidence_auroc"] == same["entropy_auroc"] == 0.5
