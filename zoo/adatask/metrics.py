"""Metrics of the tasks of a multi-task model over a whole split, right under DDP with any batch sizes.

A constant output never scores best and a NaN output scores worst: an error of infinity, a miss, the wrong end of a
ranking, 180 degrees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat

from zoo.adatask.losses import labelled
from zoo.adatask.metrics_dense import DepthMetrics, NormalsMetrics, SegmentationMetrics, classes_against_ties
from zoo.adatask.tasks import KINDS, TaskSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Name, and whether higher is better.
_PRIMARY = {
    "binary": ("auc", True),
    "multiclass": ("accuracy", True),
    "regression": ("r2", True),
    "segmentation": ("miou", True),
    "depth": ("abs_err", False),
    "normals": ("mean_angle", False),
}
_NEEDS = {
    "binary": "auc needs labels of both classes, user_auc within one user",
    "regression": "r2 needs labels that differ",
}


def primary(kind: str) -> tuple[str, bool]:
    """The metric that stands for a task of this kind, and whether higher is better.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in _PRIMARY:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    return _PRIMARY[kind]


def score(values: Mapping[str, Tensor], specs: Sequence[TaskSpec]) -> Tensor | None:
    """Mean over tasks of their primary metrics, or None where one of them is an error (lower is better).

    A metric that the split does not define (NaN: an AUC without positives) is left out, or no epoch could be the best;
    a NaN *output* scores worst and is not NaN here.

    Args:
        values: Scalars by `<metric>/<task>`, such as `auc/income`; others than the primary ones are left alone.
        specs: The tasks.

    Raises:
        ValueError: If the primary metric of a task is missing.
    """
    names = []
    for spec in specs:
        metric, higher_is_better = primary(spec.kind)
        if not higher_is_better:
            return None
        names.append(f"{metric}/{spec.name}")
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing among the values {sorted(values)}")
    return torch.stack([values[name] for name in names]).nanmean()


class MeanLoss(Metric):
    """Mean of losses over their labels, without a look at the values, which would have to wait for the device."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, count: Tensor) -> None:
        """Add a batch.

        Args:
            loss: Mean loss, a scalar.
            count: Labels behind it.
        """
        self.total += loss.detach().double() * count
        self.count += count

    def compute(self) -> Tensor:
        """The mean, float32; NaN without a label."""
        return (self.total / self.count).float()


def grouped_auc(scores: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Area under the ROC curve within each group, exact: a tie of a positive and a negative counts one half.

    A NaN score stands at the wrong end: below all others for a positive, above all others for a negative.

    Args:
        scores: Floating point `(rows,)`.
        labels: bool `(rows,)`.
        groups: int64 `(rows,)`, any ids.

    Returns:
        float64 `(groups,)` in the order of their ids, NaN for a group with one class, and the int64 number of rows of
        each.
    """
    ids, group = torch.unique(groups, return_inverse=True)
    broken = scores.isnan()
    levels, level = torch.unique(scores.masked_fill(broken, 0.0), return_inverse=True)
    level = torch.where(broken, torch.where(labels, 0, len(levels) + 1), level + 1)
    width = len(levels) + 2
    # A block is a set of tied rows of one group; blocks lie in the order of their groups, then of their scores.
    blocks, block = torch.unique(group * width + level, return_inverse=True)
    owner = blocks.div(width, rounding_mode="floor")
    positives = torch.zeros_like(blocks).index_add_(0, block, labels.long())
    negatives = torch.zeros_like(blocks).index_add_(0, block, (~labels).long())
    num_positives = torch.zeros_like(ids).index_add_(0, owner, positives)
    num_negatives = torch.zeros_like(ids).index_add_(0, owner, negatives)
    before = num_negatives.cumsum(0) - num_negatives
    below = negatives.cumsum(0) - negatives - before[owner]
    half_wins = torch.zeros_like(ids).index_add_(0, owner, positives * (2 * below + negatives))
    return half_wins.double() / (2 * num_positives * num_negatives), num_positives + num_negatives


def _mean_auc(scores: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Mean of the defined AUCs weighted by rows, NaN where there is none."""
    aucs, rows = grouped_auc(scores, labels, groups)
    weights = rows.double() * ~aucs.isnan()
    return (aucs.nan_to_num(0.0) * weights).sum() / weights.sum()


class BinaryMetrics(Metric):
    """auc, logloss and accuracy of a binary task, and user_auc where user ids are given.

    auc is exact (a tie counts one half); user_auc is the mean of the AUCs within the users that have both classes,
    weighted by their labelled rows. accuracy asks for a logit on the label's side of 0; 0 itself is a miss. Logits are
    kept in float32: 13 bytes a row.

    Args:
        spec: A binary task.
    """

    full_state_update = False
    is_differentiable = False

    logits: list[Tensor]
    labels: list[Tensor]
    user_ids: list[Tensor]
    rows_of_users: Tensor

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        self.spec = spec
        for name in ("logits", "labels", "user_ids"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("rows_of_users", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, output: Tensor, target: Tensor, mask: Tensor | None = None, user_ids: Tensor | None = None
    ) -> None:
        """Keep a batch; shapes as in `task_loss`, `user_ids` int64 `(batch,)`.

        Raises:
            ValueError: If a shape is not what the task needs.
        """
        logits, target, valid = labelled(self.spec, output, target, mask)
        if user_ids is not None and user_ids.shape != logits.shape:
            raise ValueError(
                f"task {self.spec.name!r}: user_ids must have shape {tuple(logits.shape)}, got {tuple(user_ids.shape)}"
            )
        self.logits.append(logits.float())
        self.labels.append(torch.where(valid, (target > 0.5).to(torch.int8), -1))
        self.user_ids.append(torch.zeros_like(self.labels[-1], dtype=torch.int64) if user_ids is None else user_ids)
        if user_ids is not None:
            self.rows_of_users += len(user_ids)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; `compute` comes through here also with one process."""
        if isinstance(self.logits, list) and not self.logits:
            # The library would send float32 for every state of a process without a batch.
            self.logits.append(torch.zeros(0, device=self.device))
            self.labels.append(torch.zeros(0, dtype=torch.int8, device=self.device))
            self.user_ids.append(torch.zeros(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Values in float64; auc is NaN with one class, user_auc without a user that has both.

        Raises:
            ValueError: If some batches had user ids and others had none.
        """
        logits, labels, users = (dim_zero_cat(state) for state in (self.logits, self.labels, self.user_ids))
        if 0 < self.rows_of_users < len(users):
            raise ValueError(f"task {self.spec.name!r}: all batches need user_ids, or none; some had them")
        valid = labels >= 0
        logits, users, positive = logits[valid], users[valid], labels[valid] > 0
        losses = F.binary_cross_entropy_with_logits(logits.double(), positive.double(), reduction="none")
        hits = torch.where(positive, logits > 0, logits < 0)
        values = {
            "auc": _mean_auc(logits, positive, torch.zeros_like(users)),
            "logloss": losses.nan_to_num(torch.inf, torch.inf).mean(),
            "accuracy": hits.double().mean(),
        }
        if self.rows_of_users > 0:
            values["user_auc"] = _mean_auc(logits, positive, users)
        return values


class MulticlassMetrics(Metric):
    """Accuracy (over all labels, a tie is a miss) and logloss of a multiclass task.

    Args:
        spec: A multiclass task.
    """

    full_state_update = False
    is_differentiable = False

    hits: Tensor
    loss: Tensor
    count: Tensor

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        self.spec = spec
        self.add_state("hits", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; shapes as in `task_loss`."""
        logits, target, valid = labelled(self.spec, output, target, mask)
        predicted = classes_against_ties(self.spec, logits, target)
        losses = F.cross_entropy(logits.double(), target.clamp(min=0), reduction="none")
        self.hits += (valid & (predicted == target)).sum()
        self.loss += torch.where(valid, losses.nan_to_num(torch.inf, torch.inf), 0.0).sum()
        self.count += valid.sum()

    def compute(self) -> dict[str, Tensor]:
        """Values in float64, NaN without labels."""
        return {"accuracy": self.hits.double() / self.count, "logloss": self.loss / self.count}


class RegressionMetrics(Metric):
    """r2, mse and mae of a regression task in natural units, mean over its targets.

    r2 = 1 - sum of squared errors / sum of squared deviations from the mean label of the split: 0 at best for a
    constant output, -inf for a NaN one.

    Args:
        spec: A regression task.
    """

    full_state_update = False
    is_differentiable = False

    sums: Tensor
    count: Tensor

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        self.spec = spec
        # Squared errors, absolute errors, labels, squared labels.
        self.add_state("sums", torch.zeros(4, spec.num_outputs, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; shapes as in `task_loss`."""
        prediction, target, valid = labelled(self.spec, output, target, mask)
        errors = (prediction.double() - target).abs().nan_to_num(torch.inf, torch.inf)
        # Squares of labels far from 0 would lose the digits of their variance.
        labels = target.double() - self.spec.target_mean
        terms = torch.stack([errors.square(), errors, labels, labels.square()])
        self.sums += torch.where(valid[:, None], terms, 0.0).sum(1)
        self.count += valid.sum()

    def compute(self) -> dict[str, Tensor]:
        """Values in float64, NaN without labels; r2 also where all labels of a target are equal."""
        squared, absolute, labels, squared_labels = self.sums
        deviations = squared_labels - labels.square() / self.count
        # What is left of equal labels after rounding is no variance.
        deviations = torch.where(deviations > 1e-13 * squared_labels, deviations, torch.nan)
        return {
            "r2": (1 - squared / deviations).mean(),
            "mse": (squared / self.count).mean(),
            "mae": (absolute / self.count).mean(),
        }


class TaskMetrics(nn.Module):
    """All metrics of one task over a split, to be held by a LightningModule (which moves it to its device).

    | kind | metrics, the primary one first |
    | --- | --- |
    | binary | auc, logloss, accuracy, and user_auc where user ids are given |
    | multiclass | accuracy, logloss |
    | regression | r2, mse, mae |
    | segmentation | miou, pixel_accuracy |
    | depth | abs_err, rel_err |
    | normals | mean_angle, median_angle, within_11.25, within_22.5, within_30 |

    Args:
        spec: The task.

    Example:
        >>> import torch
        >>> metrics = TaskMetrics(TaskSpec("age", "regression", target_mean=40.0, target_std=10.0))
        >>> metrics.update(torch.tensor([-1.0, 1.0]), torch.tensor([30.0, 52.0]))
        >>> {name: round(float(value), 3) for name, value in metrics.compute().items()}
        {'r2': 0.983, 'mse': 2.0, 'mae': 1.0}
    """

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        self.spec = spec
        kinds: dict[str, Callable[[TaskSpec], Metric]] = {
            "binary": BinaryMetrics,
            "multiclass": MulticlassMetrics,
            "regression": RegressionMetrics,
            "segmentation": SegmentationMetrics,
            "depth": DepthMetrics,
            "normals": NormalsMetrics,
        }
        self.metric = kinds[spec.kind](spec)
        self._warned = False

    def update(
        self, output: Tensor, target: Tensor, mask: Tensor | None = None, user_ids: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            output: What the task's head puts out; shapes as in `task_loss`.
            target: The labels.
            mask: bool `(batch,)`, whether a row or image has labels; None for all.
            user_ids: int64 `(batch,)` for binary tasks; other kinds have no metric within users.

        Raises:
            ValueError: If a shape or a class is not what the task needs.
        """
        if self.spec.kind == "binary":
            self.metric.update(output, target, mask, user_ids)
        else:
            self.metric.update(output, target, mask)

    def compute(self) -> dict[str, Tensor]:
        """Values (0-dim float64) over all batches of all processes since `reset`, by name.

        A metric that the split does not define (an AUC of one class, a mean over no label) is NaN, with a single
        warning that names the task.
        """
        values: dict[str, Tensor] = self.metric.compute()
        undefined = [name for name, value in values.items() if value.isnan()]
        if undefined and not self._warned:
            self._warned = True
            needs = _NEEDS.get(self.spec.kind, "all of its metrics need a label")
            rank_zero_warn(f"task {self.spec.name!r}: {', '.join(undefined)} is NaN over this split; {needs}")
        return values

    def reset(self) -> None:
        """Forget all batches."""
        self.metric.reset()
