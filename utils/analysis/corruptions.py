"""Corrupted test images: the published CIFAR-10-C and CIFAR-100-C, and a subset made here.

Our own take their constants, which are meant for 32 x 32 pixels, from Hendrycks and Dietterich,
"Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019 (the
CIFAR-10-C variant), and their rules at the border, but not their images, libraries or random
numbers; grey levels are rounded, where the published ones are cut off. Results on them are not
results on CIFAR-10-C.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur, pil_to_tensor, to_pil_image

from utils.program import UserError
from utils.program.files import refused

SEVERITIES = (1, 2, 3, 4, 5)
# Beside the names of corruptions; MEAN beside severities, too.
CLEAN = "clean"
MEAN = "mean"
PUBLISHED = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "gaussian_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "spatter",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "saturate",
)


class Download(NamedTuple):
    title: str  # also its folder in --data_dir
    address: str


SOURCES = {
    "cifar10c": Download("CIFAR-10-C", "https://zenodo.org/record/2535967"),
    "cifar100c": Download("CIFAR-100-C", "https://zenodo.org/record/3555552"),
}
CIFAR_CLASSES = {  # what the images of --on were made of, and its classes
    "cifar10c": ("CIFAR-10", 10),
    "cifar10h": ("CIFAR-10", 10),
    "cifar100c": ("CIFAR-100", 100),
}


class Corrupted(NamedTuple):
    name: str  # of the corruption
    severity: int
    images: Tensor  # uint8 (N, 3, H, W)


def make_noise(images: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """Gaussian noise, independent in every pixel and channel; sigma as a share of the range."""
    noise = rng.standard_normal(tuple(images.shape), dtype=np.float32)
    return images + 255 * sigma * torch.from_numpy(noise)


def make_blur(images: Tensor, sigma: float, rng) -> Tensor:
    """Gaussian blur, sigma in pixels, cut off at four of them; beyond the border its pixels repeat.

    So do the published images: skimage.filters.gaussian with its mode `nearest` and truncate 4.
    """
    reach = int(4 * sigma + 0.5)
    size = 2 * reach + 1
    # torchvision would reflect; what it makes of the rim that is added here is cut off again.
    framed = F.pad(images.float(), [reach] * 4, mode="replicate")
    return gaussian_blur(framed, [size, size], [sigma])[..., reach:-reach, reach:-reach]


def make_contrast(images: Tensor, share: float, rng) -> Tensor:
    """This share of the distance from the mean colour is left (torchvision: from the mean grey)."""
    mean = images.float().mean(dim=(2, 3), keepdim=True)
    return mean + share * (images - mean)


def make_brightness(images: Tensor, shift: float, rng) -> Tensor:
    """The V of HSV, as a share of the range, is raised (torchvision multiplies)."""
    value = images.amax(dim=1, keepdim=True).float()
    raised = (value + 255 * shift).clamp_max(255)
    # Black has neither hue nor saturation: it becomes grey.
    return torch.where(value > 0, images * raised / value.clamp_min(1), raised)


def make_jpeg(images: Tensor, quality: int, rng) -> Tensor:
    """Compressed and unpacked again by Pillow, at this quality."""

    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return torch.stack([pil_to_tensor(compressed(to_pil_image(image))) for image in images])


def make_pixels(images: Tensor, share: float, rng) -> Tensor:
    """Reduced to this share of the side, and enlarged again, by Pillow's box filter."""
    side = images.shape[2]
    small = max(1, int(share * side))
    box = Image.Resampling.BOX

    def pixelated(image: Image.Image) -> Image.Image:
        return image.resize((small, small), box).resize((side, side), box)

    return torch.stack([pil_to_tensor(pixelated(to_pil_image(image))) for image in images])


# name: how to make it, from images uint8 (N, 3, H, W), and its constant at severity 1 to 5
OWN: dict[str, tuple[Callable, tuple]] = {
    "gaussian_noise": (make_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "gaussian_blur": (make_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": (make_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (make_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "jpeg_compression": (make_jpeg, (80, 65, 58, 50, 40)),
    "pixelate": (make_pixels, (0.95, 0.9, 0.85, 0.75, 0.65)),
}


def own_corruptions(images: Tensor, names: list[str], seed: int = 0) -> Iterator[Corrupted]:
    """The corruptions of OWN that are named, of images uint8 (N, 3, H, W), at every severity.

    The random numbers of one depend on the seed, its name and its severity alone.
    """
    for name in names:
        make, constants = OWN[name]
        for severity, constant in zip(SEVERITIES, constants, strict=True):
            rng = np.random.default_rng([seed, severity, *name.encode()])
            levels = make(images, constant, rng).round().clamp(0, 255)
            yield Corrupted(name, severity, levels.to(torch.uint8))


def published_corruptions(
    source: str, data_dir: Path, labels: Tensor, names: list[str]
) -> Iterator[Corrupted]:
    """The published files of `source`, a key of SOURCES, from its folder in `data_dir`.

    `labels` (N,) are the test split's; labels.npy has to be these, once per severity. Raises
    UserError, before the first image, where a file is absent or is something else.
    """
    download = SOURCES[source]
    folder = data_dir / download.title
    labels_file = folder / "labels.npy"
    way_out = (
        f"put the files of {download.title} ({download.address}) there, whole, name the folder "
        "above it by --data_dir, or choose by --corruptions those that are there"
    )
    if not labels_file.exists():
        refuse_other_data(source, labels)
    published_labels = mapped(labels_file, way_out)
    arrays = {name: mapped(folder / f"{name}.npy", way_out) for name in names}
    if not np.array_equal(published_labels, np.tile(labels.numpy(), len(SEVERITIES))):
        raise UserError(
            f"--on {source}: {labels_file} is not the labels of the run's test split "
            f"({len(labels)} images), once per severity; evaluate a run on those"
        )
    return by_severity(arrays)


def by_severity(arrays: dict[str, np.ndarray]) -> Iterator[Corrupted]:
    """Images of arrays (5 N, H, W, 3), by their corruption's name: first all of severity 1."""
    for name, array in arrays.items():
        stacks = np.split(array, len(SEVERITIES))
        for severity, stack in zip(SEVERITIES, stacks, strict=True):
            images = torch.from_numpy(stack.copy()).permute(0, 3, 1, 2)
            yield Corrupted(name, severity, images)


def refuse_other_data(source: str, labels: Tensor) -> None:
    """Before a download is asked for that could not fit a run. Raises UserError.

    `labels` (N,) of the run's test split; CIFAR's has 10,000 images, as many of each class.
    """
    name, classes = CIFAR_CLASSES[source]
    if labels.bincount().tolist() != [10_000 // classes] * classes:
        raise UserError(
            f"--on {source}: the run's test split, {len(labels)} images of "
            f"{len(labels.unique())} classes, is not {name}'s; evaluate a run on {name}"
        )


def mapped(file: Path, way_out: str) -> np.ndarray:
    """An .npy file, mapped and not read: CIFAR-10-C's have 150 MB each. Raises UserError."""
    with refused(f"{file} cannot be read", way_out):
        return np.lib.format.open_memmap(file, mode="r")
