"""Post-hoc calibration: maps of the logits that are fitted on the validation split.

All are softmax(W x + b) with a convex NLL, x logits or log probabilities: W is a scalar, a diagonal
or a whole matrix. Fitted in float64 on the CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import itemgetter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .scores import Array, checked_pair
from .temperature import fit_temperature

# Of the gradient where the curvature is about 1, so half its square is the distance to the minimum:
# 1e-12 nats. Cross-validation need not be as exact.
TOLERANCE = 1e-6
CV_TOLERANCE = 1e-4
MAX_ITERATIONS = 1000
AT_BOUND = "the temperature lies at the bound of its range, do not trust the row"
FROM_BOUND = "its fit starts from a temperature at the bound of its range, do not trust the row"
IDENTITY = "no map that was tried beats the identity, so nothing is changed"
FELL_BACK = "what was fitted is worse than temperature scaling, which stands in its place"
# Strengths of the two penalties of Dirichlet calibration, in nats, from strong to weak.
LAMBDAS = (1e6, 1e5, 1e4, 1e3, 1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3)
MUS = (1e2, 1e0, 1e-2, 1e-4)
FOLDS = 5
ROUNDING = 1e-9  # relative, of two NLLs of one map


@dataclass(frozen=True)
class Calibration:
    """A fitted map of logits, or where `of_log_probs` of log probabilities, (N, K) to logits.

    weight (K, K), bias (K,), float64. `facts` says how it was found, ready for JSON; `notes` is
    what a reader must know before trusting it.
    """

    weight: Tensor
    bias: Tensor
    of_log_probs: bool = False
    facts: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __call__(self, logits: Array) -> Tensor:
        """The calibrated logits (N, K), float64."""
        inputs = torch.as_tensor(logits).double()
        if self.of_log_probs:
            inputs = inputs.log_softmax(dim=1)
        return inputs @ self.weight.T + self.bias

    def parameters(self) -> dict:
        """The map itself, ready for JSON: of a diagonal weight, the diagonal."""
        diagonal = self.weight.diagonal()
        is_diagonal = torch.equal(self.weight, diagonal.diag())
        return {
            "of_log_probs": self.of_log_probs,
            "weight": (diagonal if is_diagonal else self.weight).tolist(),
            "bias": self.bias.tolist(),
        }


def no_calibration(logits: Array, labels: Array) -> Calibration:
    """The identity on logits (N, K), which every other map is measured against."""
    classes = logits.shape[1]
    return Calibration(torch.eye(classes).double(), torch.zeros(classes).double())


def temperature_scaling(logits: Array, labels: Array) -> Calibration:
    """softmax(z / T), T as `fit_temperature` finds it for logits (N, K) and labels (N,).

    Raises ValueError as that does. Guo et al., ICML 2017, Section 4.2.
    """
    temperature, at_bound = fit_temperature(logits, labels)
    identity = no_calibration(logits, labels)
    return replace(
        identity,
        weight=identity.weight / temperature,
        facts={"temperature": temperature, "at_bound": at_bound},
        notes=(AT_BOUND,) if at_bound else (),
    )


def vector_scaling(logits: Array, labels: Array) -> Calibration:
    """softmax(w * z + b), a weight and a bias per class, of least NLL.

    Logits (N, K), labels (N,); raises ValueError as `fit_temperature`. The fit starts from
    temperature scaling. The biases' mean is 0. A class without a label keeps its temperature-scaled
    logit, which the NLL would only ever lower. Guo et al., ICML 2017, Section 4.2.
    """
    temperature, at_bound = fit_temperature(logits, labels)
    logits = torch.as_tensor(logits).double()
    labels = torch.as_tensor(labels).long()
    # Only the classes that have labels are fitted.
    present, label = labels.unique(return_inverse=True)
    scaled = logits[:, present] / temperature
    features = torch.stack([scaled, torch.ones_like(scaled)], dim=2)  # (N, K, 2)
    by_logits = _curvature_by_logits(scaled)
    products = torch.einsum("nk,nki,nkj->kij", by_logits, features, features)
    curvature = products / len(labels)

    def loss(parameters: Tensor) -> Tensor:
        return F.cross_entropy(scaled * parameters[:, 0] + parameters[:, 1], label)

    # From temperature scaling: the weight 1 and the bias 0 of each class.
    parameters = torch.tensor([[1.0, 0.0]]).double().repeat(logits.shape[1], 1)
    start = parameters[present]
    parameters[present], facts = _minimise(loss, start, curvature, TOLERANCE)
    weight, bias = parameters.T
    bias[present] -= bias[present].mean()
    fitted = Calibration(torch.diag(weight / temperature), bias, facts=facts)
    return _approved(fitted, at_bound, logits, labels)


def dirichlet_calibration(logits: Array, labels: Array, folds: int = FOLDS) -> Calibration:
    """softmax(W log p + b), the NLL penalised by lambda and mu, both by cross-validation.

    Logits (N, K), labels (N,); raises ValueError as `fit_temperature`. The penalty (ODIR) is
    lambda times the mean square of W's off-diagonal entries plus mu times that of b. For each mu
    of MUS the strengths in LAMBDAS are tried from strong to weak until the held-out NLL rises; the
    identity is a candidate too. The chosen map is fitted on all samples, from temperature scaling.
    A class without a label keeps its temperature-scaled log probability, as in `vector_scaling`.
    Kull et al., "Beyond temperature scaling", NeurIPS 2019, Sections 3 and 4.
    """
    logits, labels = checked_pair(logits, labels)
    logits = logits.double()

    # Which strengths hold best on samples that were held out?
    held_out = _held_out_samples(len(labels), folds)
    scores = _cross_validate(logits, labels, held_out)
    identity_nll = F.cross_entropy(logits, labels).item()
    best = min(scores, key=itemgetter("held_out_nll"), default=None)
    if best is None or not best["held_out_nll"] < identity_nll:
        return replace(
            no_calibration(logits, labels),
            facts={
                "folds": len(held_out),
                "identity_nll": identity_nll,
                "cross_validation": scores,
            },
            notes=(IDENTITY,),
        )

    # With these once more, on all samples.
    problem = _Dirichlet(logits, labels)
    parameters, fit = problem.fit(best["lambda"], best["mu"], TOLERANCE)
    fitted = Calibration(
        weight=parameters[:, :-1] / problem.temperature,
        bias=parameters[:, -1],
        of_log_probs=True,
        facts={
            "lambda": best["lambda"],
            "mu": best["mu"],
            "held_out_nll": best["held_out_nll"],
            "folds": len(held_out),
            "identity_nll": identity_nll,
            "cross_validation": scores,
            "converged": fit["converged"],
            "gradient": fit["gradient"],
            "iterations": fit["iterations"],
        },
    )
    return _approved(fitted, problem.at_bound, logits, labels)


def _approved(fitted: Calibration, at_bound: bool, logits: Tensor, labels: Tensor) -> Calibration:
    """What was fitted, with its notes, or a simpler map that is better on the same samples.

    The fit leaves classes out that have no label; with them it may be worse than what it began as.
    """
    simpler = {IDENTITY: no_calibration(logits, labels)}
    if not at_bound:
        simpler[FELL_BACK] = temperature_scaling(logits, labels)
    nll_of = {
        note: F.cross_entropy(simple(logits), labels).item() for note, simple in simpler.items()
    }
    note = min(nll_of, key=nll_of.get)
    allowed = nll_of[note] * (1 + ROUNDING)
    if not F.cross_entropy(fitted(logits), labels).item() <= allowed:
        return replace(simpler[note], facts=fitted.facts, notes=(note,))

    notes = []
    if at_bound:
        notes.append(FROM_BOUND)
    facts = fitted.facts
    if not facts["converged"]:
        notes.append(
            f"did not converge: gradient {facts['gradient']:.1e} after {facts['iterations']} "
            f"iterations, {TOLERANCE:.0e} wanted"
        )
    absent = sorted(set(range(logits.shape[1])) - set(labels.tolist()))
    if absent:
        notes.append(
            f"no validation image of class {', '.join(map(str, absent))}: its temperature-scaled "
            "logit is kept"
        )
    return replace(fitted, notes=tuple(notes))


def _held_out_samples(samples: int, folds: int) -> list[np.ndarray]:
    """Which samples each fold holds out; no fold where there is one sample alone."""
    if samples == 1:  # it cannot be held out from itself
        return []
    order = np.random.default_rng(0).permutation(samples)
    return np.array_split(order, min(folds, samples))


def _cross_validate(logits: Tensor, labels: Tensor, held_out: list[np.ndarray]) -> list[dict]:
    """The mean held-out NLL per sample of the settings that were tried.

    `held_out`: of each fold, which samples.
    """
    # Of each fold its problem, and the inputs and labels that are held out from it.
    problems = []
    for samples in held_out:
        out = torch.from_numpy(np.isin(np.arange(len(labels)), samples))
        problem = _Dirichlet(logits[~out], labels[~out])
        problems.append((problem, problem.inputs(logits[out]), labels[out]))

    scores = []
    for mu in tqdm(MUS if held_out else (), desc="Dirichlet", leave=False, disable=None):
        solutions = [None] * len(held_out)
        nll_before = math.inf
        for strength in LAMBDAS:
            nll = 0.0
            for fold, (problem, inputs, right) in enumerate(problems):
                # From the solution for the strength before, which is near.
                solution, _ = problem.fit(strength, mu, CV_TOLERANCE, start=solutions[fold])
                solutions[fold] = solution
                sum_out = F.cross_entropy(inputs @ solution.T, right, reduction="sum")
                nll += sum_out.item() / len(labels)
            scores.append({"lambda": strength, "mu": mu, "held_out_nll": nll})
            if nll > nll_before:
                break
            nll_before = nll
    return scores


class _Dirichlet:
    """The problem of one data set, whose solutions for several penalties share the curvature.

    Parameters are (K, K + 1): weights of log p / T, of which temperature scaling is the identity,
    then the bias.
    """

    def __init__(self, logits: Tensor, labels: Tensor):
        self.temperature, self.at_bound = fit_temperature(logits, labels)
        self.present, self.labels = labels.unique(return_inverse=True)
        self.features = self.inputs(logits)
        self.identity = torch.eye(logits.shape[1]).double()
        by_logits = _curvature_by_logits(self.features[:, self.present]) / len(labels)
        columns = by_logits.T.unsqueeze(2)  # (K, N, 1)
        products = [(self.features * column).T @ self.features for column in columns]
        self.curvature = torch.stack(products)

    def inputs(self, logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(dim=1) / self.temperature
        return torch.cat([log_probs, torch.ones(len(logits), 1).double()], dim=1)

    def fit(
        self, strength: float, mu: float, tolerance: float, start: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """The parameters of least penalised NLL, and how the search for them ended."""
        count = len(self.identity)
        present = self.present
        # Off the diagonal, and the bias; rows of the classes that have labels.
        penalised = torch.cat([1 - self.identity, torch.ones(count, 1).double()], dim=1)[present]
        penalty = penalised * (strength / max(1, count * (count - 1)) / self.temperature**2)
        penalty[:, -1] = mu / count

        def centre(parameters: Tensor) -> Tensor:
            # The softmax does not see a number added to a whole column: a flat valley for the
            # search. Of all such parameters these have the least penalty.
            counts = penalised.sum(dim=0).clamp_min(1)
            return parameters - (parameters * penalised).sum(dim=0) / counts

        def objective(parameters: Tensor) -> Tensor:
            nll = F.cross_entropy(self.features @ parameters.T, self.labels)
            return nll + (penalty * centre(parameters).square()).sum()

        fitted = F.pad(self.identity, (0, 1)) if start is None else start.clone()
        curvature = self.curvature + torch.diag_embed(2 * penalty)
        parameters, facts = _minimise(objective, fitted[present], curvature, tolerance)
        fitted[present] = centre(parameters)
        return fitted, facts


def _curvature_by_logits(logits: Tensor) -> Tensor:
    """p (1 - p) of logits (N, K): the second derivative of a sample's NLL by each of its logits."""
    probs = logits.softmax(dim=1)
    return probs * (1 - probs)


def _minimise(
    loss: Callable[[Tensor], Tensor], start: Tensor, curvature: Tensor, tolerance: float
) -> tuple[Tensor, dict]:
    """L-BFGS on parameters (K, d) whose rows have about this curvature (K, d, d).

    It works in units in which that is the identity: in their own, log probabilities are so
    correlated that it would need thousands of steps.
    """
    size = curvature.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    identity = torch.eye(curvature.shape[1]).double()
    root = torch.linalg.cholesky(curvature + (1e-9 * size + 1e-12) * identity)
    unit = torch.linalg.solve_triangular(root, identity, upper=False).mT.contiguous()
    steps = torch.zeros_like(start).requires_grad_()

    def parameters() -> Tensor:
        return start + torch.bmm(unit, steps.unsqueeze(2)).squeeze(2)

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(parameters())
        value.backward()
        return value

    search = torch.optim.LBFGS(
        [steps],
        max_iter=MAX_ITERATIONS,
        max_eval=3 * MAX_ITERATIONS,
        history_size=50,
        tolerance_grad=tolerance,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )
    search.step(closure)

    closure()  # the gradient where it ended
    gradient = steps.grad.abs().max().item()
    facts = {
        "converged": gradient <= tolerance,
        "gradient": gradient,
        "iterations": search.state[steps]["n_iter"],
    }
    return parameters().detach(), facts


# name in tables: how to fit it to validation logits (N, K) and labels (N,)
METHODS: dict[str, Callable[[Array, Array], Calibration]] = {
    "none": no_calibration,
    "temperature": temperature_scaling,
    "vector": vector_scaling,
    "Dirichlet ODIR": dirichlet_calibration,
}
