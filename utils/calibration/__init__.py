"""What the confidence of a classifier is worth: logits and labels in, numbers out.

metrics        accuracy, proper scores and calibration errors of a whole split
binning        the bins of calibration errors, and class-wise errors
selective      risk against coverage: what confidence is worth for choosing what to keep
temperature    the temperature of least NLL, and the NLL that it leaves
posthoc        temperature, vector and Dirichlet scaling, fitted on a validation split
packaged       further maps, made by the package probmetrics
sets           conformal sets, which hold the true class with a chance that is chosen
distributions  against known label distributions, and on foreign data
bootstrap      intervals of an ECE, a calibrated net's ECE, errors without bias
paired         two rows compared on the same images: differences and their tests
diagram        reliability diagrams
scores         what all of them accept: numpy arrays or tensors, checked

    from utils.calibration import classification_metrics, ece, fit_temperature

The folder imports nothing of the project. Copied elsewhere, under any name, it works alone. It
needs numpy and torch; bootstrap, paired and distributions need scipy, distributions scikit-learn,
posthoc tqdm, packaged probmetrics, diagram matplotlib. Each of these is loaded where a name that
needs it is first used.
"""

from importlib import import_module

from .metrics import (
    adaece,
    classification_metrics,
    ece,
    posterior_metrics,
    reliability_bins,
    sce,
)
from .sets import ConformalSets, fit_sets, set_metrics
from .temperature import fit_temperature

# Names whose files load packages that most users of this folder do not need.
LATE = {
    "dirichlet_calibration": "posthoc",
    "temperature_scaling": "posthoc",
    "vector_scaling": "posthoc",
    "label_distribution_metrics": "distributions",
    "ood_metrics": "distributions",
    "paired_difference": "paired",
    "reliability_diagrams": "diagram",
}

__all__ = [
    "ConformalSets",
    "adaece",
    "classification_metrics",
    "ece",
    "fit_sets",
    "fit_temperature",
    "posterior_metrics",
    "reliability_bins",
    "sce",
    "set_metrics",
    *LATE,
]


def __getattr__(name: str):
    """Load the file that a late name stands in. Python calls this for names that are absent."""
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{LATE[name]}", __name__), name)
