"""Every data set as tensors in memory: three splits of images and labels, and their statistics.

Images stay uint8: augmentation and normalisation happen on the device (utils/data/views.py).
"""

from utils.data.dataset import (
    NORMALISATION,
    Dataset,
    Split,
    Statistics,
    normalisation,
    pixel_statistics,
)
from utils.data.loading import NAMES, dataset_label, load_dataset, split_indices

__all__ = [
    "NAMES",
    "NORMALISATION",
    "Dataset",
    "Split",
    "Statistics",
    "dataset_label",
    "load_dataset",
    "normalisation",
    "pixel_statistics",
    "split_indices",
]
