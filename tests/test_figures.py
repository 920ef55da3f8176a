"""Pictures hold what belongs to them: whole legends, and panels of equal axes."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from utils.analysis.corruptions import CLEAN, MEAN, SEVERITIES
from utils.analysis.figures import BOXES, TRAINING, VALIDATION, learning_curves, severity_boxes
from utils.analysis.groups import Group
from utils.calibration.diagram import reliability_diagrams


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
        MEAN: severities | {MEAN: metrics},
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


def group_of(name: str, *histories: list[dict]) -> Group:
    """A group whose runs have nothing but a name and a history."""
    runs = [SimpleNamespace(name=name, note="", history=history) for history in histories]
    return Group(runs)


def test_the_curves_of_a_loss_and_its_parts(saved):
    """A student with parts, a teacher with a calibration term, and a run of one part."""
    student = [
        {"epoch": e, "train_loss": 3.0 / e, "train_labels": 1.0 / e, "train_distillation": 2.0 / e}
        for e in (1, 2)
    ]
    worse = [line | {"train_labels": 2 * line["train_labels"]} for line in student]
    section = SimpleNamespace(
        drawn=[
            group_of("student", student, worse),
            group_of("plain", [{"epoch": 1, "train_loss": 5.0}]),
        ]
    )
    learning_curves(section, TRAINING, io.BytesIO())
    [figure] = saved
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["loss, training", "its part: labels", "its part: distillation"]
    loss, labels, distillation = figure.axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[3, 1.5], [5]]
    assert labels.lines[0].get_ydata().tolist() == [1.5, 0.75]  # the mean of both runs
    assert distillation.lines[0].get_ydata().tolist() == [2, 1]
    assert len(distillation.lines[1].get_xdata()) == 0
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["student", "plain"]


def test_curves_that_no_run_has_take_no_room(saved):
    line = {"epoch": 1, "val_top1": 0.5, "val_nll": 1.0, "val_ece": 0.1}
    learning_curves(SimpleNamespace(drawn=[group_of("old", [line])]), VALIDATION, io.BytesIO())
    assert [axes.get_title() for axes in saved[0].axes] == [
        "top-1 %, validation",
        "ECE %, validation",
        "NLL, validation",
    ]
    assert saved[0].axes[0].lines[0].get_ydata().tolist() == [50]
