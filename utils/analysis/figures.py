"""Pictures of calibration, drawn without a display."""

from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.patches import Patch, Rectangle

from utils.calibration.diagram import BLUE, GREY, RED, STYLE, new_figure
from utils.tables import Column

COLOURS = [BLUE, "#e08a1e", "#3a9d6e", RED, "#7d5ba6", "#8c6d4f", "#c6699f", "#6b7280"]
DASHES = ["solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]


def colour_of(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def dashes_of(place: int) -> str | tuple:
    """With the colour, 32 curves that differ."""
    return DASHES[place // len(COLOURS) % len(DASHES)]


def heat_map(
    values: np.ndarray,
    names: tuple[list[str], list[str]],
    labels: tuple[str, str],
    chosen: tuple[int, int],
    column: Column,
    file,
) -> None:
    """Values (rows, columns) as an SVG file, darker = better, the chosen cell framed.

    `names` and `labels` belong to rows and columns. NaN, a setting without a run, is grey.
    """
    rows, columns = values.shape
    with rc_context(STYLE):
        figure, [[axes]] = new_figure(1.1 + 0.56 * columns, 1.0 + 0.42 * rows)
        axes.set_facecolor("#d5d9de")
        shade = np.ma.masked_invalid(values if column.best == "max" else -values)
        axes.imshow(shade, cmap="Blues", aspect="auto")
        middle = (shade.min() + shade.max()) / 2
        for place, value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if shade[place] > middle else "black"
                text = column.text(value)
                axes.text(*place[::-1], text, ha="center", va="center", fontsize=8, color=colour)
        corner = (chosen[1] - 0.5, chosen[0] - 0.5)
        frame = {"fill": False, "edgecolor": RED, "linewidth": 2.5, "clip_on": False}
        axes.add_patch(Rectangle(corner, 1, 1, **frame))
        axes.set_yticks(range(rows) if labels[0] else [], names[0] if labels[0] else [], fontsize=8)
        axes.set_xticks(range(columns), names[1], fontsize=8)
        axes.set(xlabel=labels[1], ylabel=labels[0])
        axes.set_title(f"{column.head}, validation", fontsize=9)
        figure.savefig(file, format="svg")


class Curve(NamedTuple):
    """A group's value by epoch: its mean and its lowest and highest run, each (epochs,).

    `place` is the group's number in the page's key: it gives the colour.
    """

    place: int
    epochs: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def learning_curves(panels: list[tuple[str, list[Curve]]], file) -> None:
    """`panels`: (title, curves), side by side in an SVG file."""
    with rc_context(STYLE):
        figure, [row] = new_figure(3.6 * len(panels), 3.0, 1, len(panels))
        for (title, curves), axes in zip(panels, row, strict=True):
            for curve in curves:
                colour = colour_of(curve.place)
                marker = "o" if len(curve.epochs) == 1 else None
                style = {"color": colour, "linestyle": dashes_of(curve.place), "marker": marker}
                axes.plot(curve.epochs, curve.mean, linewidth=1.4, **style)
                if np.any(curve.low < curve.high):
                    band = {"color": colour, "alpha": 0.15, "linewidth": 0}
                    axes.fill_between(curve.epochs, curve.low, curve.high, **band)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(color="#e5e7eb", linewidth=0.6)
        figure.savefig(file, format="svg")


class Point(NamedTuple):
    """A group's top-1 against its ECE, (mean, sd) in percent, raw and scaled."""

    place: int
    student: bool
    top1: tuple[float, float]
    raw: tuple[float, float]
    scaled: tuple[float, float]


def scatter(points: list[Point], file) -> None:
    """Top-1 against ECE as an SVG file: a line leads from a net to itself after scaling."""
    with rc_context(STYLE):
        figure, [[axes]] = new_figure(9.6, 4.2)
        for point in points:
            colour = colour_of(point.place)
            style = {"color": colour, "marker": "^" if point.student else "o", "markersize": 7}
            top1, top1_sd = point.top1
            axes.plot([point.raw[0], point.scaled[0]], [top1, top1], color=colour, linewidth=0.6)
            for (error, error_sd), fill in ((point.raw, colour), (point.scaled, "white")):
                axes.errorbar(error, top1, top1_sd, error_sd, markerfacecolor=fill, **style)
        axes.set(xlabel="ECE %", ylabel="top-1 %")
        axes.set_xlim(left=0)
        axes.grid(color="#e5e7eb", linewidth=0.6)
        figure.savefig(file, format="svg")


class Series(NamedTuple):
    """One net, raw or temperature-scaled.

    `boxes` holds, for each metric, a list for each severity: the values (fractions) over
    corruptions. `place` gives the colour; a scaled net is drawn hollow.
    """

    title: str
    place: int
    scaled: bool
    boxes: dict[str, list[list[float]]]


def severity_boxes(
    series: list[Series], severities: list[str], metrics: dict[str, Column], file
) -> None:
    """A panel per metric, below each other in a PNG file, and in it a box per severity and series.

    A box spans the quartiles over corruptions, its line is the median, the whiskers reach to the
    extremes. After Ovadia et al., "Can you trust your model's uncertainty?", NeurIPS 2019.
    """
    with rc_context(STYLE):
        # Room for the key above the panels: a line for each series.
        height = 2.5 * len(metrics) + 0.18 * len(series)
        figure, axes = new_figure(8, height, len(metrics), 1, sharex=True)
        for (metric, column), panel in zip(metrics.items(), axes[:, 0], strict=True):
            for place, one in enumerate(series):
                boxes = [[column.factor * x for x in values] for values in one.boxes[metric]]
                draw_boxes(panel, one, boxes, place, len(series))
            panel.set_ylabel(column.head)
            panel.grid(axis="y", color="#e5e7eb", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.set_xticks(range(len(severities)), severities)
            for edge in range(1, len(severities)):
                panel.axvline(edge - 0.5, color=GREY, linewidth=0.4)
        axes[-1, 0].set_xlabel("severity")
        handles = [
            Patch(label=one.title, facecolor=face(one), edgecolor=colour_of(one.place))
            for one in series
        ]
        figure.legend(handles=handles, loc="outside upper left", fontsize=8, frameon=False)
        figure.savefig(file, format="png", dpi=110)


def draw_boxes(panel, one: Series, boxes: list[list[float]], place: int, count: int) -> None:
    """One box at each severity, side by side with those of the other series."""
    width = 0.8 / count
    colour = colour_of(one.place)
    panel.boxplot(
        boxes,
        positions=[at - 0.4 + (place + 0.5) * width for at in range(len(boxes))],
        widths=0.8 * width,
        whis=(0, 100),
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": face(one), "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 1.6},
        whiskerprops={"color": colour},
        capprops={"color": colour},
    )


def face(one: Series) -> str | tuple[str, float]:
    return "white" if one.scaled else (colour_of(one.place), 0.5)
