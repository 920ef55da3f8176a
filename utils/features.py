"""Which layers of a student and its teacher a term on features compares, and the term itself."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from losses import FeatureTerm, build_features, feature_layers
from losses.features import LayerPairs
from models.blocks import Chain, layer_names
from utils.data import Dataset
from utils.data.views import normalise
from utils.program import UserError
from utils.settings import LossChoice
from utils.teachers.nets import Member, NetTeacher

EXAMPLES = 2  # images whose maps a term is made for


def feature_term(
    choice: LossChoice,
    student: nn.Module,
    teacher: NetTeacher,
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
    pairs = compared_layers(choice, student, member)
    images = data.train.images[:EXAMPLES]
    student_layers = [layer for layer, _ in pairs]
    teacher_layers = [layer for _, layer in pairs]
    with accelerator.autocast():  # the teacher's weights may be in half precision
        student_maps = maps_of(student, normalise(images, data.mean, data.std), student_layers)
        teacher_maps = maps_of(member.net, member.inputs(images), teacher_layers)
    return build_features(choice.name, pairs, student_maps, teacher_maps, **choice.parameters)


def teaching_member(choice: LossChoice, teacher: NetTeacher) -> Member:
    """The one net whose maps are compared. Raises UserError."""
    nets = len(teacher.members)
    if nets != 1:
        raise UserError(
            f"--distill {choice.name}: compares maps with those of one net, and {nets} teach; give "
            f"one --teacher_path, or --distill {choice.base}"
        )
    return teacher.members[0]


def compared_layers(choice: LossChoice, student: nn.Module, member: Member) -> LayerPairs:
    """Those that --feature_layer names, else the term's own. Raises UserError."""
    teacher_name = f"the teacher {member.model}"
    refuse_without_layers(choice, "the student", student)
    refuse_without_layers(choice, teacher_name, member.net)

    if choice.feature_layer:
        flag = f"--feature_layer {choice.feature_layer}"
        student_layer, colon, teacher_layer = choice.feature_layer.partition(":")
        pairs = [(student_layer, teacher_layer if colon else student_layer)]
    else:
        flag = f"--distill {choice.name}"
        pairs = feature_layers(choice.name, student.stage_names, member.net.stage_names)
    if not pairs:
        raise UserError(f"{flag}: one of the nets names no stages; give --feature_layer")

    for student_layer, teacher_layer in pairs:
        refuse_unknown_layer(flag, "the student", student, student_layer)
        refuse_unknown_layer(flag, teacher_name, member.net, teacher_layer)
    return pairs


def refuse_without_layers(choice: LossChoice, owner: str, net: nn.Module) -> None:
    """Raises UserError for a net whose layers have no names."""
    if not isinstance(net, Chain):
        raise UserError(
            f"--distill {choice.name}: compares maps of layers, and {owner} has no layers by "
            f"name; give a net of ours, or --distill {choice.base}"
        )


def refuse_unknown_layer(flag: str, owner: str, net: Chain, layer: str) -> None:
    """Raises UserError where the net has no layer of that name."""
    names = layer_names(net)
    if layer not in names:
        raise UserError(
            f"{flag}: {owner} has no layer {layer!r}; its layers are {', '.join(names)}"
        )


@torch.no_grad()
def maps_of(net: nn.Module, inputs: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """What layers make of inputs that are normalised; statistics and random states stay."""
    was_training = net.training
    device = next(net.parameters()).device
    net.eval()
    _, maps = net(inputs.to(device), keep=layers)
    net.train(was_training)
    return [maps[layer] for layer in layers]
