"""Titles of one victim on another."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.text_attack.test_aggregate import result
from zoo.text_attack.exposure import top_scores_of
from zoo.text_attack.transfer import TransferStudy, exposure_scorer

RESULTS = {"first": [result(0, 0.1, 0.3), result(1, 0.1, 0.2)], "second": [result(2, 0.1, 0.2)]}


def table(values):
    """A victim with known exposures of titles of items."""
    return lambda item, titles: torch.tensor([values[item][title == "Mario"] for title in titles])


VICTIMS = {
    "white": table({0: (0.3, 0.1), 1: (0.2, 0.1), 2: (0.2, 0.1)}),
    "black": table({0: (0.1, 0.1), 1: (0.5, 0.2), 2: (0.1, 0.2)}),
}


def test_the_matrix_holds_the_means_of_each_pair():
    matrix = TransferStudy(VICTIMS, RESULTS).matrix()
    assert (matrix.sources, matrix.victims) == (("first", "second"), ("white", "black"))
    torch.testing.assert_close(matrix.pre, torch.tensor([[0.1, 0.15], [0.1, 0.2]]).double())
    torch.testing.assert_close(matrix.lift, torch.tensor([[2.5, 2.0], [2.0, 0.5]]).double())
    torch.testing.assert_close(matrix.gain, torch.tensor([[0.15, 0.15], [0.1, -0.1]]).double())
    torch.testing.assert_close(matrix.win_rate, torch.tensor([[1.0, 0.5], [1.0, 0.0]]).double())
    assert matrix.to_dict()["second"] == pytest.approx({"white": 2.0, "black": 0.5})


def test_results_in_any_order_give_the_same_matrix():
    turned = {name: list(reversed(results)) for name, results in RESULTS.items()}
    assert torch.equal(TransferStudy(VICTIMS, turned).matrix().lift, TransferStudy(VICTIMS, RESULTS).matrix().lift)


def test_a_scorer_gives_the_exposure_of_titles_in_its_victim():
    catalogue = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.6, 0.4]])
    scorer = exposure_scorer(
        lambda titles: torch.tensor([[0.8 if title == "Great" else 0.0 for title in titles]] * 2),
        top_scores_of([catalogue], 1),
    )
    assert scorer(2, ["Great", "Poor"]).tolist() == [0.5, 0]
    assert scorer(0, ["Great", "Poor"]).tolist() == [1, 0]


def test_bad_studies_are_refused():
    with pytest.raises(ValueError, match="got 2 and 0"):
        TransferStudy({}, RESULTS)
    with pytest.raises(ValueError, match="'first' has no result"):
        TransferStudy(VICTIMS, {"first": []})
    with pytest.raises(ValueError, match=r"'bad' must give a finite number .* item 0"):
        TransferStudy({"bad": lambda item, titles: torch.tensor([torch.nan, 0.0])}, RESULTS).matrix()
    with pytest.raises(ValueError, match="pessimistic"):
        exposure_scorer(lambda titles: torch.zeros(1, 1), top_scores_of([torch.zeros(1, 3)], 1), "none")
