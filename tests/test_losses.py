"""Losses against float64 loops written from the formulas, and at their edges."""

import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script

import losses
from losses import BASES, DISTILLATIONS, TERMS, Flag, LossEntry, build_distillation, build_loss
from losses.calibration import cpc, dca, mbls, mdca, mmce
from losses.classification import AdaFocal, focal, label_smoothing, nll
from losses.distillation import Undefined, dist, divergence, dkd, kd, lskd
from losses.registry import refuse_shared_flags

NAMES = [*BASES, *(f"NLL+{term}" for term in TERMS), *DISTILLATIONS]  # every part of a loss


def loss_of(name, **parameters):
    """A loss or a distillation as a function of logits and labels."""
    if name not in DISTILLATIONS:
        return build_loss(name, **parameters)
    distil = build_distillation(name, **parameters)
    return lambda logits, labels: distil(logits, -logits.detach().flip(1), labels)


# ---- the formulas, one sample at a time: logits z, softmax p, label y -------------------------


def softmax(z, T=1.0):
    powers = torch.exp((z - z.detach().max()) / T)
    return powers / powers.sum()


def mean(formula):
    def loop(logits, labels):
        rows = zip(logits, labels, strict=True)
        return sum(formula(z, softmax(z), y) for z, y in rows) / len(labels)

    return loop


def focal_formula(gamma):
    return lambda z, p, y: -((1 - p[y]) ** gamma) * torch.log(p[y])


def dual_focal_formula(gamma):
    def formula(z, p, y):
        p_j = max((q for q in p if q < p[y]), default=0)
        return -((1 - p[y] + p_j) ** gamma) * torch.log(p[y])

    return formula


def adafocal_formula(z, p, y):
    gamma = GAMMAS[sum(edge < p[y] for edge in EDGES)]
    factor = (1 - p[y]) ** gamma if gamma > 0 else (1 + p[y]) ** -gamma
    return -factor * torch.log(p[y])


def flsd_formula(z, p, y):
    return -((1 - p[y]) ** (5 if p[y] < 0.2 else 3)) * torch.log(p[y])


def brier_formula(z, p, y):
    return sum((p_k - int(k == y)) ** 2 for k, p_k in enumerate(p))


def mbls_formula(z, p, y):  # of margin 1.5
    return sum(max(z.max() - z_k - 1.5, 0 * z_k) for z_k in z) / len(z)


def label_smoothing_formula(alpha):
    return lambda z, p, y: -(1 - alpha) * torch.log(p[y]) - alpha / len(p) * torch.log(p).sum()


def cpc_formula(exclusion):
    def cost(differences):
        return sum(torch.log(1 + torch.exp(-d)) for d in differences) / len(differences)

    def formula(z, p, y):
        rest = [z_k for k, z_k in enumerate(z) if k != y]
        pairs = [a - b for k, a in enumerate(rest) for b in rest[:k] + rest[k + 1 :]]
        return cost([z[y] - z_k for z_k in rest]) + exclusion * cost(pairs) / 2

    return formula


def ls_cpc_formula(z, p, y):
    return label_smoothing_formula(0.2)(z, p, y) + 3 * cpc_formula(2)(z, p, y)


def dca_loop(logits, labels):
    return abs(mean(lambda z, p, y: p.max() - (p[y] == p.max()).double())(logits, labels))


def mdca_loop(logits, labels):
    (B, K), p = logits.shape, [softmax(z) for z in logits]
    return sum(abs(sum(row[k] for row in p) - labels.count(k)) / B for k in range(K)) / K


def mmce_loop(logits, labels):
    right, wrong = [], []
    for z, y in zip(logits, labels, strict=True):
        (right if z.argmax() == y else wrong).append(softmax(z).max())
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


def kl(p, q):
    return (p * torch.log(p / q)).sum()


def kd_loop(student, teacher, labels, T):
    rows = zip(student, teacher, strict=True)
    return T**2 * sum(kl(softmax(t, T), softmax(s, T)) for s, t in rows) / len(labels)


def dkd_loop(student, teacher, labels, T, alpha, beta):
    total = 0
    for s, t, y in zip(student, teacher, labels, strict=True):
        p, q = softmax(t, T), softmax(s, T)
        target = [torch.stack([r[y], 1 - r[y]]) for r in (p, q)]
        rest = [torch.cat([r[:y], r[y + 1 :]]) / (1 - r[y]) for r in (p, q)]
        total = total + alpha * kl(*target) + beta * kl(*rest)
    return T**2 * total / len(labels)


def lskd_loop(student, teacher, labels, T):
    def standardised(z):
        deviation = torch.sqrt(((z - z.mean()) ** 2).sum() / (len(z) - 1))
        return (z - z.mean()) / (deviation + 1e-7)

    return kd_loop(map(standardised, student), map(standardised, teacher), labels, T)


def dist_loop(student, teacher, labels, T, beta, gamma):
    def distance(rows):
        r = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in rows if len(pair[0]) > 1]
        return 1 - sum(r) / len(rows)

    p_s, p_t = (torch.stack([softmax(z, T) for z in logits]) for logits in (student, teacher))
    over_classes, over_images = list(zip(p_s, p_t)), list(zip(p_s.T, p_t.T))  # noqa: B905
    return T**2 * (beta * distance(over_classes) + gamma * distance(over_images))


GAMMAS = [(-1.0) ** k * (0.25 + k / 4) for k in range(15)]
EDGES = [0.002 * 1.5**k for k in range(14)]
ADAFOCAL = build_loss("AdaFocal")
ADAFOCAL.base.load_state_dict({"gammas": torch.tensor(GAMMAS), "edges": torch.tensor(EDGES)})

TEACHER = 3 * torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def taught(term, loop, *parameters):
    def of(function):
        return lambda z, y: function(z, TEACHER[: len(z)].to(z.dtype), y, *parameters)

    return of(term), of(loop)


CASES = {  # name: (the loss, its loop)
    "NLL": (nll, mean(focal_formula(0))),
    "FL 0.5": (build_loss("FL", gamma=0.5), mean(focal_formula(0.5))),
    "FL 3": (build_loss("FL", gamma=3.0), mean(focal_formula(3))),
    "LS 0.1": (build_loss("LS"), mean(label_smoothing_formula(0.1))),
    "FLSD": (build_loss("FLSD"), mean(flsd_formula)),
    "DFL": (build_loss("DFL"), mean(dual_focal_formula(5))),
    "DFL 0.5": (build_loss("DFL", gamma=0.5), mean(dual_focal_formula(0.5))),
    "AdaFocal at first": (build_loss("AdaFocal"), mean(focal_formula(1))),
    "AdaFocal": (ADAFOCAL, mean(adafocal_formula)),
    "Brier": (build_loss("Brier"), mean(brier_formula)),
    "MDCA": (mdca, mdca_loop),
    "MMCE": (mmce, mmce_loop),
    "DCA": (dca, dca_loop),
    "MbLS": (lambda z, y: mbls(z, y, 1.5), mean(mbls_formula)),
    "CPC": (lambda z, y: cpc(z, y, 10.0), mean(cpc_formula(10))),
    "LS+CPC": (build_loss("LS+CPC", alpha=0.2, beta=3.0, exclusion=2.0), mean(ls_cpc_formula)),
    "KD": taught(kd, kd_loop, 4.0),
    "KD 1.5": taught(kd, kd_loop, 1.5),
    "DKD": taught(dkd, dkd_loop, 4.0, 1.0, 8.0),
    "LSKD": taught(lskd, lskd_loop, 2.0),
    "DIST": taught(dist, dist_loop, 1.0, 1.0, 1.0),
    "DIST 4": taught(dist, dist_loop, 4.0, 2.0, 0.5),
}
KINDS = ["mixed", "one", "right", "wrong", "absent classes"]


def batch(kind, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    size = 1 if kind == "one" else 9
    logits = 2 * torch.randn(size, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (size,), generator=generator)
    right, wrong = logits.argmax(dim=1), logits.argmin(dim=1)
    mixed = torch.cat([right[:4], labels[4:]])
    kinds = {"mixed": mixed, "right": right, "wrong": wrong, "absent classes": labels % 2}
    return logits.to(dtype).requires_grad_(), kinds.get(kind, labels)


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
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits)


def test_label_smoothing_over_the_other_classes_as_the_docstring_converts_it():
    logits, labels = batch("mixed")
    alpha, K = 0.1, logits.shape[1]
    target = torch.full_like(logits, alpha / (K - 1)).scatter(1, labels.unsqueeze(1), 1 - alpha)
    over_others = F.cross_entropy(logits, target)
    torch.testing.assert_close(label_smoothing(logits, labels, alpha * K / (K - 1)), over_others)


def test_mmce_is_zero_with_a_finite_gradient_where_its_root_is():
    # All confidences 0.5, half of the predictions right: the square is exactly 0.
    logits = torch.zeros(4, 2, requires_grad=True)
    value, gradient = value_and_gradient(mmce, logits, torch.tensor([0, 0, 1, 1]))
    assert value == 0 and torch.equal(gradient, torch.zeros(4, 2))


def test_what_distillations_are_where_the_answer_is_known():
    logits, labels = batch("mixed")
    teacher, own = TEACHER, logits.detach()
    for name in DISTILLATIONS:  # nothing to learn from a teacher like oneself
        value = build_distillation(name, Lambda=3.0, ce_weight=0.25)(logits, own, labels)
        torch.testing.assert_close(value, 0.25 * nll(logits, labels))
    assert build_distillation("KD", Lambda=0.0)(logits, teacher, labels) == nll(logits, labels)
    affine = lskd(3 * logits - 1, 0.1 * teacher + 5, labels, 2.0)
    torch.testing.assert_close(affine, lskd(logits, teacher, labels, 2.0), rtol=1e-5, atol=0)
    # The opposite teacher of two classes: both correlations are -1.
    two = logits[:, :2]
    assert dist(two, -two, labels % 2, 1.0, 1.0, 1.0).item() == pytest.approx(4)


@pytest.mark.parametrize("T", [1e2, 1e3, 1e4, 1e6])
def test_a_high_temperature_tends_to_the_difference_of_centred_logits(T):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(64, 100, generator=generator) for _ in range(2))
    labels = torch.zeros(64, dtype=torch.long)
    difference = student - teacher
    difference -= difference.mean(dim=1, keepdim=True)
    value, gradient = value_and_gradient(
        lambda z, y: kd(z, teacher, y, T), student.requires_grad_(), labels
    )
    assert value.item() == pytest.approx(difference.square().mean().item() / 2, rel=0.02)
    error = gradient * difference.numel() - difference
    assert error.norm() < 0.05 * difference.norm()


# ---- classes that a teacher rules out, by a logit of -inf ---------------------------------------

NEVER = -math.inf


def xlogy_kl(p, q):
    """KL by a loop, where 0 log 0 = 0."""
    return sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def masked_teacher(*columns):
    teacher = TEACHER.clone()
    teacher[:, list(columns)] = NEVER
    return teacher


@pytest.mark.parametrize("columns", [(4,), (1, 3), (0, 1, 2, 4)])
@pytest.mark.parametrize("T", [1.0, 4.0, 1e3])
def test_kd_of_a_teacher_that_rules_classes_out(columns, T):
    """Whether the label is among these or not: 0 log 0 = 0."""
    logits, labels = batch("mixed")
    teacher = masked_teacher(*columns)

    def loop(logits, labels):
        rows = zip(logits, teacher, strict=True)
        return T**2 * sum(xlogy_kl(softmax(t, T), softmax(s, T)) for s, t in rows) / len(labels)

    def loss(logits, labels):
        return kd(logits, teacher, labels, T)

    expected = value_and_gradient(loop, logits, labels)
    torch.testing.assert_close(value_and_gradient(loss, logits, labels), expected)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits)


def test_dkd_of_a_teacher_that_rules_classes_out():
    """Labels that it rules out and labels that it does not."""
    (logits, labels), T = batch("mixed"), 4.0
    teacher = masked_teacher(1, 3)
    assert labels.eq(3).any() and labels.eq(2).any()

    def loop(logits, labels):
        total = 0
        for s, t, y in zip(logits, teacher, labels.tolist(), strict=True):
            p, q = softmax(t, T), softmax(s, T)
            target = [torch.stack([r[y], 1 - r[y]]) for r in (p, q)]
            rest = [torch.cat([r[:y], r[y + 1 :]]) / (1 - r[y]) for r in (p, q)]
            total = total + 0.5 * xlogy_kl(*target) + 2 * xlogy_kl(*rest)
        return T**2 * total / len(labels)

    def loss(logits, labels):
        return dkd(logits, teacher, labels, T, 0.5, 2.0)

    expected = value_and_gradient(loop, logits, labels)
    torch.testing.assert_close(value_and_gradient(loss, logits, labels), expected)


def test_dist_of_a_teacher_that_rules_classes_out():
    """Their probability is 0; over the images it is constant, and has a correlation of 0."""
    logits, labels = batch("mixed")
    almost = masked_teacher().index_fill(1, torch.tensor([1, 3]), -1e4)
    for T in (1.0, 4.0):
        expected, gradient = value_and_gradient(
            lambda z, y, T=T: dist(z, almost, y, T, 2.0, 0.5), logits, labels
        )
        found, own = value_and_gradient(
            lambda z, y, T=T: dist(z, masked_teacher(1, 3), y, T, 2.0, 0.5), logits, labels
        )
        assert torch.equal(found, expected) and torch.equal(own, gradient)
        assert found.isfinite() and own.isfinite().all()


@pytest.mark.parametrize("name", ["KD", "DKD", "DIST"])
def test_a_class_that_both_rule_out_costs_nothing(name):
    """As one does whose logits are so low that no probability is left."""
    logits, labels = batch("mixed")
    labels = labels % 4

    def at(lowest):
        student = logits.detach().clone()
        student[:, 4] = lowest
        student.requires_grad_()
        teacher = TEACHER.clone()
        teacher[:, 4] = lowest
        return value_and_gradient(
            lambda z, y: build_distillation(name)(z, teacher, y), student, labels
        )

    torch.testing.assert_close(at(NEVER), at(-1e5))


def test_where_a_distillation_has_no_value_it_says_so():
    logits, labels = batch("mixed")
    with pytest.raises(Undefined, match="LSKD .*-inf"):
        lskd(logits, masked_teacher(4), labels, 2.0)
    certain = torch.full_like(TEACHER, NEVER).scatter(1, labels.unsqueeze(1), 0.0)
    with pytest.raises(Undefined, match="DKD .*rules all of them out"):
        dkd(logits, certain, labels, 4.0, 1.0, 8.0)
    torch.testing.assert_close(kd(logits, certain, labels, 1.0), nll(logits, labels))
    wrong = torch.full_like(TEACHER, NEVER).scatter(1, (labels.unsqueeze(1) + 1) % 5, 0.0)
    assert dkd(logits, wrong, labels, 4.0, 1.0, 8.0).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size, classes", [(1, 2), (9, 5), (128, 100), (37, 1000)])
def test_finite_logits_keep_every_bit_of_torchs_own_divergence(dtype, size, classes):
    """Value and gradient, as F.kl_div has them, by which runs were made before."""
    generator = torch.Generator().manual_seed(size)
    student, teacher = (
        (5 * torch.randn(size, classes, generator=generator, dtype=dtype)).log_softmax(dim=1)
        for _ in range(2)
    )
    student.requires_grad_()
    torchs = partial(F.kl_div, reduction="batchmean", log_target=True)
    expected = value_and_gradient(lambda s, t: torchs(s, t), student, teacher)
    value, gradient = value_and_gradient(lambda s, t: divergence(t, s), student, teacher)
    assert torch.equal(value, expected[0]) and torch.equal(gradient, expected[1])


# ---- what changes between epochs ---------------------------------------------------------------


def test_adafocal_follows_its_validation_and_is_restored_bit_for_bit():
    loss, generator = build_loss("AdaFocal+MDCA"), torch.Generator().manual_seed(3)
    gammas, met = [1.0] * 15, set()
    for epoch in range(60):
        # Too sure at first, later too hesitant by far.
        logits = torch.randn(300, 10, generator=generator) * (5 if epoch < 10 else 0.3)
        labels = torch.randint(10, (300,), generator=generator)
        labels = labels if epoch < 10 else logits.argmax(dim=1)
        loss.after_validation(logits, labels)
        confidence, prediction = logits.double().softmax(dim=1).max(dim=1)
        gaps = (confidence - (prediction == labels).double())[confidence.argsort()]
        for b, gap in enumerate(gaps.view(15, 20).mean(dim=1).tolist()):
            gamma = gammas[b] * math.exp(gap if gammas[b] > 0 else -gap)
            if abs(gamma) < 0.2:
                gamma = -0.2 if gamma > 0 else 0.2
            gammas[b] = min(max(gamma, -2.0), 20.0)
        torch.testing.assert_close(loss.base.gammas, torch.tensor(gammas))
        met |= {gamma > 0 for gamma in gammas}
    assert met == {True, False} and min(gammas) == -2.0
    restored = build_loss("AdaFocal+MDCA")
    restored.load_state_dict(loss.state_dict())
    logits, labels = batch("mixed", torch.float32)
    assert torch.equal(restored(logits, labels), loss(logits, labels))


def test_adafocal_of_equal_confidences():
    loss = AdaFocal()
    loss.after_validation(torch.tensor([[2.0, 0.0]]).repeat(50, 1), torch.zeros(50).long())
    assert loss.gammas.isfinite().all() and (loss.gammas != 1).sum() == 1


def test_dkd_rises_over_twenty_epochs():
    loss, (logits, labels) = build_distillation("DKD"), batch("mixed")
    full, alone = loss(logits, TEACHER, labels), nll(logits, labels)
    address = loss.share.data_ptr()
    for epoch, share in ((1, 1 / 20), (10, 0.5), (20, 1), (100, 1)):
        loss.before_epoch(epoch)
        expected = alone + share * (full - alone)
        torch.testing.assert_close(loss(logits, TEACHER, labels), expected, rtol=1e-6, atol=0)
    assert loss.share.data_ptr() == address  # where a captured step reads it


# ---- numerical edges ---------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_focal_gradient_is_finite_where_the_prediction_is_certain(gamma, dtype):
    margins = [*torch.linspace(0, 40, 81).tolist(), 1e4]
    logits = torch.tensor([[m, 0.0] for m in margins], dtype=dtype, requires_grad=True)
    labels = torch.zeros(len(margins), dtype=torch.long)
    value, gradient = value_and_gradient(lambda z, y: focal(z, y, gamma), logits, labels)
    assert value.isfinite() and gradient.isfinite().all()
    assert not gradient[-1].any()
    assert gradient.abs().max() <= (1 + gamma) / len(margins)


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e-30, 0.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name, kind, scale):
    logits, labels = batch(kind, torch.float32)
    loss = loss_of(name, **({} if name in DISTILLATIONS else {"gamma": 0.5, "margin": 0.1}))
    if name == "AdaFocal":
        loss.base.gammas.copy_(torch.tensor([0.2, -0.2, -2.0] * 5))
    logits = (logits.detach() * scale).requires_grad_()
    value, gradient = value_and_gradient(loss, logits, labels)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name, dtype, autocast):
    (logits, labels), loss = batch("mixed", dtype), loss_of(name, margin=0.1)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        value, gradient = value_and_gradient(loss, logits, labels)
    assert value.dtype == torch.float32 and value == loss(logits.float(), labels)
    assert gradient.dtype == dtype and gradient.isfinite().all()


# ---- the registry ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*losses.loss_names(), *DISTILLATIONS])
def test_every_loss_reads_exactly_its_flags(name):
    logits, labels = batch("mixed")
    value = loss_of(name)(3 * logits, labels)
    flags = losses.loss_flags(name)
    assert len({flag.name for flag in flags}) == len(flags)
    for flag in flags:
        assert all(flag.range[1](x) for x in flag.grid) and not flag.range[1](-1)
        assert loss_of(name, **{flag.name: 0.3})(3 * logits, labels) != value
    assert loss_of(name, unread=0.3)(3 * logits, labels) == value


RUN_NAMES = [  # what is asked for and given, what names the run
    ("MMCE beta=2", "NLL+MMCE beta=2"),
    ("focal_loss gamma=2", "FL gamma=2"),
    ("FL+MDCA gamma=3 alpha=2", "FL+MDCA gamma=3 beta=1"),
    ("DFL+MbLS", "DFL+MbLS gamma=5 beta=0.1 margin=10"),
    ("KD ce_weight=0.1", "KD T=4 Lambda=0.9"),
    ("KD Lambda=2 ce_weight=1 gamma=3", "KD T=4 Lambda=2 ce_weight=1"),
    ("DKD ce_weight=1.0 beta=2", "DKD T=4 Lambda=1 alpha=1 beta=2"),
    ("LSKD", "LSKD T=2 Lambda=9"),
    ("LSKD ce_weight=0.1", "LSKD T=2 Lambda=9"),
    ("LSKD ce_weight=1", "LSKD T=2 Lambda=9 ce_weight=1"),
    ("CPC", "NLL+CPC beta=0.1 exclusion=10"),
    ("KD+FitNet", "KD+FitNet T=4 Lambda=0.9 feature_weight=100"),
    ("KD+SP", "KD+SP T=4 Lambda=0.9 feature_weight=3000"),
    ("KD+RKD", "KD+RKD T=4 Lambda=0.9 feature_weight=1"),
    ("KD+PKT", "KD+PKT T=4 Lambda=0.9 feature_weight=30000"),
    ("DIST ce_weight=0.5", "DIST T=1 Lambda=1 beta=1 gamma=1 ce_weight=0.5"),
    ("KD+AT Lambda=0 ce_weight=1", "KD+AT T=4 Lambda=0 feature_weight=1000"),
    ("LSKD+SP feature_weight=2", "LSKD+SP T=2 Lambda=9 feature_weight=2"),
]


@pytest.mark.parametrize("asked, named", RUN_NAMES)
def test_what_names_a_run(asked, named):
    name, *given = asked.split()
    given = {key: float(x) for key, x in (each.split("=") for each in given)}
    found = losses.loss_parameters(name, given | {"T": None, "margin": None})
    name = name if losses.is_distillation(name) else losses.canonical_loss(name)
    assert " ".join([name, *(f"{k}={v:g}" for k, v in found.items())]) == named


@pytest.mark.parametrize("name, nearest", [
    ("nll", "NLL"), ("fl+mdca", "FL+MDCA"), ("focalloss", "focal_loss"), ("NLL+MCDA", "NLL+MDCA"),
    ("", ""), ("NLL+", ""), ("+MDCA", ""), ("MDCA+NLL", ""), ("NLL+MDCA+MMCE", ""), ("KD", ""),
])  # fmt: skip
def test_unknown_names_get_a_suggestion(name, nearest):
    with pytest.raises(ValueError, match="unknown loss") as error:
        losses.canonical_loss(name)
    assert not nearest or f"did you mean '{nearest}'" in str(error.value)
    assert all(known in str(error.value) for known in (*BASES, *TERMS))


def test_a_loss_is_imported_without_accelerate_and_without_a_command_line():
    """`from losses import build_loss` in a notebook loads torch and our losses, no more."""
    line = "import sys, torch; before = set(sys.modules); from losses import build_loss\n"
    line += "print(*sorted(set(sys.modules) - before))"
    loaded = run_script(sys.executable, "-c", line, cwd=ROOT).stdout.split()
    assert "losses.registry" in loaded
    packages = {module.partition(".")[0] for module in loaded}
    assert not packages & {"accelerate", "argparse", "utils", "models", "scripts"}


def test_a_loss_has_ranges_of_its_own(monkeypatch):
    """Though another one reads a flag of the same name."""
    anything = ("any number", lambda value: True)
    monkeypatch.setitem(BASES, "Own", LossEntry(nll, (Flag("alpha", -2.0, "", range=anything),)))
    assert losses.loss_parameters("Own", {"alpha": -3.0}) == {"alpha": -3.0}
    with pytest.raises(ValueError, match="--alpha: '-3' will not do; give a number from 0 "):
        losses.loss_parameters("LS", {"alpha": -3.0})


def test_a_loss_shares_no_flag_with_a_term():
    clashing = {"Own": LossEntry(nll, (Flag("margin", 1.0, ""),))}
    with pytest.raises(ValueError, match="Own and MbLS both read --margin"):
        refuse_shared_flags(clashing, TERMS)
