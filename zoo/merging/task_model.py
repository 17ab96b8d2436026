"""A merged encoder, the surgery of one task and its head, as one module to deploy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zoo.merging.deep_surgery import DeepSurgery
from zoo.merging.features import default_features
from zoo.merging.surgery import SurgeryBank

if TYPE_CHECKING:
    from zoo.merging.blocks import Blocks
    from zoo.merging.features import FeatureFn


class TaskModel(nn.Module):
    """Logits of one task: encoder, repair, head.

    Args:
        merged: The merged encoder. Weights of a `MergedModel` are no part of a state dict: `materialize()` it first if
            the model is to be saved.
        surgery: Module from features to repaired features, or deep surgery of the one task, which repairs the encoder's
            blocks while this model runs.
        head: Module from features to logits.
        task: Name of the task.
        feature_fn: Function (model, batch) -> features.
        blocks: Where the blocks are, for deep surgery; as in `DeepSurgery.attach`.
    """

    def __init__(
        self,
        merged: nn.Module,
        surgery: nn.Module,
        head: nn.Module,
        task: str,
        feature_fn: FeatureFn = default_features,
        blocks: Blocks = None,
    ) -> None:
        super().__init__()
        self.merged, self.surgery, self.head = merged, surgery, head
        self.task, self.feature_fn, self.blocks = task, feature_fn, blocks

    def forward(self, batch: Any) -> Tensor:
        """Logits `(batch, classes)` of what `feature_fn` takes."""
        logits: Tensor
        if isinstance(self.surgery, DeepSurgery):
            with self.surgery.attach(self.merged, self.blocks), self.surgery.task(self.task):
                logits = self.head(self.surgery(self.feature_fn(self.merged, batch)))
        else:
            logits = self.head(self.surgery(self.feature_fn(self.merged, batch)))
        return logits


def task_model(
    merged: nn.Module,
    surgery: nn.Module,
    head: nn.Module,
    task: str,
    feature_fn: FeatureFn = default_features,
    blocks: Blocks = None,
) -> TaskModel:
    """A model of one task, in evaluation mode, which shares the weights of its parts.

    Args:
        merged: The merged encoder.
        surgery: A `SurgeryBank` or `DeepSurgery`, of which the task's modules are taken, or one module.
        head: Module from features to logits.
        task: Name of the task.
        feature_fn: Function (model, batch) -> features.
        blocks: Where the blocks are, for deep surgery; None means the paths it was last attached to, or finds them.

    Raises:
        ValueError: If the bank has no such task.
    """
    if isinstance(surgery, DeepSurgery):
        blocks = surgery.found_at or None if blocks is None else blocks
        surgery = surgery.only(task)
    elif isinstance(surgery, SurgeryBank):
        surgery = surgery[task]
    model = TaskModel(merged, surgery, head, task, feature_fn, blocks)
    model.eval()
    return model
