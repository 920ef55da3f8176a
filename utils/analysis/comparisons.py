"""Differences between rows, tested in pairs on the same test images (--against)."""

from difflib import get_close_matches
from itertools import product

import numpy as np

from utils.analysis.conformal import PAIRED_SETS, values_of_images
from utils.analysis.groups import Group, seeds_of_teacher
from utils.analysis.record import KINDS
from utils.analysis.sections import Section
from utils.calibration.bootstrap import shows_little, wrong_predictions
from utils.calibration.paired import BINNED, PAIRED, Difference, holm, paired_difference
from utils.program import UserError


def find_group(sections: list[Section], name: str) -> tuple[Section, Group]:
    """The row that --against names: with its teacher and data set, or shorter where that is clear.

    Raises UserError.
    """
    rows = [(section, group) for section in sections for group in section.groups]
    if not rows:
        raise UserError(f"--against {name}: there is no finished run; leave it out to see why")
    for name_of in NAMES_OF_ROWS:
        matches = [(section, group) for section, group in rows if name_of(section, group) == name]
        if len(matches) == 1:
            return matches[0]
        if matches:
            full_names = [full_name(section, group) for section, group in matches]
            if len(set(full_names)) < len(matches):  # also the data set has to be said
                full_names = [name_with_data(section, group) for section, group in matches]
            raise UserError(
                f"--against {name}: {len(matches)} rows have that name; "
                f"give one of {', '.join(map(repr, full_names))}"
            )
    every_name = [name_of(section, group) for section, group in rows for name_of in NAMES_OF_ROWS]
    nearest = get_close_matches(name, every_name, n=1, cutoff=0)[0]
    raise UserError(f"--against {name}: there is no such row; did you mean {nearest}?")


def name_with_data(section: Section, group: Group) -> str:
    return f"{section.title} {group.full_name}"


def full_name(section: Section, group: Group) -> str:
    return group.full_name


def short_name(section: Section, group: Group) -> str:
    return group.name


def bare_name(section: Section, group: Group) -> str:
    """Without what sets it apart from others."""
    return group.first.name


# What --against takes. The longest first: it is some row's own.
NAMES_OF_ROWS = (name_with_data, full_name, short_name, bare_name)


def distinct(section: Section, against: Group) -> list[Group]:
    """The printed groups but for `against`, and for those that repeat the logits of another.

    A teacher whose logits were divided for its students is the same net as its run's row.
    """
    first: dict[frozenset, Group] = {nets_of(against): against}
    for group in sorted(section.printed, key=lambda group: group.first.measured_by_student):
        first.setdefault(nets_of(group), group)
    return [group for group in section.printed if group in first.values() and group is not against]


def nets_of(group: Group) -> frozenset:
    """The nets that a group's logits are of, whoever stores them."""
    nets = set()
    for record in group.records:
        run = record.run_with_logits or record
        nets.add(run.measured["sha256"] if run.measured_by_student else (run.folder, run.part))
    return frozenset(nets)


def can_be_tested(metric: str) -> bool:
    """Whether it is a mean over images or bins."""
    return metric in PAIRED or metric in PAIRED_SETS


def matrices(group: Group, kind: str, metric: str) -> list[np.ndarray] | None:
    """What is compared of each run, (N, columns).

    None where a run does not store it, has an infinite value (the NLL of a label ruled out), or of
    a calibration error is wrong too rarely.
    """
    compared = []
    for record in group.records:
        if metric in PAIRED_SETS:
            values = values_of_images(record, kind, metric)
            if values is None:
                return None
            compared.append(values.float().unsqueeze(1).numpy())
        else:
            predicted = record.probabilities(kind)
            if predicted is None:
                return None
            probs, labels = predicted
            compared.append(PAIRED[metric](probs, labels))
        if not np.isfinite(compared[-1]).all():
            return None
    is_binned = metric in BINNED
    if is_binned and any(shows_little(wrong_predictions(run), len(run)) for run in compared):
        return None
    return compared


def teachers_of(group: Group) -> list[tuple | None]:
    """Who taught each of its runs, by the teachers' seeds."""
    return [seeds_of_teacher(record) for record in group.records]


def shares_teachers(group: Group) -> bool:
    """Whether several teachers taught it, and one of them several of its runs."""
    teachers = teachers_of(group)
    return 1 < len(set(teachers)) < len(teachers)


def differences(section: Section, against: Group) -> dict[tuple[Group, str, str], Difference]:
    """How each printed group differs from another: by group, kind of logits, metric (fractions).

    p-values are Holm's, for all groups in one metric and kind of logits. A metric that is no mean
    over images or bins, a run without stored predictions, a calibration error of a net that is
    hardly ever wrong, and a single test image have none. Nor has a teacher that repeats another
    group's logits, divided for its students: the same test twice is one test.
    """
    groups = distinct(section, against)
    metrics = [metric for metric in section.columns if can_be_tested(metric)]
    draws = section.choice.resamples or 1000
    tested = {}
    for kind, metric in product(KINDS, metrics):
        base = matrices(against, kind, metric)
        if base is None or len(base[0]) == 1:  # one image has no spread
            continue
        family = {}
        for group in groups:
            own = matrices(group, kind, metric)
            if own is not None:
                teachers = teachers_of(group), teachers_of(against)
                family[group] = paired_difference(own, base, draws, teachers)
        p_values = holm([difference.p for difference in family.values()])
        for (group, difference), p in zip(family.items(), p_values, strict=True):
            tested[group, kind, metric] = difference._replace(p=p)
    return tested
