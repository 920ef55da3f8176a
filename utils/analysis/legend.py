"""What a reader needs to know of the main table: a sentence each, and only of what occurs in it."""

from itertools import product

from utils.analysis.conformal import ALPHA, LEAST_IMAGES
from utils.analysis.groups import Group, grouped_by, same_but_for_seed, seeds_of
from utils.analysis.record import KINDS
from utils.analysis.rows import FEW
from utils.analysis.sections import Section, Sweep
from utils.analysis.splits import comparison
from utils.columns import COLUMNS, NO_SCALED_ROW, SET_METRICS, printable
from utils.program.words import counted
from utils.run_files import number_text

TEMPERED = "tempered"
EPOCH_WORDS = {"best": "the epoch that validation chose", "last": "the last epoch"}
OTHER_EPOCH = {"best": "last", "last": "best"}


def legend(section: Section, has_chance: bool) -> list[str]:
    """`has_chance`: whether the table has intervals of the ECE."""
    choice = section.choice
    groups = section.printed
    nets = [record for group in groups for record in group.records]
    return [
        *about_rows(section),
        *about_columns(section, has_chance),
        *about_choices(section),
        *about_teachers(section),
        *comparison(nets, bool(choice.resamples or choice.test_temperature)),
        *[sweep_sentence(section, sweep) for sweep in section.sweeps if sweep.chosen in groups],
        *notes_of_fits(groups),
    ]


def about_rows(section: Section) -> list[str]:
    sentences = [
        f"Test split, {EPOCH_WORDS[section.choice.epoch]}; scaled: logits divided by the "
        "temperature that fits the validation split best. Mean ± standard deviation of n runs that "
        "differ only in the seed."
    ]
    kinds = dict.fromkeys(kind for group in section.printed for kind in group.rows)
    fitted = [kind for kind in kinds if kind not in (*KINDS, TEMPERED)]
    if fitted:
        sentences.append(f"{', '.join(fitted)}: fitted on the validation split (scripts.posthoc).")
    if TEMPERED in kinds:
        sentences.append("tempered: divided by --teacher_temperature, as its students saw them.")
    return sentences


def about_columns(section: Section, has_chance: bool) -> list[str]:
    rows = [row for group in section.printed for row in group.rows.values()]
    sentences = []
    if has_chance and "ece" in section.columns:
        sentences.append(
            "95 % interval: of the true mean ECE of these n nets, over test images; it allows for "
            "the bias of the measured one. ECE of a calibrated net: what n nets of these "
            "confidences would measure on average if they were calibrated, and 95 % of draws less "
            "than the value in brackets."
        )
    if "mce" in section.columns and any(row.few for row in rows):
        sentences.append(
            f"MCE: beware, in some rows a bin holds fewer than {FEW} test images, and its value is "
            "mostly chance."
        )
    # A file of JSON has no infinity, so an infinite value was left out, and a column without any.
    is_nll_wanted = not section.choice.columns or "nll" in section.choice.columns
    if is_nll_wanted and any("nll" not in row.cells for row in rows):
        sentences.append(
            "A row without NLL gives the true class of some image the probability 0: its NLL is "
            "infinite."
        )
    if section.choice.with_sets:
        sentences.append(about_sets(section))
    return sentences


def about_sets(section: Section) -> str:
    sentence = (
        f"Coverage and set size: of conformal sets at {100 * (1 - ALPHA):g} %, fitted on the "
        "validation split, of the LAC method where no other is named."
    )
    if any(metric.endswith("set_size_matched") for metric in section.columns):
        sentence += (
            f" Size at {100 * (1 - ALPHA):g} % of test: with the threshold at which these cover "
            "that share of test. It has seen the labels: no result, but the same coverage for all."
        )
    metric = next(metric for metric in section.columns if metric in SET_METRICS)
    for group in section.printed:
        if any(metric not in row.cells for kind, row in group.rows.items() if kind in KINDS):
            return (
                f"{sentence} A row has none where validation logits are not stored, where these "
                f"are of fewer than {LEAST_IMAGES} images, or where a third party's teacher may "
                "have been trained on them."
            )
    return sentence


def about_choices(section: Section) -> list[str]:
    rows = [row for group in section.printed for row in group.rows.values()]
    sentences = []
    if section.sweeps:
        sentences.append(
            f"←: chosen from its sweep by validation {select_words(section)}, of logits as they "
            "are; the sweep's other settings do not take part in the comparison. (--select "
            "refinement chooses what is the best once it is scaled.)"
        )
    for groups in section.unchosen:
        names = "; ".join(printable(group.full_name) for group in groups)
        sentences.append(
            f"Not known on validation: the {select_words(section)} of {names}. Nothing is chosen "
            "from this sweep."
        )
    if any(row.at_bound for row in rows):
        sentences.append("†: the temperature lies at the bound of its range; do not trust the row.")
    return sentences


def about_teachers(section: Section) -> list[str]:
    choice = section.choice
    nets = [group.first for group in section.printed]
    sentences = []
    if any(net.note for net in nets):
        sentences.append(
            f"{OTHER_EPOCH[choice.epoch]} epoch: what taught the students below it; a teacher is "
            "always shown at the epoch that they were taught by."
        )
        sentences += about_split_rows(section.printed)
    if choice.test_temperature:
        sentences.append(
            "T of test: what fits the test split best, and the ECE that it gives there. It has "
            "seen the labels: no result, but what the transfer of T from validation costs."
        )
    if any(net.measured_by_student for net in nets):
        sentences.append("A teacher without a run here is shown as its students' runs measured it.")
    if any(net.third_party for net in nets):
        sentences.append(f"A third party's teacher has no scaled row. {NO_SCALED_ROW}")
    if any(net.taught_by and net.taught_by.third_party for net in nets):
        sentences.append(
            "Students of a third party's teacher may know something of the validation images from "
            "it: their T, and sets that are fitted there, are then too small for test."
        )
    if any("temperature" not in net.measured and not net.third_party for net in nets):
        sentences.append("A file of logits without those of validation has no scaled row.")
    sentences += about_confidence(section.printed)
    unprinted = len(section.groups) - len(section.printed)
    if unprinted:
        sentences.append(f"{unprinted} further nets are in report.csv only (--nets prints more).")
    return sentences


def about_split_rows(groups: list[Group]) -> list[str]:
    """Where runs of a row stand in another one, at the epoch that taught: how many."""
    sentences = []
    for same in grouped_by(groups, settings_of_row):
        rows = [group for group in same if not group.first.note]
        rows_that_taught = [group for group in same if group.first.note]
        for group, taught in product(rows, rows_that_taught):
            missing = len(taught.seeds - group.seeds)
            if missing:
                sentences.append(
                    f"{printable(group.full_name)} lacks {counted(missing, 'run')} that taught: "
                    f"see {printable(taught.full_name)}."
                )
    return sentences


def settings_of_row(group: Group) -> tuple:
    """Equal for rows that differ in the epoch alone, best or last."""
    return same_but_for_seed(group.first, any_epoch=True), group.exp_name


def about_confidence(students: list[Group]) -> list[str]:
    """How sure the teachers are of what their students learned from: means over their students."""
    seen: dict[Group, list[dict[str, float]]] = {}
    for group in students:
        for student in group.records:
            if student.taught_by is not None and student.taught_by.measured.get("seen"):
                seen.setdefault(group.teacher, []).append(student.taught_by.measured["seen"])
    if not seen:
        return []

    def mean(teacher: Group, key: str) -> float:
        return sum(values[key] for values in seen[teacher]) / len(seen[teacher])

    texts = []
    for teacher in seen:
        text = f"{printable(teacher.name)} {100 * mean(teacher, 'view_confidence'):.1f}"
        if all("val_confidence" in values for values in seen[teacher]):
            text += f" and {100 * mean(teacher, 'val_confidence'):.1f} %"
        else:
            text += " % (unknown on validation)"
        temperature = mean(teacher, "temperature")
        texts.append(text if temperature == 1 else f"{text}, divided by T = {temperature:.3f}")
    return [
        "Mean confidence of a teacher on its students' training images and on validation images: "
        f"{'; '.join(texts)}."
    ]


def select_words(section: Section) -> str:
    """The metric that validation chooses by, as its column is headed."""
    return COLUMNS[section.choice.select].head.removesuffix(" %")


def sweep_sentence(section: Section, sweep: Sweep) -> str:
    """Which setting validation chose, and what it is worth on test."""
    values = zip(sweep.parameters, sweep.places[sweep.chosen], strict=True)
    setting = ", ".join(f"{name} = {number_text(value)}" for name, value in values)
    worth = []
    for metric in section.columns:
        column = COLUMNS[metric]
        texts = []
        for kind in KINDS:
            value = sweep.chosen.rows[kind].cells.get(metric)
            texts.append("–" if value is None else column.text_with_spread(value.mean, value.sd))
        worth.append(f"{column.head} {' → '.join(dict.fromkeys(texts))}")
    return (
        f"Sweep of {printable(sweep.name)}, {len(sweep.places)} settings: {setting} has the best "
        f"validation {select_words(section)}{compared_on(sweep)}. "
        f"On test, raw → scaled: {', '.join(worth)}."
    )


def compared_on(sweep: Sweep) -> str:
    """Which runs of the settings were compared, where not all have the same seeds."""
    if not sweep.seeds_differ:
        return ""
    if not sweep.seeds:
        return " (no seed is common to all settings: each is judged by its own, so beware)"
    runs = {seeds_of(run): run for group in sweep.places for run in group.records}
    seeds = [str(run.seed) for key, run in runs.items() if key in sweep.seeds]
    return f" on the seeds that all settings have ({', '.join(dict.fromkeys(seeds))})"


def notes_of_fits(groups: list[Group]) -> list[str]:
    """What scripts.posthoc says of its maps that have a row, each remark once."""
    notes = []
    for group in groups:
        for net in group.records:
            for method, fit in net.posthoc.items():
                if method in group.rows:
                    notes += [printable(f"{method}, {note}") for note in fit.get("notes", [])]
    return list(dict.fromkeys(notes))
