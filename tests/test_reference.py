"""A run of each entry script against the same experiment, written here as one plain loop.

Most tests of runs compare two runs of the same code. What both have wrong shows here: a flag that
does not reach the loss, the loader or the optimiser, another normalisation, a temperature that only
the run's name has.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import command, folder_of, weights
from torch import Tensor, nn
from torchvision.transforms import functional as TF

import train_student
import train_teacher
from models import build_model
from utils.data import Dataset, load_dataset
from utils.data.mixing import Mixing, mix_plan
from utils.data.views import epoch_plan

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
SIDE, BATCH = 8, 64
COMMON = f"--dataset cifar100 --model resnet8 --train-batch-size {BATCH}"
# One epoch: the slope of |...| in MDCA is a sign, which rounding turns over later on.
TEACHER = "--epochs 1 --loss FL+MDCA --gamma 3 --beta 5 --lr 0.05 --wd 0.01 --seed 7"
STUDENT = (
    "--epochs 3 --schedule-steps 2 --lr-decay-factor 0.3 --T 3 --Lambda 0.7 --lr 0.01 --wd 0.02 "
    "--seed 8 --teacher_temperature 2.5 --mix mixup --mix_alpha 0.3"
)


def view(image: Tensor, number: int) -> Tensor:
    """Padded by 4, cropped, mirrored, normalised: what the net sees."""
    crop = TF.crop(TF.pad(image, 4), number // 18, number // 2 % 9, SIDE, SIDE)
    if number % 2:
        crop = TF.hflip(crop)
    return TF.normalize(crop.double() / 255, MEAN, STD).float()


def epoch_of(data: Dataset, seed: int, epoch: int, alpha: float | None) -> Iterator[tuple]:
    """Images, labels, the labels of what was mixed in and the images' share, step by step."""
    order, views = epoch_plan(len(data.train.labels), seed, epoch, flip=True)
    partners, partner_views = order, views
    if alpha is not None:
        mixing = Mixing("mixup", alpha)
        plan = mix_plan(mixing, order, views, BATCH, side=SIDE, seed=seed, epoch=epoch)
        partners, partner_views = plan.partner_plan

    for step, places in enumerate(torch.arange(len(order)).split(BATCH)):
        share = 1.0 if alpha is None else float(plan.numbers[step])
        mixed = []
        for place in places:
            image = view(data.train.images[order[place]], int(views[place]))
            partner = view(data.train.images[partners[place]], int(partner_views[place]))
            mixed.append(share * image + (1 - share) * partner)
        labels = data.train.labels
        yield torch.stack(mixed), labels[order[places]], labels[partners[places]], share


def reference(
    data: Dataset,
    epochs: int,
    seed: int,
    lr: float,
    wd: float,
    loss_of: Callable,
    alpha: float | None = None,
) -> nn.Module:
    """A ResNet-8, trained with SGD and Nesterov momentum; the rate falls after epoch 2."""
    torch.manual_seed(seed)
    net = build_model("resnet8", data.num_classes).train()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=wd, nesterov=True)
    for epoch in range(1, epochs + 1):
        optimizer.param_groups[0]["lr"] = lr if epoch <= 2 else 0.3 * lr
        for images, labels, partner_labels, share in epoch_of(data, seed, epoch, alpha):
            logits = net(images)
            loss = share * loss_of(images, logits, labels)
            loss = loss + (1 - share) * loss_of(images, logits, partner_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def focal_with_mdca(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """gamma = 3, beta = 5."""
    probs = logits.softmax(dim=1)
    of_label = probs.gather(1, labels[:, None])
    focal = (-((1 - of_label) ** 3) * of_label.log()).mean()
    frequencies = F.one_hot(labels, probs.shape[1]).float().mean(dim=0)
    return focal + 5 * (probs.mean(dim=0) - frequencies).abs().mean()


def distillation_from(teacher: nn.Module) -> Callable:
    """Its logits are divided by 2.5; T = 3, Lambda = 0.7."""

    def loss_of(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = (teacher(images) / 2.5 / 3).softmax(dim=1)
        log_probs = (logits / 3).log_softmax(dim=1)
        divergence = (target * (target.log() - log_probs)).sum(dim=1).mean()
        return 0.7 * 3**2 * divergence + (1 - 0.7) * F.cross_entropy(logits, labels)

    return loss_of


def assert_same_net(net: nn.Module, folder: Path, seed: int) -> None:
    """The weights differ by little of the way from the first ones, by rounding that grows."""
    torch.manual_seed(seed)
    first = list(build_model("resnet8", 100).parameters())
    trained = weights(folder)
    way = apart = 0.0
    for before, (name, after) in zip(first, net.named_parameters(), strict=True):
        way += (after - before).square().sum().item()
        apart += (after - trained[name]).square().sum().item()
    assert apart**0.5 < 0.03 * way**0.5


@pytest.mark.long
def test_both_scripts_train_as_a_plain_loop_does(cifar100_dir, tmp_path):
    data = load_dataset("cifar100", cifar100_dir)
    common = [*COMMON.split(), "--data_dir", str(cifar100_dir), "--checkpoint"]
    teachers, students = tmp_path / "teachers", tmp_path / "students"

    train_teacher.main([*common, str(teachers), *TEACHER.split()])
    net = reference(data, epochs=1, seed=7, lr=0.05, wd=0.01, loss_of=focal_with_mdca)
    assert_same_net(net, folder_of(teachers), seed=7)

    net.load_state_dict(weights(folder_of(teachers)))
    taught = ["--teacher_select", "last", "--teacher_path", str(teachers)]
    train_student.main([*common, str(students), *taught, *STUDENT.split()])
    loss_of = distillation_from(net.eval())
    student = reference(data, epochs=3, seed=8, lr=0.01, wd=0.02, loss_of=loss_of, alpha=0.3)
    assert_same_net(student, folder_of(students), seed=8)


def test_a_loss_learns_from_each_validation(tiny_npz, tmp_path):
    """AdaFocal begins with a gamma of 1 in every bin of confidence."""
    train_teacher.main(command(tiny_npz, tmp_path, "--loss", "AdaFocal"))
    saved = torch.load(folder_of(tmp_path) / "checkpoint.pth", weights_only=True)
    gammas = saved["task"]["loss.base.gammas"]
    assert (gammas != 1).any()
