"""Before a student is trained: its teacher's temperature, whether it can teach, its worth."""

import math
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from losses import DistillationLoss
from losses.distillation import Undefined
from utils.calibration.temperature import (
    T_MAX,
    T_MIN,
    fit_temperature,
    matching_temperature,
    mean_confidence,
)
from utils.data import NORMALISATION, Dataset, Split, Statistics
from utils.evaluation import logits_of
from utils.program import UserError
from utils.split_metrics import evaluate, with_finite_logits
from utils.teachers.nets import Member, NetTeacher
from utils.teachers.seen_views import SeenViews
from utils.teachers.stored import StoredTeacher
from utils.teachers.teacher import Teacher, cannot_teach

TRIED_IMAGES = 1000  # on which other normalisations are tried

# Measured: see docs/teachers.md.
MAY_KNOW_VALIDATION = (
    "it may have been trained on the validation images: its student then does better there than on "
    "test, and the student's temperature comes out too small"
)


def settle_nets(
    teacher: NetTeacher,
    data: Dataset,
    accelerator: Accelerator,
    seen: SeenViews,
    batch_size: int | None = None,
    loss: DistillationLoss | None = None,
) -> str:
    """Set the temperature and the confidences of nets; lines on what they are worth on validation.

    `seen` is what they say of the training images. Third parties' teachers are also tried with
    every known normalisation: with a wrong one they are silently worse. Raises UserError where they
    cannot teach: logits are not finite, no temperature suits them, or they rule classes out and the
    `loss` has no value for that.
    """
    logits = logits_of(teacher.logits, data.val, accelerator, batch_size, title="teacher")
    view_confidence = seen.confidence()
    if not (logits.amax(dim=1).isfinite().all() and math.isfinite(view_confidence)):
        raise UserError(
            f"--teacher_path {teacher.members[0].path}: its outputs are NaN or infinite for some "
            "images; give another teacher, or another precision if this is bf16 or fp16"
        )

    settle_temperature(teacher, logits, data.val, seen)
    teacher.confidences = confidences_of(teacher, logits, view_confidence)
    if loss is not None:
        check_loss(loss, teacher.tempered(logits), data.val.labels.cpu())

    lines = [quality_line(teacher, logits, data.val), confidence_line(teacher, seen)]

    # The checkpoints of our own runs say what they were trained on, and how inputs were normalised.
    third_parties = [member for member in teacher.members if member.seed is None]
    if third_parties:
        lines.append(MAY_KNOW_VALIDATION)
    step = math.ceil(len(data.val.labels) / TRIED_IMAGES)
    sample = Split(data.val.images[::step], data.val.labels[::step])
    for member in third_parties:
        lines += norm_advice(member, sample, accelerator)
    return "\n".join(lines)


def settle_stored(
    teacher: StoredTeacher, data: Dataset, seen: SeenViews, loss: DistillationLoss | None = None
) -> str:
    """`settle_nets` of stored logits, also compared with the labels of training images."""
    val_logits = teacher.val_and_test.get("val")
    settle_temperature(teacher, val_logits, data.val, seen)
    teacher.confidences = confidences_of(teacher, val_logits, seen.confidence())
    labels = data.train.labels.cpu()
    if loss is not None:
        for logits in teacher.training:
            check_loss(loss, teacher.tempered(logits), labels)

    top1 = (teacher.training.argmax(dim=2) == labels).double().mean().item()
    lines = [f"teacher {teacher.model} {teacher.label}: training top-1 {100 * top1:.2f} %"]
    if val_logits is not None:
        lines.append(quality_line(teacher, val_logits, data.val))
    lines.append(confidence_line(teacher, seen))
    return "\n".join(lines)


def settle_temperature(
    teacher: Teacher, val_logits: Tensor | None, val: Split, seen: SeenViews
) -> None:
    """Find what the teacher's logits are divided by, where a rule is asked for.

    `val_logits` (N, K) may be unknown to a file of logits. Raises UserError.
    """
    if teacher.rule == "auto":
        teacher.temperature = suiting_temperature(val_logits, val)
    if teacher.rule == "views":
        accuracy = teacher.accuracy
        if accuracy is None:
            accuracy = evaluate(val_logits, val)["top1"]
        teacher.temperature = views_temperature(seen, accuracy)


def confidences_of(
    teacher: Teacher, val_logits: Tensor | None, view_confidence: float
) -> dict[str, float]:
    """How sure it is before its temperature divides its logits, as fractions; and that number."""
    confidences = {"view_confidence": view_confidence}
    if val_logits is not None:
        confidences["val_confidence"] = mean_confidence(val_logits)
    return {**confidences, "temperature": teacher.temperature}


def quality_line(teacher: Teacher, logits: Tensor, val: Split) -> str:
    raw = evaluate(logits, val)
    line = (
        f"teacher {teacher.model} {teacher.label}: validation top-1 {100 * raw['top1']:.2f} %, "
        f"ECE {100 * raw['ece']:.2f} %"
    )
    if teacher.temperature != 1:
        tempered = evaluate(logits, val, teacher.temperature)
        line += f", with T = {teacher.temperature:.4g} {100 * tempered['ece']:.2f} %"
    return line


def confidence_line(teacher: Teacher, seen: SeenViews) -> str:
    confidences = teacher.confidences
    line = f"its mean confidence: {100 * confidences['view_confidence']:.2f} % on training images"
    if "val_confidence" in confidences:
        line += f", {100 * confidences['val_confidence']:.2f} % on validation images"
    if teacher.temperature != 1:
        divided = seen.confidence(teacher.temperature)
        line += f"; with T = {teacher.temperature:.4g} {100 * divided:.2f} % on training images"
    return line


def suiting_temperature(logits: Tensor, val: Split) -> float:
    """The T of --teacher_temperature auto. Raises UserError where it lies at its bound."""
    temperature, at_bound = fit_temperature(with_finite_logits(logits), val.labels)
    if not at_bound:
        return temperature
    if temperature == T_MIN:
        reason = "it is right on so many validation images that its NLL falls with T without end"
    else:
        reason = "its logits are no better than a guess"
    raise UserError(
        f"--teacher_temperature auto: the T that suits this teacher lies at the bound of its "
        f"range, {temperature:g} ({reason}); give a number, such as 1"
    )


def views_temperature(seen: SeenViews, accuracy: float) -> float:
    """The T of --teacher_temperature views. Raises UserError where it lies at its bound."""
    temperature, at_bound = matching_temperature(seen.confidence, accuracy)
    if at_bound:
        raise UserError(
            f"--teacher_temperature views: no T from {T_MIN:g} to {T_MAX:g} makes this teacher's "
            f"mean confidence on training images its accuracy, {100 * accuracy:.2f} %; give "
            "another --teacher_accuracy, or a number such as 1"
        )
    return temperature


def check_loss(loss: DistillationLoss, target: Tensor, labels: Tensor) -> None:
    """Refuse a distillation that has no value for classes which the teacher rules out.

    `target`: what the teacher teaches, logits (N, K). Raises UserError.
    """
    if not target.isneginf().any():
        return
    knows_nothing = torch.zeros_like(target)
    try:
        loss.distil(knows_nothing, target, labels)
    except Undefined as undefined:
        raise cannot_teach(undefined) from None


def norm_advice(member: Member, sample: Split, accelerator: Accelerator) -> list[str]:
    """A line where another normalisation makes a teacher right far more often, else none."""

    def percent_right(mean: Statistics, std: Statistics) -> float:
        teacher = NetTeacher([replace(member, mean=mean, std=std)])
        predictions = logits_of(teacher.logits, sample, accelerator).argmax(dim=1)
        return 100 * (predictions == sample.labels.cpu()).double().mean().item()

    own = percent_right(member.mean, member.std)
    others = {name: percent_right(mean, std) for name, (mean, std) in NORMALISATION.items()}
    best = max(others, key=others.get)
    images = len(sample.labels)
    # A handful of images decides nothing.
    if others[best] - own <= max(5, 1000 / images):
        return []
    return [
        f"{member.path}: is {own:.1f} % right on {images} validation images, and with "
        f"--teacher_norm {best} {others[best]:.1f} %"
    ]
