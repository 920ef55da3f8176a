"""Tables of what runs amount to: every row's metrics, and differences from one of them."""

from itertools import product

from utils.analysis.comparisons import can_be_tested, differences, distinct, shares_teachers
from utils.analysis.conformal import PAIRED_SETS
from utils.analysis.groups import Group
from utils.analysis.legend import legend
from utils.analysis.record import KINDS
from utils.analysis.rendering import Table, TableCell
from utils.analysis.rows import Row, Statistic, statistic
from utils.analysis.sections import Section
from utils.analysis.splits import COLUMNS_OF_TEST, columns_of_test
from utils.calibration.bootstrap import FEW_WRONG
from utils.calibration.paired import BINNED, Difference
from utils.columns import COLUMNS, Column, printable

UNKNOWN = TableCell("–")


def main_table(section: Section) -> Table:
    """Name, kind of logits, number of runs, then the section's columns."""
    has_chance = any(
        row.cells["ece"].interval for group in section.printed for row in group.rows.values()
    )
    head = [printable(section.title), "logits", "n"]
    for metric in section.columns:
        head.append(COLUMNS[metric].head)
        if metric == "ece" and has_chance:
            head += ["95 % interval", "ECE of a calibrated net %"]
    if section.choice.test_temperature:
        head += [column.head for column in COLUMNS_OF_TEST.values()]

    chosen = {sweep.chosen for sweep in section.sweeps}
    lines = []
    for group in section.printed:
        for kind, row in group.rows.items():
            line = first_cells(group, kind, row, is_chosen=group in chosen)
            for metric in section.columns:
                value = row.cells.get(metric)
                line.append(metric_cell(value, COLUMNS[metric]))
                if metric == "ece" and has_chance:
                    line += chance_cells(value)
            if section.choice.test_temperature:
                line += cells_of_test(group, kind)
            lines.append(line)
    return Table(head, lines, legend(section, has_chance), kind="metrics")


def first_cells(group: Group, kind: str, row: Row, is_chosen: bool) -> list[TableCell]:
    """A group is named in its first row alone, the raw one."""
    kind_cell = TableCell(kind + (" †" if row.at_bound else ""))
    if kind != "raw":
        return [TableCell(""), kind_cell, TableCell("")]
    name = printable(group.name) + (" ←" if is_chosen else "")
    number = TableCell(str(len(group.records)))
    return [TableCell(name, indent=len(group.teachers)), kind_cell, number]


def metric_cell(value: Statistic | None, column: Column) -> TableCell:
    if value is None:
        return UNKNOWN
    return TableCell(column.text_with_spread(value.mean, value.sd), value.mark)


def chance_cells(ece: Statistic) -> list[TableCell]:
    """The interval of an ECE, and what a calibrated net would measure."""
    if ece.interval is None:
        return [UNKNOWN, UNKNOWN]
    column = COLUMNS["ece"]
    low, high = ece.interval
    mean, limit = ece.calibrated
    return [
        TableCell(f"[{column.text(low)}, {column.text(high)}]"),
        TableCell(f"{column.text(mean)} (< {column.text(limit)})"),
    ]


def cells_of_test(group: Group, kind: str) -> list[TableCell]:
    """The temperatures of a scaled row, in use and suited to test, and the ECE of the latter."""
    values = columns_of_test(group.records) if kind == "scaled" else {}
    cells = []
    for key, column in COLUMNS_OF_TEST.items():
        cells.append(metric_cell(statistic(values[key]), column) if key in values else UNKNOWN)
    return cells


def paired_table(section: Section, against: Group) -> Table:
    """What each row with stored logits differs by from the one named, with 95 % intervals."""
    tested = differences(section, against)
    metrics = [metric for metric in section.columns if can_be_tested(metric)]
    head = [f"Difference from {printable(against.full_name)}", "logits"]
    head += [COLUMNS[metric].head for metric in metrics]
    lines = []
    for group, kind in product(section.printed, KINDS):
        row = {metric: tested.get((group, kind, metric)) for metric in metrics}
        if any(difference is not None for difference in row.values()):
            name = printable(group.full_name) if kind == "raw" else ""
            line = [TableCell(name), TableCell(kind)]
            line += [difference_cell(value, COLUMNS[metric]) for metric, value in row.items()]
            lines.append(line)
    notes = [*notes_on_tests(section, against, metrics), *notes_on_gaps(tested, metrics)]
    if not lines:
        notes = [
            "Nothing to test: no logits are stored of this row, or of any other, there is a single "
            f"test image, or of calibration errors fewer than {FEW_WRONG} predictions are wrong."
        ]
    return Table(head, lines, notes, kind="metrics")


def notes_on_tests(section: Section, against: Group, metrics: list[str]) -> list[str]:
    notes = [
        "95 % intervals: over test images, the same for both rows, and the spread of their runs; "
        "of single runs the former alone. They are not corrected for the number of rows; the mark "
        "of a difference is (Holm)."
    ]
    if any(metric in BINNED for metric in metrics):
        notes.append(
            "ECE and AdaECE: difference of the errors without the bias that noise gives them, not "
            "of the table's values. Of two calibrated nets it is 0 on average, whatever their "
            "accuracy."
        )
    # Sets are made from validation, so that what is tested is less than what could vary.
    if any(metric in PAIRED_SETS for metric in metrics):
        notes.append(
            "Coverage and set size: the sets are taken as they were fitted; what another "
            "validation split would change is not in the intervals. A row that covers less has "
            f"smaller sets by that alone: compare {COLUMNS['set_size_matched'].head}."
        )

    # What counts as a run, which the reader cannot see from the table.
    tested = [against, *distinct(section, against)]
    if any(shares_teachers(group) for group in tested):
        notes.append(
            "Several runs of one teacher are alike: where a row has several teachers, the mean of "
            "each one's students counts as one run."
        )
    are_single = {len(group.records) == 1 for group in tested}
    if len(are_single) > 1:
        notes.append(
            "A single run has no spread of its own: compared with a row of several, it is taken to "
            "have theirs, so beware."
        )

    untested = [group for group in tested if not has_predictions(group)]
    if untested:
        names = "; ".join(printable(group.full_name) for group in untested)
        notes.append(f"Not tested, for a run of it has no stored predictions: {names}.")
    repeated = [printable(group.full_name) for group in section.printed if group not in tested]
    if repeated:
        notes.append(
            f"Not tested a second time, for another row has its logits: {'; '.join(repeated)}."
        )
    return notes


def has_predictions(group: Group) -> bool:
    return all(record.predictions.exists() for record in group.records)


def notes_on_gaps(
    tested: dict[tuple[Group, str, str], Difference], metrics: list[str]
) -> list[str]:
    """Why a metric of a row is not tested, of which another one is."""
    rows = {(group, kind) for group, kind, _ in tested}
    untested = {metric for metric in metrics for row in rows if (*row, metric) not in tested}
    notes = []
    if untested.intersection(BINNED):
        notes.append(
            f"ECE and AdaECE are not tested of nets with fewer than {FEW_WRONG} wrong predictions, "
            "or right ones: so few do not show how large the noise is."
        )
    if "nll" in untested:
        notes.append("NLL is not tested where a label has the probability 0.")
    return notes


def difference_cell(difference: Difference | None, column: Column) -> TableCell:
    if difference is None:
        return UNKNOWN
    sign = "+" if difference.value > 0 else ""
    value = column.text(difference.value)
    interval = f"[{column.text(difference.low)}, {column.text(difference.high)}]"
    mark = "differs" if difference.p <= 0.05 else ""
    return TableCell(f"{sign}{value} {interval}", mark)
