"""Terms on features against float64 loops written from the formulas, and what they compare."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from losses import FEATURES, build_distillation, build_features, feature_layers
from losses.features import (
    FitNet,
    attention,
    pooled,
    probabilities,
    relations,
    similarity,
)
from losses.modules import FeatureTerm
from models import build_model
from utils.data import Dataset, Split
from utils.data.views import Batch
from utils.features import feature_term
from utils.settings import LossChoice
from utils.tasks import DistillationTask
from utils.teachers.answers import LiveAnswers
from utils.teachers.nets import Member, NetTeacher

# ---- the formulas, one number at a time, of one pair of maps ------------------------------------


def cells(length, fields, i):
    """The places of field i, as adaptive pooling has them."""
    return range(math.floor(i * length / fields), math.ceil((i + 1) * length / fields))


def pooled_loop(maps, size):
    images, channels, height, width = maps.shape
    values = torch.empty(images, channels, size, size, dtype=maps.dtype)
    for i in range(size):
        for j in range(size):
            field = [
                maps[:, :, y, x] for y in cells(height, size, i) for x in cells(width, size, j)
            ]
            values[:, :, i, j] = sum(field) / len(field)
    return values


def at_one_size(student, teacher):
    size = min(student.shape[-1], teacher.shape[-1])
    return pooled_loop(student, size), pooled_loop(teacher, size)


def attention_loop(student, teacher):
    student, teacher = at_one_size(student, teacher)
    images, _, size, _ = student.shape

    def attention_map(maps):
        squares = [
            sum(channel[y, x].item() ** 2 for channel in maps) / len(maps)
            for y in range(size)
            for x in range(size)
        ]
        norm = math.sqrt(sum(value**2 for value in squares))
        return [value / norm for value in squares]

    total = 0
    for s, t in zip(student, teacher, strict=True):
        differences = zip(attention_map(s), attention_map(t), strict=True)
        total += sum((a - b) ** 2 for a, b in differences) / size**2
    return total / images


def dot(a, b):
    return sum(x * y for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))


def similarity_loop(student, teacher):
    images = len(student)

    def products(maps):
        rows = [[dot(a, b) for b in maps] for a in maps]
        return [[value / math.hypot(*row) for value in row] for row in rows]

    rows = zip(products(student), products(teacher), strict=True)
    squares = [(a - b) ** 2 for one, other in rows for a, b in zip(one, other, strict=True)]
    return sum(squares) / images**2


def huber(a, b):
    return abs(a - b) - 0.5 if abs(a - b) > 1 else (a - b) ** 2 / 2


def relations_loop(student, teacher):
    every = range(len(student))

    def distances(maps):
        table = [[math.sqrt(dot(a - b, a - b)) for b in maps] for a in maps]
        apart = [table[i][j] for i in every for j in every if i != j]
        return [[value / (sum(apart) / len(apart)) for value in row] for row in table]

    def angle(maps, i, j, k):
        if i in (j, k):
            return 0.0
        to_j, to_k = maps[j] - maps[i], maps[k] - maps[i]
        return dot(to_j, to_k) / math.sqrt(dot(to_j, to_j) * dot(to_k, to_k))

    d_s, d_t = distances(student), distances(teacher)
    of_distances = [huber(d_s[i][j], d_t[i][j]) for i in every for j in every]
    of_angles = [
        huber(angle(student, i, j, k), angle(teacher, i, j, k))
        for i in every
        for j in every
        for k in every
    ]
    return 25 * sum(of_distances) / len(of_distances) + 50 * sum(of_angles) / len(of_angles)


def probabilities_loop(student, teacher):
    images = len(student)

    def neighbours(maps):
        rows = [
            [(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) + 1) / 2 for b in maps] for a in maps
        ]
        return [[value / sum(row) for value in row] for row in rows]

    rows = zip(neighbours(student), neighbours(teacher), strict=True)
    terms = [t * math.log(t / s) for p_s, p_t in rows for s, t in zip(p_s, p_t, strict=True)]
    return sum(terms) / images**2


def fitnet_loop(term, student, teacher):
    """With the weights of the regressor as they are."""
    student, teacher = at_one_size(student, teacher)
    conv, norm, *_ = term.regressors[0]
    images, _, size, _ = student.shape
    places = [(i, y, x) for i in range(images) for y in range(size) for x in range(size)]
    total = 0
    for channel, (row, shift) in enumerate(zip(conv.weight, conv.bias, strict=True)):
        values = [dot(row[:, 0, 0], student[i, :, y, x]) + shift.item() for i, y, x in places]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + norm.eps)
        wanted = [teacher[i, channel, y, x].item() for i, y, x in places]
        made = [(v - mean) / deviation for v in values]
        if teacher.min() >= 0:
            made = [max(v, 0) for v in made]
        total += sum((a - b) ** 2 for a, b in zip(made, wanted, strict=True))
    return total / teacher.numel()


LOOPS = {
    attention: attention_loop,
    similarity: similarity_loop,
    relations: relations_loop,
    probabilities: probabilities_loop,
}


def maps(*shape, seed=0, positive=True):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return values.relu() + 0.01 if positive else values


def two_pairs(function):
    """Of different channels; where places are compared also of different size."""
    teacher_sizes = (5, 3) if function in (attention, FitNet) else (3, 5)
    student = [maps(4, 6, 3, 3, seed=1), maps(4, 3, 5, 5, seed=2)]
    teacher = [maps(4, 5, size, size, seed=3 + size) for size in teacher_sizes]
    return student, teacher


@pytest.mark.parametrize("function", LOOPS)
def test_terms_are_the_sums_of_their_formulas(function):
    student, teacher = two_pairs(function)
    expected = sum(LOOPS[function](s, t) for s, t in zip(student, teacher, strict=True))
    # PKT's 1e-7 keeps logarithms finite, and is no part of the formula.
    precision = 1e-4 if function is probabilities else 1e-12
    assert function(student, teacher).item() == pytest.approx(expected, rel=precision)
    assert expected > 0.001 or function is probabilities


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("sizes", [(4, 4), (6, 4), (3, 6)])
def test_fitnet_is_its_formula(sizes, positive):
    """A teacher whose maps have negative values is met by a regressor without a ReLU."""
    student = maps(3, 4, sizes[0], sizes[0])
    teacher = maps(3, 5, sizes[1], sizes[1], seed=1, positive=positive)
    teacher[0, 0, 0, 0] = 0  # as a ReLU leaves it
    term = FitNet([student], [teacher]).double()
    value = term([student], [teacher]).item()
    assert value == pytest.approx(fitnet_loop(term, student, teacher), rel=1e-9)


@pytest.mark.parametrize("size", [(8, 8), (4, 8), (7, 3), (1, 1), (5, 8)])
def test_pooling_is_adaptive_pooling(size):
    values = maps(2, 3, 8, 8, positive=False).requires_grad_()
    ours, theirs = pooled(values, *size), F.adaptive_avg_pool2d(values, size)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    weights = torch.randn_like(ours)
    own, their = (torch.autograd.grad((x * weights).sum(), values)[0] for x in (ours, theirs))
    torch.testing.assert_close(own, their, rtol=1e-12, atol=1e-14)


# ---- what must not matter ------------------------------------------------------------------------


def rotated(values):
    """The features of all images turned by one random rotation."""
    features = values.flatten(1)
    rotation, _ = torch.linalg.qr(maps(features.shape[1], features.shape[1], positive=False))
    return features @ rotation


UNCHANGED = {
    attention: {"channels": lambda x: x[:, [2, 0, 1]], "scale": lambda x: 3 * x},
    similarity: {"channels": lambda x: x[:, [2, 0, 1]], "scale": lambda x: 3 * x, "turn": rotated},
    relations: {"shift": lambda x: 2 * x + 5, "scale": lambda x: 3 * x, "turn": rotated},
    probabilities: {"channels": lambda x: x[:, [2, 0, 1]], "turn": rotated},
}
CASES = [(function, change) for function, changes in UNCHANGED.items() for change in changes]


@pytest.mark.parametrize("function, change", CASES)
def test_what_a_term_does_not_see(function, change):
    values, teacher = maps(5, 3, 4, 4), maps(5, 3, 4, 4, seed=1)
    changed = UNCHANGED[function][change](values)
    assert function([values], [values]).item() == pytest.approx(0, abs=1e-12)
    assert function([changed], [values]).item() == pytest.approx(0, abs=1e-12)
    term = function([values], [teacher]).item()
    assert function([changed], [teacher]).item() == pytest.approx(term, rel=1e-6)
    assert abs(term) > 1e-6


@pytest.mark.parametrize("case", ["zeros", "equal images", "one image", "itself"])
@pytest.mark.parametrize("function", LOOPS)
def test_edges_have_finite_gradients(function, case):
    teacher = maps(4, 3, 4, 4).float()
    student = {
        "zeros": torch.zeros(4, 3, 4, 4),
        "equal images": teacher[:1].repeat(4, 1, 1, 1),
        "one image": maps(1, 3, 4, 4, seed=1).float(),
        "itself": teacher.clone(),
    }[case].requires_grad_()
    value = function([student], [teacher[: len(student)]])
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    if case == "itself" or (case == "one image" and function is not attention):
        assert value.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FEATURES)
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher = maps(4, 3, 4, 4).to(dtype), maps(4, 3, 4, 4, seed=1).to(dtype)
    function = FEATURES[name].function
    term = function([student], [teacher]) if function is FitNet else function
    weighted = FeatureTerm(term, 10.0, [("a", "b")])
    value = weighted({"a": student}, {"b": teacher})
    assert value.dtype == torch.float32
    assert value == 10 * term([student.float()], [teacher.float()])


# ---- which layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, student, teacher, pairs", [
    ("KD+AT", "resnet20", "wrn_40_2", "layer1:layer1 layer2:layer2 layer3:layer3"),
    ("KD+AT", "mobilenetv2_half", "vgg13",
     "stages.1:block1 stages.2:block2 stages.4:block3 stages.6:block4"),
    ("KD+FitNet", "resnet8x4", "resnet32x4", "layer2:layer2"),
    ("KD+FitNet", "vgg8", "resnet50", "block2:layer2"),
    ("KD+FitNet", "vgg8", "vgg13", "block2:block2"),
    ("DKD+SP", "vgg8", "resnet50", "block4:layer4"),
    ("KD+RKD", "vgg8", "resnet50", "pool:pool"),
    ("KD+PKT", "vgg8", "resnet50", "pool:pool"),
])  # fmt: skip
def test_default_parts_are_those_of_published_pairs(name, student, teacher, pairs):
    stages = [build_model(model).stage_names for model in (student, teacher)]
    found = feature_layers(name, *stages)
    assert " ".join(":".join(pair) for pair in found) == pairs
    assert feature_layers(name, ("a",), ()) in ([], [("pool", "pool")])


# RepDistiller's benchmark: student and teacher.
PUBLISHED = """
wrn_16_2 wrn_40_2  wrn_40_1 wrn_40_2  resnet20 resnet56  resnet20 resnet110  resnet32 resnet110
resnet8x4 resnet32x4  vgg8 vgg13  mobilenetv2_half vgg13  mobilenetv2_half resnet50  vgg8 resnet50
shufflenetv1 resnet32x4  shufflenetv2 resnet32x4  shufflenetv1 wrn_40_2
"""
PAIRS = list(zip(PUBLISHED.split()[::2], PUBLISHED.split()[1::2], strict=True))


def noise_data(side: int, images: int = 4) -> Dataset:
    pixels = torch.randint(256, (images, 3, side, side), dtype=torch.uint8)
    split = Split(pixels, torch.arange(images))
    return Dataset(
        name="noise",
        num_classes=10,
        train=split,
        val=split,
        test=split,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        fingerprint="f",
    )


def teacher_of(net, model="teacher") -> NetTeacher:
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return NetTeacher([Member(net.eval(), model, label="NLL", sha256="0", path="t", **statistics)])


def learning_task(student, teacher, data, name) -> DistillationTask:
    teacher, accelerator = teacher_of(teacher), Accelerator(cpu=True)
    features = feature_term(LossChoice(name), student, teacher, data, accelerator)
    answers = LiveAnswers(teacher, accelerator)
    return DistillationTask(student, build_distillation(name), teacher, answers, data, features)


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_published_pairs_train_a_step(student, teacher):
    """By all terms at once."""
    torch.manual_seed(0)
    learning, teaching = build_model(student), build_model(teacher).eval()
    pixels = torch.randn(4, 3, 8, 8)
    _, made = learning(pixels, keep=[*learning.stage_names, "pool"])
    with torch.no_grad():
        _, wanted = teaching(pixels, keep=[*teaching.stage_names, "pool"])

    terms = nn.ModuleList()
    for name in FEATURES:
        pairs = feature_layers(f"KD+{name}", learning.stage_names, teaching.stage_names)
        examples = ([made[one] for one, _ in pairs], [wanted[other] for _, other in pairs])
        terms.append(build_features(f"KD+{name}", pairs, *examples))
    values = torch.stack([term(made, wanted) for term in terms])
    assert (values > 0).all() and values.isfinite().all()
    values.sum().backward()
    assert next(learning.parameters()).grad.any()
    own = list(terms.parameters())
    assert len(own) == 4 and all(weight.grad.any() for weight in own)
    before = [weight.clone() for weight in own]
    torch.optim.SGD([*learning.parameters(), *own], lr=0.1).step()
    assert not any(map(torch.equal, before, own))


def test_mixed_images_have_one_term():
    """It has no labels: it is computed once, and is the same for both."""
    torch.manual_seed(0)
    data = noise_data(side=8)
    task = learning_task(build_model("resnet8"), build_model("resnet8"), data, "KD+FitNet")
    calls = []
    task.features.register_forward_hook(lambda *_: calls.append(1))
    plain = Batch(data.train.images, data.train.labels, torch.arange(4), weight=1.0)
    mixed = plain._replace(partners=data.train.labels.flip(0), share=torch.tensor(0.3))
    parts = [task(batch).parts["features"] for batch in (plain, mixed)]
    torch.testing.assert_close(*parts)
    assert len(calls) == 2
    torch.testing.assert_close(task(mixed).loss, sum(task(mixed).parts.values()))
