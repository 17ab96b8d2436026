"""Masked softmax, maximum and mean against plain slices of the kept places."""

from __future__ import annotations

import pytest
import torch

from zoo.summary_mrc.masked import masked_max, masked_mean, masked_softmax, require_kept


def drawn(rows=4, length=7, features=3):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, length, features, generator=generator, dtype=torch.float64) - 3
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[:, 2] = True
    return states, mask


def test_each_function_equals_the_plain_one_on_the_kept_places():
    states, mask = drawn()
    weights = masked_softmax(states[..., 0], mask)
    for row in range(len(states)):
        kept = states[row][mask[row]]
        assert torch.allclose(weights[row][mask[row]], kept[:, 0].softmax(0), atol=1e-15)
        assert torch.equal(masked_max(states, mask)[row], kept.max(0).values)
        assert torch.allclose(masked_mean(states, mask)[row], kept.mean(0), atol=1e-15)


def test_masked_places_weigh_exactly_nothing_whatever_their_score():
    states, mask = drawn()
    scores = states[..., 0].float().masked_fill(~mask, 1e30)
    weights = masked_softmax(scores, mask)
    assert (weights[~mask] == 0).all() and (weights[mask] > 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(len(scores)))


def test_softmax_along_another_dimension_is_that_of_the_transpose():
    states, _ = drawn()
    mask = torch.tensor([True, False, True, True, False, False, True])
    along = masked_softmax(states, mask[:, None], dim=-2)
    assert torch.allclose(along, masked_softmax(states.transpose(1, 2), mask).transpose(1, 2), atol=1e-15)


@pytest.mark.parametrize("function", [masked_max, masked_mean])
def test_garbage_at_masked_places_changes_no_value_and_gets_no_gradient(function):
    states, mask = drawn()
    clean = function(states, mask)
    dirty = states.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    result = function(dirty, mask)
    result.sum().backward()
    assert torch.equal(result, clean)
    assert (dirty.grad[~mask] == 0).all() and dirty.grad.isfinite().all()


def test_a_row_that_keeps_nothing_gives_zeros_and_finite_gradients():
    states, mask = drawn()
    mask[1] = False
    states.requires_grad_()
    results = [masked_softmax(states[..., 0], mask), masked_max(states, mask), masked_mean(states, mask)]
    assert all((result[1] == 0).all() and (result[0] != 0).any() for result in results)
    sum(result.square().sum() for result in results).backward()
    assert (states.grad[1] == 0).all() and states.grad.isfinite().all()


def test_half_precision_is_summed_in_float32():
    values = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)
    values[:, ::2] = 1.0078125
    mask = torch.ones(1, 4096, dtype=torch.bool)
    assert masked_mean(values, mask).item() == 1.00390625
    assert masked_softmax(values[..., 0], mask).dtype == torch.float32
    assert masked_max(values, mask).dtype == torch.bfloat16


def test_masks_that_keep_something_in_each_row_are_accepted():
    require_kept(summary_mask=torch.eye(3, dtype=torch.bool), passage_mask=torch.ones(1, 2, dtype=torch.bool))


def test_a_row_that_keeps_nothing_is_named_with_its_mask():
    summary, passage = torch.ones(9, 4, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    passage[1] = False
    with pytest.raises(ValueError, match=r"passage_mask keeps no token in 1 of 3 rows \(row 1\)"):
        require_kept(summary_mask=summary, passage_mask=passage)
    summary[2:] = False
    with pytest.raises(ValueError, match=r"summary_mask keeps no token in 7 of 9 rows \(row 2, 3, 4, 5, 6, \.\.\.\)"):
        require_kept(summary_mask=summary, passage_mask=passage)
