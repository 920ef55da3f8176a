"""Whose temperature does a student inherit? The table and the picture of results.md, of all pairs.

python -m docs.results.temperatures      from the repository's root; draws docs/temperatures.png

temperatures.csv has a line for each student, or for the mean of three: the temperature of its
distillation, and those that suit its teacher (as it teaches: after a division) and itself on images
that are new to both.
"""

import csv
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from utils.analysis.groups import grouped_by
from utils.calibration.diagram import BLUE, GREY, RED, STYLE, new_figure

PAIRS = Path(__file__).with_name("temperatures.csv")
PICTURE = Path(__file__).parents[1] / "temperatures.png"
MARKS = {  # of each data set: colour and shape
    "CIFAR-10": (RED, "o"),
    "CIFAR-10, all images": ("#e08a1e", "^"),
    "CIFAR-100": (BLUE, "s"),
}
EXCEPTIONS = ("three NLL together", "label smoothing")  # named where they are not near 1
NEAR = 0.08
TICKS = (0.7, 0.8, 1, 1.2, 1.4, 1.7, 2, 2.5)


class Pair(NamedTuple):
    """A line of the file: a teacher and its student."""

    data: str
    teacher: str
    distilled_at: str
    seed: str  # 42-44: the mean of three
    its: str
    students: str
    fitted_to: str


def main() -> None:
    pairs = read_pairs()
    print(table(pairs))
    draw(pairs)


def read_pairs() -> list[Pair]:
    with PAIRS.open(newline="") as file:
        _, *lines = csv.reader(file)
    return [Pair(*line) for line in lines]


def table(pairs: list[Pair]) -> str:
    """The students at T = 4, a row for each teacher."""
    lines = ["| teacher | data | its T | its student's T |", "| --- | --- | ---: | ---: |"]
    at_four = [pair for pair in pairs if pair.distilled_at == "4"]
    for same in grouped_by(at_four, lambda pair: (pair.data, pair.teacher)):
        first = same[0]
        note = "" if first.fitted_to == "test" else f", of {first.fitted_to}"
        its = listed([pair.its for pair in same])
        students = listed([pair.students for pair in same])
        lines.append(f"| {first.teacher} | {first.data} | {its} | {students}{note} |")
    return "\n".join(lines)


def listed(temperatures: list[str]) -> str:
    return ", ".join(f"{float(temperature):.2f}" for temperature in temperatures)


def draw(pairs: list[Pair]) -> None:
    with rc_context(STYLE):
        figure, axes = new_figure(width=9, height=4.4, columns=2, sharey=True)
        for panel, distilled_at in zip(axes[0], ("4", "1"), strict=True):
            of_panel = [pair for pair in pairs if pair.distilled_at == distilled_at]
            draw_panel(panel, of_panel)
            name_exceptions(panel, of_panel)
            panel.set_title(f"distilled at T = {distilled_at}", fontsize=10)
        axes[0, 0].set_ylabel("T that suits the student")
        axes[0, 0].legend(fontsize=8, frameon=False, loc="upper left")
        figure.savefig(PICTURE, dpi=110)


def draw_panel(panel: Axes, pairs: list[Pair]) -> None:
    """Filled: both temperatures were fitted to test images. Hollow: the student's to validation."""
    ends = (0.6, 2.7)
    panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_ticks(TICKS)
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("T that suits the teacher")
    panel.set_aspect("equal")
    panel.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="as the teacher")
    panel.axhline(1, color=GREY, linestyle=":", linewidth=1, label="calibrated by itself")

    for data, (colour, shape) in MARKS.items():
        of_data = [pair for pair in pairs if pair.data == data]
        panel.scatter(
            [float(pair.its) for pair in of_data],
            [float(pair.students) for pair in of_data],
            s=32,
            marker=shape,
            facecolors=[colour if pair.fitted_to == "test" else "none" for pair in of_data],
            edgecolors=colour,
            label=data,
        )


def name_exceptions(panel: Axes, pairs: list[Pair]) -> None:
    for pair in pairs:
        place = (float(pair.its), float(pair.students))
        if pair.teacher in EXCEPTIONS and abs(place[1] - 1) > NEAR:
            panel.annotate(pair.teacher, place, (5, 5), textcoords="offset points", fontsize=7)


if __name__ == "__main__":
    main()
