"""What scripts/benchmark.py times: a conventional loop, ours, and a bare step.

Each is made for a Job, and is then a function that trains for as many steps as it is told.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from losses import build_distillation, build_loss
from losses.classification import at_least_float32
from models import build_model
from utils.data import NORMALISATION, Dataset, Split
from utils.data.shared import train_loader
from utils.data.views import Draw, TrainLoader, normalise
from utils.settings import Recipe
from utils.steps import uncounted
from utils.sums import Sums
from utils.tasks import ClassificationTask, DistillationTask, Task
from utils.teachers.answers import answers_of
from utils.teachers.nets import Member, NetTeacher
from utils.teachers.weights import ready
from utils.training import Trainer, eager_step, launched, train_epoch

CLASSES = 10
SIDE = 32  # pixels
RATE = 0.001  # low: labels are random, and nothing is to diverge
Pass = Callable[[int], None]  # trains for that many steps


@dataclass(frozen=True)
class Job:
    """What contenders are to train, each a net of its own: on the labels, or by a teacher."""

    accelerator: Accelerator
    data: Dataset
    recipe: Recipe
    teacher: NetTeacher | None = None
    cache: str | None = None  # folder of the teacher's logits; the conventional loop asks anew


def recipe_of(model: str, batch_size: int) -> Recipe:
    return Recipe(model=model, epochs=1, lr=RATE, train_batch_size=batch_size)


def random_data(images: int) -> Dataset:
    """Random bytes of CIFAR's shape."""
    pixels = torch.randint(256, (images, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.arange(images) % CLASSES
    few = Split(pixels[:CLASSES], labels[:CLASSES])
    mean, std = NORMALISATION["cifar10"]
    return Dataset(
        name="random",
        num_classes=CLASSES,
        train=Split(pixels, labels),
        val=few,
        test=few,
        mean=mean,
        std=std,
        fingerprint=f"random {images}",
    )


def random_teacher(model: str, data: Dataset, accelerator: Accelerator) -> NetTeacher:
    """A net that has learned nothing: it takes as long as any other."""
    member = Member(
        net=ready(build_model(model, data.num_classes), model),
        model=model,
        mean=data.mean,
        std=data.std,
        label="random",
        sha256="random",
        path=Path(model),
    )
    return NetTeacher([member]).to(accelerator.device, accelerator.mixed_precision)


def build_task(job: Job) -> Task:
    net = build_model(job.recipe.model, job.data.num_classes)
    if job.teacher is None:
        return ClassificationTask(net, build_loss("NLL"), job.data)
    answers = answers_of(job.teacher, job.data, job.accelerator, job.recipe.seed, job.cache)
    return DistillationTask(net, build_distillation("KD"), job.teacher, answers, job.data)


def conventional(job: Job, workers: int) -> Pass:
    """PIL images through torchvision's transforms in the workers of a DataLoader, loss and accuracy
    read back in every step, the teacher run for every student."""
    accelerator = job.accelerator
    device = accelerator.device
    recipe = job.recipe
    net = build_model(recipe.model, CLASSES)
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    net, optimizer = accelerator.prepare(net, optimizer)
    loss_of = conventional_loss(job)

    batch_size = recipe.train_batch_size
    order: list[int] = []  # the images of a pass
    loader = conventional_loader(job.data, batch_size, order, workers, pinned=device.type == "cuda")

    def train(steps: int) -> None:
        order[:] = torch.randperm(steps * batch_size).tolist()
        net.train()
        for batch in loader:
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            logits = net(images)
            loss = loss_of(logits, images, labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            loss.item()
            (logits.argmax(dim=1) == labels).float().mean().item()

    return train


def conventional_loss(job: Job) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of logits (B, K), the images (B, 3, H, W) that they are of, and labels (B,).

    A teacher is run on the images.
    """
    if job.teacher is None:
        nll = build_loss("NLL")
        return lambda logits, images, labels: nll(logits, labels)

    device = job.accelerator.device
    teaching_net = build_model(job.teacher.model, CLASSES).eval().to(device)
    distillation = build_distillation("KD").to(device)

    def loss_of(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), job.accelerator.autocast():
            target = teaching_net(images)
        return distillation(logits, target, labels)

    return loss_of


def conventional_loader(
    data: Dataset, batch_size: int, order: list[int], workers: int, pinned: bool
) -> DataLoader:
    transform = transforms.Compose(
        [
            transforms.RandomCrop(SIDE, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    pixels = data.train.images.permute(0, 2, 3, 1).numpy()
    labels = data.train.labels

    def read(index: list[int]) -> tuple[Tensor, Tensor]:
        images = [transform(Image.fromarray(pixels[i])) for i in index]
        return torch.stack(images), labels[index]

    return DataLoader(
        range(len(pixels)),
        batch_size,
        sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pinned,
        collate_fn=read,
    )


class FewSteps:
    """A loader whose epochs end after so many steps."""

    def __init__(self, loader: TrainLoader, steps: int):
        self.loader = loader
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[Draw]:
        return islice(self.loader.epoch(epoch), self.steps)


def prepared(job: Job) -> tuple[Trainer, TrainLoader]:
    """What `fit` makes before its first epoch."""
    task = build_task(job)
    loader = train_loader(job.data, job.recipe, job.accelerator)
    return Trainer(task, job.recipe, job.accelerator, steps_per_epoch=len(loader)), loader


def ours(job: Job, mode: str) -> Pass:
    """The steps of an epoch as `fit` runs them, launched as --step `mode` says."""
    trainer, loader = prepared(job)
    step = eager_step(trainer, loader)
    step = launched(step, trainer, loader, mode=mode, compiled=mode == "compile")

    def train(steps: int) -> None:
        train_epoch(trainer, step, FewSteps(loader, steps), epoch=1, shown=False)

    return train


def bare(job: Job, mode: str) -> Pass:
    """A step without what surrounds the net: always the same batch, which lies there normalised."""
    trainer, loader = prepared(job)
    task = trainer.task
    draw = next(loader.epoch(1))
    batch = loader.batch(draw)
    images = normalise(batch.images, job.data.mean, job.data.std)

    def bare_step(draw: Draw) -> Sums:
        with job.accelerator.autocast():
            logits = at_least_float32(task.net(images))
        if job.teacher is None:
            loss = task.loss(logits, batch.labels)
        else:
            loss = task.loss(logits, task.answers(batch), batch.labels)
        job.accelerator.backward(loss)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return {}

    step = launched(bare_step, trainer, loader, mode=mode, compiled=mode == "compile")

    def train(steps: int) -> None:
        task.train()
        with task.during_epoch(1), uncounted(task.net, steps=steps):
            for _ in range(steps):
                step(draw)

    return train
