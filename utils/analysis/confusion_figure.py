"""A confusion matrix as a picture, drawn without a display."""

import numpy as np
from matplotlib import rc_context

from utils.analysis.classes import Classes
from utils.calibration.diagram import STYLE, new_figure
from utils.columns import printable

MOST_CLASSES = 100  # more cannot be told apart
NAMED = 40  # classes: of more, every second or fifth name would have to go
WRITTEN = 12  # classes whose cells have room for a number


def confusion_matrix(classes: Classes, file) -> None:
    """Which share of the images of a class (rows) was taken for which class (columns), as SVG.

    Darker is more. A class without images is an empty row.
    """
    count = len(classes.names)
    images = classes.confusion.sum(axis=1, keepdims=True)
    share = classes.confusion / np.maximum(images, 1)
    side = 1.6 + max(2.4, min(0.34 * count, 6.0))
    with rc_context(STYLE):
        figure, [[axes]] = new_figure(side, side)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if count <= WRITTEN:
            for label in range(count):
                for predicted in range(count):
                    write_share(axes, label, predicted, share[label, predicted])
        if count <= NAMED:
            names = [shortened(name) for name in classes.names]
            axes.set_xticks(range(count), names, fontsize=7, rotation=90)
            axes.set_yticks(range(count), names, fontsize=7)
        axes.set(xlabel="predicted class", ylabel="class")
        figure.savefig(file, format="svg", dpi=110)


def write_share(axes, label: int, predicted: int, share: float) -> None:
    if share > 0:
        colour = "white" if share > 0.5 else "black"
        text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
        axes.text(predicted, label, text, ha="center", va="center", fontsize=7, color=colour)


def shortened(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 16 else f"{name[:15]}…"
