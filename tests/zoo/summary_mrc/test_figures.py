"""The pictures show the numbers and words that they are given."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from zoo.summary_mrc.figures import length_groups, plot_accuracy_by, plot_attention

DASH = "\N{EN DASH}"


def drawn(figure: Any) -> Any:
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("bins", [1, 3, 5, 40])
@pytest.mark.parametrize("highest", [3, 12, 500])
def test_groups_are_of_rising_lengths_and_their_names_say_which(bins: int, highest: int) -> None:
    lengths = torch.randint(0, highest, (30,), generator=torch.Generator().manual_seed(bins + highest))
    names, group = length_groups(lengths, bins)
    assert len(names) <= bins and group.unique().tolist() == list(range(len(names)))
    for number, name in enumerate(names):
        mine = lengths[group == number]
        low, high = int(mine.min()), int(mine.max())
        assert name == (str(low) if low == high else f"{low}{DASH}{high}")
        if number:
            assert low > int(lengths[group == number - 1].max())


def test_distinct_lengths_give_groups_of_equal_size() -> None:
    lengths = torch.randperm(103, generator=torch.Generator().manual_seed(0))
    names, group = length_groups(lengths, 5)
    assert torch.bincount(group).tolist() == [20, 21, 20, 21, 21]
    assert names[0] == f"0{DASH}19" and names[4] == f"82{DASH}102"


def test_equal_lengths_stay_together() -> None:
    names, group = length_groups(torch.tensor([7, 7, 7, 7, 2, 7, 512]), 3)
    assert names == [f"2{DASH}7", "512"] and group.tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert length_groups(torch.tensor([9, 9]))[0] == ["9"]


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [(torch.zeros(0).long(), 5), (torch.zeros(2, 2).long(), 5), (torch.zeros(3), 5), (torch.ones(3).long(), 0)],
    ids=["none", "two dimensions", "fractions", "no group"],
)
def test_lengths_that_cannot_be_grouped_are_refused(lengths: torch.Tensor, bins: int) -> None:
    with pytest.raises(ValueError, match="at least one length"):
        length_groups(lengths, bins)


def test_bars_stand_by_group_with_counts_chance_and_priors() -> None:
    figure = drawn(
        plot_accuracy_by(
            ["start", "middle", "end"],
            [0.5, 0.0, 1.0],
            [40, 0, 1200],
            0.2,
            {"rarest": 0.348, "count": 0.154},
            "place of the slot",
            "test $accuracy",
        )
    )
    (axis,) = figure.axes
    bars = [patch for patch in axis.patches if patch.get_width() > 0]
    # A group without questions has no bar.
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars] == [(0, 0.5), (2, 1.0)]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["start\n(40)", "middle\n(0)", "end\n(1,200)"]
    levels = {line.get_label(): line.get_ydata()[0] for line in axis.get_lines() if len(set(line.get_ydata())) == 1}
    assert {"chance 0.20": 0.2, "rarest 0.35": 0.348, "count 0.15": 0.154}.items() <= levels.items()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chance 0.20", "rarest 0.35", "count 0.15"]
    assert axis.get_xlabel() == "place of the slot (number of questions)"
    assert figure.get_suptitle() == "test $accuracy"


def test_error_bars_are_the_binomial_interval_and_never_leave_the_unit_interval() -> None:
    shares, counts = [0.25, 0.0, 1.0, 0.5], [200, 10, 3, 1]
    figure = drawn(plot_accuracy_by(["a", "b", "c", "d"], shares, counts, 0.2, {}, "", ""))
    bars = figure.axes[0].collections[0].get_segments()
    assert len(bars) == 4
    for segment, share, count in zip(bars, shares, counts, strict=True):
        low, high = sorted(segment[:, 1])
        assert 0 <= low <= share <= high <= 1
        # Wilson's ends are the shares p at which the observed one lies 1.96 standard errors away.
        for end in (low, high):
            if abs(end - share) > 1e-9:
                assert abs(share - end) / np.sqrt(end * (1 - end) / count) == pytest.approx(1.959964, abs=1e-6)
    assert sorted(bars[1][:, 1])[1] > 0.2 and sorted(bars[2][:, 1])[0] < 0.6


@pytest.mark.parametrize(
    ("values", "counts", "message"),
    [
        ([0.5], [1, 2], "2 groups, 1 accuracies and 2 counts"),
        ([0.5, 1.5], [1, 2], "group 'b' is 1.5"),
        ([float("nan"), 0.5], [1, 2], "group 'a' is nan"),
    ],
    ids=["sizes", "above one", "nan"],
)
def test_numbers_that_are_no_accuracies_are_refused(values: list[float], counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_accuracy_by(["a", "b"], values, counts, 0.2, {}, "", "")


SUMMARY = ["the", "object", "##ive", "costs", "$", "5", "$", "."]
# "$7_$" would be a formula with a mistake.
PASSAGE = ["a", "play", "##er", "##s", "goal", "of", "$7_$", "or", "$"]


def attention(rows: dict[int, list[float]]) -> torch.Tensor:
    weights = torch.rand(len(SUMMARY), len(PASSAGE), generator=torch.Generator().manual_seed(1))
    for place, row in rows.items():
        weights[place] = torch.tensor(row)
    return weights


def test_words_are_joined_wrapped_and_shaded_by_the_mean_attention_of_the_option() -> None:
    weights = attention({1: [0.0, 0.4, 0, 0, 0.2, 0, 0, 0, 0], 2: [0.0, 0.0, 0, 0, 0.6, 0, 0, 0, 0.4]})
    figure = drawn(plot_attention(SUMMARY, PASSAGE, weights.half(), [1, 2], "costs $5"))
    text, bar = figure.axes
    assert [each.get_text() for each in text.texts] == [
        *("the", "object", "ive", "costs", "$", "5", "$", "."),
        *("a", "play", "er", "s", "goal", "of", "$7_$", "or", "$"),
    ]
    columns = [each.get_position()[0] for each in text.texts]
    assert columns[:4] == [0, 4, 10, 14] and columns[8:13] == [0, 2, 6, 8, 10]
    lines = [each.get_position()[1] for each in text.texts]
    assert set(lines[:8]) == {0.5} and set(lines[8:]) == {2.5}
    shades = [patch.get_facecolor() for patch in text.patches]
    assert [shade[3] > 0 for shade in shades[:8]] == [False, True, True, False, False, False, False, False]
    # Darker is more: 0.4 in the mean on "goal", 0.2 on "play" and on the last token, 0 elsewhere.
    darkness = [3 - sum(shade[:3]) for shade in shades[8:]]
    assert max(darkness) == darkness[4] and darkness[1] == pytest.approx(darkness[8], abs=0.01)
    assert darkness[4] > darkness[1] > darkness[0] == darkness[2] == darkness[7]
    assert bar.get_images()[0].get_extent()[1] == pytest.approx(0.4, abs=1e-3)
    assert [each.get_text() for each in figure.texts] == [
        "attention of the option; spread evenly over 9 tokens: 0.111",
        "costs $5",
    ]


@pytest.mark.parametrize("mark", ["\u0120", "\u2581"])
def test_marks_of_byte_level_and_sentence_pieces_part_the_words(mark: str) -> None:
    tokens = ["The", f"{mark}goal", "keep", "er", f"{mark}won", ".", mark, "Then"]
    figure = plot_attention(tokens, tokens, torch.full((8, 8), 0.125), [1], "")
    texts = figure.axes[0].texts[8:]
    assert [each.get_text() for each in texts] == ["The", "goal", "keep", "er", "won", ".", "", "Then"]
    assert [each.get_position()[0] for each in texts] == [0, 4, 8, 12, 15, 18, 20, 20]


def test_long_texts_wrap_inside_the_picture() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 12, (300,), generator=generator).tolist()
    passage = ["x" * length for length in lengths] + ["y" * 200, "##" + "z" * 50, "##" + "z" * 50]
    weights = torch.rand(4, len(passage), generator=generator)
    figure = drawn(plot_attention(["one", "two", "three", "four"], passage, weights, [3], "long"))
    axis = figure.axes[0]
    right, bottom = axis.get_xlim()[1], axis.get_ylim()[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    box = axis.get_window_extent(renderer)
    last = (0.0, -1.0)
    for each in axis.texts:
        column, line = each.get_position()
        assert column + len(each.get_text()) <= right and line < bottom
        assert (line, column) > last
        last = (line, column)
        extent = each.get_window_extent(renderer)
        assert extent.x1 <= box.x1 + 1 and extent.x0 >= box.x0 - 1
    # A character is drawn as wide as the layout says: neither gaps nor overlaps.
    word = next(each for each in axis.texts if len(each.get_text()) == 11)
    unit = box.width / right
    assert word.get_window_extent(renderer).width == pytest.approx(11 * unit, rel=0.06)


def test_a_word_of_several_tokens_goes_to_the_next_line_as_a_whole() -> None:
    passage = ["x" * 79, "play", "##er", "##s"]
    texts = plot_attention(["a"], passage, torch.ones(1, 4), [0], "").axes[0].texts[1:]
    assert [each.get_position() for each in texts] == [(0, 2.5), (0, 3.5), (4, 3.5), (6, 3.5)]


def test_no_attention_at_all_is_drawn_pale() -> None:
    figure = drawn(plot_attention(["a"], ["b", "c"], torch.zeros(1, 2), [0], ""))
    assert figure.axes[1].get_images()[0].get_extent()[1] == 1
    assert all(sum(patch.get_facecolor()[:3]) > 2.8 for patch in figure.axes[0].patches[1:])


@pytest.mark.parametrize(
    ("passage", "weights", "places", "message"),
    [
        (["b", "c"], torch.ones(2, 1), [0], r"1 tokens of the sentence and 2 of the passage .* got \(2, 1\)"),
        ([], torch.ones(1, 0), [0], "0 of the passage"),
        (["b"], torch.ones(1, 1), [], r"got \[\]"),
        (["b"], torch.ones(1, 1), [1], r"sentence of 1 tokens, got \[1\]"),
        (["b"], torch.full((1, 1), torch.nan), [0], "finite and not negative"),
        (["b"], -torch.ones(1, 1), [0], "finite and not negative"),
    ],
    ids=["shape", "no passage", "no option", "outside", "nan", "negative"],
)
def test_weights_that_do_not_fit_are_refused(
    passage: list[str], weights: torch.Tensor, places: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plot_attention(["a"], passage, weights, places, "")
