"""Attention over views: convex, the same for all views, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.idsf.attention import AttentionFusion, MeanFusion


def fusion(hidden_size: int = 4) -> AttentionFusion:
    torch.manual_seed(0)
    unit = AttentionFusion(hidden_size)
    for weight in unit.parameters():
        torch.nn.init.normal_(weight)
    return unit


def views(count: int, rows: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(rows, 4, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_are_positive_and_sum_to_one(count: int) -> None:
    weights = fusion().weights(views(count))
    assert weights.shape == (6, count) and bool((weights > 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_result_is_the_formula_row_by_row(count: int) -> None:
    unit, inputs = fusion().requires_grad_(False), views(count)
    weight, bias = unit.hidden.weight.double(), unit.hidden.bias.double()
    last, found = unit.score.weight[0].double(), unit(inputs)
    for row in range(6):
        powers = [math.exp(float(last @ torch.tanh(weight @ x[row].double() + bias))) for x in inputs]
        expected = sum(power / sum(powers) * x[row].double() for power, x in zip(powers, inputs, strict=True))
        torch.testing.assert_close(found[row].double(), expected, atol=1e-6, rtol=0)
        assert unit.weights(inputs)[row].tolist() == pytest.approx([p / sum(powers) for p in powers], abs=1e-6)


def test_equal_views_give_themselves_back() -> None:
    (x,) = views(1)
    torch.testing.assert_close(fusion()([x, x, x]), x)


def test_the_order_of_views_does_not_matter() -> None:
    first, second, third = views(3)
    torch.testing.assert_close(fusion()([first, second, third]), fusion()([third, first, second]))


def test_one_view_is_returned_as_it_is() -> None:
    (x,) = views(1)
    assert fusion()([x]) is x


def test_weights_differ_between_rows_and_the_score_has_no_bias() -> None:
    assert float(fusion().weights(views(2)).detach().std(0).min()) > 0.01
    assert fusion().score.bias is None and fusion().hidden.bias is not None


def test_under_autocast_weights_are_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = fusion().weights(views(2))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_switched_off_it_is_the_mean_with_equal_weights_and_nothing_to_learn(count: int) -> None:
    unit, inputs = MeanFusion(), views(count)
    assert list(unit.parameters()) == []
    torch.testing.assert_close(unit.weights(inputs), torch.full((6, count), 1 / count))
    torch.testing.assert_close(unit(inputs), sum(inputs[1:], inputs[0]) / count)
