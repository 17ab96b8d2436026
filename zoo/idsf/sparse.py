"""A constant sparse matrix as a module: products whose gradient goes through a stored transpose."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class _Product(torch.autograd.Function):
    """`matrix @ dense` for a constant matrix; autograd's own rule would transpose the matrix in every step."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, dense: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        # Where backward is called under autocast: there is no product of a compressed matrix in half precision.
        with torch.autocast(gradients[0].device.type, enabled=False):
            return None, None, ctx.transposed @ gradients[0]


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
        with warnings.catch_warnings():
            # torch says once in a process that this format is in beta.
            warnings.simplefilter("ignore")
            self._compressed(self.row_starts, self.columns, self.values, shape)

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
            matrix, transposed = self.compressed()
            product: Tensor = _Product.apply(matrix, transposed, dense.to(self.values.dtype))  # type: ignore[no-untyped-call]
            return product

    def compressed(self) -> tuple[Tensor, Tensor]:
        """The matrix and its transpose as sparse tensors in compressed rows, on the values of the buffers."""
        matrix = self._compressed(self.row_starts, self.columns, self.values, self.shape)
        transposed = self._compressed(
            self.transposed_row_starts, self.transposed_columns, self.transposed_values, self.shape[::-1]
        )
        return matrix, transposed

    @staticmethod
    def _compressed(row_starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
        return torch.sparse_csr_tensor(row_starts, columns, values, shape, check_invariants=False)

    def to_dense(self) -> Tensor:
        """The whole matrix `(rows, columns)`."""
        rows = torch.repeat_interleave(self.row_starts.diff())
        dense = self.values.new_zeros(self.shape)
        dense[rows, self.columns] = self.values
        return dense
