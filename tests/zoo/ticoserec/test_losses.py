"""Closed forms and brute force for the losses and for the similarity of views."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.ticoserec.losses import (
    bce_next_item,
    full_softmax_next_item,
    gbce_next_item,
    sampled_softmax_next_item,
    view_gram,
    view_vectors,
)


def test_bce_of_zero_logits_is_two_log_two():
    assert float(bce_next_item(torch.zeros(7), torch.zeros(7, 1))) == pytest.approx(2 * math.log(2))


def test_bce_equals_its_sum_over_positions():
    positive, negative = torch.tensor([0.3, -1.0]), torch.tensor([[0.5, 2.0], [-0.1, 0.0]])
    expected = sum(
        -math.log(1 / (1 + math.exp(-float(p)))) - sum(math.log(1 - 1 / (1 + math.exp(-float(x)))) for x in row)
        for p, row in zip(positive, negative, strict=True)
    )
    assert float(bce_next_item(positive, negative)) == pytest.approx(expected / 2, rel=1e-6)


def test_gbce_without_calibration_is_bce_and_with_it_weighs_the_target_down():
    positive, negative = torch.randn(5), torch.randn(5, 8)
    assert float(gbce_next_item(positive, negative, 100, 0.0)) == pytest.approx(
        float(bce_next_item(positive, negative)) / 9, rel=1e-5
    )
    # t = 1 gives beta = alpha = K / (V - 1)
    alpha = 8 / 99
    expected = (-alpha * torch.sigmoid(positive).log() - (1 - torch.sigmoid(negative)).log().sum(-1)).mean() / 9
    assert float(gbce_next_item(positive, negative, 100, 1.0)) == pytest.approx(float(expected), rel=1e-5)


def test_softmax_losses_agree_when_the_sample_is_the_catalogue():
    torch.manual_seed(0)
    table, states, targets = torch.randn(6, 4), torch.randn(3, 4), torch.tensor([2, 5, 1])
    scores = states @ table.T
    others = torch.tensor([[i for i in range(1, 6) if i != t] for t in targets.tolist()])
    sampled = sampled_softmax_next_item(scores.gather(1, targets[:, None])[:, 0], scores.gather(1, others))
    assert torch.allclose(sampled, full_softmax_next_item(states, table, targets))


def test_gram_of_views_equals_the_dense_product_in_value_and_gradient():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 50, 0, 1, 7, 22, 2, 2])
    states = torch.randn(int(lengths.sum()), 6, requires_grad=True)
    weights = torch.randn(8, 8)
    flat = view_vectors(states, lengths, 50, "flatten")
    assert flat.shape == (8, 300) and flat[2].abs().max() == 0
    (dense,) = torch.autograd.grad(((flat @ flat.T) * weights).sum(), states)
    gram = view_gram(states, lengths, 50)
    (sparse,) = torch.autograd.grad((gram * weights).sum(), states)
    assert torch.allclose(gram, flat @ flat.T, atol=1e-4) and torch.allclose(sparse, dense, atol=1e-4)


def test_last_and_mean_vectors_of_views():
    states = torch.arange(8.0).view(4, 2)
    lengths = torch.tensor([3, 0, 1])
    assert view_vectors(states, lengths, 5, "last").tolist() == [[4, 5], [0, 0], [6, 7]]
    assert view_vectors(states, lengths, 5, "mean").tolist() == [[2, 3], [0, 0], [6, 7]]
