"""Backbones of tables: one embedding for all columns, a shared trunk, and a trunk per task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.adatask.backbones.outputs import (
    MultiTaskOutput,
    SeparateBackbones,
    check_outputs,
    check_sizes,
    differentiable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class TableEmbedding(nn.Module):
    """Rows of a table as vectors: embedded categorical columns, then the numbers.

    All categorical columns lie in one table with an offset per column, so that a batch costs one look-up. An offset
    would turn a code that is too large into another column's value, hence every code is compared with its column's
    size. On a CPU a violation is a ValueError. On other devices, and under `torch.compile`, reading the comparison
    would stall the step, so such a code is sent past the end of the table instead, where the look-up's own bound check
    ends the run.

    Args:
        cardinalities: Codes per categorical column (0..cardinality-1); may be empty.
        num_numeric: Numeric columns.
        embedding_size: Width of a categorical column's vector.

    Attributes:
        output_size: Width of a row's vector.

    Raises:
        ValueError: If there is no column, or a size is not positive.
    """

    offsets: Tensor
    limits: Tensor

    def __init__(self, cardinalities: Sequence[int], num_numeric: int, embedding_size: int = 4) -> None:
        super().__init__()
        check_sizes(cardinalities=cardinalities, embedding_size=embedding_size)
        if num_numeric < 0 or len(cardinalities) + num_numeric == 0:
            raise ValueError(
                f"a table needs at least one column, got {len(cardinalities)} categorical and {num_numeric} numeric"
            )
        self.num_numeric = num_numeric
        self.output_size = len(cardinalities) * embedding_size + num_numeric
        limits = torch.tensor(cardinalities, dtype=torch.int64)
        self.register_buffer("limits", limits, persistent=False)
        self.register_buffer("offsets", limits.cumsum(0) - limits, persistent=False)
        self.table = nn.Embedding(sum(cardinalities), embedding_size) if cardinalities else None

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        """Vectors `(batch, output_size)`.

        Args:
            categories: int64 `(batch, categorical columns)`.
            numbers: float `(batch, num_numeric)`.

        Raises:
            ValueError: A wrong number of columns, or (on a CPU) a code outside its column's range.
        """
        expected = (len(self.limits), self.num_numeric)
        if categories.dim() != 2 or numbers.dim() != 2 or (categories.shape[1], numbers.shape[1]) != expected:
            raise ValueError(
                f"expected categories (batch, {expected[0]}) and numbers (batch, {expected[1]}), got "
                f"{tuple(categories.shape)} and {tuple(numbers.shape)}"
            )
        if self.table is None:
            return numbers
        outside = (categories < 0) | (categories >= self.limits)
        if categories.device.type == "cpu" and not torch.compiler.is_compiling() and bool(outside.any()):
            row, column = (int(i) for i in outside.nonzero()[0])
            raise ValueError(
                f"categories column {column} has the code {int(categories[row, column])} in row {row}, expected 0 to "
                f"{int(self.limits[column]) - 1} (cardinalities[{column}] is {int(self.limits[column])})"
            )
        codes = (categories + self.offsets).masked_fill(outside, self.table.num_embeddings)
        return torch.cat([self.table(codes).flatten(1), numbers], dim=1)


def relu_layers(input_size: int, sizes: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear layers of the given widths, each with ReLU and dropout."""
    parts: list[nn.Module] = []
    for size in sizes:
        parts += [nn.Linear(input_size, size), nn.ReLU(), nn.Dropout(dropout)]
        input_size = size
    return nn.Sequential(*parts)


def build_towers(outputs: Mapping[str, int], input_size: int, sizes: Sequence[int], dropout: float) -> nn.ModuleDict:
    """One tower per task: ReLU layers of the given widths, then a linear layer to the task's outputs."""
    width = sizes[-1] if sizes else input_size
    return nn.ModuleDict(
        {name: relu_layers(input_size, sizes, dropout).append(nn.Linear(width, n)) for name, n in outputs.items()}
    )


class SharedBottom(nn.Module):
    """Hard parameter sharing: one embedding and one ReLU trunk, and a tower per task (Caruana, 1997).

    Args:
        outputs: Output count by task name.
        cardinalities: Codes per categorical column.
        num_numeric: Numeric columns.
        embedding_size: Width of a categorical column's vector.
        hidden_sizes: Widths of the trunk's layers.
        tower_sizes: Widths of the hidden layers of a tower; empty for linear heads.
        dropout: Dropout after each ReLU.

    Raises:
        ValueError: If the tasks are not valid or a size is not positive.

    Example:
        >>> import torch
        >>> backbone = SharedBottom({"income": 1, "age": 1}, cardinalities=[5, 3], num_numeric=2)
        >>> output = backbone(torch.tensor([[4, 0], [1, 2]]), torch.zeros(2, 2))
        >>> output.outputs["age"].shape, output.features[0].shape
        (torch.Size([2, 1]), torch.Size([2, 8]))
    """

    def __init__(
        self,
        outputs: Mapping[str, int],
        cardinalities: Sequence[int],
        num_numeric: int,
        embedding_size: int = 4,
        hidden_sizes: Sequence[int] = (32, 8),
        tower_sizes: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        outputs = check_outputs(outputs)
        check_sizes(hidden_sizes=hidden_sizes, tower_sizes=tower_sizes)
        self.embedding = TableEmbedding(cardinalities, num_numeric, embedding_size)
        self.trunk = relu_layers(self.embedding.output_size, hidden_sizes, dropout)
        width = hidden_sizes[-1] if hidden_sizes else self.embedding.output_size
        self.towers = build_towers(outputs, width, tower_sizes, dropout)

    def forward(self, categories: Tensor, numbers: Tensor) -> MultiTaskOutput:
        """Outputs `(batch, num_outputs)` by task and the trunk's output as the feature.

        Args:
            categories: int64 `(batch, categorical columns)`.
            numbers: float `(batch, num_numeric)`.
        """
        hidden = self.trunk(self.embedding(categories, numbers))
        return MultiTaskOutput({name: tower(hidden) for name, tower in self.towers.items()}, differentiable(hidden))


class SingleTask(SeparateBackbones):
    """One independent `SharedBottom` per task, with its own embedding and trunk: the single-task baseline.

    Args:
        outputs: Output count by task name.
        cardinalities: Codes per categorical column.
        num_numeric: Numeric columns.
        embedding_size: Width of a categorical column's vector.
        hidden_sizes: Widths of each trunk's layers.
        tower_sizes: Widths of the hidden layers of a tower.
        dropout: Dropout after each ReLU.

    Raises:
        ValueError: If the tasks are not valid or a size is not positive.
    """

    def __init__(
        self,
        outputs: Mapping[str, int],
        cardinalities: Sequence[int],
        num_numeric: int,
        embedding_size: int = 4,
        hidden_sizes: Sequence[int] = (32, 8),
        tower_sizes: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        def build(one: dict[str, int]) -> SharedBottom:
            return SharedBottom(one, cardinalities, num_numeric, embedding_size, hidden_sizes, tower_sizes, dropout)

        super().__init__(outputs, build)
