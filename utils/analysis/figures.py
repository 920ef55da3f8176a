"""Pictures of calibration, drawn without a display. Those of a report are SVG files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from utils.analysis.corruptions import CLEAN, MEAN, SEVERITIES
from utils.analysis.groups import Group
from utils.analysis.record import KINDS
from utils.analysis.sections import Section, Sweep
from utils.calibration.diagram import BLUE, GREY, RED, STYLE, new_figure
from utils.columns import COLUMNS, Column, printable
from utils.run_files import number_text

COLOURS = [BLUE, "#e08a1e", "#3a9d6e", RED, "#7d5ba6", "#8c6d4f", "#c6699f", "#6b7280"]
DASHES = ["solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
LINES = list(cycler(linestyle=DASHES) * cycler(color=COLOURS))  # 32 that differ


class Curve(NamedTuple):
    """A value of metrics.jsonl as a panel: its title, the factor from the file's value to it."""

    title: str
    factor: float


VALIDATION = {
    "val_top1": Curve("top-1 %, validation", 100),
    "val_ece": Curve("ECE %, validation", 100),
    "val_nll": Curve("NLL, validation", 1),
    "val_refinement": Curve("NLL, scaled, validation", 1),
}
# The parts add up to the loss. A run whose loss has one part, or of an older version, has none.
TRAINING = {
    "train_loss": Curve("loss, training", 1),
    "train_labels": Curve("its part: labels", 1),
    "train_calibration": Curve("its part: calibration", 1),
    "train_distillation": Curve("its part: distillation", 1),
    "train_features": Curve("its part: features", 1),
}
GRID = {"grid.color": "#e5e7eb", "grid.linewidth": 0.6, "axes.axisbelow": True}
BOXES = ("top1", "ece", "nll")
LONGEST = 75  # characters of a net's name


@contextmanager
def drawing(
    file,
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    format: str = "svg",
    sharex: bool = False,
) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure of this size in inches and its axes (rows, columns); it goes into `file` at the end.

    The figure may have grown by then.
    """
    with rc_context(STYLE | GRID):
        figure, axes = new_figure(width, height, rows, columns, sharex=sharex)
        yield figure, axes
        figure.savefig(file, format=format, dpi=110)


def heat_map(sweep: Sweep, metric: str, file) -> None:
    """Validation means over a grid, darker = better, the chosen cell framed; grey without a run.

    Of the seeds that all settings have, as they were compared.
    """
    column = COLUMNS[metric]
    across, down = sweep.values
    values = np.full((len(down), len(across)), np.nan)
    for group, (x, y) in sweep.places.items():
        values[down.index(y), across.index(x)] = group.validation(metric, sweep.seeds).mean()

    width = 1.1 + 0.56 * len(across)
    height = 1.0 + 0.42 * len(down)
    with drawing(file, width, height) as (_, axes):
        panel = axes[0, 0]
        draw_cells(panel, values, column)

        x, y = sweep.places[sweep.chosen]
        corner = (across.index(x) - 0.5, down.index(y) - 0.5)
        panel.add_patch(
            Rectangle(
                corner, width=1, height=1, fill=False, edgecolor=RED, linewidth=2.5, clip_on=False
            )
        )
        panel.set_xticks(range(len(across)), map(number_text, across), fontsize=8)
        panel.set_yticks(range(len(down)), map(number_text, down), fontsize=8)
        panel.set(xlabel=sweep.parameters[0], ylabel=sweep.parameters[1])
        panel.set_title(f"{column.head}, validation", fontsize=9)


def draw_cells(panel: Axes, values: np.ndarray, column: Column) -> None:
    """A shade and a number for each value (down, across) that is finite."""
    panel.set_facecolor("#d5d9de")
    shade = np.ma.masked_invalid(values if column.best == "max" else -values)
    panel.imshow(shade, cmap="Blues", aspect="auto")
    middle = (shade.min() + shade.max()) / 2
    for row, place in np.argwhere(np.isfinite(values)):
        panel.text(
            place,
            row,
            column.text(values[row, place]),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if shade[row, place] > middle else "black",
        )


def with_legend(figure: Figure, axes: Axes) -> None:
    """Below the figure, of what is drawn in `axes`; the figure grows until the legend fits in."""
    handles, names = axes.get_legend_handles_labels()
    for columns in (2, 1):
        legend = figure.legend(
            handles, names, ncols=columns, loc="outside lower center", fontsize=8, frameon=False
        )
        extent = legend.get_window_extent(figure.canvas.get_renderer())
        if extent.width <= figure.bbox.width:
            break
        if columns > 1:
            legend.remove()

    # A single name may still be wider than the figure.
    figure.set_figwidth(max(figure.get_figwidth(), extent.width / figure.dpi + 0.1))
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)


def legend_name(group: Group) -> str:
    """The group's name, cut off where it would be too long for a legend."""
    name = printable(group.full_name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def top1_against_ece(section: Section, file) -> None:
    """A line leads from each net, raw, to itself after scaling."""
    with drawing(file, width=9.6, height=4.2) as (figure, axes):
        panel = axes[0, 0]
        for group, line in zip(section.drawn, LINES, strict=False):
            draw_net(panel, group, line)
        panel.set(xlabel="ECE %", ylabel="top-1 %")
        panel.set_xlim(left=0)
        panel.grid()
        with_legend(figure, panel)


def draw_net(panel: Axes, group: Group, line: Mapping) -> None:
    """Its raw point, filled, and its scaled one; a third party's teacher has no scaled row."""

    def mean_and_sd(kind: str, metric: str) -> tuple[float, float]:
        """In percent; a single run has no spread, which draws no bar."""
        cell = group.rows[kind].cells[metric]
        mean, sd = np.nan_to_num([100 * cell.mean, 100 * cell.sd])
        return mean, sd

    kinds = [kind for kind in KINDS if kind in group.rows]
    # Scaling changes no prediction.
    top1, top1_sd = mean_and_sd(kinds[0], "top1")
    errors = [mean_and_sd(kind, "ece") for kind in kinds]
    raw_error, _ = errors[0]
    last_error, _ = errors[-1]
    panel.plot([raw_error, last_error], [top1, top1], linewidth=0.6, **line)
    for place, (error, error_sd) in enumerate(errors):
        is_first = place == 0
        panel.errorbar(
            error,
            top1,
            yerr=top1_sd,
            xerr=error_sd,
            mfc=line["color"] if is_first else "white",
            label=legend_name(group) if is_first else None,
            color=line["color"],
            marker="^" if group.teachers else "o",
        )


def learning_curves(section: Section, curves: Mapping[str, Curve], file) -> None:
    """By epoch: the mean of a group's runs, shaded from the lowest to the highest.

    `curves`: VALIDATION or TRAINING; those that no run has are left out.
    """
    groups = []
    for group, line in zip(section.drawn, LINES, strict=False):
        if group.has_history:
            groups.append((group, line))
    keys = curves_in([group for group, _ in groups], curves)
    with drawing(file, width=2.6 * len(keys), height=2.6, columns=len(keys)) as (figure, axes):
        panels = axes[0]
        for group, line in groups:
            for key, panel in zip(keys, panels, strict=True):
                draw_curve(panel, group, key, curves[key].factor, line)
        for key, panel in zip(keys, panels, strict=True):
            panel.set_title(curves[key].title, fontsize=9)
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid()
        with_legend(figure, panels[0])


def curves_in(groups: list[Group], curves: Mapping[str, Curve]) -> list[str]:
    """The keys of the curves of which some run has a value."""
    present = set()
    for group in groups:
        for run in group.records:
            for epoch in run.history:
                present.update(epoch)
    return [key for key in curves if key in present]


def draw_curve(panel: Axes, group: Group, key: str, factor: float, line: Mapping) -> None:
    """The epochs that all runs of the group have a value of."""
    values_of_runs = [
        {epoch["epoch"]: epoch[key] for epoch in run.history if key in epoch}
        for run in group.records
    ]
    epochs = sorted(set.intersection(*(set(values) for values in values_of_runs)))
    if not epochs:
        return
    values = factor * np.array([[values[epoch] for epoch in epochs] for values in values_of_runs])

    panel.plot(
        epochs,
        values.mean(axis=0),
        marker="o" if len(epochs) == 1 else None,  # of one point no line could be seen
        label=legend_name(group),
        **line,
    )
    panel.fill_between(
        epochs,
        values.min(axis=0),
        values.max(axis=0),
        color=line["color"],
        alpha=0.15,
        linewidth=0,
    )


class Box(NamedTuple):
    """A net's boxes: what they are drawn of, and where they stand among those of a severity."""

    place: int
    title: str
    kind: str  # raw or scaled
    measured: dict  # by corruption and severity, as `shift.under_corruptions` gives it

    def values(self, metric: str, severity: str) -> list[float]:
        """One value for each corruption; `severity` may be CLEAN."""
        if severity == CLEAN:
            points = list(self.measured[CLEAN].values())
        else:
            names = [name for name in self.measured if name not in (CLEAN, MEAN)]
            points = [self.measured[name][severity] for name in names]
        return [COLUMNS[metric].factor * point[self.kind][metric] for point in points]


def severity_boxes(titles: list[str], measured: list[dict], file) -> None:
    """A panel for each metric in a PNG file; in it for each severity two boxes for each net.

    `measured`: what `shift.under_corruptions` gives of the nets of these titles. A box spans the
    quartiles over corruptions, its line is the median, the whiskers reach to the extremes; that of
    scaled logits is hollow. After Ovadia et al., "Can you trust your model's uncertainty?",
    NeurIPS 2019.
    """
    boxes = []
    for number, (title, by_corruption) in enumerate(zip(titles, measured, strict=True)):
        for offset, kind in enumerate(KINDS):
            # A third party's teacher has no scaled logits: its second place stays empty.
            if kind in by_corruption[MEAN][MEAN]:
                boxes.append(Box(len(KINDS) * number + offset, title, kind, by_corruption))

    width = 0.8 / (len(KINDS) * len(titles))  # of what a severity has for its boxes
    with drawing(
        file, width=8, height=2.5 * len(BOXES), rows=len(BOXES), format="png", sharex=True
    ) as (figure, axes):
        panels = axes[:, 0]
        for metric, panel in zip(BOXES, panels, strict=True):
            draw_boxes(panel, boxes, metric, width)
        panels[-1].set_xlabel("severity")
        with_legend(figure, panels[-1])


def draw_boxes(panel: Axes, boxes: list[Box], metric: str, width: float) -> None:
    severities = [CLEAN, *map(str, SEVERITIES)]
    centres = np.arange(len(severities))
    for box in boxes:
        colour = COLOURS[box.place // len(KINDS) % len(COLOURS)]
        panel.boxplot(
            [box.values(metric, severity) for severity in severities],
            positions=centres - 0.4 + (box.place + 0.5) * width,
            widths=0.8 * width,
            whis=(0, 100),
            manage_ticks=False,
            patch_artist=True,
            label=f"{box.title}, {box.kind}",
            boxprops={
                "facecolor": "white" if box.kind == "scaled" else (colour, 0.5),
                "edgecolor": colour,
            },
            medianprops={"linewidth": 1.6, "color": colour},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
    for centre in centres[1:]:
        panel.axvline(centre - 0.5, color=GREY, linewidth=0.4)
    panel.grid(axis="y")
    panel.set_xticks(centres, severities)
    panel.set_ylabel(COLUMNS[metric].head)
