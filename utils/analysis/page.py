"""The report as one page of HTML: pictures inside, nothing fetched, no script."""

import base64
import io
from collections.abc import Callable
from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from utils.analysis.figures import (
    Curve,
    Point,
    colour_of,
    dashes_of,
    heat_map,
    learning_curves,
    scatter,
)
from utils.analysis.groups import Group
from utils.analysis.records import Apart
from utils.analysis.statistics import (
    WAYS,
    Cell,
    Section,
    Sweep,
    apart_table,
    legend,
    sweep_sentence,
    table_of,
)
from utils.analysis.tables import Entry, html_table
from utils.calibration.diagram import reliability_diagrams
from utils.runs import number_text
from utils.tables import COLUMNS, printable

CURVES = {"val_top1": "top-1 %", "val_ece": "ECE %", "val_nll": "NLL"}

CSS = """
:root { --ink: #1f2933; --soft: #5b6773; --line: #e3e7eb; --accent: #2f5d8a; --paper: #fff; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem clamp(0.8rem, 2vw, 2.5rem) 4rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 0.2rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 0.6rem; padding-top: 0.8rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 0.5rem; }
h1, h2, h3, p, li, figcaption { overflow-wrap: anywhere; }
p { margin: 0.4rem 0; max-width: 62rem; }
.soft, figcaption { color: var(--soft); font-size: 0.875rem; }
ul { margin: 0.5rem 0; padding-left: 1.2rem; color: var(--soft); font-size: 0.875rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.8125rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.5rem; text-align: right; vertical-align: baseline;
  white-space: nowrap; }
th:first-child, .words td, .words th { text-align: left; }
tbody th { font-weight: 500; }
.metrics tbody tr:has(th:not(:empty)) > * { border-top: 1px solid var(--line); }
.words tbody th, .words td:last-child { white-space: normal; overflow-wrap: anywhere;
  min-width: 16rem; }
.words.code td:last-child { min-width: 32rem; }
sup { position: absolute; line-height: 1; }
.code tbody { font: 0.8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
thead th { background: #f5f7f9; border-bottom: 1px solid var(--line); font-weight: 600; }
tbody tr:hover { background: #f8fafc; }
strong { color: var(--accent); }
.grid { display: grid; gap: 1rem; margin: 0.8rem 0; }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); }
figure { margin: 0; padding: 0.6rem; border: 1px solid var(--line); border-radius: 6px; }
figure img { display: block; width: 100%; max-width: 46rem; height: auto; margin: 0 auto; }
.wide { overflow-x: auto; margin: 0.8rem 0; }
.wide img { min-width: 38rem; max-width: 60rem; }
.map img { width: auto; max-width: 100%; }
.key { list-style: none; padding: 0; columns: 24rem; }
.key li { break-inside: avoid; padding-left: 38px; text-indent: -38px; }
.key svg { vertical-align: middle; margin-right: 8px; }
@media (max-width: 40rem) { .metrics tbody th { white-space: normal; min-width: 9rem; } }
summary { cursor: pointer; color: var(--accent); }
"""


def page(sections: list[Section], apart: list[Apart], roots: list[Path]) -> str:
    """The whole page. Every name in it is text, whatever it holds."""
    runs = len({one.folder for s in sections for g in s.groups for one in g.records})
    where = escape(printable(", ".join(map(str, roots))))
    parts = [
        "<h1>Accuracy and calibration</h1>",
        f'<p class="soft">{runs} finished runs below {where}; not in the tables: {len(apart)}. '
        f"{datetime.now():%Y-%m-%d %H:%M}.</p>",
        *map(section_html, sections),
    ]
    if runs:
        parts.append(commands_html(sections))
    if apart:
        parts += ["<h2>Not in the tables</h2>", html_table(*apart_table(apart), "words")]
    content = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>Accuracy and calibration</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{content}\n</body>\n</html>\n"
    )


def section_html(section: Section) -> str:
    sentences = legend(section, {"best": "bold", "close": "≈"})
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    parts = [
        f"<h2>{escape(printable(section.title))}</h2>",
        html_table(*table_of(section), "metrics"),
        f"<ul>{items}</ul>",
        *(sweep_html(section, sweep) for sweep in section.sweeps),
        comparison_html(section),
        reliability_html(section),
    ]
    return "\n".join(parts)


def picture(draw: Callable, description: str, kind: str = "", caption: str = "") -> str:
    """`draw(file)` writes an SVG, which goes into the page as a data URI."""
    file = io.BytesIO()
    draw(file)
    data = base64.b64encode(file.getvalue()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(description)}">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{image}{below}</figure>'


def sweep_html(section: Section, sweep: Sweep) -> str:
    """A map of validation values for each metric; of test values only those of the chosen one."""
    across, down = (*sweep.parameters, "")[:2]
    values = [sweep.values_of(name) if name else [] for name in (down, across)]
    names = [[number_text(value) for value in axis] or [""] for axis in values]
    maps = []
    known = sweep.chosen.records[0].metrics(section.epoch, "val")
    for metric in filter(known.__contains__, section.columns):
        means, chosen = sweep.grid(metric, section.epoch)
        column = COLUMNS[metric]
        draw = partial(heat_map, means, names, (down, across), chosen, column)
        maps.append(picture(draw, f"{column.head} on validation, {sweep.name}", "map"))
    sentence = escape(sweep_sentence(section, sweep))
    return (
        f"<h3>{escape(printable(sweep.name))}</h3>\n<p>{sentence}</p>\n"
        f'<p class="soft">Maps show validation; the darker the better; framed: chosen.</p>\n'
        f'<div class="grid maps">{"".join(maps)}</div>'
    )


def comparison_html(section: Section) -> str:
    """Scatter and learning curves of the same nets in the same colours, with one key."""
    places = {group: place for place, group in enumerate(section.shown())}
    items = (
        f"<li>{swatch(place, group)} {escape(printable(group.full_name))}</li>"
        for group, place in places.items()
    )
    parts = [
        "<h3>Top-1 against ECE</h3>",
        '<p class="soft">Upper left is best. Filled: raw; white: temperature-scaled. Circles: '
        "trained on labels; triangles: distilled. Bars: standard deviation.</p>",
        picture(partial(scatter, points_of(section, places)), "top-1 against ECE", "wide"),
        f'<ul class="key">{"".join(items)}</ul>',
    ]
    histories = {group: [one.history() for one in group.records] for group in places}
    known = {group: runs for group, runs in histories.items() if all(runs)}
    if known:
        panels = [
            (f"{head}, validation", [curve_of(places[g], runs, key) for g, runs in known.items()])
            for key, head in CURVES.items()
        ]
        draw = partial(learning_curves, panels)
        parts += ["<h3>Learning curves</h3>", picture(draw, "validation by epoch", "wide")]
        parts.append('<p class="soft">Mean of the runs; shaded: from lowest to highest.</p>')
    return "\n".join(parts)


def swatch(place: int, group: Group) -> str:
    """The line and the mark of a group, as an inline SVG."""
    colour, dashes = colour_of(place), dashes_of(place)
    pattern = "" if dashes == "solid" else f' stroke-dasharray="{" ".join(map(str, dashes[1]))}"'
    shape = '<circle cx="15" cy="7" r="4"' if group.teacher is None else '<path d="M15 2l5 9h-10z"'
    return (
        f'<svg width="30" height="14" aria-hidden="true"><path d="M0 7h30" stroke="{colour}" '
        f'stroke-width="2"{pattern}/>{shape} fill="{colour}"/></svg>'
    )


def points_of(section: Section, places: dict[Group, int]) -> list[Point]:
    cells = {(row.group, row.way): row.cells for row in section.rows}
    points = []
    for group, place in places.items():
        raw, scaled = cells[group, "raw"], cells[group, "scaled"]
        pairs = [percent(raw["top1"]), percent(raw["ece"]), percent(scaled["ece"])]
        points.append(Point(place, group.teacher is not None, *pairs))
    return points


def percent(cell: Cell) -> tuple[float, float]:
    return 100 * cell.mean, 0.0 if np.isnan(cell.sd) else 100 * cell.sd


def reliability_html(section: Section) -> str:
    """A picture, raw and scaled, for the first run of each group: a teacher, then its students."""
    families: dict[Group | None, list[str]] = {}
    teachers = {group.teacher for group in section.groups}
    for group in section.shown():
        top = group
        while top.teacher is not None:
            top = top.teacher
        card = reliability_card(section, group)
        if card:
            families.setdefault(top if top in teachers else None, []).append(card)
    if not families:
        return ""
    grids = "\n".join(f'<div class="grid pairs">{"".join(f)}</div>' for f in families.values())
    return f"<h3>Reliability on the test split</h3>\n{grids}"


def reliability_card(section: Section, group: Group) -> str:
    record = group.records[0]
    panels = []
    for way in WAYS:
        predicted = record.probabilities(section.epoch, way)
        if predicted is None:
            return ""
        temperature = record.measured(section.epoch)["temperature"]
        panels.append((way if way == "raw" else f"scaled, T = {temperature:.2f}", *predicted))
    seed = record.result["seed"]
    caption = printable(group.full_name + (f", seed {seed}" if seed is not None else ""))
    draw = partial(reliability_diagrams, panels, format="svg")
    return picture(draw, f"reliability of {caption}", caption=caption)


def curve_of(place: int, runs: list[list[dict]], key: str) -> Curve:
    epochs = min(map(len, runs))
    values = np.array([[record[key] for record in run[:epochs]] for run in runs])
    values *= COLUMNS[key.removeprefix("val_")].factor
    steps = np.array([record["epoch"] for record in runs[0][:epochs]])
    return Curve(place, steps, values.mean(0), values.min(0), values.max(0))


def commands_html(sections: list[Section]) -> str:
    rows = [
        (
            record.folder,
            f"{record.result['seconds'] / 60:.1f}" if "seconds" in record.result else "–",
            record.config.get("hardware", "–"),
            record.config.get("command", "–"),
        )
        for section in sections
        for group in section.groups
        for record in group.records
        if not record.borrowed
    ]
    head = ["run", "minutes", "hardware", "command"]
    cells = [[Entry(printable(text)) for text in row] for row in rows]
    table = html_table(head, cells, "words code")
    return f"<h2>Commands</h2>\n<details><summary>{len(rows)} runs</summary>{table}</details>"
