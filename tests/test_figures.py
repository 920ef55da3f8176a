"""Pictures hold what belongs to them: whole legends, and panels of equal axes."""

import io
from argparse import Namespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from utils.analysis import figures
from utils.analysis.corruptions import CLEAN, MEAN, SEVERITIES
from utils.analysis.figures import BOXES, draw_cells, severity_boxes
from utils.analysis.groups import Group
from utils.calibration import reliability_bins
from utils.calibration.diagram import reliability_diagrams
from utils.columns import COLUMNS


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that were written, as they were laid out for that."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **options):
        save(figure, *args, **options)
        figure.set_dpi(options["dpi"])
        figure.draw_without_rendering()  # the same once more: saving takes its resolution back
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def measured() -> dict:
    metrics = {logits: dict.fromkeys(BOXES, 0.5) for logits in ("raw", "scaled")}
    severities = {str(severity): metrics for severity in SEVERITIES}
    return {
        CLEAN: {"0": metrics},
        "contrast": severities,
        "pixelate": severities,
        MEAN: {MEAN: metrics},
    }


@pytest.mark.parametrize("length", [8, 60, 150])
def test_the_legend_of_a_box_plot_is_whole(saved, length):
    """However long the folders' names are, and however many nets there are."""
    titles = [f"{number} {'x' * length}" for number in range(5)]
    severity_boxes(titles, [measured()] * 5, io.BytesIO())
    [figure] = saved
    [legend] = figure.legends
    assert len(legend.get_texts()) == 10
    whole = figure.bbox
    for text in legend.get_texts():
        extent = text.get_window_extent()
        assert whole.x0 <= extent.x0 and extent.x1 <= whole.x1
        assert whole.y0 <= extent.y0 and extent.y1 <= whole.y1
    # It takes no room from the panels.
    assert all(axes.get_window_extent().height > 150 for axes in figure.axes)


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_a_histogram_is_as_wide_as_the_diagram_above_it(saved, panels):
    rng = np.random.default_rng(0)
    probs = torch.from_numpy(rng.dirichlet([1, 1, 1], 500))
    labels = torch.from_numpy(rng.integers(0, 3, 500))
    reliability_diagrams([("net", probs, labels)] * panels, io.BytesIO())
    [figure] = saved
    diagrams, histograms = figure.axes[:panels], figure.axes[panels:]
    for diagram, histogram in zip(diagrams, histograms, strict=True):
        above, below = diagram.get_window_extent(), histogram.get_window_extent()
        assert (above.x0, above.x1) == pytest.approx((below.x0, below.x1), abs=0.5)
        assert above.width == pytest.approx(above.height)  # so the diagonal has 45 degrees
        assert diagram.get_xlim() == histogram.get_xlim()


def test_bars_are_as_high_as_the_accuracy(saved):
    """And reach, with the hatched part, up to the mean confidence."""
    rng = np.random.default_rng(3)
    probs = torch.from_numpy(rng.dirichlet([2, 1, 1], size=400))
    labels = torch.from_numpy(rng.integers(3, size=400))
    reliability_diagrams([("net", probs, labels)], io.BytesIO())
    counts, accuracy, confidence = reliability_bins(probs, labels)
    full = counts > 0
    heights, gaps = saved[0].axes[0].containers
    assert [bar.get_height() for bar in heights] == pytest.approx(accuracy[full].tolist())
    tops = [bar.get_y() + bar.get_height() for bar in gaps]
    assert tops == pytest.approx(confidence[full].tolist())


@pytest.mark.parametrize(("metric", "best"), [("top1", 0.9), ("nll", 0.1)])
def test_the_best_cell_of_a_heat_map_is_the_darkest(metric, best):
    panel = Figure().subplots()
    values = np.array([[0.9, 0.5], [0.1, 0.3]])
    draw_cells(panel, values, COLUMNS[metric])
    shade = panel.images[0].get_array()
    assert values.flat[shade.argmax()] == best  # Blues: the more, the darker


def test_a_curve_has_the_epochs_of_which_all_runs_have_a_value():
    """An epoch without one leaves a gap, and moves no other."""
    first = [{"epoch": 1, "nll": 4.0}, {"epoch": 2}, {"epoch": 3, "nll": 2.0}]
    second = [{"epoch": epoch, "nll": 1.0} for epoch in (1, 2, 3, 4)]
    group = Group([Namespace(history=first), Namespace(history=second)])
    panel = Figure().subplots()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "legend_name", lambda group: "")
        figures.draw_curve(panel, group, "nll", factor=2, line={"color": "black"})
    [line] = panel.lines
    assert line.get_xydata().tolist() == [[1, 5.0], [3, 3.0]]
