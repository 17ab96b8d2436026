"""Rows of a table in memory, with the labels of several tasks."""

from __future__ import annotations

import logging
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.loading import Draw, keyed_uniform, mix
from datamodules.task_batches import TabularTaskBatch

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.sources.task_tables import Encoding, Parsed

log = logging.getLogger(__name__)


class TaskTensors(NamedTuple):
    """A whole table; the fields are those of a batch.

    Attributes:
        categories: int32 `(rows, categorical columns)`.
        numbers: float32 `(rows, numeric columns)`.
        targets: By task, 0 where there is no label.
        masks: By task, bool `(rows,)`; only tasks that lack labels have one.
        user_ids: int64 `(rows,)`, or None.
    """

    categories: Tensor
    numbers: Tensor
    targets: dict[str, Tensor]
    masks: dict[str, Tensor]
    user_ids: Tensor | None


class TaskRows(Dataset[TabularTaskBatch]):
    """Some rows of a table, gathered by whole batches.

    Args:
        tensors: The table.
        rows: int64 `(length,)`, which of its rows.
    """

    def __init__(self, tensors: TaskTensors, rows: Tensor) -> None:
        self.tensors, self.rows = tensors, rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> TabularTaskBatch:
        """The batch of the rows `draw.indices`."""
        table, rows = self.tensors, self.rows[draw.indices]
        return TabularTaskBatch(
            table.categories[rows].long(),
            table.numbers[rows],
            {name: values[rows] for name, values in table.targets.items()},
            {name: mask[rows] for name, mask in table.masks.items()},
            None if table.user_ids is None else table.user_ids[rows],
            draw.indices,
        )


def task_tensors(parsed: Parsed, encoding: Encoding) -> TaskTensors:
    """Encode a table."""
    targets, masks = {}, {}
    for name, kind in encoding.columns.targets:
        if name not in parsed.targets:
            continue  # rows to predict for
        values = parsed.targets[name]
        absent = np.isnan(values)
        dtype = np.int64 if kind == "multiclass" else np.float32
        targets[name] = torch.from_numpy(np.where(absent, 0, values).astype(dtype))
        if absent.any():
            masks[name] = torch.from_numpy(~absent)
            log.info("%s: task %s has %d labels in %d rows", parsed.name, name, (~absent).sum(), len(absent))
    return TaskTensors(
        torch.from_numpy(encoding.categories(parsed)),
        torch.from_numpy(encoding.numbers(parsed)),
        targets,
        masks,
        None if parsed.users is None else torch.from_numpy(parsed.users),
    )


def hide_labels(tensors: TaskTensors, train: Tensor, fraction: float, seed: int) -> TaskTensors:
    """Take labels of training rows away; which ones depends on the seed, the task's name and the row alone."""
    targets, masks = {}, {}
    for name, values in tensors.targets.items():
        hidden = train[keyed_uniform(mix(seed, zlib.crc32(name.encode())), train) < fraction]
        mask = tensors.masks.get(name, torch.ones(len(values), dtype=torch.bool)).clone()
        mask[hidden] = False
        targets[name], masks[name] = values.index_fill(0, hidden, 0), mask
        log.info("task %s: %d training labels hidden", name, len(hidden))
    return tensors._replace(targets=targets, masks=masks)


def describe_task(
    table: str,
    name: str,
    kind: str,
    tensors: TaskTensors,
    train: Tensor,
    num_classes: int | None,
    scaling: bool,
) -> dict[str, Any]:
    """A task in plain values, with the statistics of its training labels.

    Args:
        table: What the table is called in messages.
        name: Name of the task.
        kind: "binary", "multiclass" or "regression".
        tensors: The table.
        train: int64 `(rows,)`, its training rows.
        num_classes: Number of classes of a multiclass task.
        scaling: Whether a regression has mean and standard deviation of its labels, otherwise 0 and 1.

    Raises:
        ValueError: If no training row has a label.
    """
    labels = tensors.targets[name][train]
    if name in tensors.masks:
        labels = labels[tensors.masks[name][train]]
    if not len(labels):
        raise ValueError(f"{table}: task {name} has no label in any of the {len(train)} training rows")
    width = labels.shape[1] if labels.dim() > 1 else 1
    task = {"name": name, "kind": kind, "num_outputs": num_classes or width, "target_mean": 0.0, "target_std": 1.0}
    constant = bool((labels == labels[0]).all())
    if constant:
        log.warning(
            "%s: all %d training labels of task %s are %s: there is nothing to learn, and an AUC is undefined",
            table, len(labels), name, labels[0].tolist(),
        )  # fmt: skip
    if kind == "regression" and scaling:
        values = labels.double()
        task["target_mean"] = float(values.mean())
        task["target_std"] = 1.0 if constant else float(values.std(correction=0))
    return task
