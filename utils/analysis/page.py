"""The report as one page of HTML: pictures inside, nothing fetched, no script."""

import base64
import io
from collections.abc import Callable
from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path

from utils.analysis.classes import classes_of
from utils.analysis.confusion_figure import MOST_CLASSES, confusion_matrix
from utils.analysis.figures import (
    TRAINING,
    VALIDATION,
    curves_in,
    heat_map,
    learning_curves,
    top1_against_ece,
)
from utils.analysis.groups import Group
from utils.analysis.record import Record
from utils.analysis.rendering import Table, TableCell, render
from utils.analysis.sections import DRAWN, Section, Sweep
from utils.calibration.diagram import reliability_diagrams
from utils.columns import COLUMNS, printable
from utils.program.words import counted


def page(sections: list[Section], tables: list[list[Table]], rest: list[Table], about: str) -> str:
    """The whole page: each section's tables and pictures, the rest. Every name in it is text."""
    blocks = []
    for section, own_tables in zip(sections, tables, strict=True):
        blocks += [render(table, "html") for table in own_tables]
        blocks += pictures(section)
        if section.choice.classes:
            blocks += confusions(section)
    blocks.append(commands(sections))
    blocks += [render(table, "html") for table in rest]

    # page.html and page.css lie beside this file.
    frame = Path(__file__).with_suffix(".html").read_text()
    return frame.format(
        style=Path(__file__).with_suffix(".css").read_text(),
        about=escape(f"{printable(about)}. {datetime.now():%Y-%m-%d %H:%M}."),
        content="\n".join(blocks),
    )


def picture(
    draw: Callable[[io.BytesIO], None], description: str, kind: str = "", caption: str = ""
) -> str:
    """`draw(file)` writes an SVG, which goes into the page as a data URI."""
    file = io.BytesIO()
    draw(file)
    data = base64.b64encode(file.getvalue()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(description)}">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{image}{below}</figure>'


def pictures(section: Section) -> list[str]:
    drawn = section.drawn
    blocks = []
    for sweep in section.sweeps:
        if sweep.chosen in drawn and sweep.is_grid:
            blocks.append(heat_maps(section, sweep))

    blocks += [
        "<h3>Top-1 against ECE</h3>",
        '<p class="soft">Upper left is best. Filled: raw; white: temperature-scaled. Circles: '
        "trained on labels; triangles: distilled. Bars: standard deviation.</p>",
        picture(partial(top1_against_ece, section), "top-1 against ECE", "wide"),
    ]
    undrawn = [group for group in section.printed if group not in drawn]
    if undrawn:
        blocks.append(
            f'<p class="soft">{counted(len(undrawn), "net")} of the table not drawn: what is in a '
            f"heat map, and what is beyond the first {DRAWN}.</p>"
        )
    blocks += curves(section)
    cards = "".join(reliability(group) for group in drawn)
    if cards:
        blocks.append("<h3>Reliability on the test split</h3>")
        blocks.append(f'<div class="grid pairs">{cards}</div>')
    return blocks


def curves(section: Section) -> list[str]:
    """Learning curves on validation, and those of the loss and its parts in training."""
    groups = [group for group in section.drawn if group.has_history]
    if not groups:
        return []
    blocks = [
        "<h3>Learning curves</h3>",
        picture(partial(learning_curves, section, VALIDATION), "validation by epoch", "wide"),
    ]
    about = "Mean of the runs; shaded: from lowest to highest."
    if curves_in(groups, TRAINING):
        draw = partial(learning_curves, section, TRAINING)
        blocks.append(picture(draw, "the loss and its parts by epoch", "wide"))
        about += " The parts of a loss add up to it."
    blocks.append(f'<p class="soft">{about}</p>')
    return blocks


def confusions(section: Section) -> list[str]:
    """Confusion matrices of the printed nets, where there are not too many classes."""
    cards = []
    for group in section.printed:
        classes = classes_of(group)
        if classes is not None and len(classes.names) <= MOST_CLASSES:
            name = printable(group.full_name)
            draw = partial(confusion_matrix, classes)
            cards.append(picture(draw, f"confusion matrix of {name}", caption=name))
    if not cards:
        return []
    about = "Share of the images of a class (rows) that is taken for each (columns), in percent."
    return [
        "<h3>Confusion matrices on the test split</h3>",
        f'<p class="soft">{about}</p>',
        f'<div class="grid pairs">{"".join(cards)}</div>',
    ]


def heat_maps(section: Section, sweep: Sweep) -> str:
    """Pictures of validation values: the report shows test values of the chosen setting alone."""
    name = printable(sweep.name)
    on_validation = sweep.chosen.first.measured["val"]
    maps = []
    for metric in section.columns:
        if metric in on_validation:
            description = f"{COLUMNS[metric].head} of {name}"
            maps.append(picture(partial(heat_map, sweep, metric), description, "map"))
    return "\n".join(
        [
            f"<h3>Sweep of {escape(name)}</h3>",
            '<p class="soft">Validation alone is shown; darker is better; red: chosen.</p>',
            f'<div class="grid maps">{"".join(maps)}</div>',
        ]
    )


def reliability(group: Group) -> str:
    """Diagrams of its first run, raw and scaled; empty without stored predictions."""
    record = group.first
    panels = []
    for logits, temperature in record.temperatures.items():
        predicted = record.probabilities(logits)
        if predicted is None:
            return ""
        probs, labels = predicted
        title = "raw" if logits == "raw" else f"scaled, T = {temperature:.2f}"
        panels.append((title, probs, labels))
    seed = f", seed {record.seed}" if record.seed is not None else ""
    caption = printable(group.full_name + seed)
    draw = partial(reliability_diagrams, panels, format="svg")
    return picture(draw, f"reliability of {caption}", caption=caption)


def commands(sections: list[Section]) -> str:
    """A table of every run's command, folded up."""
    # A run is shown once, whatever its epochs; a teacher without a run has no command.
    runs: dict[Path, Record] = {}
    for section in sections:
        for group in section.groups:
            for record in group.records:
                if not record.measured_by_student:
                    runs[record.folder] = record

    rows = []
    for record in runs.values():
        seconds = record.result.get("seconds")
        cells = [
            record.folder,
            "–" if seconds is None else f"{seconds / 60:.1f}",
            record.config.get("hardware", "–"),
            record.config.get("command", "–"),
        ]
        rows.append([TableCell(printable(cell)) for cell in cells])
    table = Table(["Commands", "minutes", "hardware", "command"], rows, kind="words code")
    summary = f"<summary>The commands of {counted(len(rows), 'run')}</summary>"
    return f"<details>{summary}{render(table, 'html')}</details>"
