"""The contrastive loss against its closed form, loops in float64, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.idsf.contrast import multi_view_nce


def pair(items: int = 7, width: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    anchors, views = torch.randn(2, items, width, generator=generator, dtype=torch.float64)
    return anchors.requires_grad_(), views.requires_grad_()


def brute_force(anchors: Tensor, views: Tensor, temperature: float) -> list[float]:
    """Loss of each item with exponentials, sums and logarithms."""
    first = [row / row.norm() for row in anchors.detach().double()]
    second = [row / row.norm() for row in views.detach().double()]
    losses = []
    for i in range(len(first)):
        positive = math.exp(float(first[i] @ second[i]) / temperature)
        across = sum(math.exp(float(first[i] @ other) / temperature) for other in second)
        within = sum(math.exp(float(first[i] @ first[j]) / temperature) for j in range(len(first)) if j != i)
        losses.append(-math.log(positive / (across + within)))
    return losses


def value_and_gradients(anchors: Tensor, views: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    value = multi_view_nce(anchors, views, **options)  # type: ignore[arg-type]
    first, second = torch.autograd.grad(value, (anchors, views))
    return value.detach(), first, second


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_it_equals_the_formula_computed_by_loops(temperature: float) -> None:
    expected = brute_force(*pair(), temperature)
    assert float(multi_view_nce(*pair(), temperature).detach()) == pytest.approx(sum(expected) / 7, rel=1e-12)


@pytest.mark.parametrize("items", [2, 5])
@pytest.mark.parametrize("temperature", [0.2, 0.5])
def test_equal_orthonormal_views_have_the_closed_form(items: int, temperature: float) -> None:
    rows = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q[:items]
    expected = math.log(1 + 2 * (items - 1) * math.exp(-1 / temperature))
    assert float(multi_view_nce(rows, rows, temperature)) == pytest.approx(expected, rel=1e-5)


def test_one_item_has_nothing_to_be_told_from() -> None:
    anchors, views = pair(items=1)
    value, *gradients = value_and_gradients(anchors, views)
    assert float(value) == 0 and all(bool((part.abs() < 1e-12).all()) for part in gradients)


def test_the_lengths_of_rows_do_not_matter() -> None:
    anchors, views = pair()
    scale = torch.linspace(0.1, 30, 7)[:, None]
    expected = multi_view_nce(anchors, views)
    torch.testing.assert_close(multi_view_nce(anchors * scale, views), expected)
    torch.testing.assert_close(multi_view_nce(anchors, views * scale), expected)


def test_the_order_of_items_does_not_matter() -> None:
    anchors, views = pair()
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    torch.testing.assert_close(multi_view_nce(anchors[order], views[order]), multi_view_nce(anchors, views))


def test_the_first_view_is_the_anchor() -> None:
    anchors, views = pair()
    assert abs(float((multi_view_nce(anchors, views) - multi_view_nce(views, anchors)).detach())) > 0.01


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_chunks_change_neither_the_value_nor_the_gradients(chunk: int) -> None:
    expected = value_and_gradients(*pair())
    for found, wanted in zip(value_and_gradients(*pair(), chunk=chunk), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_no_similarities_are_kept_for_the_backward_pass() -> None:
    anchors, views = (x.detach().requires_grad_() for x in pair(40, 3))
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = multi_view_nce(anchors, views, 0.3, chunk=8)
    # A block of similarities has 8 x 80 values.
    assert kept and max(kept) <= 40 * 3
    loss.backward()
    assert anchors.grad is not None and bool(anchors.grad.abs().sum() > 0)


def test_the_gradient_is_that_of_the_loss() -> None:
    anchors, views = (x.detach().double().requires_grad_() for x in pair(7, 3))
    rows = torch.tensor([1, 4, 6])
    assert torch.autograd.gradcheck(lambda a, b: multi_view_nce(a, b, 0.3, rows=rows, chunk=2), (anchors, views))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_finite_at_a_very_low_temperature(dtype: torch.dtype) -> None:
    anchors, views = (part.detach().to(dtype).requires_grad_() for part in pair())
    value, *gradients = value_and_gradients(anchors, views, temperature=0.001)
    assert float(value) > 10 and all(bool(part.isfinite().all()) for part in gradients)
    value = multi_view_nce(anchors, views, 0.01).detach()
    assert float(value) == pytest.approx(sum(brute_force(anchors, views, 0.01)) / 7, rel=1e-4)


def test_only_the_items_of_the_index_take_part() -> None:
    anchors, views = pair()
    index = torch.tensor([5, 0, 3])
    torch.testing.assert_close(
        multi_view_nce(anchors, views, index=index), multi_view_nce(anchors[index], views[index])
    )
    _, first, _ = value_and_gradients(anchors, views, index=index)
    assert first.abs().sum(1).gt(0).nonzero().flatten().tolist() == [0, 3, 5]


@pytest.mark.parametrize("chunk", [2, 4096])
def test_shares_of_the_anchors_add_up_to_the_whole_in_value_and_gradients(chunk: int) -> None:
    index = torch.tensor([6, 5, 0, 3, 2])
    expected = value_and_gradients(*pair(), index=index)
    shares = [torch.tensor([0, 2, 4]), torch.tensor([1, 3])]
    parts = [value_and_gradients(*pair(), index=index, rows=rows, chunk=chunk) for rows in shares]
    anchors, views = pair()
    losses = brute_force(anchors[index], views[index], 0.5)
    for (value, *_), rows in zip(parts, shares, strict=True):
        assert float(value) == pytest.approx(sum(losses[row] for row in rows.tolist()) / len(rows), rel=1e-12)
    for first, second, wanted in zip(*parts, expected, strict=True):
        torch.testing.assert_close((3 * first + 2 * second) / 5, wanted)


def test_a_process_without_an_anchor_adds_nothing_and_has_gradients_of_zero() -> None:
    value, *gradients = value_and_gradients(*pair(), rows=torch.empty(0, dtype=torch.int64))
    assert float(value) == 0 and all(not bool(part.any()) for part in gradients)


def test_under_autocast_it_is_the_same_float32() -> None:
    anchors, views = (part.detach().float() for part in pair())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, from_half = multi_view_nce(anchors, views), multi_view_nce(anchors.bfloat16(), views.bfloat16())
    assert found.dtype == from_half.dtype == torch.float32
    assert found.equal(multi_view_nce(anchors, views))
    assert multi_view_nce(*pair()).dtype == torch.float64


@pytest.mark.parametrize(
    ("anchors", "views", "options", "message"),
    [
        ((3, 2), (3, 4), {}, r"one shape \(items, d\), got \(3, 2\), \(3, 4\)"),
        ((3,), (3,), {}, r"one shape \(items, d\)"),
        ((0, 2), (0, 2), {}, "no item to contrast"),
        ((3, 2), (3, 2), {"index": torch.empty(0, dtype=torch.int64)}, "no item to contrast"),
        ((3, 2), (3, 2), {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ((3, 2), (3, 2), {"temperature": math.nan}, "temperature must be above 0, got nan"),
    ],
    ids=["widths", "vectors", "no-items", "empty-index", "zero", "nan"],
)
def test_a_wrong_argument_is_named(
    anchors: tuple[int, ...], views: tuple[int, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        multi_view_nce(torch.ones(anchors), torch.ones(views), **options)  # type: ignore[arg-type]
