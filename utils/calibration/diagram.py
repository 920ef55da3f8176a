"""Reliability diagrams, drawn without a display."""

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.calibration.metrics import reliability_bins

BLUE, RED, GREY = "#4878a8", "#d1495b", "#8d99ae"
# Names come from folders and files: a $ in them starts no formula.
STYLE = {"text.parse_math": False, "svg.hashsalt": "report", "axes.edgecolor": GREY}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def reliability_diagrams(panels: list[tuple], file, bins: int = 15, format: str = "png") -> None:
    """Draw reliability diagrams, each over its confidence histogram, side by side into a file.

    `panels` holds (title, probabilities (N, K), labels (N,)). A bar is the accuracy in a bin of
    confidence; the hatched part is the gap between accuracy and mean confidence.
    """
    with rc_context(STYLE):
        shape = {"height_ratios": [3, 1], "sharey": "row"}  # so that panels can be compared
        figure, axes = new_figure(3.3 * len(panels), 4.6, 2, len(panels), **shape)
        for column, (title, probs, labels) in enumerate(panels):
            draw_panel(*axes[:, column], title, probs, labels, bins)
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("share")
        key = axes[0, 0].get_legend_handles_labels()
        figure.legend(*key, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        figure.savefig(file, format=format, dpi=110)


def draw_panel(diagram, histogram, title: str, probs, labels, bins: int) -> None:
    counts, accuracy, confidence = (part.numpy() for part in reliability_bins(probs, labels, bins))
    width = 1 / bins
    centres = (0.5 + np.arange(bins)) * width
    full, error = counts > 0, counts @ abs(accuracy - confidence) / counts.sum()
    bar = {"width": width, "edgecolor": "white", "linewidth": 0.6}
    gap = {"width": width, "edgecolor": RED, "linewidth": 0.8, "color": "none", "hatch": "////"}
    x, height, rise = centres[full], accuracy[full], (confidence - accuracy)[full]
    diagram.bar(x, height, color=BLUE, label="accuracy", **bar)
    diagram.bar(x, rise, bottom=height, label="gap to confidence", **gap)
    diagram.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    diagram.set(xlim=(0, 1), ylim=(0, 1))
    # Boxes whose heights are as 3 to 1, as the rows are, stay equally wide: the bars are aligned.
    diagram.set_box_aspect(1)
    histogram.set_box_aspect(1 / 3)
    diagram.set_title(f"{title}\nECE {100 * error:.2f} %", fontsize=9)
    histogram.bar(centres, counts / counts.sum(), color=GREY, **bar)
    histogram.set(xlim=(0, 1), xlabel="confidence")
