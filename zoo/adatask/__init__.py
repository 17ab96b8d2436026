"""AdaTask: adaptive learning rates by task, what stands beside it, and modules that use it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.adatask.aggregators import aggregator
    from zoo.adatask.backbones import build_backbone
    from zoo.adatask.callbacks import TaskDominanceMonitor
    from zoo.adatask.delta_m import delta_m
    from zoo.adatask.dominance import TaskDominance
    from zoo.adatask.gradients import infer_membership, per_task_grads
    from zoo.adatask.hooks import TaskGradMixin
    from zoo.adatask.losses import task_loss
    from zoo.adatask.metrics import TaskMetrics
    from zoo.adatask.module import MultiTaskModule
    from zoo.adatask.mtadam import MTAdam
    from zoo.adatask.optimizer import AdaTask
    from zoo.adatask.task_gradients import TaskGradients
    from zoo.adatask.tasks import TaskSpec
    from zoo.adatask.weightings import weighting

_HOMES = {
    "AdaTask": "optimizer",
    "MTAdam": "mtadam",
    "MultiTaskModule": "module",
    "TaskDominance": "dominance",
    "TaskDominanceMonitor": "callbacks",
    "TaskGradMixin": "hooks",
    "TaskGradients": "task_gradients",
    "TaskMetrics": "metrics",
    "TaskSpec": "tasks",
    "aggregator": "aggregators",
    "build_backbone": "backbones",
    "delta_m": "delta_m",
    "infer_membership": "gradients",
    "per_task_grads": "gradients",
    "task_loss": "losses",
    "weighting": "weightings",
}
__all__ = [
    "AdaTask",
    "MTAdam",
    "MultiTaskModule",
    "TaskDominance",
    "TaskDominanceMonitor",
    "TaskGradMixin",
    "TaskGradients",
    "TaskMetrics",
    "TaskSpec",
    "aggregator",
    "build_backbone",
    "delta_m",
    "infer_membership",
    "per_task_grads",
    "task_loss",
    "weighting",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
