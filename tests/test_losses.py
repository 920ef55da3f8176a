"""Losses against float64 loops written from the formulas, and at their edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import (
    build_loss,
    canonical_loss,
    distillation_loss,
    loss_names,
    loss_parameters,
)
from losses.calibration import mdca, mmce
from losses.classification import focal, label_smoothing, nll

# ---- the formulas, one sample and one class at a time ----------------------------------------


def softmax_loop(row, T=1.0):
    top = max(z.item() for z in row)
    powers = [torch.exp((z - top) / T) for z in row]
    return [power / sum(powers) for power in powers]


def nll_loop(logits, labels):
    terms = [-torch.log(softmax_loop(row)[y]) for row, y in zip(logits, labels, strict=True)]
    return sum(terms) / len(terms)


def focal_loop(logits, labels, gamma):
    p = [softmax_loop(row)[y] for row, y in zip(logits, labels, strict=True)]
    return sum(-((1 - p_y) ** gamma) * torch.log(p_y) for p_y in p) / len(p)


def label_smoothing_loop(logits, labels, alpha):
    total, K = 0, logits.shape[1]
    for row, y in zip(logits, labels, strict=True):
        for k, p_k in enumerate(softmax_loop(row)):
            total = total - ((1 - alpha) * (k == y) + alpha / K) * torch.log(p_k)
    return total / len(labels)


def mdca_loop(logits, labels):
    total, (B, K) = 0, logits.shape
    p = [softmax_loop(row) for row in logits]
    for k in range(K):
        frequency = sum(1 for y in labels if y == k) / B
        total = total + abs(sum(row[k] for row in p) / B - frequency)
    return total / K


def mmce_loop(logits, labels):
    right, wrong = [], []
    for row, y in zip(logits, labels, strict=True):
        p = softmax_loop(row)
        k = max(range(len(p)), key=lambda k: p[k].item())
        (right if k == y else wrong).append(p[k])
    if not right or not wrong:
        return 0 * logits.sum()

    def mean(first, second, weight):
        pairs = [weight(a, b) * torch.exp(-abs(a - b) / 0.4) for a in first for b in second]
        return sum(pairs) / len(pairs)

    return torch.sqrt(
        mean(wrong, wrong, lambda a, b: a * b)
        + mean(right, right, lambda a, b: (1 - a) * (1 - b))
        - 2 * mean(right, wrong, lambda a, b: (1 - a) * b)
    )


def distillation_loop(student, teacher, labels, T, Lambda):
    total = 0
    for row_s, row_t in zip(student, teacher, strict=True):
        for p_s, p_t in zip(softmax_loop(row_s, T), softmax_loop(row_t, T), strict=True):
            total = total + p_t * (torch.log(p_t) - torch.log(p_s))
    return Lambda * T**2 * total / len(labels) + (1 - Lambda) * nll_loop(student, labels)


CASES = {
    "nll": (nll, nll_loop),
    "focal 0": (lambda z, y: focal(z, y, 0.0), lambda z, y: focal_loop(z, y, 0.0)),
    "focal 0.5": (lambda z, y: focal(z, y, 0.5), lambda z, y: focal_loop(z, y, 0.5)),
    "focal 3": (lambda z, y: focal(z, y, 3.0), lambda z, y: focal_loop(z, y, 3.0)),
    "ls 0": (lambda z, y: label_smoothing(z, y, 0.0), lambda z, y: label_smoothing_loop(z, y, 0.0)),
    "ls 0.1": (
        lambda z, y: label_smoothing(z, y, 0.1),
        lambda z, y: label_smoothing_loop(z, y, 0.1),
    ),
    "mdca": (mdca, mdca_loop),
    "mmce": (mmce, mmce_loop),
    "FL+MDCA": (
        build_loss("FL+MDCA", gamma=2.0, beta=5.0),
        lambda z, y: focal_loop(z, y, 2.0) + 5 * mdca_loop(z, y),
    ),
    "LS+MMCE": (
        build_loss("LS+MMCE", alpha=0.2, beta=3.0),
        lambda z, y: label_smoothing_loop(z, y, 0.2) + 3 * mmce_loop(z, y),
    ),
}


def batch(kind, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    size = 1 if kind == "one" else 9
    logits = 2 * torch.randn(size, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (size,), generator=generator)
    if kind == "mixed":
        labels[:4] = logits[:4].argmax(dim=1)
    if kind == "right":
        labels = logits.argmax(dim=1)
    if kind == "wrong":
        labels = logits.argmin(dim=1)
    if kind == "absent classes":
        labels = labels % 2
    return logits.to(dtype).requires_grad_(), labels


KINDS = ["mixed", "one", "right", "wrong", "absent classes"]


def value_and_gradient(loss, logits, labels):
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_match_the_formula(case, kind, dtype, tolerance):
    loss, loop = CASES[case]
    logits, labels = batch(kind)
    expected, expected_gradient = value_and_gradient(loop, logits, labels.tolist())
    value, gradient = value_and_gradient(loss, *batch(kind, dtype))
    assert value.dtype == dtype and value.shape == ()
    torch.testing.assert_close(value.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, kind):
    logits, labels = batch(kind)
    assert torch.autograd.gradcheck(lambda z: CASES[case][0](z, labels), logits)


@pytest.mark.parametrize("T, Lambda", [(4.0, 0.9), (1.0, 0.5), (1.0, 0.0), (20.0, 1.0), (1.5, 0)])
def test_distillation_matches_the_formula(T, Lambda):
    student, labels = batch("mixed")
    teacher = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value, gradient = value_and_gradient(
        lambda z, y: distillation_loss(z, teacher, y, T, Lambda), student, labels
    )
    expected, expected_gradient = value_and_gradient(
        lambda z, y: distillation_loop(z, teacher, y, T, Lambda), student, labels.tolist()
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(z, teacher, labels, T, Lambda), student
    )


def test_distillation_at_its_ends():
    student, labels = batch("mixed")
    teacher = torch.randn(9, 5, dtype=torch.float64)
    assert distillation_loss(student, teacher, labels, 4.0, 0.0) == nll(student, labels)
    assert distillation_loss(student, student.detach(), labels, 4.0, 1.0).item() == 0.0
    assert distillation_loss(student, teacher, labels, 4.0, 1.0) > 0


# ---- equalities --------------------------------------------------------------------------------


def test_label_smoothing_is_torch_s_and_the_docstring_s_conversion_holds():
    logits, labels = batch("mixed")
    assert label_smoothing(logits, labels, 0.1) == F.cross_entropy(
        logits, labels, label_smoothing=0.1
    )
    alpha, K = 0.1, logits.shape[1]
    target = torch.full_like(logits, alpha / (K - 1)).scatter(1, labels.unsqueeze(1), 1 - alpha)
    over_others = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(label_smoothing(logits, labels, alpha * K / (K - 1)), over_others)


def test_zero_weights_leave_cross_entropy():
    logits, labels = batch("mixed")
    expected = value_and_gradient(nll, logits, labels)
    for name in ("FL", "LS", "NLL+MDCA", "NLL+MMCE"):
        loss = build_loss(name, alpha=0.0, beta=0.0, gamma=0.0)
        torch.testing.assert_close(value_and_gradient(loss, logits, labels), expected)


def test_mmce_by_hand():
    # Two classes, confidence 0.9 right and 0.6 wrong: one pair of each sort.
    logits = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64).log()
    expected = math.sqrt(0.6**2 + 0.1**2 - 2 * 0.1 * 0.6 * math.exp(-0.3 / 0.4))
    assert mmce(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, abs=1e-12)
    # Duplicates keep every mean over pairs; a second division by their number would not.
    twice = mmce(logits.repeat(2, 1), torch.tensor([0, 1, 0, 1]))
    assert twice.item() == pytest.approx(expected, abs=1e-12)


def test_mmce_is_zero_with_a_finite_gradient_where_its_root_is():
    # All confidences 0.5, half of the predictions right: the square is exactly 0.
    logits = torch.zeros(4, 2, requires_grad=True)
    value, gradient = value_and_gradient(mmce, logits, torch.tensor([0, 0, 1, 1]))
    assert value == 0 and torch.equal(gradient, torch.zeros(4, 2))
    for kind in ("right", "wrong", "one"):
        value, gradient = value_and_gradient(mmce, *batch(kind))
        assert value == 0 and not gradient.any()


def test_mdca_counts_absent_classes():
    # Class 2 never occurs and always gets 0.5.
    logits = torch.tensor([[0.25, 0.25, 0.5]] * 2, dtype=torch.float64).log()
    assert mdca(logits, torch.tensor([0, 1])).item() == pytest.approx(1 / 3)


# ---- numerical edges ---------------------------------------------------------------------------

GAMMAS = [0.0, 0.01, 0.5, 1.0, 5.0]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_focal_gradient_is_finite_where_the_prediction_is_certain(gamma, dtype):
    margins = [*torch.linspace(0, 40, 81).tolist(), 1e4]
    logits = torch.tensor([[m, 0.0] for m in margins], dtype=dtype, requires_grad=True)
    value, gradient = value_and_gradient(
        lambda z, y: focal(z, y, gamma), logits, torch.zeros(len(margins), dtype=torch.long)
    )
    assert value.isfinite() and gradient.isfinite().all()
    assert not gradient[-1].any()
    assert gradient.abs().max() <= (1 + gamma) / len(margins)


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e-30, 0.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", loss_names())
def test_extreme_logits_stay_finite(name, kind, scale):
    logits, labels = batch(kind, torch.float32)
    logits = (logits.detach() * scale).requires_grad_()
    loss = build_loss(name, gamma=0.5)
    value, gradient = value_and_gradient(loss, logits, labels)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_distillation_of_huge_logits_stays_finite(T):
    student, labels = batch("mixed", torch.float32)
    student = (student.detach() * 1e4).requires_grad_()
    value, gradient = value_and_gradient(
        lambda z, y: distillation_loss(z, -z.detach(), y, T, 0.9), student, labels
    )
    assert value.isfinite() and gradient.isfinite().all()


# ---- precision and device ----------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", loss_names())
def test_half_precision_is_computed_in_float32(name, dtype, autocast):
    logits, labels = batch("mixed", dtype)
    loss = build_loss(name)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        value = loss(logits, labels)
        kd = distillation_loss(logits, logits.detach() * 2, labels, 4.0, 0.9)
    assert value.dtype == kd.dtype == torch.float32
    assert torch.equal(value, loss(logits.float(), labels))
    assert torch.equal(
        kd, distillation_loss(logits.float(), logits.detach().float() * 2, labels, 4.0, 0.9)
    )
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("name", loss_names())
def test_no_loss_asks_for_a_value(name):
    # Meta tensors hold none: .item(), bool() and a copy to the host all raise.
    logits = torch.empty(6, 4, device="meta", requires_grad=True)
    labels = torch.empty(6, device="meta", dtype=torch.long)
    value = build_loss(name)(logits, labels)
    (value + distillation_loss(logits, logits.detach(), labels, 4.0, 0.9)).backward()
    assert logits.grad.shape == (6, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", loss_names())
def test_cuda_graph_capture(name):
    def step(z, y):
        value = build_loss(name)(z, y) + distillation_loss(z, teacher, y, 4.0, 0.9)
        return value, torch.autograd.grad(value, z)[0]

    teacher = torch.randn(16, 5, device="cuda")
    logits = torch.randn(16, 5, device="cuda", requires_grad=True)
    labels = torch.randint(5, (16,), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(logits, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, labels)
    # The captured work has to follow new inputs, all right and all wrong among them.
    new_logits = torch.randn(16, 5, device="cuda")
    for new_labels in (new_logits.argmax(1), new_logits.argmin(1), labels.flip(0)):
        with torch.no_grad():
            logits.copy_(new_logits)
            labels.copy_(new_labels)
        graph.replay()
        torch.testing.assert_close(captured, step(logits, labels))


# ---- grammar -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, canonical, parameters",
    [
        ("NLL", "NLL", ()),
        ("cross_entropy", "NLL", ()),
        ("FL", "FL", ("gamma",)),
        ("focal_loss", "FL", ("gamma",)),
        ("LS", "LS", ("alpha",)),
        ("MDCA", "NLL+MDCA", ("beta",)),
        ("MMCE", "NLL+MMCE", ("beta",)),
        ("FL+MDCA", "FL+MDCA", ("gamma", "beta")),
        ("LS+MMCE", "LS+MMCE", ("alpha", "beta")),
    ],
)
def test_names(name, canonical, parameters):
    assert canonical_loss(name) == canonical
    assert loss_parameters(name) == parameters
    logits, labels = batch("mixed")
    assert build_loss(name)(logits, labels) == build_loss(canonical)(logits, labels)


def test_every_loss_reads_exactly_its_parameters():
    logits, labels = batch("mixed")
    default = {"alpha": 0.1, "beta": 1.0, "gamma": 1.0}
    for name in loss_names():
        value = build_loss(name, **default)(logits, labels)
        for parameter in default:
            changed = build_loss(name, **{**default, parameter: 0.3})(logits, labels)
            assert (changed != value) == (parameter in loss_parameters(name))


@pytest.mark.parametrize(
    "name, nearest",
    [("nll", "NLL"), ("fl+mdca", "FL+MDCA"), ("focal", "focal_loss"), ("NLL+MCDA", "NLL+MDCA")],
)
@pytest.mark.parametrize("function", [canonical_loss, loss_parameters, build_loss])
def test_unknown_names_get_a_suggestion(function, name, nearest):
    with pytest.raises(ValueError, match="unknown loss") as error:
        function(name)
    assert f"did you mean '{nearest}'" in str(error.value)
    assert all(known in str(error.value) for known in loss_names())


@pytest.mark.parametrize("name", ["", "xyzzy", "NLL+", "+MDCA", "MDCA+NLL", "NLL+MDCA+MMCE", "KD"])
def test_what_the_grammar_does_not_know_is_refused(name):
    with pytest.raises(ValueError, match="unknown loss"):
        build_loss(name)
