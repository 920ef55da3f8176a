"""Before a run has a folder: what does not fit the data or the device is refused.

Whether nets can take the images, and every step its batch, is seen by running them a few times on
the CPU, on random images or those of the data. No random state and no batch-norm statistics of a
net that is used later change by it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from models import build_model
from utils.data import Dataset
from utils.data.views import normalise, share_of
from utils.features import feature_term
from utils.program import UserError
from utils.program.environment import compiler_fault
from utils.program.files import refused
from utils.program.words import counted
from utils.settings import Experiment, LossChoice, Recipe
from utils.steps import can_capture
from utils.teachers.nets import NetTeacher

REPEATED = 1e-3  # by what logits may differ that a net gives twice, relative and absolute
ROUNDING = 1e-3  # by how much probabilities of an image may miss 1


@dataclass(frozen=True)
class Trial:
    """Images that a net is run on, and what is said of it where it cannot take them."""

    images: Tensor  # as the net takes them
    classes: int
    named: str  # the flag that names the net
    fault: str  # with images of this size
    way_out: str

    def logits(self, net: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (N, K) of the images. Raises UserError where the net gives anything else."""
        with refused(self.fault, self.way_out):
            logits = net(self.images.clone())  # it may work in place
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{self.named}: gives a {type(logits).__name__} where a tensor of logits is "
                "wanted; let it return the logits alone"
            )
        wanted = (len(self.images), self.classes)
        if logits.shape != wanted:
            raise UserError(
                f"{self.fault} (its outputs are {tuple(logits.shape)} where {wanted} is wanted); "
                f"{self.way_out}"
            )
        return logits

    def check_answers(self, net: Callable[[Tensor], Tensor]) -> None:
        """Refuse a net in evaluation mode that does not give logits, and the same ones again.

        Raises UserError.
        """
        logits = self.logits(net)
        # A class may be ruled out, by -inf. An image without any other logit has no answer.
        if not logits.amax(dim=1).isfinite().all():
            raise UserError(
                f"{self.named}: gives NaN or infinite logits; give a net whose logits are finite"
            )
        again = self.logits(net)
        if not torch.allclose(logits, again, rtol=REPEATED, atol=REPEATED):
            raise UserError(
                f"{self.named}: answers the same images differently in evaluation mode; where it "
                "calls F.dropout, pass training=self.training"
            )
        sums_to_one = (logits.sum(dim=1) - 1).abs().max() <= ROUNDING
        if sums_to_one and logits.min() >= 0:
            raise UserError(
                f"{self.named}: gives probabilities where logits are wanted; leave its softmax out"
            )


def check_run(experiment: Experiment, data: Dataset, accelerator: Accelerator) -> None:
    """Refuse what does not fit the data or the device: steps, warm-up, ways to launch.

    Raises UserError.
    """
    recipe = experiment.recipe
    processes = accelerator.num_processes
    images = len(data.train.labels)

    # What does not fit the data.
    if recipe.train_batch_size > images // processes:
        raise UserError(
            f"--train-batch-size {recipe.train_batch_size}: the training split has only "
            f"{counted(images // processes, 'image')} per process; give at most that"
        )
    steps = recipe.epochs * math.ceil(images / (recipe.train_batch_size * processes))
    if recipe.warmup >= steps:
        raise UserError(
            f"--warmup {recipe.warmup}: the run has only {counted(steps, 'step')}; give fewer"
        )
    side = data.side
    if recipe.cutout is not None and recipe.cutout >= side:
        raise UserError(
            f"--cutout {recipe.cutout}: the images have {side} x {side} pixels; give fewer"
        )

    # What does not fit the device.
    if experiment.run.step == "graph" and not can_capture(accelerator):
        raise UserError(
            "--step graph: needs one GPU, one process and no --deterministic; leave it out"
        )
    on_cpu = accelerator.device.type == "cpu"
    if experiment.run.step == "compile" and on_cpu:
        fault = compiler_fault()
        if fault is not None:
            raise UserError(f"--step compile: {fault}; leave it out")
    if recipe.sync_bn and (processes == 1 or on_cpu):
        raise UserError("--sync_bn: has an effect on several GPUs only; leave it out")


def check_net(recipe: Recipe, data: Dataset, accelerator: Accelerator) -> None:
    """Refuse a --model that cannot take the images, and a step that batch norm cannot take.

    Where maps have shrunk to one pixel, batch norm has nothing to average over a single image. The
    net is made for this and thrown away. Raises UserError.
    """
    named = f"--model {recipe.model}"
    side = data.side
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            net = build_model(recipe.model, data.num_classes)
        except ValueError as error:  # of the user's own
            raise UserError(f"{named}: {error}") from None
        if recipe.ema is not None:
            with refused(f"--ema {recipe.ema:g}: {recipe.model} cannot be copied", "leave it out"):
                copy.deepcopy(net)
        trial = Trial(
            images=torch.rand(2, 3, side, side),
            classes=data.num_classes,
            named=named,
            fault=f"{named}: cannot be trained on images of {side} x {side} pixels",
            way_out="give another net or, for a folder of images, --image_size",
        )
        trial.logits(net.train())
        trial.check_answers(net.eval())
        if not trial.logits(net).isfinite().all():
            raise UserError(
                f"{named}: rules a class out by a logit of -inf, as a teacher may and a net in "
                "training may not; give a large negative number instead"
            )
        check_single_images(net.train(), recipe, data, accelerator.num_processes)


def check_single_images(net: nn.Module, recipe: Recipe, data: Dataset, processes: int) -> None:
    """Refuse steps of one image where the net, in training mode, cannot take them. UserError."""
    side = data.side
    images = len(data.train.labels)
    batch_size = recipe.train_batch_size
    if 1 not in shares(images, batch_size, processes, together=recipe.sync_bn):
        return
    with refused(
        f"--train-batch-size {batch_size}: of {images} training images a step is left with "
        f"one, from which {recipe.model} cannot learn at {side} x {side} pixels",
        other_batch_sizes(images, batch_size, processes, together=recipe.sync_bn),
    ):
        net(torch.zeros(1, 3, side, side))


def check_teacher(teacher: NetTeacher, data: Dataset) -> None:
    """Refuse a teacher that cannot take the images as it gets them. Raises UserError."""
    images = data.train.images[:1]
    side = data.side
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
        trial = Trial(
            images=images,
            classes=data.num_classes,
            named=f"--teacher_path {member.path}",
            fault=fault,
            way_out=way_out,
        )
        with torch.no_grad():
            trial.check_answers(member.logits)


def check_features(
    choice: LossChoice, recipe: Recipe, teacher: NetTeacher, data: Dataset, accelerator: Accelerator
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
            first, last = share_of(size, rank, processes)
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
