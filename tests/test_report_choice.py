"""What validation chooses in a report, and what it says of the splits."""

import csv
import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from written_runs import (
    CLASSES,
    cells,
    identity,
    measured,
    only_section,
    shown,
    with_logits,
    write_predicted_run,
    write_run,
)

from scripts import report
from utils.calibration.metrics import classification_metrics

# Sweeps


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    """Validation prefers T = 4, Lambda = 0.9; test prefers T = 1, Lambda = 1; one is missing."""
    root = tmp_path_factory.mktemp("grid")
    write_run(root, model="resnet56", best=measured(test={"ece": 0.4}))
    for temperature, weight in {*product((1, 4, 20), (0.9, 1))} - {(20, 1)}:
        chosen, lure = ((temperature, weight) == one for one in ((4, 0.9), (1, 1)))
        val = {
            "nll": 0.2 if chosen else 0.6,
            "ece": 0.04 if chosen else 0.09,
            "refinement": 0.1 if chosen else 0.3,
        }
        test = {"nll": 0.1 if lure else 0.5, "ece": 0.01 if lure else 0.0765}
        best = measured(val, test, scaled={"ece": 0.0123})
        knobs = {"T": temperature, "Lambda": weight}
        write_run(root, "KD", knobs, best=best, teacher=identity())
    return root


@pytest.mark.parametrize("select", ["nll", "ece", "refinement"])
def test_validation_chooses_and_its_test_value_is_quoted(grid, select):
    section = only_section(grid, "--select", select)
    [sweep] = section.sweeps
    assert sweep.chosen.name == "resnet8 KD T=4 Lambda=0.9"
    assert sweep.parameters == ["T", "Lambda"] and len(sweep.places) == 5 and sweep.is_grid
    text = shown(section)
    [sentence] = [line for line in text.splitlines() if line.startswith("Sweep of")]
    assert "T = 4, Lambda = 0.9 has the best validation" in sentence
    assert "ECE % 7.65 → 1.23" in sentence
    assert re.search(r"T=4 Lambda=0.9 ←", text) and text.count("=0.9 ←") == 1
    for setting, mark in (("T=1 Lambda=1", ""), ("T=4 Lambda=0.9", "best")):
        assert cells(section, f"resnet8 KD {setting} from resnet56 NLL")["ece"].mark == mark


def test_any_set_of_settings(tmp_path):
    """Three parameters at random, and one alone: no map, but the best by validation."""
    rng = np.random.default_rng(0)
    for nll in (0.5, 0.3, 0.4, 0.6):
        knobs = dict(zip(("T", "Lambda"), rng.uniform(1, 9, 2), strict=True))
        lr, best = rng.uniform(), measured({"nll": nll})
        write_run(tmp_path, "KD", knobs, best=best, settings={"lr": lr}, teacher=identity())
        write_run(tmp_path, "NLL+MDCA", {"beta": 10 * nll}, best=best)
    section = only_section(tmp_path)
    three, one = section.sweeps
    assert (three.parameters, one.name) == (["T", "Lambda", "lr"], "resnet8 NLL+MDCA over beta")
    for sweep in (three, one):
        assert sweep.chosen.validation("nll") == [0.3] and not sweep.is_grid
    assert "beta = 3 has the best validation NLL" in shown(section)


def test_other_seeds_losses_or_settings_are_no_sweep(tmp_path):
    write_run(tmp_path, seed=1)
    write_run(tmp_path, seed=2)
    write_run(tmp_path, "LS", {"alpha": 0.1})
    write_run(tmp_path / "b", "FL", {"gamma": 1})
    write_run(tmp_path / "c", "FL", {"gamma": 2}, settings={"epochs": 1})
    assert only_section(tmp_path).sweeps == []


def test_a_sweep_that_validation_does_not_know_has_no_choice(tmp_path):
    """Nor where a metric is known of some of the seeds alone."""
    for gamma, seed in product((1, 2), (42, 43)):
        known = {} if seed == 42 else {"refinement": 0.3}
        write_run(tmp_path, "FL", {"gamma": gamma}, seed, best=measured(known))
    section = only_section(tmp_path, "--select", "refinement")
    assert section.sweeps == [] and len(section.compared) == 2
    assert "Not known on validation: the refinement of resnet8 FL gamma=1; " in shown(section)


def test_a_setting_that_was_not_chosen_is_drawn_where_no_map_shows_it(tmp_path, grid):
    write_sweep(tmp_path, {1: {42: 0.40}, 2: {42: 0.41}})
    section = only_section(tmp_path)
    assert len(section.compared) == 1 and len(section.drawn) == 2
    section = only_section(grid)
    assert section.drawn == section.compared != section.printed


def write_sweep(root: Path, values: dict[int, dict[int, float]]) -> None:
    """Validation NLL by gamma and seed."""
    for gamma, by_seed in values.items():
        for seed, nll in by_seed.items():
            write_run(root, "FL", {"gamma": gamma}, seed, best=measured({"nll": nll}))


def test_settings_are_compared_on_the_seeds_that_all_have(tmp_path):
    """One lucky seed does not beat a setting that is better on that very seed."""
    write_sweep(tmp_path, {1: {42: 0.40, 43: 0.44, 44: 0.45}, 2: {42: 0.41}})
    section = only_section(tmp_path)
    [sweep] = section.sweeps
    assert sweep.chosen.name == "resnet8 FL gamma=1"
    assert "validation NLL on the seeds that all settings have (42). On test" in shown(section)


def test_settings_without_a_common_seed(tmp_path):
    write_sweep(tmp_path, {1: {42: 0.40, 43: 0.44}, 2: {44: 0.41}})
    section = only_section(tmp_path)
    assert section.sweeps[0].chosen.name == "resnet8 FL gamma=2"
    assert "no seed is common to all settings" in shown(section)


def test_equal_seeds_need_no_word(tmp_path):
    write_sweep(tmp_path, {1: {42: 0.40, 43: 0.44}, 2: {43: 0.41, 42: 0.30}})
    section = only_section(tmp_path)
    assert section.sweeps[0].chosen.name == "resnet8 FL gamma=2"
    assert "seed" not in shown(section).split("Sweep of")[1]


# Validation and test


def set_images(root: Path, val: int = 4000, test: int = 10000) -> None:
    for file in root.rglob("config.json"):
        content = json.loads(file.read_text()) | {"images": {"val": val, "test": test}}
        file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "val, test, said",
    [
        ((0.87, 0.89), (0.855, 0.875), "easier than test here: its top-1 is on average 1.5 points"),
        ((0.85, 0.85), (0.87, 0.87), "harder than test here: its top-1 is on average 2.0 points"),
        ((0.87, 0.86), (0.86, 0.855), None),  # less than two standard errors
    ],
)
def test_whether_validation_is_easier_is_said(tmp_path, val, test, said):
    for seed, (own, others) in enumerate(zip(val, test, strict=True)):
        write_run(tmp_path, seed=seed, best=measured({"top1": own}, {"top1": others}))
    assert "than test here" not in shown(only_section(tmp_path))  # of how many images?
    set_images(tmp_path)
    text = shown(only_section(tmp_path))
    assert said in text and "2 of 2 nets" in text if said else "than test here" not in text


def test_a_third_partys_teacher_says_nothing_of_the_splits(tmp_path):
    third_party = measured({"top1": 1.0}, {"top1": 0.5}) | identity("foreign", "best", None, "abc")
    write_run(tmp_path, "KD", {"T": 4}, teacher=third_party)
    set_images(tmp_path)
    assert "than test here" not in shown(only_section(tmp_path))


def test_nor_does_its_student(tmp_path):
    """It may have learned of the validation images from its teacher."""
    third_party = measured({"top1": 0.5}, {"top1": 0.5}) | identity("foreign", "best", None, "abc")
    easier = measured({"top1": 0.9}, {"top1": 0.5})
    write_run(tmp_path, "KD", {"T": 4}, best=easier, teacher=third_party)
    set_images(tmp_path)
    assert "than test here" not in shown(only_section(tmp_path))
    write_run(tmp_path, best=easier)
    set_images(tmp_path)
    assert "(1 of 1 nets)" in shown(only_section(tmp_path))


def test_the_temperature_that_test_would_choose_is_shown_on_request(tmp_path, capsys):
    """Against SciPy's minimum of the NLL; no row but the scaled one has it."""
    folder = write_predicted_run(tmp_path, seed=3)
    write_run(tmp_path, "LS")  # without predictions
    with np.load(folder / "predictions.npz") as arrays:
        logits, labels = arrays["best_test_logits"].astype(float), arrays["test_labels"]

    def nll(temperature):
        log_probs = log_softmax(logits / temperature, axis=1)
        return -log_probs[np.arange(len(labels)), labels].mean()

    best = minimize_scalar(nll, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-8}).x
    report.main([str(tmp_path), "--columns", "ece", "--resamples", "0"])
    assert "T of test" not in capsys.readouterr().out
    flags = ["--columns", "ece", "--test-temperature", "--out", str(tmp_path / "out")]
    report.main([str(tmp_path), *flags, "--resamples", "0"])
    text = capsys.readouterr().out
    lines = {tuple(line.split()[:3]): line.split() for line in text.splitlines()}
    expected = classification_metrics(logits, labels, best)["ece"]
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("scaled ")]
    assert rows[0][-2:] == ["–", "–"] and rows[0][-3] == "1.500"
    assert rows[1][-3:] == ["1.500", f"{best:.3f}", f"{100 * expected:.2f}"]
    assert lines[("resnet8", "NLL", "raw")][-3:] == ["–"] * 3
    assert "no result" in text and "times the one in use (1 with stored logits)" in text
    with open(tmp_path / "out/report.csv") as file:
        found = {(line["net"], line["logits"]): line["T of test"] for line in csv.DictReader(file)}
    assert float(found["resnet8 NLL", "scaled"]) == pytest.approx(best, rel=1e-5)
    assert found["resnet8 NLL", "raw"] == found["resnet8 LS", "scaled"] == ""


def test_a_temperature_at_its_bound_says_nothing_of_the_splits(tmp_path):
    folder = write_predicted_run(tmp_path)
    flag = "--test-temperature"
    assert "The T that test would choose" in shown(only_section(tmp_path, flag))
    with np.load(folder / "predictions.npz") as stored:
        labels = stored["test_labels"]
    with_logits(folder, np.eye(CLASSES, dtype=np.float32)[labels])  # always right: T is 0
    assert "The T that test would choose" not in shown(only_section(tmp_path, flag))
