"""The pictures show the numbers, items and words that they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from zoo.idsf.figures import (
    ItemCard,
    RecommendationRow,
    plot_ablation,
    plot_attention,
    plot_embedding,
    plot_recommendations,
    plot_similarity,
)

GREEN = "#2e9e4f"


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(figure: Any) -> Any:
    figure.draw_without_rendering()
    return figure


def visible(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_visible()]


def tick_names(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_xticklabels()]


def weights(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=random(seed)).softmax(1)


def test_each_level_has_its_distributions_their_medians_and_the_even_weight() -> None:
    found = {"text": weights(50, 2), "modalities": weights(70, 3, 1), "users": weights(1200, 2, 2)}
    names = {"text": ("content", "ID"), "modalities": ("audio", "image", "text"), "users": ("image", "text")}
    figure = drawn(plot_attention(found, names))
    axes = visible(figure)
    assert [axis.get_title() for axis in axes] == ["text\n50 rows", "modalities\n70 rows", "users\n1,200 rows"]
    assert axes[0].get_ylabel() == "attention weight" and "median" in figure.get_suptitle()
    for axis, (level, own) in zip(axes, found.items(), strict=True):
        assert tick_names(axis) == list(names[level])
        medians = np.median(own.double().numpy(), axis=0)
        assert [text.get_text() for text in axis.texts] == [f"{median:.2f}" for median in medians]
        lines = [line.get_segments()[0][:, 1] for line in axis.collections if hasattr(line, "get_segments")]
        np.testing.assert_allclose(lines, np.stack((medians, medians), 1))
        np.testing.assert_allclose(axis.lines[0].get_ydata(), 1 / own.shape[1])
        low, high = axis.get_ylim()
        assert low <= float(own.min()) and high >= float(own.max())


def test_the_width_of_a_distribution_is_the_share_of_rows_there() -> None:
    own = torch.tensor([0.1] * 30 + [0.9] * 10, dtype=torch.float64)
    figure = drawn(plot_attention({"text": torch.stack((own, 1 - own), 1)}, {"text": ("content", "ID")}))
    (axis,) = visible(figure)
    shape = axis.collections[0].get_paths()[0].vertices
    low, high = (shape[abs(shape[:, 1] - place) < 0.03] for place in (0.1, 0.9))
    assert np.ptp(low[:, 0]) == pytest.approx(0.8) and np.ptp(high[:, 0]) == pytest.approx(0.8 / 3)


def test_constant_weights_and_many_levels_can_be_drawn() -> None:
    found = {f"level {number}": torch.full((9, 2), 0.5) for number in range(7)} | {"one": torch.ones(4, 1)}
    figure = drawn(plot_attention(found, {level: ("a", "b")[: own.shape[1]] for level, own in found.items()}))
    assert len(visible(figure)) == 8
    assert visible(figure)[0].texts[0].get_text() == "0.5000"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "no level"),
        ({"text": weights(5, 3)}, r"'text'.*\['content', 'ID'\]"),
        ({"other": weights(5, 2)}, "'other'"),
        ({"text": torch.zeros(0, 2)}, "'text'"),
        ({"text": torch.tensor([[1.5, -0.5]])}, r"\[0, 1\]"),
        ({"text": torch.tensor([[torch.nan, 0.5]])}, r"\[0, 1\]"),
    ],
    ids=["none", "inputs", "names", "rows", "range", "nan"],
)
def test_weights_that_cannot_be_drawn_are_refused(found: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_attention(found, {"text": ("content", "ID")})


def test_matrices_are_shown_as_given_sorted_by_user_with_lines_between_users() -> None:
    groups = torch.tensor([2, 0, 1, 0, 2, 2])
    order = [1, 3, 2, 0, 4, 5]
    matrices = {f"matrix {number}": torch.randn(6, 6, generator=random(number)) for number in range(5)}
    figure = drawn(plot_similarity(matrices, groups))
    axes = visible(figure)
    assert len(axes) == 5 and figure.get_suptitle() == "likeness of 6 items of 3 users"
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        (image,) = axis.images
        np.testing.assert_array_equal(image.get_array(), matrix[order][:, order].numpy())
        largest = float(matrix.clone().fill_diagonal_(0).max())
        assert image.get_clim() == (0, pytest.approx(largest))
        assert axis.get_title() == f"{name}\n0 to {largest:.2g}"
        assert [line.get_ydata()[0] for line in axis.lines[::2]] == [1.5, 2.5]
        assert [line.get_xdata()[0] for line in axis.lines[1::2]] == [1.5, 2.5]
    assert axes[0].get_yticks().tolist() == [0.5, 2, 4]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["0", "1", "2"]


def test_one_item_and_a_matrix_of_zeros_can_be_drawn() -> None:
    figure = drawn(plot_similarity({"zeros": torch.zeros(1, 1)}, torch.zeros(1).long()))
    assert visible(figure)[0].images[0].get_clim() == (0, 1)


def test_matrices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'a'.*\(3, 3\).*\(2, 3\)"):
        plot_similarity({"a": torch.zeros(2, 3)}, torch.zeros(3).long())
    with pytest.raises(ValueError, match="at least one matrix"):
        plot_similarity({}, torch.zeros(3).long())
    with pytest.raises(ValueError, match="one item"):
        plot_similarity({"a": torch.zeros(0, 0)}, torch.zeros(0).long())


def places_by_user(axis: Any) -> list[np.ndarray]:
    return [np.asarray(dots.get_offsets()) for dots in axis.collections]


def test_clusters_of_users_stay_clusters_in_the_plane() -> None:
    labels = torch.tensor([7, 3, 12]).repeat(8)
    centres = torch.eye(3)[torch.arange(3).repeat(8)]
    vectors = {
        # The length of a row says nothing.
        "ID": (centres + 0.02 * torch.randn(24, 3, generator=random(0))) * torch.linspace(1, 50, 24)[:, None],
        "raw": torch.randn(24, 5, generator=random(1)),
    }
    figure = drawn(plot_embedding(vectors, labels))
    axes = visible(figure)
    assert [axis.get_title() for axis in axes] == ["ID", "raw"]
    assert figure.get_suptitle() == "24 items of 3 users, t-SNE (in place of UMAP)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["3", "7", "12"]
    users = places_by_user(axes[0])
    assert [own.shape for own in users] == [(8, 2)] * 3
    within = max(np.linalg.norm(own - own.mean(0), axis=1).max() for own in users)
    between = min(np.linalg.norm(users[i].mean(0) - users[j].mean(0)) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert between > 1.5 * within
    colours = [tuple(dots.get_facecolors()[0]) for dots in axes[0].collections]
    assert len(set(colours)) == 3
    again = plot_embedding(vectors, labels)
    np.testing.assert_array_equal(np.concatenate(users), np.concatenate(places_by_user(visible(again)[0])))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_fewer_than_four_items_lie_by_their_principal_components(number: int) -> None:
    vectors = torch.randn(number, 4, generator=random(number))
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    figure = drawn(plot_embedding({"ID": vectors}, torch.arange(number)))
    places = np.concatenate(places_by_user(visible(figure)[0]))
    # Three points or fewer lie in a plane, where their distances are kept.
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.testing.assert_allclose(distances, torch.cdist(unit, unit).numpy(), atol=1e-5)
    assert "principal components" in figure.get_suptitle()


def test_constant_vectors_of_many_users_can_be_drawn() -> None:
    figures = [
        drawn(plot_embedding({"ID": torch.ones(25, 3), "flat": torch.ones(25, 1)}, torch.arange(25), seed))
        for seed in (0, 0, 1)
    ]
    assert len(visible(figures[0])[0].collections) == 25
    # Without principal components to start from, the seed says where.
    first, again, other = (np.concatenate(places_by_user(visible(figure)[1])) for figure in figures)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_vectors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'ID'.*each of 4"):
        plot_embedding({"ID": torch.zeros(3, 2)}, torch.arange(4))
    with pytest.raises(ValueError, match=r"'ID'.*NaN"):
        plot_embedding({"ID": torch.full((4, 2), torch.nan)}, torch.arange(4))
    with pytest.raises(ValueError, match="at least one"):
        plot_embedding({}, torch.arange(4))


def poster(shade: int) -> np.ndarray:
    return np.full((9, 6, 3), shade, dtype=np.uint8)


def framed(axis: Any) -> bool:
    spine = axis.spines["left"]
    return spine.get_visible() and to_hex(spine.get_edgecolor()) == GREEN and spine.get_linewidth() >= 2


def test_users_have_their_items_then_recommendations_with_green_frames_on_hits() -> None:
    rows = [
        RecommendationRow(
            "17",
            [ItemCard("seen $1", poster(1)), ItemCard("seen_2", poster(2))],
            [ItemCard("first", poster(3)), ItemCard("second"), ItemCard("third", poster(5))],
            [False, True, True],
        ),
        RecommendationRow("a$b_", [ItemCard("only", poster(6))], [ItemCard("best", poster(7))], [False]),
    ]
    figure = drawn(plot_recommendations(rows))
    grid = np.array(figure.axes).reshape(2, 6)
    # Two items of training, the gap, three recommendations.
    shades = [[int(axis.images[0].get_array()[0, 0, 0]) if axis.images else None for axis in line] for line in grid]
    assert shades == [[1, 2, None, 3, None, 5], [6, None, None, 7, None, None]]
    assert [axis.get_xlabel() for axis in grid[0]] == ["seen $1", "seen_2", "", "first", "", "third"]
    assert [text.get_text() for text in grid[0, 4].texts] == ["second"]
    assert [[framed(axis) for axis in line] for line in grid] == [
        [False, False, False, False, True, True],
        [False] * 6,
    ]
    assert [[axis.spines["left"].get_visible() for axis in line] for line in grid] == [
        [True, True, False, True, True, True],
        [True, False, False, True, False, False],
    ]
    assert [line[0].get_ylabel() for line in grid] == ["user 17", "user a$b_"]
    assert [axis.get_title(loc="left") for axis in grid[0]] == [
        "items of training",
        "",
        "",
        "recommended, best first",
        "",
        "",
    ]


def test_long_titles_are_wrapped_and_cut() -> None:
    title = "The Lord of the Rings: The Fellowship of the Ring, extended edition"
    row = RecommendationRow("0", [], [ItemCard(title), ItemCard(title, poster(0)), ItemCard("")], [True, False, False])
    figure = drawn(plot_recommendations([row]))
    shown = figure.axes[1].texts[0].get_text()
    assert shown == figure.axes[2].get_xlabel() and shown.startswith("The Lord of the\nRings")
    assert shown.count("\n") == 2 and shown.endswith("\N{HORIZONTAL ELLIPSIS}")
    assert figure.axes[1].get_title(loc="left") == "recommended, best first"


def test_users_without_items_or_hits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"user 3: 1 recommendations, 0 hits"):
        plot_recommendations([RecommendationRow("3", [], [ItemCard("a")], [])])
    with pytest.raises(ValueError, match="no item"):
        plot_recommendations([RecommendationRow("3", [], [], [])])
    with pytest.raises(ValueError, match="no item"):
        plot_recommendations([])


def test_bars_of_variants_have_means_spreads_and_the_change_from_the_first() -> None:
    results = {"IDSF": (0.08, 0.002), "no IDs": (0.06, 0.001), "mean": (0.084, 0.0)}
    figure = drawn(plot_ablation(results, "test/recall@20"))
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [0.08, 0.06, 0.084]
    assert [label.get_text() for label in axis.get_yticklabels()] == list(results)
    assert axis.yaxis_inverted()
    assert [text.get_text() for text in axis.texts] == [
        "0.0800 \u00b1 0.0020",
        "0.0600 \u00b1 0.0010  (-25.0 %)",
        "0.0840  (+5.0 %)",
    ]
    assert axis.get_xlabel() == "test/recall@20 (mean, standard deviation over seeds)"
    segments = axis.containers[1].lines[2][0].get_segments()
    np.testing.assert_allclose([segment[:, 0] for segment in segments], [[0.078, 0.082], [0.059, 0.061]])
    np.testing.assert_allclose([segment[:, 1] for segment in segments], [[0, 0], [1, 1]])
    reference = [line for line in axis.lines if line.get_linestyle() == ":"]
    np.testing.assert_allclose(reference[0].get_xdata(), 0.08)
    assert axis.patches[0].get_facecolor() != axis.patches[1].get_facecolor() == axis.patches[2].get_facecolor()
    assert axis.get_xlim()[0] == 0


def test_numbers_stay_within_the_axis() -> None:
    figure = plot_ablation({"a": (0.5, 0.01), "b": (0.4999, 0.1), "a longer name of a variant": (0.1, 0.0)}, "recall")
    drawn(figure)
    (axis,) = figure.axes
    right = axis.get_window_extent().x1
    assert all(text.get_window_extent().x1 <= right + 1 for text in axis.texts)


def test_negative_and_zero_means_can_be_drawn() -> None:
    assert drawn(plot_ablation({"a": (0.0, 0.0)}, "gain")).axes[0].texts[0].get_text() == "0.0000"
    figure = drawn(plot_ablation({"a": (0.2, 0.1), "b": (-0.3, 0.1)}, "gain"))
    assert figure.axes[0].get_xlim()[0] == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "no variant"),
        ({"a": (float("nan"), 0.0)}, "'a'"),
        ({"a": (0.1, -1.0)}, "'a'"),
        ({"a": (0.1, float("nan"))}, "'a'"),
    ],
    ids=["none", "nan", "negative", "nan spread"],
)
def test_results_that_are_no_numbers_are_refused(results: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_ablation(results, "recall")
