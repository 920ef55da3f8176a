"""Reliability diagrams, drawn without a display."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .metrics import reliability_bins
from .scores import Array

BLUE = "#4878a8"
RED = "#d1495b"
GREY = "#8d99ae"
# Names come from folders and files: a $ in them starts no formula.
STYLE = {"text.parse_math": False, "svg.hashsalt": "report", "axes.edgecolor": GREY}

Panel = tuple[str, Array, Array]  # title, probabilities (N, K), labels (N,)


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options
) -> tuple[Figure, np.ndarray]:
    """A figure of this size in inches, and its axes (rows, columns).

    `options` are those of matplotlib's `Figure.subplots`.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def reliability_diagrams(
    panels: Sequence[Panel], file, bins: int = 15, format: str = "png"
) -> None:
    """Draw reliability diagrams, each over its confidence histogram, side by side into a file.

    A bar is the accuracy in a bin of confidence; the hatched part is the gap between accuracy and
    mean confidence.
    """
    with rc_context(STYLE):
        figure, axes = new_figure(
            width=3.3 * len(panels),
            height=4.6,
            rows=2,
            columns=len(panels),
            height_ratios=[3, 1],
            sharey="row",  # so that panels can be compared
        )
        for (diagram, histogram), (title, probs, labels) in zip(axes.T, panels, strict=True):
            draw_panel(diagram, histogram, title, reliability_bins(probs, labels, bins))
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("share")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False
        )
        figure.savefig(file, format=format, dpi=110)


def draw_panel(diagram: Axes, histogram: Axes, title: str, binned: Sequence) -> None:
    """`binned`: counts, accuracy and mean confidence (bins,), as `reliability_bins` gives them."""
    counts, accuracy, confidence = (part.numpy() for part in binned)
    bins = len(counts)
    width = 1 / bins
    centres = (0.5 + np.arange(bins)) * width
    share = counts / counts.sum()
    full = counts > 0
    error = counts @ abs(accuracy - confidence) / counts.sum()

    diagram.bar(
        centres[full],
        accuracy[full],
        width=width,
        color=BLUE,
        edgecolor="white",
        linewidth=0.6,
        label="accuracy",
    )
    diagram.bar(
        centres[full],
        (confidence - accuracy)[full],
        bottom=accuracy[full],
        width=width,
        color="none",
        edgecolor=RED,
        linewidth=0.8,
        hatch="////",
        label="gap to confidence",
    )
    diagram.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    diagram.set(xlim=(0, 1), ylim=(0, 1))
    diagram.set_title(f"{title}\nECE {100 * error:.2f} %", fontsize=9)

    histogram.bar(centres, share, width=width, color=GREY, edgecolor="white", linewidth=0.6)
    histogram.set(xlim=(0, 1), xlabel="confidence")

    # Boxes whose heights are as 3 to 1, as the rows are, stay equally wide: the bars are aligned.
    diagram.set_box_aspect(1)
    histogram.set_box_aspect(1 / 3)
