"""The pictures show the numbers that they are given."""

from __future__ import annotations

import io
import math

import pytest

from zoo.adatask.figures import mean_matrix, plot_balance_comparison, plot_dominance, plot_histograms

LAYERS = ["net.trunk.0", "net.trunk.2"]
TASKS = ["click", "like"]


def drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_rows_of_the_table_become_a_matrix_with_gaps_where_a_task_does_not_reach():
    rows = [
        {"layer": "b", "task": "like", "mean": 0.25},
        {"layer": "b", "task": "click", "mean": 0.75},
        {"layer": "a", "task": "like", "mean": 1.0},
    ]
    means, layers = mean_matrix(rows, TASKS)
    assert layers == ["b", "a"] and means[0] == [0.75, 0.25]
    assert math.isnan(means[1][0]) and means[1][1] == 1.0


def test_the_heat_map_has_the_input_at_the_top_and_white_at_balance():
    figure = plot_dominance([[0.9, 0.1], [0.001, 0.999]], LAYERS, TASKS, "epoch 3")
    axis = figure.axes[0]
    assert drawn(figure)[:4] == b"\x89PNG"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["trunk.0", "trunk.2"]
    bottom, top = axis.get_ylim()
    assert bottom > top  # row 0 is drawn uppermost
    assert texts(axis) == ["0.90", "0.10", "<.01", "1.00"]
    assert axis.get_title() == "epoch 3"
    image = axis.get_images()[0]
    assert image.norm(0.5) == pytest.approx(0.5) and (image.norm.vmin, image.norm.vmax) == (0, 1)


def test_balance_is_one_over_the_number_of_tasks():
    axis = plot_dominance([[0.2] * 5], ["trunk"], list("abcde")).axes[0]
    assert float(axis.get_images()[0].norm(0.2)) == pytest.approx(0.5)


def test_a_task_that_does_not_reach_a_layer_has_no_number():
    assert texts(plot_dominance([[math.nan, 1.0]], ["trunk"], TASKS).axes[0]) == ["1.00"]


def test_two_runs_stand_side_by_side_on_one_scale():
    figure = plot_balance_comparison([[0.99, 0.01]], [[0.5, 0.5]], ["trunk"], TASKS)
    left, right = figure.axes[:2]
    drawn(figure)
    assert (texts(left), texts(right)) == (["0.99", "0.01"], ["0.50", "0.50"])
    assert (left.get_title(), right.get_title()) == ("Adam", "AdaTask")
    assert left.get_position().x1 < right.get_position().x0
    assert left.get_images()[0].norm.vmax == right.get_images()[0].norm.vmax


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["a.b.conv", "a.b.norm"], ["conv", "norm"]),
        (["a.b.0", "a.b.1"], ["b.0", "b.1"]),
        (["trunk"], ["trunk"]),
        ([f"m.{i}.{'x' * 40}.end" for i in range(2)], [f"{i}.{'x' * 14}…{'x' * 12}.end" for i in range(2)]),
        ([f"m.{'x' * 30}.{i}{'y' * 30}" for i in range(2)], [f"{i}{'y' * 30}" for i in range(2)]),
        ([f"{'x' * 30}{i}{'y' * 30}" for i in range(2)], [f"{'x' * 30}{i}{'y' * 30}" for i in range(2)]),
    ],
    ids=["modules", "numbers", "one", "long", "below the middle", "told apart by the middle only"],
)
def test_long_names_are_cut_but_never_confused(layers, expected):
    axis = plot_dominance([[0.5, 0.5]] * len(layers), layers, TASKS).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == expected


def test_a_picture_of_many_layers_grows_instead_of_shrinking_its_rows():
    small, large = (plot_dominance([[0.5, 0.5]] * n, [f"l{i}" for i in range(n)], TASKS) for n in (20, 80))
    assert large.get_size_inches()[1] - small.get_size_inches()[1] == pytest.approx(60 * 0.24)


def test_histograms_show_parts_of_each_layer():
    figure = plot_histograms({"a.x": [0, 1, 3, 0], "a.y": [2, 0, 0, 0]}, 2, "click")
    assert drawn(figure)[:4] == b"\x89PNG"
    first, second = figure.axes
    assert [bar.get_height() for bar in first.patches] == [0, 0.25, 0.75, 0]
    assert [bar.get_height() for bar in second.patches] == [1, 0, 0, 0]
    assert [bar.get_x() for bar in first.patches] == [0, 0.25, 0.5, 0.75]
    assert first.lines[0].get_xdata()[0] == 0.5
    assert figure.get_supxlabel() == "share of click"
    assert plot_histograms({"a": [1, 1]}, 3).get_supxlabel() == "largest share of a task"


def test_of_many_layers_evenly_spaced_ones_get_a_histogram():
    figure = plot_histograms({f"layer{i}": [1, 2] for i in range(101)}, 3)
    shown = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert len(shown) == 48 and shown[0] == "layer0" and shown[-1] == "layer100"
    assert figure.get_suptitle().endswith("(48 of 101 layers)")


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"expected means of 2 layers x 2 tasks, got 1 rows of \[2\]"):
        plot_dominance([[0.5, 0.5]], LAYERS, TASKS)
    with pytest.raises(ValueError, match=r"got 2 rows of \[1, 2\]"):
        plot_balance_comparison([[0.5, 0.5]] * 2, [[0.5, 0.5], [1.0]], LAYERS, TASKS)
    with pytest.raises(ValueError, match="expected 2 titles, got 1"):
        plot_balance_comparison([[0.5, 0.5]] * 2, [[0.5, 0.5]] * 2, LAYERS, TASKS, ["Adam"])
    with pytest.raises(ValueError, match="no layer to draw"):
        plot_histograms({}, 2)
