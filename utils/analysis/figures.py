"""Pictures of calibration, drawn without a display. Those of a report are SVG files."""

from contextlib import contextmanager
from itertools import product

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.patches import Rectangle

from utils.analysis.columns import COLUMNS, printable
from utils.analysis.corruptions import CLEAN, MEAN, SEVERITIES
from utils.analysis.groups import Group
from utils.analysis.record import LOGITS
from utils.analysis.statistics import Section, Sweep
from utils.calibration.diagram import BLUE, GREY, RED, STYLE, new_figure
from utils.run_files import number_text

COLOURS = [BLUE, "#e08a1e", "#3a9d6e", RED, "#7d5ba6", "#8c6d4f", "#c6699f", "#6b7280"]
DASHES = ["solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
LINES = list(cycler(linestyle=DASHES) * cycler(color=COLOURS))  # 32 that differ
CURVES = {
    "val_top1": ("top-1 %", 100),
    "val_ece": ("ECE %", 100),
    "val_nll": ("NLL", 1),
    "val_refinement": ("NLL, scaled", 1),
}
GRID = {"grid.color": "#e5e7eb", "grid.linewidth": 0.6, "axes.axisbelow": True}
LARGEST = 20  # values along a side of a heat map
BOXES = ("top1", "ece", "nll")


@contextmanager
def drawing(file, *size, format: str = "svg", **options):
    """A figure and its axes, which go into `file` at the end; arguments as of `new_figure`."""
    with rc_context(STYLE | GRID):
        figure, axes = new_figure(*size, **options)
        yield figure, axes
        figure.savefig(file, format=format, dpi=110)


def is_grid(sweep: Sweep) -> bool:
    """Whether a map of it would have two sides, not too long, and at least half of its cells."""
    sides = [len(set(values)) for values in zip(*sweep.places.values(), strict=True)]
    return len(sides) == 2 and max(sides) <= LARGEST and 2 * len(sweep.places) >= np.prod(sides)


def heat_map(sweep: Sweep, metric: str, file) -> None:
    """Validation means over a grid, darker = better, the chosen cell framed; grey without a run.

    Of the seeds that all settings have, as they were compared.
    """
    column = COLUMNS[metric]
    across, down = (sorted(set(values)) for values in zip(*sweep.places.values(), strict=True))
    values = np.full((len(down), len(across)), np.nan)
    for group, (x, y) in sweep.places.items():
        values[down.index(y), across.index(x)] = group.validation(metric, sweep.seeds).mean()
    with drawing(file, 1.1 + 0.56 * len(across), 1.0 + 0.42 * len(down)) as (figure, [[axes]]):
        axes.set_facecolor("#d5d9de")
        shade = np.ma.masked_invalid(values if column.best == "max" else -values)
        axes.imshow(shade, cmap="Blues", aspect="auto")
        middle = (shade.min() + shade.max()) / 2
        for place in zip(*np.isfinite(values).nonzero(), strict=True):
            colour = "white" if shade[place] > middle else "black"
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
            axes.text(*place[::-1], column.text(values[place]), **style)
        x, y = sweep.places[sweep.chosen]
        corner = (across.index(x) - 0.5, down.index(y) - 0.5)
        frame = {"fill": False, "edgecolor": RED, "linewidth": 2.5, "clip_on": False}
        axes.add_patch(Rectangle(corner, 1, 1, **frame))
        axes.set_xticks(range(len(across)), map(number_text, across), fontsize=8)
        axes.set_yticks(range(len(down)), map(number_text, down), fontsize=8)
        axes.set(xlabel=sweep.parameters[0], ylabel=sweep.parameters[1])
        axes.set_title(f"{column.head}, validation", fontsize=9)


def with_legend(figure, axes) -> None:
    """Below the figure, of what is drawn in `axes`; the figure grows until the legend fits in."""
    handles = axes.get_legend_handles_labels()
    place = {"loc": "outside lower center", "fontsize": 8, "frameon": False}
    for columns in (2, 1):
        legend = figure.legend(*handles, ncols=columns, **place)
        extent = legend.get_window_extent(figure.canvas.get_renderer())
        if extent.width <= figure.bbox.width:
            break
        if columns > 1:
            legend.remove()
    # A single name may still be wider than the figure.
    figure.set_figwidth(max(figure.get_figwidth(), extent.width / figure.dpi + 0.1))
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)


def label_of(group: Group) -> str:
    name = printable(group.full_name)
    return name if len(name) <= 75 else f"{name[:74]}…"


def top1_against_ece(section: Section, file) -> None:
    """A line leads from each net, raw, to itself after scaling."""
    with drawing(file, 9.6, 4.2) as (figure, [[axes]]):
        for group, line in zip(section.drawn, LINES, strict=False):
            style = {"color": line["color"], "marker": "^" if group.teachers else "o"}
            # A third party's teacher has no scaled row.
            known = [group.rows[logits].cells for logits in LOGITS if logits in group.rows]
            top1, top1_sd, *_ = np.nan_to_num(100 * np.array(known[0]["top1"][:2]))
            ends = [np.nan_to_num(100 * np.array(cells["ece"][:2])) for cells in known]
            axes.plot([ends[0][0], ends[-1][0]], [top1, top1], linewidth=0.6, **line)
            for (error, sd), fill in zip(ends, (line["color"], "white"), strict=False):
                label = label_of(group) if fill != "white" else None
                axes.errorbar(error, top1, top1_sd, sd, mfc=fill, label=label, **style)
        axes.set(xlabel="ECE %", ylabel="top-1 %")
        axes.set_xlim(left=0)
        axes.grid()
        with_legend(figure, axes)


def learning_curves(section: Section, file) -> None:
    """Validation by epoch: the mean of a group's runs, shaded from the lowest to the highest."""
    drawn = zip(section.drawn, LINES, strict=False)
    known = [(group, style) for group, style in drawn if group.has_history]
    lines = [line for group, _ in known for run in group.records for line in run.history]
    curves = [key for key in CURVES if any(key in line for line in lines)]
    with drawing(file, 2.6 * len(curves), 2.6, 1, len(curves)) as (figure, [row]):
        for group, style in known:
            for key, axes in zip(curves, row, strict=True):
                runs = [[e[key] for e in run.history if key in e] for run in group.records]
                epochs = [line["epoch"] for line in group.first.history]
                steps = min(map(len, [epochs, *runs]))
                values = CURVES[key][1] * np.array([run[:steps] for run in runs])
                marker = "o" if steps == 1 else None
                mean, low, high = values.mean(0), values.min(0), values.max(0)
                axes.plot(epochs[:steps], mean, marker=marker, label=label_of(group), **style)
                band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
                axes.fill_between(epochs[:steps], low, high, **band)
        for key, axes in zip(curves, row, strict=True):
            axes.set_title(f"{CURVES[key][0]}, validation", fontsize=9)
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid()
        with_legend(figure, row[0])


def severity_boxes(titles: list[str], measured: list[dict], file) -> None:
    """A panel for each metric in a PNG file; in it for each severity two boxes for each net.

    `measured`: what `shift.under_corruptions` gives of the nets of these titles. A box spans the
    quartiles over corruptions, its line is the median, the whiskers reach to the extremes; that of
    scaled logits is hollow. After Ovadia et al., "Can you trust your model's uncertainty?",
    NeurIPS 2019.
    """
    severities, centres = [CLEAN, *map(str, SEVERITIES)], np.arange(1 + len(SEVERITIES))
    width = 0.4 / len(titles)
    places = enumerate(product(zip(titles, measured, strict=True), LOGITS))
    # A third party's teacher has no scaled logits: its second place stays empty.
    boxes = [(place, *net, kind) for place, (net, kind) in places if kind in net[1][MEAN][MEAN]]
    size = 8, 2.5 * len(BOXES), len(BOXES)
    with drawing(file, *size, format="png", sharex=True) as (figure, axes):
        for metric, panel in zip(BOXES, axes[:, 0], strict=True):
            column = COLUMNS[metric]
            for place, title, one, logits in boxes:
                corrupted = [by for name, by in one.items() if name not in (CLEAN, MEAN)]
                found = [one[CLEAN].values()]
                found += [[by[severity] for by in corrupted] for severity in severities[1:]]
                colour = COLOURS[place // 2 % len(COLOURS)]
                face, line = "white" if logits == "scaled" else (colour, 0.5), {"color": colour}
                panel.boxplot(
                    [[column.factor * x[logits][metric] for x in values] for values in found],
                    positions=centres - 0.4 + (place + 0.5) * width,
                    widths=0.8 * width,
                    whis=(0, 100),
                    manage_ticks=False,
                    patch_artist=True,
                    label=f"{title}, {logits}",
                    boxprops={"facecolor": face, "edgecolor": colour},
                    medianprops={"linewidth": 1.6} | line,
                    whiskerprops=line,
                    capprops=line,
                )
            for edge in centres[1:]:
                panel.axvline(edge - 0.5, color=GREY, linewidth=0.4)
            panel.grid(axis="y")
            panel.set_xticks(centres, severities)
            panel.set_ylabel(column.head)
        panel.set_xlabel("severity")
        with_legend(figure, panel)
