"""Box plots of metrics under corruptions, by severity, as in the literature on shift."""

from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.patches import Patch

from utils.plots import GREY, STYLE, colour_of, new_figure
from utils.tables import Column


class Series(NamedTuple):
    """One net, raw or temperature-scaled.

    `values` holds, for each severity and each metric, the values (fractions) over corruptions.
    `place` gives the colour; a scaled net is drawn hollow.
    """

    title: str
    place: int
    scaled: bool
    values: dict[str, dict[str, list[float]]]


def severity_boxes(series: list[Series], metrics: dict[str, Column], file) -> None:
    """A panel per metric, below each other in a PNG file, and in it a box per severity and series.

    A box spans the quartiles over corruptions, its line is the median, the whiskers reach to the
    extremes. After Ovadia et al., "Can you trust your model's uncertainty?", NeurIPS 2019.
    """
    severities = list(series[0].values)
    with rc_context(STYLE):
        # Room for the key above the panels: a line for each series.
        height = 2.5 * len(metrics) + 0.18 * len(series)
        figure, axes = new_figure(8, height, len(metrics), 1, sharex=True)
        for (metric, column), panel in zip(metrics.items(), axes[:, 0], strict=True):
            for place, one in enumerate(series):
                draw_series(panel, one, metric, column, place, len(series))
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


def draw_series(panel, one: Series, metric: str, column: Column, place: int, count: int) -> None:
    width = 0.8 / count
    colour = colour_of(one.place)
    panel.boxplot(
        [
            [column.factor * value for value in by_metric[metric]]
            for by_metric in one.values.values()
        ],
        positions=[at - 0.4 + (place + 0.5) * width for at in range(len(one.values))],
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
