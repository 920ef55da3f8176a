"""Tables of what runs amount to, and one renderer for a terminal, Markdown, LaTeX and HTML."""

import html
import math
import re
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

from utils.analysis.columns import COLUMNS, NO_SCALED_ROW, Column, printable, text_table
from utils.analysis.groups import Group, seeds_of
from utils.analysis.records import LOGITS
from utils.analysis.splits import COLUMNS_OF_TEST, columns_of_test, comparison
from utils.analysis.statistics import FEW, Cell, Section, Sweep, differences, distinct
from utils.calibration.bootstrap import BINNED, PAIRED, Difference
from utils.run_files import number_text


class Entry(NamedTuple):
    """A cell as text; `mark` is best, close or chance (see statistics.mark), or nothing."""

    text: str
    mark: str = ""
    indent: int = 0


class Table(NamedTuple):
    """What is shown, in whatever format. The first head is the title of the whole."""

    head: list[str]
    rows: list[list[Entry]]
    notes: list[str] = []
    kind: str = ""


TEMPERED = "tempered"
MEANING = {
    "best": "best of its column among rows of equal logits.",
    "close": "its difference from the best is within the spread.",
    "chance": "a calibrated net of the same confidences has such an ECE on so few images (it lies "
    "within 95 % of draws); no best is named where the lowest is one of these, or may be.",
    "differs": "from 0, Holm-corrected for all rows of its column and logits, at 5 %.",
}


def main_table(section: Section) -> Table:
    """Name, kind of logits, number of runs, then the section's columns."""
    chosen = {sweep.chosen for sweep in section.sweeps}
    rows = [(group, *row) for group in section.printed for row in group.rows.items()]
    has_chance = any(row.cells["ece"].interval for _, _, row in rows)
    head = [printable(section.title), "logits", "n"]
    for metric in section.columns:
        head.append(COLUMNS[metric].head)
        if metric == "ece" and has_chance:
            head += ["95 % interval", "ECE of a calibrated net %"]
    if section.args.test_temperature:
        head += [column.head for column in COLUMNS_OF_TEST.values()]
    entries = []
    for group, logits, row in rows:
        opens = logits == "raw"
        name = printable(group.name) + (" ←" if group in chosen else "")
        line = [
            Entry(name if opens else "", indent=len(group.teachers) if opens else 0),
            Entry(logits + (" †" if row.at_bound else "")),
            Entry(str(len(group.records)) if opens else ""),
        ]
        for metric in section.columns:
            cell, column = row.cells.get(metric), COLUMNS[metric]
            line.append(metric_entry(cell, column))
            if metric == "ece" and has_chance:
                texts = ["–", "–"]
                if cell.interval:
                    ends, floor = map(column.text, cell.interval), map(column.text, cell.calibrated)
                    texts = ["[{}, {}]".format(*ends), "{} (< {})".format(*floor)]
                line += map(Entry, texts)
        if section.args.test_temperature:
            line += entries_of_test(group, logits)
        entries.append(line)
    return Table(head, entries, legend(section, has_chance), "metrics")


def entries_of_test(group: Group, logits: str) -> list[Entry]:
    """The temperatures of a scaled row, in use and suited to test, and the ECE of the latter."""
    columns = columns_of_test(group.records) if logits == "scaled" else {}
    entries = []
    for key, column in COLUMNS_OF_TEST.items():
        values = columns.get(key)
        cell = None
        if values is not None:
            cell = Cell(values.mean(), values.std(ddof=1) if len(values) > 1 else math.nan)
        entries.append(metric_entry(cell, column))
    return entries


def metric_entry(cell: Cell | None, column: Column) -> Entry:
    if cell is None:
        return Entry("–")
    spread = "" if math.isnan(cell.sd) else f" ± {column.text(cell.sd)}"
    return Entry(column.text(cell.mean) + spread, cell.mark)


def legend(section: Section, has_chance: bool) -> list[str]:
    """What a reader needs to know of the table, a sentence each; only what occurs in it."""
    args, groups = section.args, section.printed
    select = COLUMNS[args.select].head.removesuffix(" %")
    epoch = {"best": "the epoch that validation chose", "last": "the last epoch"}[args.epoch]
    rows = [row for group in groups for row in group.rows.values()]
    kinds = dict.fromkeys(logits for group in groups for logits in group.rows)
    further = [kind for kind in kinds if kind not in (*LOGITS, TEMPERED)]
    few = "mce" in section.columns and any(row.few for row in rows)
    at_bound = any(row.at_bound for row in rows)
    borrowed = any(group.first.borrowed for group in groups)
    other = {"best": "last", "last": "best"}[args.epoch]
    taught = any(group.first.note for group in groups)
    of_test = args.test_temperature
    third_party = any(group.first.third_party for group in groups)
    unprinted = len(section.groups) - len(groups)
    sentences = {
        f"Test split, {epoch}; scaled: logits divided by the temperature that fits the validation "
        "split best. Mean ± standard deviation of n runs that differ only in the seed.": True,
        f"{', '.join(further)}: fitted on the validation split (scripts.posthoc).": further,
        "tempered: divided by --teacher_temperature, as its students saw them.": TEMPERED in kinds,
        "95 % interval: of the true mean ECE of these n nets, over test images; it allows for the "
        "bias of the measured one. ECE of a calibrated net: what n nets of these confidences would "
        "measure on average if they were calibrated, and 95 % of draws less than the value in "
        "brackets.": has_chance,
        f"MCE: beware, in some rows a bin holds fewer than {FEW} test images, and its value is "
        "mostly chance.": few,
        f"←: chosen from its sweep by validation {select}; the sweep's other settings do not take "
        "part in the comparison.": section.sweeps,
        "†: the temperature lies at the bound of its range; do not trust the row.": at_bound,
        f"{other} epoch: what taught the students below it; a teacher is always shown at the "
        "epoch that they were taught by.": taught,
        "T of test: what fits the test split best, and the ECE that it gives there. It has seen "
        "the labels: no result, but what the transfer of T from validation costs.": of_test,
        "A teacher without a run here is shown as its students' runs measured it.": borrowed,
        f"A third party's teacher has no scaled row. {NO_SCALED_ROW}": third_party,
        f"{unprinted} further nets are in report.csv only (--nets prints more).": unprinted,
    }
    said = [sentence for sentence, holds in sentences.items() if holds]
    nets = [record for group in groups for record in group.records]
    said += comparison(nets, bool(args.resamples or args.test_temperature))
    said += [sweep_sentence(section, one) for one in section.sweeps if one.chosen in groups]
    runs = (record for group in groups for record in group.records)
    fits = (fit for run in runs for fit in run.posthoc.items())
    notes = [f"{name}, {note}" for name, found in fits for note in found.get("notes", [])]
    return said + list(map(printable, dict.fromkeys(notes)))


def sweep_sentence(section: Section, sweep: Sweep) -> str:
    """Which setting validation chose, and what it is worth on test."""
    values = zip(sweep.parameters, map(number_text, sweep.places[sweep.chosen]), strict=True)
    setting = ", ".join(map(" = ".join, values))
    cells = [sweep.chosen.rows[logits].cells for logits in LOGITS]
    worth = []
    for metric in section.columns:
        texts = [metric_entry(one.get(metric), COLUMNS[metric]).text for one in cells]
        worth.append(f"{COLUMNS[metric].head} {' → '.join(dict.fromkeys(texts))}")
    select = COLUMNS[section.args.select].head.removesuffix(" %")
    what = f"Sweep of {printable(sweep.name)}, {len(sweep.places)} settings: {setting}"
    text = f"{what} has the best validation {select}{compared_on(sweep)}."
    return f"{text} On test, raw → scaled: {', '.join(worth)}."


def compared_on(sweep: Sweep) -> str:
    """Which runs of the settings were compared, where not all have the same seeds."""
    if not sweep.seeds_differ:
        return ""
    if not sweep.seeds:
        return " (no seed is common to all settings: each is judged by its own, so beware)"
    runs = {seeds_of(run): run for group in sweep.places for run in group.records}
    seeds = [str(run.seed) for key, run in runs.items() if key in sweep.seeds]
    return f" on the seeds that all settings have ({', '.join(dict.fromkeys(seeds))})"


def paired_table(section: Section, against: Group) -> Table:
    """What each row with stored logits differs by from the one named, with 95 % intervals."""
    found = differences(section, against)
    metrics = [metric for metric in section.columns if metric in PAIRED]
    head = [f"Difference from {printable(against.full_name)}", "logits"]
    head += [COLUMNS[metric].head for metric in metrics]
    rows = []
    for group, logits in product(section.printed, LOGITS):
        keys = [(group, logits, metric) for metric in metrics]
        if not found.keys().isdisjoint(keys):
            name = printable(group.full_name) if logits == "raw" else ""
            cells = [difference_entry(found.get(key), COLUMNS[key[2]]) for key in keys]
            rows.append([Entry(name), Entry(logits), *cells])
    notes = [
        "95 % intervals: over test images, the same for both rows, and the spread of their runs; "
        "of single runs the former alone."
    ]
    if any(metric in BINNED for metric in metrics):
        notes.append(
            "ECE and AdaECE: difference of the errors without the bias that noise gives them, not "
            "of the table's values. Of two calibrated nets it is 0 on average, whatever their "
            "accuracy."
        )
    tested = [against, *distinct(section, against)]
    repeated = [printable(group.full_name) for group in section.printed if group not in tested]
    if repeated:
        notes.append(
            f"Not tested a second time, for another row has its logits: {'; '.join(repeated)}."
        )
    if not rows:
        notes = ["Nothing to test: no logits are stored of this row, or of any other."]
    return Table(head, rows, notes, "metrics")


def difference_entry(one: Difference | None, column: Column) -> Entry:
    if one is None:
        return Entry("–")
    value, low, high = map(column.text, one[:3])
    sign = "+" if one.value > 0 else ""
    return Entry(f"{sign}{value} [{low}, {high}]", "differs" if one.p <= 0.05 else "")


class Format(NamedTuple):
    """`marks`: how a cell shows each. `blank`: a cell without one in a column that has some.

    `whole` takes title, kind, table and notes.
    """

    escape: Callable[[str], str]
    marks: dict[str, str]
    indent: str
    lay_out: Callable[[list[str], list[list[str]]], str]
    note: str
    whole: str
    blank: str = "{}"


def render(table: Table, form: str) -> str:
    """As text of a form in FORMATS."""
    format = FORMATS[form]
    marks = format.marks | {"differs": format.marks["best"]}
    found = {entry.mark for row in table.rows for entry in row}
    lines = [list(map(Entry, table.head)), *table.rows]
    columns = zip(*lines, strict=True)
    unmarked = [format.blank if any(one.mark for one in column) else "{}" for column in columns]

    def cell(entry: Entry, plain: str) -> str:
        text = marks.get(entry.mark, plain).format(format.escape(entry.text))
        return format.indent * entry.indent + text

    head, *rows = (list(map(cell, line, unmarked)) for line in lines)
    notes = list(map(format.escape, table.notes))
    notes += [f"{marks[m].format(m)}: {MEANING[m]}" for m in MEANING if m in found]
    return format.whole.format(
        title=format.escape(table.head[0]),
        kind=table.kind,
        table=format.lay_out(head, rows),
        notes="".join(map(format.note.format, notes)),
    )


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LATEX = {char: "\\" + char for char in "{}$&#_%"}
LATEX |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
LATEX |= {"±": r"$\pm$", "≈": r"$\approx$", "←": r"$\leftarrow$", "→": r"$\to$"}
LATEX |= {"–": "--", "†": r"\dag{}", "°": r"$^\circ$", "<": "$<$", ">": "$>$", "|": "$|$"}


def latex_table(head: list[str], rows: list[list[str]]) -> str:
    first, *others = (" & ".join(line) + r" \\" for line in [head, *rows])
    top = [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", first, r"\midrule"]
    return "\n".join([*top, *others, r"\bottomrule", r"\end{tabular}"])


def html_table(head: list[str], rows: list[list[str]]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in head)
    lines = [f"<tr><th>{row[0]}</th><td>{'</td><td>'.join(row[1:])}</td></tr>" for row in rows]
    body = "\n".join(lines)
    return f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


FORMATS = {
    "terminal": Format(
        escape=lambda text: text.replace(" ± ", "±"),
        marks={"best": "{}*", "close": "{}~", "chance": "{}°"},
        indent="  ",
        lay_out=text_table,
        note="{}\n",
        whole="{table}\n{notes}",
        blank="{} ",
    ),
    "markdown": Format(
        escape=lambda text: re.sub(r"([\\`*_{}\[\]<>|~#])", r"\\\1", text),
        marks={"best": "**{}**", "close": "{} ≈", "chance": "{} °"},
        indent="↳ ",
        lay_out=markdown_table,
        note="{}\n\n",
        whole="## {title}\n\n{table}\n\n{notes}",
    ),
    "latex": Format(  # for \\input where booktabs is loaded
        escape=lambda text: text.translate(str.maketrans(LATEX)),
        marks={"best": r"\textbf{{{}}}", "close": r"{}$^\approx$", "chance": r"{}$^\circ$"},
        indent=r"\quad ",
        lay_out=latex_table,
        note=" {}",
        whole="\\begin{{table}}\n\\centering\n{table}\n\\caption{{{title}.{notes}}}\n"
        "\\end{{table}}\n",
    ),
    "html": Format(
        escape=html.escape,
        marks={"best": "<b>{}</b>", "close": "{}<sup>≈</sup>", "chance": "{}<sup>°</sup>"},
        indent="&emsp;",
        lay_out=html_table,
        note="<li>{}</li>",
        whole='<h2>{title}</h2>\n<div class="scroll {kind}">{table}</div>\n<ul>{notes}</ul>\n',
    ),
}
