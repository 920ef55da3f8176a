"""Which parts of a student and its teacher a term on features compares, and the term itself."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from losses import FeatureTerm, build_features, feature_parts
from losses.features import PartPairs
from models.blocks import Chain, part_names
from utils.data import Dataset
from utils.data.views import normalise
from utils.program import UserError
from utils.settings import LossChoice
from utils.teachers import Member, Teacher

EXAMPLES = 2  # images whose maps a term is made for


def feature_term(
    choice: LossChoice,
    student: nn.Module,
    teacher: Teacher,
    data: Dataset,
    accelerator: Accelerator,
) -> FeatureTerm | None:
    """The term of a distillation; None where it has none.

    Its initial weights, where it has some, are drawn here. Student and teacher stay as they are.
    Raises UserError where they have no maps that can be compared.
    """
    if not choice.has_features:
        return None
    member = teaching_member(choice, teacher)
    pairs = compared_parts(choice, student, member)
    images = data.train.images[:EXAMPLES]
    student_parts = [part for part, _ in pairs]
    teacher_parts = [part for _, part in pairs]
    with accelerator.autocast():  # the teacher's weights may be in half precision
        student_maps = maps_of(student, normalise(images, data.mean, data.std), student_parts)
        teacher_maps = maps_of(member.net, member.inputs(images), teacher_parts)
    return build_features(choice.name, pairs, student_maps, teacher_maps, **choice.parameters)


def teaching_member(choice: LossChoice, teacher: Teacher) -> Member:
    """The one net whose maps are compared. Raises UserError."""
    nets = len(teacher.members)
    if nets != 1:
        raise UserError(
            f"--distill {choice.name}: compares maps with those of one net, and {nets} teach; give "
            f"one --teacher_path, or --distill {choice.logits}"
        )
    return teacher.members[0]


def compared_parts(choice: LossChoice, student: nn.Module, member: Member) -> PartPairs:
    """Those that --feature_layer names, else the term's own. Raises UserError."""
    teacher = f"the teacher {member.model}"
    refuse_partless(choice, "the student", student)
    refuse_partless(choice, teacher, member.net)

    if choice.feature_layer:
        flag = f"--feature_layer {choice.feature_layer}"
        student_part, _, teacher_part = choice.feature_layer.partition(":")
        pairs = [(student_part, teacher_part or student_part)]
    else:
        flag = f"--distill {choice.name}"
        pairs = feature_parts(choice.name, student.stage_names, member.net.stage_names)
    if not pairs:
        raise UserError(f"{flag}: one of the nets names no stages; give --feature_layer")

    for student_part, teacher_part in pairs:
        refuse_unknown_part(flag, "the student", student, student_part)
        refuse_unknown_part(flag, teacher, member.net, teacher_part)
    return pairs


def refuse_partless(choice: LossChoice, owner: str, net: nn.Module) -> None:
    """Raises UserError for a net whose parts have no names."""
    if not isinstance(net, Chain):
        raise UserError(
            f"--distill {choice.name}: compares maps of parts, and {owner} has no parts by "
            f"name; give a net of ours, or --distill {choice.logits}"
        )


def refuse_unknown_part(flag: str, owner: str, net: Chain, part: str) -> None:
    """Raises UserError where the net has no part of that name."""
    names = part_names(net)
    if part not in names:
        raise UserError(f"{flag}: {owner} has no part {part!r}; its parts are {', '.join(names)}")


@torch.no_grad()
def maps_of(net: nn.Module, inputs: Tensor, parts: Sequence[str]) -> list[Tensor]:
    """What parts make of inputs that are normalised; statistics and random states stay."""
    was_training = net.training
    device = next(net.parameters()).device
    net.eval()
    _, maps = net(inputs.to(device), keep=parts)
    net.train(was_training)
    return [maps[part] for part in parts]
