"""`synthetic`, the embedded data set, whose labels are drawn from a known distribution."""

import numpy as np
import torch
import torch.nn.functional as F

from utils.data.npz import Arrays

SEED = 2024
# Few images train, so that a net can learn them by heart. Many measure, so that chance is small: a
# calibrated net's ECE is about 2 % on 2,000 images and 1 % on 10,000.
IMAGES = {"train": 2000, "val": 2000, "test": 10_000}
BLOCK = 2000  # images drawn at once; of 10,000 the float64 copies would take a gigabyte
CLASSES = 10
SIDE = 32  # pixels
# More noise and finer patterns make the blend harder to read.
GRID = 4  # cells along a pattern's side, before it is smoothed
AMPLITUDE = 45.0  # standard deviation of a pattern, in grey levels
CONTRAST = 0.2  # contrast is scaled by 1 plus or minus up to this
BRIGHTNESS = 20.0  # grey levels, plus or minus
NOISE = 20  # grey levels, plus or minus, uniform in every pixel


def make_synthetic() -> Arrays:
    """Blends of two class patterns whose labels are drawn from a distribution that is known.

    An image is w P_a + (1 - w) P_b in a random contrast and brightness, plus noise. Its label is a
    with probability w, else b. So the best that a net can do is to say just this probability, and
    one that learns the drawn labels by heart says too much.

    Returns x (uint8, N x H x W x 3), y (int64, N) and posterior (float64, N x K) of `train`, `val`
    and `test`: independent draws, of which the training images come first.
    """
    rng = np.random.default_rng(SEED)
    patterns = class_patterns(rng)
    arrays = {}
    for split, total in IMAGES.items():
        blocks = [draw_block(patterns, BLOCK, rng) for _ in range(total // BLOCK)]
        images, labels, posteriors = zip(*blocks, strict=True)
        arrays[f"x_{split}"] = np.concatenate(images)
        arrays[f"y_{split}"] = np.concatenate(labels)
        arrays[f"posterior_{split}"] = np.concatenate(posteriors)
    return arrays


def draw_block(
    patterns: np.ndarray, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels and posterior of `n` independent draws."""
    # Two different classes and the share of the first.
    a = rng.integers(CLASSES, size=n)
    b = (a + rng.integers(1, CLASSES, size=n)) % CLASSES
    w = rng.random(n)
    posterior = np.zeros((n, CLASSES))
    posterior[np.arange(n), a] = w
    posterior[np.arange(n), b] = 1 - w
    images = blend(patterns, a, b, w, rng)
    labels = np.where(rng.random(n) < w, a, b)
    return images, labels, posterior


def class_patterns(rng: np.random.Generator) -> np.ndarray:
    """Smooth random colours, one pattern per class: float64 (K, H, W, 3), mean 0 per channel."""
    coarse = rng.standard_normal((CLASSES, 3, GRID, GRID))
    smooth = F.interpolate(torch.from_numpy(coarse), (SIDE, SIDE), mode="bicubic").numpy()
    smooth -= smooth.mean((2, 3), keepdims=True)
    smooth *= AMPLITUDE / smooth.std((2, 3), keepdims=True)
    return np.ascontiguousarray(smooth.transpose(0, 2, 3, 1))


def blend(
    patterns: np.ndarray, a: np.ndarray, b: np.ndarray, w: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Images uint8 (N, H, W, 3) of w P_a + (1 - w) P_b, in a contrast and brightness of their own.

    `a` and `b` are classes (N,), `w` shares (N,).
    """
    # In float64, so that rounding to whole grey levels gives the same bytes on every machine.
    contrast = rng.uniform(1 - CONTRAST, 1 + CONTRAST, len(w))
    brightness = rng.uniform(-BRIGHTNESS, BRIGHTNESS, len(w))
    of_a = per_image(contrast * w)
    of_b = per_image(contrast * (1 - w))
    images = of_a * patterns[a] + of_b * patterns[b] + per_image(127.5 + brightness)
    images += rng.integers(-NOISE, NOISE, images.shape, dtype=np.int16, endpoint=True)
    return images.round(out=images).clip(0, 255, out=images).astype(np.uint8)


def per_image(values: np.ndarray) -> np.ndarray:
    """(N,) -> (N, 1, 1, 1)."""
    return values[:, None, None, None]
