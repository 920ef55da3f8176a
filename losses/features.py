"""Terms on features: what layers of a student and of its teacher make of a batch -> scalar.

Each takes two lists of as many maps, (B, C, H, W) or (B, C), in at least float32, and sums over
the pairs. The values are those of the code of Tian, Krishnan and Isola (ICLR 2020), RepDistiller,
so that weights tuned with it carry over. Which layers are compared says the registry, by one of the
functions at the end.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = Sequence[Tensor]
LayerPairs = list[tuple[str, str]]  # a layer of the student and one of the teacher, by their names


def over_pairs(distance: Callable, student: Maps, teacher: Maps) -> Tensor:
    """The sum of the distances of the student's maps from the teacher's."""
    return sum(distance(s, t) for s, t in zip(student, teacher, strict=True))


# ---- maps of one size ----------------------------------------------------------------------------


def of_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and width. Raises ValueError for features without places."""
    if student.dim() != 4 or teacher.dim() != 4:
        raise ValueError("the places of maps are compared, and a layer without places is none")
    height = min(student.shape[2], teacher.shape[2])
    width = min(student.shape[3], teacher.shape[3])
    return pooled(student, height, width), pooled(teacher, height, width)


def pooled(maps: Tensor, height: int, width: int) -> Tensor:
    """The means over height x width fields, as adaptive_avg_pool2d has them.

    As products, for the gradient of torch's own is not deterministic on a GPU.
    """
    if maps.shape[2:] == (height, width):
        return maps
    rows = field_shares(maps.shape[2], height, maps)
    columns = field_shares(maps.shape[3], width, maps)
    return rows @ maps @ columns.T


def field_shares(length: int, fields: int, maps: Tensor) -> Tensor:
    """The share of each of `length` places in the mean of each field: (fields, length)."""
    place = torch.arange(length, device=maps.device)
    field = torch.arange(fields, device=maps.device).unsqueeze(1)
    begins_before = (place + 1) * fields > field * length
    ends_behind = place * fields < (field + 1) * length
    inside = (begins_before & ends_behind).to(maps.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


# ---- the terms -----------------------------------------------------------------------------------


class FitNet(nn.Module):
    """The mean squared difference of the teacher's maps and of regressions from the student's.

    A regressor is a 1x1 convolution and batch norm; where the teacher's maps have no negative
    values, a ReLU as well, for both have to have the same non-linearity. It is trained with the
    student, from the first step on. Maps of different size are pooled to the smaller.
    Romero et al., ICLR 2015, Eq. 3.
    """

    def __init__(self, student: Maps, teacher: Maps):
        super().__init__()
        pairs = zip(student, teacher, strict=True)
        self.regressors = nn.ModuleList(self.regressor(s, t) for s, t in pairs)

    @staticmethod
    def regressor(student: Tensor, teacher: Tensor) -> nn.Module:
        of_one_size(student, teacher)  # refuses what has no places
        channels = teacher.shape[1]
        layers = nn.Sequential(
            nn.Conv2d(student.shape[1], channels, 1),
            nn.BatchNorm2d(channels, track_running_stats=False),  # it is never evaluated
        )
        if (teacher >= 0).all():
            layers.append(nn.ReLU())
        return layers

    def forward(self, student: Maps, teacher: Maps) -> Tensor:
        total = 0
        for regressor, s, t in zip(self.regressors, student, teacher, strict=True):
            s, t = of_one_size(s, t)
            total = total + F.mse_loss(regressor(s), t)
        return total


def attention(student: Maps, teacher: Maps) -> Tensor:
    """The mean squared difference of attention maps: f^2, averaged over channels, at norm 1.

    Maps f of different size are pooled to the smaller first. Zagoruyko and Komodakis, ICLR 2017,
    Eq. 2, with a mean over images and places as in their code.
    """

    def attention_map(maps: Tensor) -> Tensor:
        return F.normalize(maps.square().mean(dim=1).flatten(1))

    def distance(s: Tensor, t: Tensor) -> Tensor:
        s, t = of_one_size(s, t)
        return (attention_map(s) - attention_map(t)).square().mean()

    return over_pairs(distance, student, teacher)


def similarity(student: Maps, teacher: Maps) -> Tensor:
    """The mean squared difference of the B x B products of images' features, each row at norm 1.

    Tung and Mori, ICCV 2019, Section 3.
    """

    def products(maps: Tensor) -> Tensor:
        features = maps.flatten(1)
        return F.normalize(features @ features.T)

    return over_pairs(lambda s, t: (products(s) - products(t)).square().mean(), student, teacher)


def relations(student: Maps, teacher: Maps) -> Tensor:
    """25 times the Huber distance of distances between images + 50 times that of angles.

    Distances are divided by their mean over pairs. An angle is the cosine at an image between two
    others. Means are over all B^2 pairs and B^3 triples. By way of B x B x C numbers.
    Park et al., CVPR 2019, Section 3.2.
    """

    def distance(s: Tensor, t: Tensor) -> Tensor:
        s = differences(s)
        t = differences(t)
        of_distances = F.smooth_l1_loss(relative_distances(s), relative_distances(t))
        of_angles = F.smooth_l1_loss(cosines(s), cosines(t))
        return 25 * of_distances + 50 * of_angles

    return over_pairs(distance, student, teacher)


def differences(maps: Tensor) -> Tensor:
    """f_i - f_j of the features of all pairs of images: (B, B, C)."""
    features = maps.flatten(1)
    return features.unsqueeze(0) - features.unsqueeze(1)


def relative_distances(differences: Tensor) -> Tensor:
    """|f_i - f_j| over its mean over pairs i != j: (B, B)."""
    images = len(differences)
    # Clamped, for the slope of the root at 0 is infinite.
    distances = differences.square().sum(dim=2).clamp_min(1e-12).sqrt()
    itself = torch.eye(images, dtype=torch.bool, device=distances.device)
    distances = distances.masked_fill(itself, 0)
    pairs = max(images * (images - 1), 1)
    return distances / (distances.sum() / pairs).clamp_min(1e-12)


def cosines(differences: Tensor) -> Tensor:
    """At image i between j and k: (B, B, B)."""
    directions = F.normalize(differences, dim=2)
    return directions @ directions.transpose(1, 2)


def probabilities(student: Maps, teacher: Maps) -> Tensor:
    """KL(teacher || student) of the probability that one image has another as its neighbour.

    It is (cosine + 1) / 2, over its sum over all images. A mean over all B^2 pairs, as in the
    authors' code, with its 1e-7. Passalis and Tefas, ECCV 2018.
    """
    tiny = 1e-7

    def neighbours(maps: Tensor) -> Tensor:
        features = maps.flatten(1)
        # Not by sqrt, whose slope at features that are all 0 is infinite.
        norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        directions = features / (norms + tiny)
        closeness = (directions @ directions.T + 1) / 2
        return closeness / closeness.sum(dim=1, keepdim=True)

    def distance(s: Tensor, t: Tensor) -> Tensor:
        p_s = neighbours(s)
        p_t = neighbours(t)
        return (p_t * ((p_t + tiny) / (p_s + tiny)).log()).mean()

    return over_pairs(distance, student, teacher)


# ---- which layers are compared, by the names of the stages of both nets --------------------------


def every_stage(student: Sequence[str], teacher: Sequence[str]) -> LayerPairs:
    """Paired from the last one back: where one net has more stages, its first ones are left out."""
    stages = min(len(student), len(teacher))
    last_of_student = student[len(student) - stages :]
    last_of_teacher = teacher[len(teacher) - stages :]
    return list(zip(last_of_student, last_of_teacher, strict=True))


def middle_stage(student: Sequence[str], teacher: Sequence[str]) -> LayerPairs:
    """The second of three or four, the third of five."""
    pairs = every_stage(student, teacher)
    middle = (len(pairs) - 1) // 2
    return pairs[middle : middle + 1]


def last_stage(student: Sequence[str], teacher: Sequence[str]) -> LayerPairs:
    return every_stage(student, teacher)[-1:]


def pooled_features(student: Sequence[str], teacher: Sequence[str]) -> LayerPairs:
    return [("pool", "pool")]
