"""Before a run has a folder: whether its nets can take the images, and every step its batch.

Each check runs a net once on the CPU on images of zeros, or of the data. No random state and no
batch-norm statistics of a net that is used later change by it.
"""

import copy
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from models import build_model
from utils.data import Dataset
from utils.data.views import normalise
from utils.features import feature_term
from utils.program import UserError
from utils.program.files import refused
from utils.settings import LossChoice, Recipe
from utils.teachers import Teacher


def check_net(recipe: Recipe, data: Dataset, accelerator: Accelerator) -> None:
    """Refuse a --model that cannot take the images, and a step that batch norm cannot take.

    Where maps have shrunk to one pixel, batch norm has nothing to average over a single image. The
    net is made for this and thrown away. Raises UserError.
    """
    side = data.train.images.shape[2]
    images = len(data.train.labels)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            net = build_model(recipe.model, data.num_classes).train()
        except ValueError as error:  # of the user's own
            raise UserError(f"--model {recipe.model}: {error}") from None
        if recipe.ema is not None:
            with refused(f"--ema {recipe.ema:g}: {recipe.model} cannot be copied", "leave it out"):
                copy.deepcopy(net)
        with refused(
            f"--model {recipe.model}: cannot be trained on images of {side} x {side} pixels",
            "give another net or, for a folder of images, --image_size",
        ):
            check_outputs(net, torch.zeros(2, 3, side, side), data.num_classes)

        batch_size = recipe.train_batch_size
        processes = accelerator.num_processes
        if 1 not in shares(images, batch_size, processes, together=recipe.sync_bn):
            return
        with refused(
            f"--train-batch-size {batch_size}: of {images} training images a step is left with "
            f"one, from which {recipe.model} cannot learn at {side} x {side} pixels",
            other_batch_sizes(images, batch_size, processes, together=recipe.sync_bn),
        ):
            net(torch.zeros(1, 3, side, side))


def check_teacher(teacher: Teacher, data: Dataset) -> None:
    """Refuse a teacher that cannot take the images as it gets them. Raises UserError."""
    images = data.train.images[:1]
    side = images.shape[2]
    for member in teacher.members:
        if member.size is None:
            fault = (
                f"--teacher_path {member.path}: {member.model} cannot take images of {side} x "
                f"{side} pixels"
            )
            way_out = "--teacher_size enlarges them"
        else:
            fault = f"--teacher_size {member.size}: {member.model} cannot take images of that size"
            way_out = "give the one that it was trained on"
        with refused(fault, way_out), torch.no_grad():
            check_outputs(member.logits, images, data.num_classes)


def check_features(
    choice: LossChoice, recipe: Recipe, teacher: Teacher, data: Dataset, accelerator: Accelerator
) -> None:
    """Refuse a term on features that the maps of --model and of its teacher do not suit.

    The student and the term are made for this and thrown away. Raises UserError.
    """
    if not choice.has_features:
        return
    sizes = shares(
        len(data.train.labels),
        recipe.train_batch_size,
        accelerator.num_processes,
        together=False,
    )
    images = data.train.images[: min(2, *sizes)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        student = build_model(recipe.model, data.num_classes)
        with refused(
            f"--distill {choice.name}: cannot compare the maps of {recipe.model} and of its "
            f"teacher {teacher.model}",
            f"give another --feature_layer, or --distill {choice.base}",
            kinds=(ValueError, RuntimeError),
        ):
            term = feature_term(choice, student, teacher, data, accelerator)
            _, maps = student.eval()(
                normalise(images, data.mean, data.std), keep=term.student_layers
            )
            _, teacher_maps = teacher.logits_and_maps(images, term.teacher_layers)
            term(maps, teacher_maps)


def check_outputs(forward: Callable[[Tensor], Tensor], images: Tensor, classes: int) -> None:
    """Raises ValueError where a net gives anything but logits (N, K), else what the net raises."""
    logits = forward(images)
    wanted = (len(images), classes)
    given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if given != wanted:
        raise ValueError(f"its outputs are {given} where {wanted} is wanted")


def shares(images: int, batch_size: int, processes: int, together: bool) -> set[int]:
    """Over how many images batch norm averages in the steps of an epoch, as TrainLoader deals them.

    `together`: over those of all processes, as --sync_bn has it.
    """
    step = batch_size * processes
    sizes = {min(step, images)}
    left_over = images % step
    if left_over > 0:
        sizes.add(left_over)
    if together:
        return sizes

    counts = set()
    for size in sizes:
        for rank in range(processes):
            first = size * rank // processes
            last = size * (rank + 1) // processes
            counts.add(max(1, last - first))  # one without a share is given an image
    return counts


def other_batch_sizes(images: int, given: int, processes: int, together: bool) -> str:
    """The nearest batch sizes with which no step is left with one image."""
    largest = images // processes
    fitting = [
        size for size in range(2, largest + 1) if 1 not in shares(images, size, processes, together)
    ]
    if not fitting:
        return "give more images"
    nearest = sorted(fitting, key=lambda size: abs(size - given))[:2]
    return f"give {' or '.join(map(str, sorted(nearest)))}"
