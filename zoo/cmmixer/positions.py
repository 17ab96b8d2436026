"""Fixed positions of patches on a rectangular grid."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_positions(rows: int, columns: int, hidden_size: int) -> Tensor:
    """Two-dimensional sine-cosine positions: half of the vector tells the column and half the row.

    The halves come in the order of the published masked autoencoders (column, then row; sines before cosines), so that
    their weights fit.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid; the grid need not be square.
        hidden_size: Length of a vector, a multiple of 4.

    Returns:
        float32 `(rows * columns, hidden_size)`, row by row.

    Raises:
        ValueError: If `hidden_size` is no multiple of 4, or the grid is empty.
    """
    if hidden_size % 4 or hidden_size < 4:
        raise ValueError(f"positions need a hidden_size that is a multiple of 4, got {hidden_size}")
    if rows < 1 or columns < 1:
        raise ValueError(f"a grid needs rows and columns, got {rows} x {columns}")
    quarter = hidden_size // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)

    def line(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)

    across = line(columns)[None].expand(rows, -1, -1)
    down = line(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], 2).flatten(0, 1).float()
