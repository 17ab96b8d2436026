"""The normalised graph of users and items, and the nearest items, against loops and known eigenvectors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from zoo.idsf.graph import BipartiteGraph, nearest_items

NUM_USERS, NUM_ITEMS = 5, 4
# User 4 and item 3 have nobody.
EDGES = torch.tensor([[0, 0, 0, 1, 2, 2, 3], [0, 1, 2, 1, 0, 2, 2]])
NORMS = ["sym", "sym_self", "rw", "rw_self"]


def graph(norm: str, edges: Tensor = EDGES) -> BipartiteGraph:
    return BipartiteGraph(edges, NUM_USERS, NUM_ITEMS, norm)


def dense_graph(norm: str) -> Tensor:
    """Entry by entry, float64."""
    size = NUM_USERS + NUM_ITEMS
    adjacency = torch.zeros(size, size, dtype=torch.float64)
    for user, item in EDGES.T.tolist():
        adjacency[user, NUM_USERS + item] = adjacency[NUM_USERS + item, user] = 1
    if norm.endswith("_self"):
        for node in range(size):
            adjacency[node, node] = 1
    degrees = adjacency.sum(1)
    result = torch.zeros_like(adjacency)
    for row, column in adjacency.nonzero().tolist():
        left, right = float(degrees[row]), float(degrees[column])
        result[row, column] = 1 / left if norm.startswith("rw") else 1 / math.sqrt(left * right)
    return result


def random(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", NORMS)
def test_the_matrix_is_the_normalised_adjacency(norm: str) -> None:
    torch.testing.assert_close(graph(norm).to_dense().double(), dense_graph(norm), atol=1e-7, rtol=0)
    x = random(9, 6)
    torch.testing.assert_close(graph(norm).propagate(x).double(), dense_graph(norm) @ x.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_that_of_the_matrix_and_not_of_its_transpose(norm: str) -> None:
    x = random(9, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(graph(norm).double().propagate, (x,))


@pytest.mark.parametrize("norm", NORMS)
def test_an_interaction_given_twice_counts_once(norm: str) -> None:
    twice = torch.cat([EDGES, EDGES[:, [3, 0, 0]]], dim=1)
    assert graph(norm, twice).num_entries == graph(norm).num_entries
    assert graph(norm, twice).to_dense().equal(graph(norm).to_dense())


def test_with_self_loops_each_row_of_a_random_walk_sums_to_one_and_a_lonely_node_keeps_its_vector() -> None:
    walk = graph("rw_self")
    torch.testing.assert_close(walk.to_dense().sum(1), torch.ones(9))
    torch.testing.assert_close(walk.propagate(torch.full((9, 2), 3.5)), torch.full((9, 2), 3.5))
    x = random(9, 3)
    assert walk.propagate(x)[[4, 8]].equal(x[[4, 8]])


@pytest.mark.parametrize("norm", ["sym", "rw"])
def test_without_self_loops_a_lonely_node_gets_zeros(norm: str) -> None:
    assert graph(norm).propagate(random(9, 3))[[4, 8]].tolist() == [[0.0] * 3] * 2


def test_sym_is_symmetric_with_the_roots_of_the_degrees_as_fixed_point_and_no_larger_eigenvalue() -> None:
    dense = graph("sym").to_dense().double()
    assert dense.equal(dense.T)
    degrees = torch.tensor([3.0, 1, 2, 1, 0, 2, 2, 3, 0])
    root = degrees.sqrt()[:, None]
    torch.testing.assert_close(graph("sym").propagate(root), root)
    assert float(torch.linalg.eigvalsh(dense).abs().max()) <= 1 + 1e-6


def test_several_embeddings_side_by_side_are_propagated_each_on_its_own() -> None:
    first, second = random(9, 3), random(9, 5).cos()
    both = graph("rw_self").propagate(torch.cat([first, second], dim=1))
    torch.testing.assert_close(both[:, :3], graph("rw_self").propagate(first))
    torch.testing.assert_close(both[:, 3:], graph("rw_self").propagate(second))


def test_a_graph_can_be_copied_leaves_no_state_and_stays_float32_under_autocast() -> None:
    first, x = graph("rw_self"), random(9, 3)
    assert copy.deepcopy(first).propagate(x).equal(first.propagate(x))
    assert first.state_dict() == {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = first.propagate(x)
    assert found.dtype == torch.float32 and found.equal(first.propagate(x))


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([[0, 5, 7], [0, 1, 2]], r"user ids must lie in 0\.\.4, got 0\.\.7 \(2 out of range\)"),
        ([[0, 1], [0, 4]], r"item ids must lie in 0\.\.3, got 0\.\.4 \(1 out of range\)"),
        ([[0, 1], [-2, 3]], r"item ids must lie in 0\.\.3, got -2\.\.3 \(1 out of range\)"),
        ([[0, 1], [1, 1], [2, 2]], r"shape \(2, interactions\), got \(3, 2\)"),
        ([0, 1], r"shape \(2, interactions\), got \(2,\)"),
        ([[], []], r"shape \(2, interactions\), got \(2, 0\)"),
    ],
    ids=["user", "item", "negative", "three-rows", "one-row", "empty"],
)
def test_wrong_interactions_are_named(edges: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph("sym", torch.tensor(edges, dtype=torch.int64))


def test_an_unknown_norm_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="norm must be one of sym, sym_self, rw, rw_self, got 'left'"):
        graph("left")


@pytest.mark.parametrize("chunk", [1, 4, 7, 1024])
def test_the_nearest_items_are_those_of_the_largest_cosine_in_chunks_of_any_size(chunk: int) -> None:
    features = random(11, 4) * torch.arange(1, 12)[:, None]
    ids, cosines = nearest_items(features, 3, chunk)
    for item in range(11):
        cosine = {
            other: float(torch.cosine_similarity(features[item], features[other], dim=0))
            for other in range(11)
            if other != item
        }
        expected = sorted(cosine, key=lambda other: -cosine[other])[:3]
        assert ids[item].tolist() == expected
        assert cosines[item].tolist() == pytest.approx([cosine[other] for other in expected], abs=1e-6)


@pytest.mark.parametrize("k", [0, 11])
def test_more_neighbors_than_other_items_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and num_items - 1 = 10, got {k}"):
        nearest_items(random(11, 4), k)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("with_added", [False, True], ids=["plain", "added"])
def test_a_convolution_is_the_sum_of_its_layers_forward_and_backward(num_layers: int, with_added: bool) -> None:
    walk, start, added = graph("rw_self").double(), random(9, 3).double(), random(9, 3).double() * 2
    layer, expected = start, start
    for _ in range(num_layers):
        layer = walk.propagate(layer) + (added if with_added else 0)
        expected = expected + layer
    given = added if with_added else None
    torch.testing.assert_close(walk.convolve(start, num_layers, given), expected)
    inputs = (start.requires_grad_(), added.requires_grad_()) if with_added else (start.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda x, *more: walk.convolve(x, num_layers, *more), inputs)


def test_a_convolution_is_float32_under_autocast_also_in_the_backward_pass() -> None:
    start = random(9, 3).requires_grad_()
    graph("rw_self").convolve(start, 2).square().sum().backward()
    expected, start.grad = start.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = graph("rw_self").convolve(start, 2)
        found.square().sum().backward()
    assert found.dtype == torch.float32 and start.grad is not None and expected is not None
    torch.testing.assert_close(start.grad, expected)
