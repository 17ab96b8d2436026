"""MTAdam against its formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.zoo.adatask.problems import TwoHeads, batch, quadratic
from zoo.adatask.mtadam import MTAdam


def test_it_follows_the_formulas():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = MTAdam([p], 2, lr=0.1)
    first, second, norms = torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), None
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(3, dtype=torch.float64)
    for t in range(1, 6):
        g = torch.randn(2, 3, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [40.0]])
        optimizer.zero_grad()
        optimizer.backward(quadratic(g, p))
        optimizer.step()
        own = g.norm(dim=1)
        norms = own if norms is None else 0.9 * norms + 0.1 * own
        g = g * (norms[0] / norms)[:, None]
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        root = (second / (1 - 0.999**t)).amax(0).sqrt() + 1e-8
        expected = expected - 0.1 * (first / (1 - 0.9**t) / root).sum(0)
    torch.testing.assert_close(p.detach(), expected)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        optimizer.backward(model.losses(*batch(step))[0])
        optimizer.step()


def test_heads_get_plain_adam_and_a_restored_state_continues():
    model, twin = TwoHeads(), TwoHeads()
    optimizer, adam = MTAdam(model.parameters(), 3, lr=1e-2), torch.optim.Adam(twin.heads.parameters(), lr=1e-2)
    for step in range(4):
        twin.trunk.load_state_dict(model.trunk.state_dict())
        adam.zero_grad()
        sum(twin.losses(*batch(step))[0]).backward()
        adam.step()
        train(model, optimizer, [step])
    for left, right in zip(model.heads.parameters(), twin.heads.parameters(), strict=True):
        torch.testing.assert_close(left, right)
    other = copy.deepcopy(model)
    resumed = MTAdam(other.parameters(), 3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match="norm_decay must be at least 0 and below 1, got 1"):
        MTAdam(TwoHeads().parameters(), 3, norm_decay=1)
