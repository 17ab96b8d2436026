"""The pictures show the numbers that they are given."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from zoo.merging.drawing import block_of, palette
from zoo.merging.feature_figures import joint_tsne, plot_tsne, plot_tsne_grid
from zoo.merging.figures import plot_accuracy_table, plot_adaptation, plot_bias, plot_coefficients, plot_surgery_gain

TASKS = ["mnist", "svhn"]
LAYERS = ["stem.weight", "stem.bias", "net.blocks.0.fc.weight", "net.blocks.0.fc.bias"]
PARTS = ("self_attn.q.weight", "self_attn.q.bias", "mlp.fc1.weight", "mlp.fc1.bias", "norm.weight", "norm.bias")


def drawn(figure):
    figure.draw_without_rendering()
    return figure


def texts(axis):
    return [text.get_text() for text in axis.texts]


def names(ticks):
    return [label.get_text() for label in ticks]


def vit(blocks):
    middle = [f"encoder.layers.{block}.{part}" for block in range(blocks) for part in PARTS]
    return ["embeddings.cls", "embeddings.patch.weight", "pre_norm.bias", *middle, "post_norm.weight"]


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("encoder.layers.3.mlp.fc1.weight", "encoder.layers.3"),
        ("encoder.layers.3", "encoder.layers.3"),
        ("layer1.0.conv2.weight", "layer1.0"),
        ("embeddings.patch.weight", "embeddings"),
        ("all", "all"),
    ],
)
def test_a_block_ends_with_the_first_number_of_a_name(layer, block):
    assert block_of(layer) == block


def test_coefficients_have_the_first_layer_at_the_top_and_their_means_above():
    coef = torch.tensor([[0.0, 0.5], [0.25, 1.0], [0.2, 0.3], [0.35, 0.6]], requires_grad=True)
    figure = drawn(plot_coefficients(coef, LAYERS, TASKS, "step 3"))
    bars, axis = figure.axes[:2]
    assert bars.get_title() == "step 3"
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([0.2, 0.6])
    assert texts(bars) == [".20", ".60"]
    assert texts(axis) == [".00", ".50", ".25", "1.00", ".20", ".30", ".35", ".60"]
    assert names(axis.get_yticklabels()) == ["stem.weight", "stem.bias", "blocks.0.fc.weight", "blocks.0.fc.bias"]
    assert names(bars.get_xticklabels()) == TASKS and not names(axis.get_xticklabels())
    bottom, top = axis.get_ylim()
    assert bottom > top
    assert bars.get_position().y0 > axis.get_position().y1
    assert bars.get_position().x0 == pytest.approx(axis.get_position().x0)
    assert bars.get_position().x1 == pytest.approx(axis.get_position().x1)
    image = axis.get_images()[0]
    assert image.get_array().tolist() == coef.detach().double().tolist()
    assert (image.norm.vmin, image.norm.vmax) == (0, 1)


def test_negative_coefficients_have_colours_about_zero():
    figure = drawn(plot_coefficients([[-0.2, 0.5], [math.nan, math.inf]], LAYERS[:2], TASKS))
    bars, axis = figure.axes[:2]
    image = axis.get_images()[0]
    assert (image.norm.vmin, image.norm.vcenter, image.norm.vmax) == (-0.5, 0, 0.5)
    # What is not finite is left out of the means too.
    assert texts(axis) == texts(bars) == ["\N{MINUS SIGN}.20", ".50"]
    assert len(plot_coefficients([[math.nan]], ["all"], ["mnist"]).axes[0].texts) == 1


def test_a_number_that_rounds_to_zero_has_no_sign():
    assert texts(plot_coefficients([[-0.001, 0.999]], ["all"], TASKS).axes[1]) == [".00", "1.00"]


def test_lines_part_the_blocks():
    axis = plot_coefficients(torch.rand(4, 2), LAYERS, TASKS).axes[1]
    assert [line.get_ydata()[0] for line in axis.lines] == [1.5]
    axis = plot_coefficients(torch.rand(5, 2), [f"net.{i}" for i in range(5)], TASKS).axes[1]
    assert not axis.lines  # a line at each row would hide the rows


@pytest.mark.parametrize(("blocks", "rows"), [(2, 16), (9, 58)])
def test_layers_are_named_one_by_one_as_long_as_there_is_room(blocks, rows):
    axis = plot_coefficients(torch.rand(rows, 2), vit(blocks), TASKS).axes[1]
    labels = names(axis.get_yticklabels())
    assert len(labels) == rows
    assert labels[:4] == ["embeddings.cls", "embeddings.patch.weight", "pre_norm.bias", "layers.0.self_attn.q.weight"]
    assert bool(axis.texts) is (rows < 40)


def test_many_layers_are_named_by_block_and_small_neighbours_share_a_name():
    layers = vit(32)
    figure = drawn(plot_coefficients(torch.rand(len(layers), 2), layers, TASKS))
    axis = figure.axes[1]
    assert names(axis.get_yticklabels()) == [
        "embeddings, pre_norm", *(f"layers.{block}" for block in range(32)), "post_norm"
    ]  # fmt: skip
    assert axis.get_yticks()[:3].tolist() == [1, 5.5, 11.5]
    assert figure.get_size_inches()[1] < 13 and not axis.texts
    # Below a long map the tasks are named again.
    assert names(axis.get_xticklabels()) == names(figure.axes[0].get_xticklabels()) == TASKS


@pytest.mark.parametrize("rows", [5, 60, 199, 400])
def test_names_of_rows_never_touch(rows):
    figure = drawn(plot_coefficients(torch.rand(rows, 2), [f"layer{i}" for i in range(rows)], TASKS))
    axis = figure.axes[1]
    boxes = [label.get_window_extent() for label in axis.get_yticklabels()]
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))
    labels = names(axis.get_yticklabels())
    assert labels[0].startswith("layer0") and labels[-1].endswith(f"layer{rows - 1}")


def test_long_names_are_cut_but_never_confused():
    long = [f"{'x' * 30}{i}{'y' * 30}" for i in range(2)]
    # Told apart by the middle alone.
    assert names(plot_coefficients(torch.rand(2, 2), long, TASKS).axes[1].get_yticklabels()) == long
    towers = [f"{tower}.layers.0.weight" for tower in ("image", "text")]
    assert names(plot_coefficients(torch.rand(2, 2), towers, TASKS).axes[1].get_yticklabels()) == towers
    alone = ["net." + "a" * 20 + "b" * 30, "net.c"]
    labels = names(plot_coefficients(torch.rand(2, 2), alone, TASKS).axes[1].get_yticklabels())
    assert labels == ["net." + "a" * 15 + "…" + "b" * 19, "net.c"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4), r"expected coefficients of 4 layers x 2 tasks, got the shape \(2, 4\): pass its transpose"),
        ((3, 2), r"expected coefficients of 4 layers x 2 tasks, got the shape \(3, 2\)$"),
        ((4,), r"got the shape \(4,\)$"),
    ],
)
def test_coefficients_of_another_shape_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        plot_coefficients(torch.rand(shape), LAYERS, TASKS)


def test_adaptation_has_a_panel_for_each_quantity_and_a_curve_for_each_task():
    history = {
        "entropy": {"mnist": [(10, 0.5), (0, 1.0)], "svhn": [(0, 2.0), (10, 1.5), (20, 1.0)]},
        "acc": {"mnist": [(0, 0.5), (3, 0.6)], "unseen": []},
    }
    figure = drawn(plot_adaptation(history))
    entropy, accuracy = figure.axes
    assert (entropy.get_title(), accuracy.get_title()) == ("entropy in nats", "accuracy")
    curves = [line.get_xydata().tolist() for line in entropy.lines]
    assert curves == [[[0, 1.0], [10, 0.5]], [[0, 2.0], [10, 1.5], [20, 1.0]], [[0, 1.5], [10, 1.0]]]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[0, 0.5], [3, 0.6]]]
    assert entropy.lines[0].get_color() == accuracy.lines[0].get_color() != entropy.lines[1].get_color()
    assert all(step == int(step) for step in accuracy.get_xticks())
    (legend,) = figure.legends
    assert names(legend.get_texts()) == ["mnist", "svhn", "mean"]
    assert legend.get_window_extent().x0 >= accuracy.get_window_extent().x1


def test_long_noisy_curves_are_drawn_below_their_running_mean():
    wave = [(step, float(step % 2)) for step in range(200)]
    axis = plot_adaptation({"entropy": {"mnist": wave}}).axes[0]
    faint, strong = axis.lines
    assert faint.get_alpha() < 0.5 and faint.get_ydata().tolist() == [value for _, value in wave]
    assert len(strong.get_ydata()) == 200 and abs(strong.get_ydata()[20:-20] - 0.5).max() < 0.06
    assert strong.get_ydata()[0] == pytest.approx(sum(v for _, v in wave[:6]) / 6)


def test_an_adaptation_without_points_is_refused():
    with pytest.raises(ValueError, match=r"no curve to draw: the history of \['entropy', 'acc'\] holds no points"):
        plot_adaptation({"entropy": {"mnist": []}, "acc": {}})


def test_bias_has_a_pair_of_bars_for_each_task_and_for_the_mean():
    figure = drawn(plot_bias({"mnist": 0.4, "svhn": 0.2}, {"svhn": 0.25, "mnist": 0.1}, ("merged", "repaired")))
    axis = figure.axes[0]
    heights = [bar.get_height() for bar in axis.patches]
    assert heights == pytest.approx([0.4, 0.2, 0.3, 0.1, 0.25, 0.175])
    assert texts(axis) == ["\N{MINUS SIGN}75 %", "+25 %", "\N{MINUS SIGN}42 %"]
    assert names(axis.get_xticklabels()) == ["mnist", "svhn", "mean"]
    assert names(figure.legends[0].get_texts()) == ["merged", "repaired"]


def test_bias_of_one_task_has_no_mean_and_of_nothing_no_change():
    axis = drawn(plot_bias({"mnist": 0.0}, {"mnist": 0.1})).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0, 0.1] and not axis.texts
    assert texts(plot_bias({"mnist": 1.0}, {"mnist": 0.999}).axes[0]) == ["0 %"]


def test_biases_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match=r"the same tasks before and after, got \['mnist'\] and \['svhn'\]"):
        plot_bias({"mnist": 0.1}, {"svhn": 0.1})


def test_the_accuracy_table_is_in_per_cent_with_the_best_in_bold():
    rows = {
        "averaging": {"mnist": 0.875, "svhn": 0.642},
        "ties": {"svhn": 0.813, "mnist": 0.8753},
        "half": {"mnist": 0.5},
    }
    axis = drawn(plot_accuracy_table(rows)).axes[0]
    dash = "\N{EN DASH}"
    assert texts(axis) == ["87.5", "64.2", "75.8", "87.5", "81.3", "84.4", "50.0", dash, dash]
    bold = [text.get_text() for text in axis.texts if text.get_fontweight() == "bold"]
    assert bold == ["87.5", "87.5", "81.3", "84.4"]  # equal as they are shown
    assert names(axis.get_yticklabels()) == ["averaging", "ties", "half"]
    assert names(axis.get_xticklabels()) == ["mnist", "svhn", "mean"]


def test_dark_cells_have_white_numbers():
    axis = plot_accuracy_table({"low": {"mnist": 0.1}, "high": {"mnist": 1.0}}).axes[0]
    assert [text.get_color() for text in axis.texts] == ["black", "white"]
    axis = plot_coefficients([[0.0, 1.0]], ["all"], TASKS).axes[1]
    assert [text.get_color() for text in axis.texts] == ["white", "black"]


def test_accuracies_in_per_cent_are_refused():
    with pytest.raises(ValueError, match=r"of 'ties', 'mnist' is 87\.5, expected 0 to 1: divide per cent by 100"):
        plot_accuracy_table({"ties": {"mnist": 87.5}})
    with pytest.raises(ValueError, match=r"accuracy of 'ties', 'repaired' is 80\.0"):
        plot_surgery_gain({"ties": (0.7, 80.0)})
    with pytest.raises(ValueError, match=r"no accuracy to show of \['ties'\]"):
        plot_accuracy_table({"ties": {}})
    with pytest.raises(ValueError, match="no base to show"):
        plot_surgery_gain({})


def test_the_gain_of_surgery_is_in_points():
    figure = drawn(plot_surgery_gain({"averaging": (0.658, 0.8), "ties": (0.9, 0.895)}, individual=0.905))
    axis = figure.axes[0]
    assert texts(axis) == ["+14.2", "\N{MINUS SIGN}0.5"]
    alone, repaired = axis.collections[1:]
    assert alone.get_offsets().tolist() == [[65.8, 0], [90, 1]]
    assert repaired.get_offsets().tolist() == [[80, 0], [89.5, 1]]
    assert axis.lines[0].get_xdata()[0] == pytest.approx(90.5)
    assert names(figure.legends[0].get_texts()) == ["alone", "with surgery", "individual"]
    bottom, top = axis.get_ylim()
    assert bottom > top
    assert names(plot_surgery_gain({"ties": (0.7, 0.8)}).legends[0].get_texts()) == ["alone", "with surgery"]


def clusters(shift=0.0, count=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, generator=generator) * 0.1 + shift


def test_the_embedding_is_joint_and_repeatable():
    features = {"merged": clusters(8.0), "individual": clusters(), "repaired": clusters()}
    places = joint_tsne(features, seed=1)
    assert [tuple(found.shape) for found in places.values()] == [(12, 2)] * 3 and list(places) == list(features)
    # Equal features have equal places, those of another model lie apart.
    near = (places["individual"] - places["repaired"]).norm(dim=1).mean()
    assert near < 0.1 * (places["individual"].mean(0) - places["merged"].mean(0)).norm()
    again = joint_tsne(features, seed=1)
    assert all(torch.equal(places[source], again[source]) for source in places)


@pytest.mark.parametrize("features", [torch.ones(5, 3), torch.arange(5.0)[:, None]], ids=["collapsed", "one dimension"])
def test_features_without_principal_components_are_embedded_too(features):
    assert joint_tsne({"merged": features})["merged"].isfinite().all()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": torch.rand(5, 3), "b": torch.rand(5, 4)}, r"of one dimension, got {'a': \(5, 3\), 'b': \(5, 4\)}"),
        ({"a": torch.rand(5, 3, 2)}, r"expected features \(images, dimension\)"),
        ({"a": torch.full((5, 3), math.nan)}, "the features of 'a' have NaN or infinity"),
        ({"a": torch.rand(3, 3)}, "t-SNE needs 4 points or more, got 3"),
        ({}, "expected features"),
    ],
)
def test_features_that_cannot_be_embedded_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        joint_tsne(features)


def test_features_are_coloured_by_source_and_by_class(monkeypatch):
    monkeypatch.setattr("zoo.merging.feature_figures.joint_tsne", lambda features, seed: dict(features))
    features = {"merged": torch.rand(3, 2), "individual": torch.rand(3, 2)}
    figure = drawn(plot_tsne(features, torch.tensor([7, 4, 7])))
    sources, classes = figure.axes
    for dots, found in zip(sources.collections, features.values(), strict=True):
        assert torch.allclose(torch.as_tensor(dots.get_offsets().data).float(), found)
    assert len({tuple(dots.get_edgecolor()[0]) for dots in sources.collections}) == 2
    assert [len(dots.get_offsets()) for dots in classes.collections] == [2, 4]
    assert names(classes.get_legend().get_texts()) == ["4", "7"]
    assert names(figure.legends[0].get_texts()) == ["merged", "individual"]
    assert len(plot_tsne(features).axes) == 1
    with pytest.raises(ValueError, match=r"a label for each image, got 2 for {'merged': 3, 'individual': 3}"):
        plot_tsne(features, torch.tensor([1, 2]))


@pytest.mark.parametrize(("tasks", "grid"), [(1, (1, 1)), (5, (2, 3)), (8, (2, 4)), (9, (3, 3))])
def test_the_grid_has_a_panel_for_each_task(tasks, grid, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        "zoo.merging.feature_figures.joint_tsne", lambda features, seed: seeds.append(seed) or dict(features)
    )
    features = {f"task{i}": {"merged": torch.rand(3, 2), "individual": torch.rand(3, 2)} for i in range(tasks)}
    figure = plot_tsne_grid(features, seed=5)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == list(features) and seeds == [5] * tasks
    assert figure.axes[0].get_gridspec().get_geometry() == grid
    assert names(figure.legends[0].get_texts()) == ["merged", "individual"]


def test_a_source_has_its_colour_in_every_panel_and_no_task_is_no_picture(monkeypatch):
    monkeypatch.setattr("zoo.merging.feature_figures.joint_tsne", lambda features, seed: dict(features))
    dots = torch.rand(3, 2)
    figure = plot_tsne_grid({"a": {"merged": dots, "individual": dots}, "b": {"individual": dots}})
    first, second = figure.axes
    assert first.collections[1].get_edgecolor().tolist() == second.collections[0].get_edgecolor().tolist()
    with pytest.raises(ValueError, match="no task to draw"):
        plot_tsne_grid({})


@pytest.mark.parametrize("count", [1, 10, 11, 40])
def test_colours_are_told_apart(count):
    assert len(set(palette(count))) == count
