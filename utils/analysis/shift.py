"""Data that no run was trained on: images from elsewhere, and how people label CIFAR-10."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.data.npz import LARGEST, SMALLEST, channels_last, image_side, open_npz
from utils.files import one_line
from utils.program import UserError

HUMAN_LABELS = ("cifar10h-counts.npy", "cifar10h-probs.npy")
AGREEMENT = 0.9  # of people's majority with the labels; 0.99 on CIFAR-10


def foreign_images(name: str, data_dir: Path) -> Tensor:
    """Images uint8 (N, 3, H, W) of `svhn` or of the .npz file that `name` is the path of.

    They are not resized. Raises UserError.
    """
    return svhn(data_dir) if name == "svhn" else images_of(Path(name).expanduser(), name)


def svhn(data_dir: Path) -> Tensor:
    """The test split of SVHN, 26,032 images: svhn.npz in `data_dir`, else torchvision's file."""
    file = data_dir / "svhn.npz"
    if file.is_file():
        return images_of(file, "svhn")
    from torchvision.datasets import SVHN

    try:
        return torch.from_numpy(SVHN(data_dir, split="test", download=True).data)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(
            f"--on svhn: not found in --data_dir {data_dir} and not downloaded "
            f"({one_line(error)}); put test_32x32.mat (http://ufldl.stanford.edu/housenumbers, "
            f"read by scipy) or {file.name} with an array x_test there"
        ) from error


def images_of(path: Path, name: str) -> Tensor:
    """The array x_test of an .npz file, or the only one that it holds."""
    try:
        with open_npz(path) as archive:
            keys = archive.files
            key = "x_test" if "x_test" in keys or len(keys) != 1 else keys[0]
            images = archive[key]
    # Any exception: damaged archives raise a dozen kinds, and each means the same to the user.
    except Exception as error:
        raise UserError(
            f"--on {name}: {path} holds no images ({type(error).__name__}: {one_line(error)}); "
            "write it with numpy.savez(file, x_test=images)"
        ) from error
    if images.dtype != np.uint8 or len(images) == 0 or image_side(images.shape) is None:
        raise UserError(
            f"--on {name}: {key} in {path} is {images.dtype} of shape {images.shape}; images are "
            f"uint8 (N, H, W, 3), (N, H, W) or (N, C, H, W), {SMALLEST} to {LARGEST} pixels square"
        )
    return torch.from_numpy(np.array(channels_last(images))).permute(0, 3, 1, 2)


def human_labels(data_dir: Path, labels: Tensor) -> Tensor:
    """The share of people who gave each label to each test image: float64 (N, K).

    Reads the published file of CIFAR-10H, counts or probabilities, in `data_dir` or its folder
    cifar10h. `labels` (N,) are those of the run's test split, to tell whether it is CIFAR-10's in
    its own order. Raises UserError. Peterson et al., ICCV 2019.
    """
    folders = (data_dir / "cifar10h", data_dir)
    files = [folder / name for folder in folders for name in HUMAN_LABELS]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise UserError(
            f"--on cifar10h: neither {folders[0]} nor {data_dir} has {' or '.join(HUMAN_LABELS)}; "
            "put one there (https://github.com/jcpeterson/cifar-10h, folder data), or name its "
            "folder by --data_dir"
        )
    try:
        votes = np.lib.format.open_memmap(path, mode="r").astype(np.float64)
    except (OSError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); download it again") from None
    usable = votes.ndim == 2 and np.isfinite(votes).all() and (votes >= 0).all()
    if not usable or not (votes.sum(axis=1) > 0).all():
        raise UserError(f"{path} of shape {votes.shape} does not hold votes; download it again")
    same = len(votes) == len(labels)
    if not same or (votes.argmax(axis=1) == labels.numpy()).mean() < AGREEMENT:
        raise UserError(
            f"--on cifar10h: {path} has votes on {len(votes)} images, and the run's test split, "
            f"{len(labels)} images, is not these in their order; evaluate a run on CIFAR-10"
        )
    return torch.from_numpy(votes / votes.sum(axis=1, keepdims=True))
