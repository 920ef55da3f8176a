"""`synthetic`, the embedded data set, whose labels are drawn from a known distribution."""

import numpy as np
import torch
import torch.nn.functional as F

from utils.data.npz import Arrays

# The synthetic data set. Sharper labels raise the best accuracy that is possible; more noise and
# finer patterns make the blend harder to read.
SYNTHETIC_SEED = 2024
SYNTHETIC_TRAIN = 2000
SYNTHETIC_TEST = 2000
SYNTHETIC_CLASSES = 10
SYNTHETIC_SIZE = 32
SYNTHETIC_GRID = 4  # cells along a pattern's side, before it is smoothed
SYNTHETIC_AMPLITUDE = 45.0  # standard deviation of a pattern, in grey levels
SYNTHETIC_SHARPNESS = 1.0  # 1: the label follows the blend weight; infinite: always the larger part
SYNTHETIC_CONTRAST = 0.2  # contrast is scaled by 1 plus or minus up to this
SYNTHETIC_BRIGHTNESS = 20.0  # grey levels, plus or minus
SYNTHETIC_NOISE = 20  # grey levels, plus or minus, uniform in every pixel


def make_synthetic() -> Arrays:
    """Blends of two class patterns whose labels are drawn from a distribution that is known.

    An image is w P_a + (1 - w) P_b in a random contrast and brightness, plus noise. Its label is a
    with probability w^s / (w^s + (1 - w)^s), s the sharpness, else b. So the best that a net can do
    is to say just this probability, and one that learns the drawn labels by heart says too much.
    """
    rng = np.random.default_rng(SYNTHETIC_SEED)
    patterns = class_patterns(rng)
    arrays = {}
    for part, n in (("train", SYNTHETIC_TRAIN), ("test", SYNTHETIC_TEST)):
        a = rng.integers(SYNTHETIC_CLASSES, size=n)
        b = (a + rng.integers(1, SYNTHETIC_CLASSES, size=n)) % SYNTHETIC_CLASSES
        w = rng.random(n)
        of_a = w**SYNTHETIC_SHARPNESS / (w**SYNTHETIC_SHARPNESS + (1 - w) ** SYNTHETIC_SHARPNESS)
        posterior = np.zeros((n, SYNTHETIC_CLASSES))
        posterior[np.arange(n), a] = of_a
        posterior[np.arange(n), b] = 1 - of_a
        arrays[f"x_{part}"] = blend(patterns, a, b, w, rng)
        arrays[f"y_{part}"] = np.where(rng.random(n) < of_a, a, b)
        arrays[f"posterior_{part}"] = posterior
    return arrays


def class_patterns(rng: np.random.Generator) -> np.ndarray:
    """Smooth random colours, one pattern per class: float64 (K, H, W, 3), mean 0 per channel."""
    coarse = rng.standard_normal((SYNTHETIC_CLASSES, 3, SYNTHETIC_GRID, SYNTHETIC_GRID))
    size = (SYNTHETIC_SIZE, SYNTHETIC_SIZE)
    smooth = F.interpolate(torch.from_numpy(coarse), size, mode="bicubic").numpy()
    smooth -= smooth.mean((2, 3), keepdims=True)
    smooth *= SYNTHETIC_AMPLITUDE / smooth.std((2, 3), keepdims=True)
    return np.ascontiguousarray(smooth.transpose(0, 2, 3, 1))


def blend(
    patterns: np.ndarray, a: np.ndarray, b: np.ndarray, w: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    # In float64, so that rounding to whole grey levels gives the same bytes on every machine.
    n = len(w)
    contrast = rng.uniform(1 - SYNTHETIC_CONTRAST, 1 + SYNTHETIC_CONTRAST, n)
    brightness = rng.uniform(-SYNTHETIC_BRIGHTNESS, SYNTHETIC_BRIGHTNESS, n)
    parts = (contrast * w, contrast * (1 - w), 127.5 + brightness)
    of_a, of_b, level = (part[:, None, None, None] for part in parts)
    images = of_a * patterns[a] + of_b * patterns[b] + level
    images += rng.integers(
        -SYNTHETIC_NOISE, SYNTHETIC_NOISE, images.shape, dtype=np.int16, endpoint=True
    )
    return images.round(out=images).clip(0, 255, out=images).astype(np.uint8)
