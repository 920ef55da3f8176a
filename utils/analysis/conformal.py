"""Conformal sets of finished runs, from their stored logits: fitted on validation, measured on
test.

No net is run. A run whose validation logits are not stored has none, such as one from a pack; nor
has a third party's teacher, which may have been trained on the validation images.
"""

import math
from functools import cache

from torch import Tensor

from utils.analysis.record import Record
from utils.calibration.sets import ALPHA, PREFIX, fit_sets, set_metrics

LEAST_IMAGES = math.ceil(1 / ALPHA - 1)  # with fewer on validation, each set would be all classes
PAIRED_SETS = {
    prefix + name: (method, name)
    for method, prefix in PREFIX.items()
    for name in ("coverage", "set_size")
}


def can_have_sets(record: Record) -> bool:
    """Raises UserError where the stored logits are damaged."""
    if record.third_party or not record.has_stored("val"):
        return False
    return len(record.stored("val")[1]) >= LEAST_IMAGES


@cache
def sets_of(record: Record, kind: str) -> dict[str, float] | None:
    """The metrics of `set_metrics`, of raw or scaled logits; None where the run has no sets."""
    if not can_have_sets(record):
        return None
    val_logits, val_labels = record.stored("val")
    test_logits, test_labels = record.stored("test")
    temperature = record.temperatures[kind]
    return set_metrics(val_logits, val_labels, test_logits, test_labels, temperature)


def values_of_images(record: Record, kind: str, metric: str) -> Tensor | None:
    """A metric of PAIRED_SETS of each test image (N,): is its label in its set, or how large is it.

    None where the run has no sets, or no such logits.
    """
    if kind not in record.temperatures or not can_have_sets(record):
        return None
    method, name = PAIRED_SETS[metric]
    val_logits, val_labels = record.stored("val")
    test_logits, test_labels = record.stored("test")
    temperature = record.temperatures[kind]
    sets = fit_sets(val_logits, val_labels, method=method, temperature=temperature)
    members = sets(test_logits)
    if name == "set_size":
        return members.sum(dim=1).double()
    return members.gather(1, test_labels.unsqueeze(1)).squeeze(1).double()
