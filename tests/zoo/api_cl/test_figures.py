"""The pictures show the numbers and images that they are given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zoo.api_cl.figures import plot_accuracy_matrices, plot_curves, plot_generated, plot_queries

MINUS = "\N{MINUS SIGN}"
TIL = torch.tensor([[0.9, 0.5, 0.2], [0.8, 1.0, 0.4], [0.7, 0.9, 0.95]])
CIL = [[0.9, 0.0, 0.0], [0.5, 0.7, 0.0], [math.nan] * 3]


def drawn(figure):
    figure.draw_without_rendering()
    return figure


def texts(axis):
    return [text.get_text() for text in axis.texts]


def names(ticks):
    return [label.get_text() for label in ticks]


def test_accuracies_stand_in_their_cells_with_their_summary_below():
    figure = drawn(plot_accuracy_matrices({"task": TIL, "class": CIL}, ["0-1", "2-3", "4-5"], "digits"))
    left, right = figure.axes[:2]
    assert [axis.get_title() for axis in (left, right)] == ["task", "class"]
    assert texts(left) == [".90", ".50", ".20", ".80", "1.00", ".40", ".70", ".90", ".95"]
    assert [text.get_position() for text in left.texts[:4]] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert texts(right) == [".90", ".00", ".00", ".50", ".70", ".00"]
    assert left.get_xlabel() == f"ACC .85   BWT {MINUS}.15"
    assert right.get_xlabel() == f"ACC .60   BWT {MINUS}.40"
    assert names(left.get_xticklabels()) == ["0-1", "2-3", "4-5"]
    assert names(left.get_yticklabels()) == ["after 0-1", "after 2-3", "after 4-5"]
    assert figure.get_suptitle() == "digits"
    image = left.get_images()[0]
    assert np.allclose(image.get_array(), TIL.numpy()) and image.get_clim() == (0, 1)
    # The first task is the uppermost row, and tasks ahead are faint.
    assert left.get_ylim()[0] > left.get_ylim()[1]
    assert ((image.get_alpha() < 1) == np.triu(np.ones((3, 3), bool), 1)).all()


def test_many_tasks_are_drawn_without_numbers_and_one_task_without_transfer():
    figure = drawn(plot_accuracy_matrices({"task": torch.rand(20, 20)}))
    assert not texts(figure.axes[0]) and names(figure.axes[0].get_xticklabels())[19] == "task 19"
    assert plot_accuracy_matrices({"task": [[0.5]]}).axes[0].get_xlabel() == "ACC .50"
    assert plot_accuracy_matrices({"task": [[math.nan]]}).axes[0].get_xlabel() == ""


def test_generated_images_stand_by_task_and_generator_in_reading_order():
    numbers = torch.arange(20.0).view(20, 1, 1, 1) / 10 - 1
    images = {
        (0, "A"): numbers.expand(20, 1, 8, 8),
        (0, "B"): -torch.ones(3, 1, 8, 8),
        (2, "A"): torch.ones(1, 1, 8, 8),
    }
    figure = drawn(plot_generated({**images, (1, "A"): torch.zeros(0, 1, 8, 8)}))
    axes = np.array(figure.axes).reshape(2, 2)
    assert [axis.get_title() for axis in axes.ravel()] == ["generator A", "generator B", "", ""]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["task 0", "task 2"]
    mosaic = axes[0, 0].get_images()[0].get_array()
    assert mosaic.shape == (2 * 9, 8 * 9)
    centres = mosaic[4::9, 4::9].ravel()
    assert np.allclose(centres, np.arange(16) / 20)
    assert (mosaic[8] == 1).all() and (mosaic[:, 8] == 1).all()
    assert axes[0, 1].get_images()[0].get_array()[4, 4] == 0
    assert not axes[1, 1].get_images() and axes[1, 0].get_images()[0].get_array()[4, 4] == 1


def test_coloured_images_keep_their_channels():
    batch = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    figure = drawn(plot_generated({(0, "A"): batch.half().requires_grad_()}, ["cats"]))
    assert figure.axes[0].get_images()[0].get_array()[3, 3].tolist() == [1.0, 0.5, 0.0]
    assert figure.axes[0].get_ylabel() == "cats"


def test_queries_are_stacked_by_purpose_and_summed():
    rows = [
        {"api": "a", "rows": 60, "gen_base": 10, "gen_dirs": 20, "student": 30, "real": 0, "probe": 0, "retries": 9},
        {"api": "b", "rows": 2000, "gen_base": 0, "gen_dirs": 1999, "student": 0, "real": 0, "probe": 1},
    ]
    figure = drawn(plot_queries(rows))
    axis = figure.axes[0]
    bars = [[(bar.get_x(), bar.get_width()) for bar in stack] for stack in axis.containers]
    assert bars == [[(0, 10), (0, 0)], [(10, 20), (0, 1999)], [(30, 30), (1999, 0)], [(60, 0), (1999, 1)]]
    assert texts(axis) == ["60", "2,000"] and names(axis.get_yticklabels()) == ["a", "b"]
    assert axis.get_xlabel() == "rows answered; 2,060 in all"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["generators, base points", "generators, directions", "CL model", "probe"]
    # The first service is the uppermost, and the number behind the longest bar is inside of the axis.
    assert axis.get_ylim()[0] > axis.get_ylim()[1] and axis.get_xlim()[1] > 2200


def test_services_that_were_never_asked_are_drawn_as_empty():
    figure = drawn(plot_queries([{"api": "a", "rows": 0}]))
    assert texts(figure.axes[0]) == ["0"] and not figure.legends


def test_short_curves_are_drawn_as_they_are_with_the_starts_of_the_tasks():
    figure = drawn(plot_curves({"gap": [3.0, 2.0, 1.0, 5.0], "memory": [math.nan, math.nan, 1, 2]}, [0, 2], "run"))
    gap, memory = figure.axes[:2]
    assert [axis.get_title() for axis in (gap, memory)] == ["gap", "memory"]
    *starts, curve = gap.get_lines()
    assert [line.get_xdata()[0] for line in starts] == [0, 2]
    assert list(curve.get_xdata()) == [0, 1, 2, 3] and list(curve.get_ydata()) == [3, 2, 1, 5]
    assert np.isnan(memory.get_lines()[-1].get_ydata()[:2]).all()
    assert gap.get_xlabel() == "iteration"


def test_long_curves_have_a_running_mean_that_begins_anew_with_each_task():
    values = [0.0] * 100 + [1.0] * 100
    values[50] = math.nan
    *_, raw, first, second = drawn(plot_curves({"gap": values}, [0, 100])).axes[0].get_lines()
    assert raw.get_alpha() < 1 and len(raw.get_ydata()) == 200
    assert list(first.get_xdata()) == list(range(100)) and list(second.get_xdata()) == list(range(100, 200))
    smooth = np.array(first.get_ydata())
    assert np.isnan(smooth[50]) and (np.delete(smooth, 50) == 0).all()
    assert np.allclose(second.get_ydata(), 1)
    ramp = drawn(plot_curves({"gap": [float(i % 2) for i in range(100)]})).axes[0].get_lines()[-1].get_ydata()
    assert ramp[50] == pytest.approx(2 / 5) and ramp[51] == pytest.approx(3 / 5) and ramp[0] == pytest.approx(1 / 3)


def test_panels_without_a_curve_are_hidden_and_empty_quantities_left_out():
    figure = drawn(plot_curves({**{str(i): [1.0, 2.0] for i in range(4)}, "none": [math.nan, math.nan]}))
    assert [axis.get_visible() for axis in figure.axes] == [True] * 4 + [False] * 2
    assert [axis.get_xlabel() for axis in figure.axes[:4]] == ["", "iteration", "iteration", "iteration"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_accuracy_matrices({}), "no accuracy matrix to draw"),
        (lambda: plot_accuracy_matrices({"task": TIL}, ["a"]), r"task: 1 tasks need a square matrix.*got \(3, 3\)"),
        (lambda: plot_accuracy_matrices({"task": TIL[:2]}), r"square matrix of them, got \(2, 3\)"),
        (lambda: plot_generated({(0, "A"): torch.zeros(0, 1, 8, 8)}), "no generated image to draw"),
        (lambda: plot_generated({(1, "B"): torch.zeros(2, 2, 8, 8)}), r"task 1, generator B: .* got \(2, 2, 8, 8\)"),
        (lambda: plot_queries([]), "no service whose queries"),
        (lambda: plot_curves({"gap": [math.nan]}), r"the history of \['gap'\] holds no values"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
