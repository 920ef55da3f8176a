"""The report as one page of HTML: pictures inside, nothing fetched, no script."""

import base64
import io
from collections.abc import Callable
from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path

from utils.analysis.classes import classes_of
from utils.analysis.columns import COLUMNS, printable
from utils.analysis.confusion_figure import MOST_CLASSES, confusion_matrix
from utils.analysis.figures import heat_map, is_grid, learning_curves, top1_against_ece
from utils.analysis.groups import Group
from utils.analysis.rendering import Table, TableCell, render
from utils.analysis.statistics import Section, Sweep
from utils.calibration.diagram import reliability_diagrams


def page(sections: list[Section], tables: list[list[Table]], rest: list[Table], about: str) -> str:
    """The whole page: each section's tables and pictures, the rest. Every name in it is text."""
    parts = []
    for section, own in zip(sections, tables, strict=True):
        parts += [render(table, "html") for table in own] + pictures(section)
        if section.choice.classes:
            parts += confusions(section)
    parts += [commands(sections), *(render(table, "html") for table in rest)]
    frame, style = (Path(__file__).with_suffix(kind).read_text() for kind in (".html", ".css"))
    about = escape(f"{printable(about)}. {datetime.now():%Y-%m-%d %H:%M}.")
    return frame.format(style=style, about=about, content="\n".join(parts))


def picture(draw: Callable, description: str, kind: str = "", caption: str = "") -> str:
    """`draw(file)` writes an SVG, which goes into the page as a data URI."""
    file = io.BytesIO()
    draw(file)
    data = base64.b64encode(file.getvalue()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(description)}">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{image}{below}</figure>'


def pictures(section: Section) -> list[str]:
    drawn = section.drawn
    grids = [one for one in section.sweeps if one.chosen in drawn and is_grid(one)]
    parts = [heat_maps(section, sweep) for sweep in grids]
    parts += [
        "<h3>Top-1 against ECE</h3>",
        '<p class="soft">Upper left is best. Filled: raw; white: temperature-scaled. Circles: '
        "trained on labels; triangles: distilled. Bars: standard deviation.</p>",
        picture(partial(top1_against_ece, section), "top-1 against ECE", "wide"),
    ]
    if any(group.has_history for group in drawn):
        draw = partial(learning_curves, section)
        parts += ["<h3>Learning curves</h3>", picture(draw, "validation by epoch", "wide")]
        parts.append('<p class="soft">Mean of the runs; shaded: from lowest to highest.</p>')
    if cards := "".join(reliability(group) for group in drawn):
        parts.append("<h3>Reliability on the test split</h3>")
        parts.append(f'<div class="grid pairs">{cards}</div>')
    return parts


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
    name, known = printable(sweep.name), sweep.chosen.first.measured["val"]
    maps = [
        picture(partial(heat_map, sweep, metric), f"{COLUMNS[metric].head} of {name}", "map")
        for metric in filter(known.__contains__, section.columns)
    ]
    about = '<p class="soft">Validation alone is shown; darker is better; red: chosen.</p>'
    maps = f'<div class="grid maps">{"".join(maps)}</div>'
    return f"<h3>Sweep of {escape(name)}</h3>\n{about}\n{maps}"


def reliability(group: Group) -> str:
    """Diagrams of its first run, raw and scaled; empty without stored predictions."""
    record = group.first
    panels = []
    for logits, temperature in record.temperatures.items():
        predicted = record.probabilities(logits)
        if predicted is None:
            return ""
        head = "raw" if logits == "raw" else f"scaled, T = {temperature:.2f}"
        panels.append((head, *predicted))
    seed = f", seed {record.seed}" if record.seed is not None else ""
    caption = printable(group.full_name + seed)
    draw = partial(reliability_diagrams, panels, format="svg")
    return picture(draw, f"reliability of {caption}", caption=caption)


def commands(sections: list[Section]) -> str:
    groups = [group for section in sections for group in section.groups]
    rows = []
    records = [one for group in groups for one in group.records if not one.borrowed]
    for record in {one.folder: one for one in records}.values():  # once, whatever its epochs
        minutes = f"{record.result['seconds'] / 60:.1f}" if "seconds" in record.result else "–"
        known = [record.config.get(key, "–") for key in ("hardware", "command")]
        rows.append([TableCell(printable(text)) for text in (record.folder, minutes, *known)])
    head = ["Commands", "minutes", "hardware", "command"]
    table = render(Table(head, rows, kind="words code"), "html")
    return f"<details><summary>The commands of {len(rows)} runs</summary>{table}</details>"
