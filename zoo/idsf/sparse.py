"""A constant sparse matrix as a module: products whose gradient goes through a stored transpose."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class CompressedRows(NamedTuple):
    """A sparse matrix by rows.

    Attributes:
        row_starts: int64 `(rows + 1,)`; row r has the entries `row_starts[r]` to `row_starts[r + 1]`.
        columns: int64 `(entries,)`.
        values: Floating point `(entries,)`.
        num_columns: Number of columns.
    """

    row_starts: Tensor
    columns: Tensor
    values: Tensor
    num_columns: int

    def matmul(self, dense: Tensor) -> Tensor:
        """Product with `(num_columns, width)`; knows no gradient."""
        if dense.device.type == "cpu":
            # The same sums, several times faster than the product of a sparse tensor.
            product: Tensor = F.embedding_bag(
                self.columns, dense, self.row_starts, mode="sum", per_sample_weights=self.values,
                include_last_offset=True,
            )  # fmt: skip
            return product
        with warnings.catch_warnings():
            # torch says once in a process that this format is in beta.
            warnings.simplefilter("ignore")
            shape = (len(self.row_starts) - 1, self.num_columns)
            matrix = torch.sparse_csr_tensor(self.row_starts, self.columns, self.values, shape, check_invariants=False)
        return matrix @ dense


class _Product(torch.autograd.Function):
    """`matrix @ dense` for a constant matrix; autograd's own rule would transpose the matrix in every step."""

    @staticmethod
    def forward(ctx: Any, matrix: CompressedRows, transposed: CompressedRows, dense: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix.matmul(dense)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        # Where backward is called under autocast: there is no such product in half precision.
        with torch.autocast(gradient.device.type, enabled=False):
            return None, None, ctx.transposed.matmul(gradient)


class SparseMatrix(nn.Module):
    """A constant sparse matrix in compressed rows, with its transpose beside it.

    Rows, columns and values are dense buffers outside the state dict: a sparse buffer breaks `copy.deepcopy` and DDP.
    Entries given twice are added up.

    Args:
        rows: int64 `(entries,)`.
        columns: int64 `(entries,)`.
        values: Floating point `(entries,)`.
        shape: Number of rows and of columns.

    Raises:
        ValueError: If an index is out of range, or the three differ in length.

    Example:
        >>> import torch
        >>> matrix = SparseMatrix(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([2.0, 3.0]), (2, 2))
        >>> matrix.matmul(torch.eye(2)).tolist()
        [[0.0, 2.0], [3.0, 0.0]]
    """

    row_starts: Tensor
    columns: Tensor
    values: Tensor
    transposed_row_starts: Tensor
    transposed_columns: Tensor
    transposed_values: Tensor

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        if not len(rows) == len(columns) == len(values):
            raise ValueError(f"got {len(rows)} rows, {len(columns)} columns and {len(values)} values")
        for name, index, size in (("rows", rows, shape[0]), ("columns", columns, shape[1])):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(f"{name} must lie in 0..{size - 1}, got {int(index.min())}..{int(index.max())}")
        self.shape = shape
        coordinates = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=False)
        coordinates = coordinates.coalesce()
        for prefix, matrix in (("", coordinates), ("transposed_", coordinates.t().coalesce())):
            row, column = matrix.indices()
            counts = row.bincount(minlength=matrix.shape[0])
            starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            self.register_buffer(f"{prefix}row_starts", starts, persistent=False)
            self.register_buffer(f"{prefix}columns", column.contiguous(), persistent=False)
            self.register_buffer(f"{prefix}values", matrix.values(), persistent=False)

    @property
    def num_entries(self) -> int:
        """Entries that are stored."""
        return len(self.values)

    def matmul(self, dense: Tensor) -> Tensor:
        """Product with `(columns of the matrix, width)`, in the precision of the matrix, also under autocast.

        Returns:
            `(rows of the matrix, width)`.
        """
        with torch.autocast(dense.device.type, enabled=False):
            dense = dense.to(self.values.dtype)
            product: Tensor = _Product.apply(*self.compressed(), dense)  # type: ignore[no-untyped-call]
            return product

    def compressed(self) -> tuple[CompressedRows, CompressedRows]:
        """The matrix and its transpose, on the buffers."""
        matrix = CompressedRows(self.row_starts, self.columns, self.values, self.shape[1])
        transposed = CompressedRows(
            self.transposed_row_starts, self.transposed_columns, self.transposed_values, self.shape[0]
        )
        return matrix, transposed

    def to_dense(self) -> Tensor:
        """The whole matrix `(rows, columns)`."""
        rows = torch.repeat_interleave(self.row_starts.diff())
        dense = self.values.new_zeros(self.shape)
        dense[rows, self.columns] = self.values
        return dense
