"""A constant or NaN output is never right, and ties are seen."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from tests.ranks import run_ranks
from zoo.summary_mrc.metrics import ChoiceAccuracy, TieRate, answered_right, predictions, tied

NAN, INF = math.nan, math.inf


def grid(seed: int, rows: int = 300, options: int = 5) -> tuple[Tensor, Tensor]:
    """Scores with many ties, NaN and infinities, and one or two accepted options each."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-INF, -1.0, 0.0, 1.0, 2.0, INF, NAN])
    chances = torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0, 0.1, 0.2])
    scores = values[torch.multinomial(chances, rows * options, True, generator=generator)].view(rows, options)
    accepted = torch.zeros(rows, options, dtype=torch.bool)
    for _ in range(2):
        places = torch.randint(options, (rows, 1), generator=generator)
        accepted.scatter_(1, places, True)
    return scores, accepted


def literally_right(scores: list[float], accepted: list[bool]) -> bool:
    mine = [score for score, right in zip(scores, accepted, strict=True) if right]
    others = [score for score, right in zip(scores, accepted, strict=True) if not right]
    if any(math.isnan(score) for score in scores) or not mine or not math.isfinite(max(mine)):
        return False
    return all(max(mine) > other for other in others)


def literal_prediction(scores: list[float]) -> int:
    known = [score for score in scores if not math.isnan(score)]
    return scores.index(max(known)) if known else 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_answers_equal_the_definition_row_by_row(seed: int) -> None:
    scores, accepted = grid(seed)
    expected = [literally_right(*row) for row in zip(scores.tolist(), accepted.tolist(), strict=True)]
    assert 0.1 < sum(expected) / len(expected) < 0.9
    assert answered_right(scores, accepted).tolist() == expected
    metric = ChoiceAccuracy()
    for start in range(0, len(scores), 128):
        metric.update(scores[start : start + 128], accepted[start : start + 128])
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == sum(expected) / len(expected)


@pytest.mark.parametrize("value", [0.0, NAN, INF, -INF])
def test_constant_output_is_never_right_and_always_a_tie(value: float) -> None:
    scores, accepted = torch.full((6, 5), value), torch.eye(6, 5).bool()
    accuracy, ties = ChoiceAccuracy(), TieRate()
    accuracy.update(scores, accepted)
    ties.update(scores)
    assert float(accuracy.compute()) == 0 and float(ties.compute()) == 1
    assert predictions(scores).tolist() == [0] * 6


def test_accepted_options_may_tie_with_each_other_but_not_with_others() -> None:
    accepted = torch.tensor([[True, True, False]])
    assert answered_right(torch.tensor([[2.0, 2.0, 1.0]]), accepted).tolist() == [True]
    assert answered_right(torch.tensor([[2.0, 0.0, 1.0]]), accepted).tolist() == [True]
    assert answered_right(torch.tensor([[2.0, 2.0, 2.0]]), accepted).tolist() == [False]
    assert answered_right(torch.tensor([[2.0, 2.0, 1.0]]), torch.zeros(1, 3, dtype=torch.bool)).tolist() == [False]
    assert answered_right(torch.tensor([[0.5, -INF, -INF]]), torch.ones(1, 3, dtype=torch.bool)).tolist() == [True]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_predictions_and_ties_equal_the_definition_row_by_row(seed: int) -> None:
    scores, _ = grid(seed)
    rows = scores.tolist()
    assert predictions(scores).dtype == torch.int64
    assert predictions(scores).tolist() == [literal_prediction(row) for row in rows]
    expected = []
    for row in rows:
        known = [score for score in row if not math.isnan(score)]
        expected.append(known.count(max(known)) > 1 if known else True)
    assert tied(scores).tolist() == expected


@pytest.mark.parametrize(
    ("row", "chosen", "tie"),
    [
        ([NAN, -1.0, -1.0, -2.0], 1, True),
        ([NAN, -INF, NAN, NAN], 1, False),
        ([NAN, NAN, NAN, NAN], 0, True),
        ([3.0, INF, NAN, 0.0], 1, False),
        ([0.0, 3.0, 3.0, 3.0], 1, True),
    ],
)
def test_ties_go_to_the_lowest_index_and_nan_is_chosen_last(row: list[float], chosen: int, tie: bool) -> None:
    scores = torch.tensor([row])
    assert predictions(scores).tolist() == [chosen]
    assert tied(scores).tolist() == [tie]


def test_predictions_follow_a_permutation_of_the_options() -> None:
    scores = torch.randn(50, 5, generator=torch.Generator().manual_seed(3))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(order[predictions(scores[:, order])], predictions(scores))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_all_precisions_are_counted_alike(dtype: torch.dtype) -> None:
    scores, accepted = grid(4)
    assert torch.equal(answered_right(scores.to(dtype), accepted), answered_right(scores, accepted))
    assert torch.equal(predictions(scores.to(dtype)), predictions(scores))


def _measured(rank: int, scores: Tensor, accepted: Tensor) -> list[float]:
    # Unequal shares, of which the second has one batch more.
    mine = slice(0, 20) if rank == 0 else slice(20, None)
    accuracy, ties = ChoiceAccuracy(), TieRate()
    for part, right in zip(scores[mine].split(64), accepted[mine].split(64), strict=True):
        accuracy.update(part, right)
        ties.update(part)
    return [float(accuracy.compute()), float(ties.compute())]


def test_processes_with_unequal_shares_count_as_one(tmp_path: Path) -> None:
    scores, accepted = grid(5, rows=120)
    expected = [float(answered_right(scores, accepted).double().mean()), float(tied(scores).double().mean())]
    assert run_ranks(tmp_path, _measured, scores, accepted) == [expected, expected]


@pytest.mark.parametrize("kind", [ChoiceAccuracy, TieRate])
def test_states_made_in_inference_mode_may_be_continued_outside(kind: type[Metric]) -> None:
    scores, accepted = grid(6)
    arguments = (scores,) if kind is TieRate else (scores, accepted)
    metric = kind()
    metric.update(*arguments)
    once = float(metric.compute())
    with torch.inference_mode():
        metric.reset()
        metric.update(*arguments)
    metric.update(*arguments)
    assert float(metric.compute()) == once and int(metric.total) == 2 * len(scores)


@pytest.mark.parametrize(
    ("scores", "accepted", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.bool), r"scores must be floating .*float32 \(3,\)"),
        (torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool), r"got torch.float32 \(3, 0\)"),
        (torch.zeros(3, 5).long(), torch.zeros(3, 5, dtype=torch.bool), "int64"),
        (torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.bool), r"shape of scores \(3, 5\), got torch.bool \(3, 4\)"),
        (torch.zeros(3, 5), torch.zeros(3, 5).long(), "accepted must be bool .*int64"),
    ],
    ids=["one dimension", "no options", "integers", "other shape", "no bool"],
)
def test_wrong_shapes_and_types_are_refused(scores: Tensor, accepted: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChoiceAccuracy().update(scores, accepted)
