"""The report as one page of HTML: pictures inside, nothing fetched, no script."""

import base64
import io
from collections.abc import Callable
from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path

from utils.analysis.figures import (
    heat_map,
    is_grid,
    learning_curves,
    settings_points,
    top1_against_ece,
)
from utils.analysis.groups import Group
from utils.analysis.records import LOGITS
from utils.analysis.statistics import Section, Sweep
from utils.analysis.tables import Entry, Table, render
from utils.calibration.diagram import reliability_diagrams
from utils.tables import COLUMNS, printable

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Accuracy and calibration</title>
<style>{style}</style>
</head>
<body>
<h1>Accuracy and calibration</h1>
<p class="soft">{about}</p>
{content}
</body>
</html>
"""


def page(sections: list[Section], tables: list[list[Table]], rest: list[Table], about: str) -> str:
    """The whole page: each section's tables and pictures, the rest. Every name in it is text."""
    parts = []
    for section, own in zip(sections, tables, strict=True):
        parts += [render(table, "html") for table in own] + pictures(section)
    parts += [commands(sections), *(render(table, "html") for table in rest)]
    style = Path(__file__).with_name("page.css").read_text()
    about = escape(f"{printable(about)}. {datetime.now():%Y-%m-%d %H:%M}.")
    return PAGE.format(style=style, about=about, content="\n".join(parts))


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
    parts = [sweep_html(section, sweep) for sweep in section.sweeps if sweep.chosen in drawn]
    parts += [
        "<h3>Top-1 against ECE</h3>",
        '<p class="soft">Upper left is best. Filled: raw; white: temperature-scaled. Circles: '
        "trained on labels; triangles: distilled. Bars: standard deviation.</p>",
        picture(partial(top1_against_ece, section), "top-1 against ECE", "wide"),
    ]
    if any(record.history for group in drawn for record in group.records):
        draw = partial(learning_curves, section)
        parts += ["<h3>Learning curves</h3>", picture(draw, "validation by epoch", "wide")]
        parts.append('<p class="soft">Mean of the runs; shaded: from lowest to highest.</p>')
    cards = "".join(reliability(section, group) for group in drawn)
    if cards:
        parts.append(
            f'<h3>Reliability on the test split</h3>\n<div class="grid pairs">{cards}</div>'
        )
    return parts


def sweep_html(section: Section, sweep: Sweep) -> str:
    """Pictures of validation values; of test values only those of the chosen setting."""
    epoch, select = section.view.epoch, section.view.select
    known = sweep.chosen.first.metrics(epoch, "val")
    draw, metrics = settings_points, [select]
    if is_grid(sweep):
        draw, metrics = heat_map, [metric for metric in section.columns if metric in known]
    pictures = "".join(
        picture(
            partial(draw, sweep, metric, epoch),
            f"{COLUMNS[metric].head} on validation, {sweep.name}",
            "map",
        )
        for metric in metrics
    )
    return (
        f"<h3>Sweep of {escape(printable(sweep.name))}</h3>\n"
        '<p class="soft">Validation alone is shown; in maps darker is better; red: chosen.</p>\n'
        f'<div class="grid maps">{pictures}</div>'
    )


def reliability(section: Section, group: Group) -> str:
    """Diagrams of its first run, raw and scaled; empty without stored predictions."""
    record, epoch = group.first, section.view.epoch
    panels = []
    for logits in LOGITS:
        predicted = record.probabilities(epoch, logits)
        if predicted is None:
            return ""
        temperature = record.measured(epoch)["temperature"]
        title = logits if logits == "raw" else f"scaled, T = {temperature:.2f}"
        panels.append((title, *predicted))
    seed = record.result["seed"]
    caption = printable(group.full_name + (f", seed {seed}" if seed is not None else ""))
    draw = partial(reliability_diagrams, panels, format="svg")
    return picture(draw, f"reliability of {caption}", caption=caption)


def commands(sections: list[Section]) -> str:
    groups = [group for section in sections for group in section.groups]
    records = [one for group in groups for one in group.records if not one.borrowed]
    rows = []
    for record in records:
        minutes = f"{record.result['seconds'] / 60:.1f}" if "seconds" in record.result else "–"
        known = [record.config.get(key, "–") for key in ("hardware", "command")]
        rows.append([Entry(printable(text)) for text in (record.folder, minutes, *known)])
    table = render(
        Table(["Commands", "minutes", "hardware", "command"], rows, kind="words code"), "html"
    )
    return f"<details><summary>The commands of {len(rows)} runs</summary>{table}</details>"
