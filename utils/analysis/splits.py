"""Whether validation speaks for test: top-1 on both, and the temperatures that suit either.

A temperature is fitted on validation. Where that is easier than test, it suits test less, and a
scaled row shows that error of T as if it were the net's own. Nothing here chooses anything.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from utils.analysis.record import Record
from utils.calibration.metrics import ece
from utils.calibration.temperature import fit_temperature
from utils.columns import Column
from utils.split_metrics import with_finite_logits

NEGLIGIBLE = 0.02  # of a ratio of temperatures
NOISE = 2  # standard errors: a difference of the splits below that may be luck
COLUMNS_OF_TEST = {
    "T": Column("T", 1, 3),
    "of_test": Column("T of test", 1, 3),
    "ece": Column("ECE % with T of test", 100, 2),
}


class Suited(NamedTuple):
    """The temperature that test would choose, and the ECE (fraction) that it gives there."""

    temperature: float
    at_bound: bool  # of its range: a limit of the fit, and no temperature that suits
    ece: float


@cache
def suited_to_test(record: Record) -> Suited | None:
    """Fitted on the labels that it is measured on: no result, but what T's transfer costs.

    None without stored predictions. Raises UserError where they are damaged.
    """
    if not record.predictions.exists():
        return None
    logits, labels = record.stored("test")
    temperature, at_bound = fit_temperature(with_finite_logits(logits), labels)
    probs = (logits.double() / temperature).softmax(dim=1)
    return Suited(temperature, at_bound, ece(probs, labels))


def own_temperatures(records: list[Record]) -> dict[str, np.ndarray]:
    """Under its key of COLUMNS_OF_TEST, the temperature of every run, fitted to validation."""
    return {"T": np.array([record.measured["temperature"] for record in records])}


def columns_of_test(records: list[Record]) -> dict[str, np.ndarray]:
    """By key of COLUMNS_OF_TEST, a value of every run; without predictions T alone."""
    columns = own_temperatures(records)
    suited = [suited_to_test(record) for record in records]
    if None not in suited:
        columns["of_test"] = np.array([fit.temperature for fit in suited])
        columns["ece"] = np.array([fit.ece for fit in suited])
    return columns


def comparison(records: list[Record], with_temperatures: bool) -> list[str]:
    """Sentences on how the splits of these nets differ; none where that may be luck.

    Third parties' teachers may have been trained on what validates here, and pass that on to their
    students: they do not count, nor do these.
    """
    nets = [
        net
        for net in records
        if net.seed is not None
        and net.run_with_logits not in records
        and not (net.taught_by and net.taught_by.third_party)
    ]
    gap = top1_gap(nets)
    sentences = [gap] if gap else []

    ratios = []  # the T that test would choose over the one in use
    for net in nets if with_temperatures else ():
        fit = suited_to_test(net)
        if fit is not None and not (fit.at_bound or net.measured["temperature_at_bound"]):
            ratios.append(fit.temperature / net.measured["temperature"])
    if not ratios:
        return sentences
    ratio = math.exp(np.mean(np.log(ratios)))
    if gap or abs(ratio - 1) > NEGLIGIBLE:
        sentences.append(
            f"The T that test would choose is {ratio:.2f} times the one in use ({len(ratios)} with "
            "stored logits): a part of each scaled ECE is that error of T (--test-temperature "
            "shows how much)."
        )
    return sentences


def standard_error(accuracy: float, images: int) -> float:
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / images)


def top1_gap(nets: list[Record]) -> str:
    """A sentence where validation is easier or harder than test by more than chance.

    All nets share the images, so the standard error is not less than that of a single net.
    """
    sizes = [net.config.get("images") for net in nets]
    if not nets or not all(sizes):
        return ""
    val = np.array([net.measured["val"]["top1"] for net in nets])
    test = np.array([net.measured["test"]["raw"]["top1"] for net in nets])
    images = sizes[0]
    error = math.hypot(
        standard_error(val.mean(), images["val"]), standard_error(test.mean(), images["test"])
    )
    gap = (val - test).mean()
    if abs(gap) <= NOISE * error:
        return ""
    word = "easier" if gap > 0 else "harder"
    side = "above" if gap > 0 else "below"
    agreeing = int((np.sign(val - test) == np.sign(gap)).sum())
    return (
        f"Validation is {word} than test here: its top-1 is on average {100 * abs(gap):.1f} points "
        f"{side} that of test ({agreeing} of {len(nets)} nets), {abs(gap) / error:.1f} standard "
        "errors of such a difference."
    )
