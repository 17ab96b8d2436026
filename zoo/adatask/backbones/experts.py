"""Backbones of tables with experts: MMoE and PLE.

Tasks are looped over on purpose: a gate or mixture computed for all tasks at once would hand every loss a zero gradient
for the other tasks' parameters, which would then pass for shared ones.

Shape legend: B rows, E experts, I and O widths.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.adatask.backbones.outputs import MultiTaskOutput, check_outputs, check_sizes, differentiable
from zoo.adatask.backbones.tabular import TableEmbedding, build_towers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class StackedLinear(nn.Module):
    """E linear layers as one batched product, initialised like `torch.nn.Linear`.

    Args:
        num_experts: Layers E.
        input_size: Width I.
        output_size: Width O.
    """

    def __init__(self, num_experts: int, input_size: int, output_size: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(input_size)
        self.weight = nn.Parameter(torch.empty(num_experts, input_size, output_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_experts, 1, output_size).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, I)` for all or `(E, B, I)` for each, to `(E, B, O)`."""
        return torch.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight)

    def extra_repr(self) -> str:
        """The sizes, for `print(module)`."""
        num_experts, input_size, output_size = self.weight.shape
        return f"num_experts={num_experts}, input_size={input_size}, output_size={output_size}"


def build_experts(num_experts: int, input_size: int, sizes: Sequence[int], dropout: float) -> nn.Sequential:
    """E ReLU networks of the given widths, `(B, I)` to `(E, B, sizes[-1])`."""
    parts: list[nn.Module] = []
    for size in sizes:
        parts += [StackedLinear(num_experts, input_size, size), nn.ReLU(), nn.Dropout(dropout)]
        input_size = size
    return nn.Sequential(*parts)


def mix_experts(gate_logits: Tensor, experts: Tensor) -> Tensor:
    """Softmax-weighted sum of experts, `(B, E)` and `(E, B, O)` to `(B, O)`; the softmax in at least float32."""
    wide = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32))
    weights = wide.softmax(-1).to(experts.dtype)
    # A third of the time of the batched product, which has a single row per matrix.
    return (weights.t().unsqueeze(-1) * experts).sum(0)


class MMoE(nn.Module):
    """Multi-gate mixture of experts (Ma et al., KDD 2018, eqs. 5-7).

    All tasks share E experts; each has a softmax gate without bias over them, on the embedded row, and a tower.

    Args:
        outputs: Output count by task name.
        cardinalities: Codes per categorical column.
        num_numeric: Numeric columns.
        embedding_size: Width of a categorical column's vector.
        num_experts: Experts E.
        expert_sizes: Widths of an expert's layers.
        tower_sizes: Widths of the hidden layers of a tower.
        dropout: Dropout after each ReLU.

    Raises:
        ValueError: If the tasks are not valid, a size is not positive, or an expert has no layer.
    """

    def __init__(
        self,
        outputs: Mapping[str, int],
        cardinalities: Sequence[int],
        num_numeric: int,
        embedding_size: int = 4,
        num_experts: int = 8,
        expert_sizes: Sequence[int] = (64, 32),
        tower_sizes: Sequence[int] = (16,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        outputs = check_outputs(outputs)
        check_sizes(num_experts=num_experts, expert_sizes=expert_sizes, tower_sizes=tower_sizes)
        if not expert_sizes:
            raise ValueError("expert_sizes is empty: an expert needs at least one layer")
        self.embedding = TableEmbedding(cardinalities, num_numeric, embedding_size)
        width = self.embedding.output_size
        self.experts = build_experts(num_experts, width, expert_sizes, dropout)
        self.gates = nn.ModuleDict({name: nn.Linear(width, num_experts, bias=False) for name in outputs})
        self.towers = build_towers(outputs, expert_sizes[-1], tower_sizes, dropout)

    def forward(self, categories: Tensor, numbers: Tensor) -> MultiTaskOutput:
        """Outputs `(batch, num_outputs)` by task; features are the gates' input and the experts' outputs.

        Args:
            categories: int64 `(batch, categorical columns)`.
            numbers: float `(batch, num_numeric)`.
        """
        embedded = self.embedding(categories, numbers)
        experts = self.experts(embedded)
        # A node of its own: the gradient at `embedded` itself would hold the part that comes through the experts too.
        gated = embedded.view_as(embedded)
        outputs = {name: tower(mix_experts(self.gates[name](gated), experts)) for name, tower in self.towers.items()}
        return MultiTaskOutput(outputs, differentiable(gated, experts))


class ExtractionLevel(nn.Module):
    """One level of customised gate control (Tang et al., RecSys 2020, eqs. 1-5).

    Args:
        tasks: Task names.
        input_size: Width of each task's and of the shared input.
        num_shared_experts: Experts on the shared input.
        num_task_experts: Experts of each task.
        expert_sizes: Widths of an expert's layers.
        dropout: Dropout after each ReLU.
        last: Whether this is the top level, which has no shared gate.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_size: int,
        num_shared_experts: int,
        num_task_experts: int,
        expert_sizes: Sequence[int],
        dropout: float,
        last: bool,
    ) -> None:
        super().__init__()
        self.num_task_experts = num_task_experts
        self.shared_experts = build_experts(num_shared_experts, input_size, expert_sizes, dropout)
        # Tasks do not share a stack: one tensor for all would be a shared parameter.
        self.task_experts = nn.ModuleDict(
            {name: build_experts(num_task_experts, input_size, expert_sizes, dropout) for name in tasks}
        )
        seen, total = (n * num_task_experts + num_shared_experts for n in (1, len(tasks)))
        self.gates = nn.ModuleDict({name: nn.Linear(input_size, seen, bias=False) for name in tasks})
        self.shared_gate = None if last else nn.Linear(input_size, total, bias=False)

    def visible(self, index: int, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The own and the shared experts of the task at `index`, out of all `(E, B, O)`: tasks' first, shared last."""
        start = index * self.num_task_experts
        return experts[start : start + self.num_task_experts], experts[len(self.gates) * self.num_task_experts :]

    def select(self, name: str, x: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        """What a task takes of its own and the shared experts, `(B, O)`, by its gate on its input `(B, I)`."""
        return mix_experts(self.gates[name](x), torch.cat([own, shared]))


class PLE(nn.Module):
    """Progressive layered extraction (Tang et al., RecSys 2020); `num_levels=1` is their CGC.

    Each level has shared experts and experts of each task. A task's gate mixes its own and the shared ones into its
    next input, the shared gate mixes all of them into the next shared input; the top level feeds the towers. A task's
    experts below the top are shared parameters all the same, for the shared gate carries them to every task.

    Args:
        outputs: Output count by task name.
        cardinalities: Codes per categorical column.
        num_numeric: Numeric columns.
        embedding_size: Width of a categorical column's vector.
        num_levels: Levels.
        num_shared_experts: Shared experts per level.
        num_task_experts: Experts of each task per level.
        expert_sizes: Widths of an expert's layers.
        tower_sizes: Widths of the hidden layers of a tower.
        dropout: Dropout after each ReLU.

    Raises:
        ValueError: If the tasks are not valid, a size is not positive, or an expert has no layer.
    """

    def __init__(
        self,
        outputs: Mapping[str, int],
        cardinalities: Sequence[int],
        num_numeric: int,
        embedding_size: int = 4,
        num_levels: int = 2,
        num_shared_experts: int = 2,
        num_task_experts: int = 2,
        expert_sizes: Sequence[int] = (64, 32),
        tower_sizes: Sequence[int] = (16,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        outputs = check_outputs(outputs)
        check_sizes(
            num_levels=num_levels,
            num_shared_experts=num_shared_experts,
            num_task_experts=num_task_experts,
            expert_sizes=expert_sizes,
            tower_sizes=tower_sizes,
        )
        if not expert_sizes:
            raise ValueError("expert_sizes is empty: an expert needs at least one layer")
        self.tasks = list(outputs)
        self.embedding = TableEmbedding(cardinalities, num_numeric, embedding_size)
        self.levels = nn.ModuleList(
            ExtractionLevel(
                self.tasks,
                expert_sizes[-1] if index else self.embedding.output_size,
                num_shared_experts,
                num_task_experts,
                expert_sizes,
                dropout,
                last=index == num_levels - 1,
            )
            for index in range(num_levels)
        )
        self.towers = build_towers(outputs, expert_sizes[-1], tower_sizes, dropout)

    def forward(self, categories: Tensor, numbers: Tensor) -> MultiTaskOutput:
        """Outputs `(batch, num_outputs)` by task, and the features.

        The task gates of the level below the top, the tasks' experts and gates of the top and the towers are all that
        one task alone reaches, so the cut lies before them: features are the tasks' inputs of the level below the top
        `(tasks, batch, width)`, the outputs of its experts, and those of the top's shared experts. With one level they
        are the embedded row and the outputs of the shared experts.

        Args:
            categories: int64 `(batch, categorical columns)`.
            numbers: float `(batch, num_numeric)`.
        """
        shared_input = self.embedding(categories, numbers)
        *lower, top = [level for level in self.levels if isinstance(level, ExtractionLevel)]
        cut_input = shared_input.view_as(shared_input)
        features = [] if lower else [cut_input]
        inputs = dict.fromkeys(self.tasks, shared_input if lower else cut_input)
        for level in lower:
            own = [level.task_experts[name](inputs[name]) for name in self.tasks]
            experts = torch.cat([*own, level.shared_experts(shared_input)])
            assert level.shared_gate is not None
            shared_input = mix_experts(level.shared_gate(shared_input), experts)
            if level is lower[-1]:
                # Nodes of their own, on which the shared input of the top does not depend.
                stacked, experts = torch.stack(list(inputs.values())), experts.view_as(experts)
                features = [stacked, experts]
                # Taken one by one: unbinding would tie the heads' graphs together.
                inputs = {name: stacked[k] for k, name in enumerate(self.tasks)}
            inputs = {
                name: level.select(name, inputs[name], *level.visible(k, experts)) for k, name in enumerate(self.tasks)
            }
        shared = top.shared_experts(shared_input)
        outputs = {}
        for name in self.tasks:
            own_experts = top.task_experts[name](inputs[name])
            outputs[name] = self.towers[name](top.select(name, inputs[name], own_experts, shared))
        return MultiTaskOutput(outputs, differentiable(*features, shared))
