"""Supervised training of an encoder under frozen heads: one for all tasks, or one expert per task."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from zoo.merging.features import FeatureFn, default_features
from zoo.merging.heads import CosineHead, prototypes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from zoo.common.schedules import WarmupCosine


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: its `labels` field or key, or the second of a pair.

    Raises:
        ValueError: If there are none.
    """
    labels = None
    if hasattr(batch, "labels"):
        labels = batch.labels
    elif isinstance(batch, dict):
        labels = batch.get("labels", batch.get("label"))
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no labels: expected a field or key 'labels', or a pair "
            "(inputs, labels). Is the data a stream without labels (--data.stream none gives labels)?"
        )
    return labels


def task_losses(
    encoder: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    heads: Mapping[str, nn.Module],
    batches: Mapping[str, Any],
    feature_fn: FeatureFn = default_features,
) -> dict[str, Tensor]:
    """Mean cross-entropy of each task.

    Args:
        encoder: One for all tasks, whose inputs it then sees in one pass, or one per task.
        heads: By task, features `(batch, d)` to logits `(batch, classes)`.
        batches: By task a batch with labels int64 `(batch,)`.
        feature_fn: Features of a batch.
    """
    if isinstance(encoder, dict):
        features = {task: feature_fn(encoder[task], batch) for task, batch in batches.items()}
    else:
        features = joint_features(encoder, batches, feature_fn)  # type: ignore[arg-type]
    return {
        task: F.cross_entropy(heads[task](features[task]).float(), labels_of(batch)) for task, batch in batches.items()
    }


def joint_features(
    encoder: Callable[..., Any], batches: Mapping[str, Any], feature_fn: FeatureFn = default_features
) -> dict[str, Tensor]:
    """Features of each task's batch by one encoder, in one pass where all are images of one size."""
    images = [getattr(batch, "images", None) for batch in batches.values()]
    sizes = {tuple(image.shape[1:]) if isinstance(image, Tensor) else None for image in images}
    if len(batches) < 2 or None in sizes or len(sizes) > 1:
        return {task: feature_fn(encoder, batch) for task, batch in batches.items()}
    found = feature_fn(encoder, torch.cat(images))  # type: ignore[arg-type]
    parts = torch.split(found, [len(image) for image in images])  # type: ignore[arg-type]
    return dict(zip(batches, parts, strict=True))


def build_optimizer(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, schedule: WarmupCosine
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW with a linear warm-up and a cosine decay to 0, as CLIP models are fine-tuned.

    Args:
        parameters: What to train.
        lr: Highest learning rate.
        weight_decay: Decoupled.
        schedule: Factor of the rate.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return optimizer, LambdaLR(optimizer, schedule)


def prototype_heads(num_classes: Mapping[str, int], dim: int, scale: float) -> dict[str, nn.Module]:
    """Frozen heads of random directions, in place of a text tower's: far from each other, and of no use by themselves.

    A head depends on its task's name and classes alone: a run with a part of the tasks has the same ones.

    Args:
        num_classes: By task, its classes.
        dim: Length of the features.
        scale: Of the cosine logits.
    """

    def seed(task: str) -> int:
        return int.from_bytes(hashlib.blake2b(task.encode(), digest_size=4).digest(), "big")

    return {task: CosineHead(prototypes(count, dim, seed(task)), scale) for task, count in num_classes.items()}
