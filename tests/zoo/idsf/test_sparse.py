"""A constant sparse matrix: its products, their gradients, and what it leaves in a state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from zoo.idsf.sparse import SparseMatrix

# Row 2 and column 4 are empty, and the entry (3, 1) is given twice.
ROWS = torch.tensor([3, 0, 0, 1, 3, 3])
COLUMNS = torch.tensor([1, 2, 0, 3, 0, 1])
SHAPE = (4, 5)


def values(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([0.5, -2.0, 3.0, 0.25, 1.5, 4.0], dtype=dtype)


def matrix(dtype: torch.dtype = torch.float64) -> SparseMatrix:
    return SparseMatrix(ROWS, COLUMNS, values(dtype), SHAPE)


def dense_matrix() -> Tensor:
    dense = torch.zeros(SHAPE, dtype=torch.float64)
    for row, column, value in zip(ROWS.tolist(), COLUMNS.tolist(), values().tolist(), strict=True):
        dense[row, column] += value
    return dense


def random(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_a_product_equals_that_of_the_dense_matrix_and_entries_given_twice_are_added() -> None:
    x = random(5, 3)
    assert matrix().num_entries == 5
    torch.testing.assert_close(matrix().to_dense(), dense_matrix())
    torch.testing.assert_close(matrix().matmul(x), dense_matrix() @ x)


def test_the_gradient_goes_through_the_transpose_of_a_matrix_that_is_not_symmetric() -> None:
    x = random(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(matrix().matmul, (x,))
    square = SparseMatrix(torch.tensor([0, 0, 2]), torch.tensor([1, 2, 1]), values()[:3], (3, 3))
    assert torch.autograd.gradcheck(square.matmul, (random(3, 2).requires_grad_(),))


def test_a_gradient_that_is_one_number_repeated_passes() -> None:
    x = random(5, 3).requires_grad_()
    matrix().matmul(x).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, dense_matrix().sum(0)[:, None].expand(5, 3))


def test_a_matrix_without_entries_gives_zeros() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    empty = SparseMatrix(nothing, nothing, torch.empty(0), (2, 3))
    assert empty.matmul(torch.ones(3, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_a_deep_copy_computes_the_same_and_shares_nothing() -> None:
    first, x = matrix(), random(5, 3)
    second, expected = copy.deepcopy(first), first.matmul(x)
    first.values.zero_()
    first.columns.zero_()
    torch.testing.assert_close(second.matmul(x), expected)


def test_nothing_enters_the_state_dict_and_no_buffer_is_sparse() -> None:
    assert matrix().state_dict() == {}
    buffers = dict(matrix().named_buffers())
    assert len(buffers) == 6 and all(buffer.layout == torch.strided for buffer in buffers.values())


def test_under_autocast_the_product_and_its_gradient_are_the_same_float32() -> None:
    sparse, x = matrix(torch.float32), random(5, 3, dtype=torch.float32).requires_grad_()
    expected = sparse.matmul(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sparse.matmul(x)
        (again,) = torch.autograd.grad(found.square().sum(), x)
        from_half = sparse.matmul(x.bfloat16())
    assert found.dtype == again.dtype == from_half.dtype == torch.float32
    assert found.equal(expected) and again.equal(gradient)
    assert from_half.equal(sparse.matmul(x.bfloat16().float()))


def test_a_conversion_converts_the_matrix() -> None:
    assert matrix(torch.float32).double().matmul(random(5, 1)).dtype == torch.float64


@pytest.mark.parametrize(
    ("rows", "columns", "count", "message"),
    [
        ([0, 4], [0, 0], 2, r"rows must lie in 0\.\.3, got 0\.\.4"),
        ([0, 1], [-1, 0], 2, r"columns must lie in 0\.\.4, got -1\.\.0"),
        ([0, 1], [0], 2, "2 rows, 1 columns and 2 values"),
        ([0, 1], [0, 1], 1, "2 rows, 2 columns and 1 values"),
    ],
    ids=["row", "column", "few-columns", "few-values"],
)
def test_a_wrong_index_is_named(rows: list[int], columns: list[int], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMatrix(torch.tensor(rows), torch.tensor(columns), torch.ones(count), SHAPE)
