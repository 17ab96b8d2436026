"""Fine-tuning: one encoder on all tasks (a base, or the joint multi-task model), or one expert per task from a base."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.common.artifacts import run_folder
from zoo.common.schedules import WarmupCosine, fit_schedule
from zoo.merging.backbones import ImageEncoder, build_encoder
from zoo.merging.evaluation import TaskEvaluation
from zoo.merging.expert_folder import write_expert_folder
from zoo.merging.features import default_features
from zoo.merging.finetune import build_optimizer, prototype_heads, task_losses
from zoo.merging.heads import as_head, check_head, load_heads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch.utilities.types import OptimizerLRScheduler

log = logging.getLogger(__name__)

MODES = ("joint", "separate")


class TaskExperts(TaskEvaluation):
    """Trains what is merged later; leaves a folder of experts in the run's folder.

    In mode "joint" one encoder learns all tasks: from fresh weights it is a base to start experts from, from a base it
    is the joint multi-task model. In mode "separate" every task has a copy of the encoder of its own: training them
    side by side equals training them one after the other, as no parameter is shared. Where memory is short, train them
    in several runs with `--data.tasks`.

    After the training the run's folder holds `experts/` (mode "separate", a folder for `--model.experts` of AdaMerging,
    RepresentationSurgery and MergedClassifier) or `encoder/` and `heads.safetensors` (mode "joint").

    Args:
        tasks: One mapping per task with `name` and `num_classes`.
        mode: "joint" or "separate".
        encoder: "tiny", or a folder or hub id with the weights to start from.
        encoder_options: Options of "tiny", such as `hidden_size` (see `build_encoder`).
        heads: "prototypes" (frozen random directions, one per class), "linear" (trained with the encoder), or a file of
            heads, which stay frozen: those of the base's training.
        head_scale: Scale of the prototypes' cosine logits.
        lr: Highest learning rate of AdamW, after a warm-up and before a cosine decay.
        weight_decay: AdamW's.
        warmup_steps: Steps of warm-up.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    def __init__(
        self,
        tasks: list[dict[str, Any]],
        mode: str = "joint",
        encoder: str = "tiny",
        encoder_options: dict[str, Any] | None = None,
        heads: str = "prototypes",
        head_scale: float = 16.0,
        lr: float = 3e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
    ) -> None:
        super().__init__([task["name"] for task in tasks])
        self.save_hyperparameters()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.mode, self.lr, self.weight_decay, self._schedule = mode, lr, weight_decay, WarmupCosine(warmup_steps)
        base = build_encoder(encoder, **(encoder_options or {}))
        # The base that the experts start from is not trained, but it belongs beside them.
        self._base = (copy.deepcopy(base) if mode == "separate" else base,)
        count = len(self.task_names) if mode == "separate" else 1
        self.encoders = nn.ModuleList(copy.deepcopy(base) for _ in range(count))
        classes = {task["name"]: int(task["num_classes"]) for task in tasks}
        self.heads = nn.ModuleList(self._build_heads(heads, classes, base.dim, head_scale))
        self.train()

    def _build_heads(self, heads: str, classes: Mapping[str, int], dim: int, scale: float) -> list[nn.Module]:
        if heads == "prototypes":
            return list(prototype_heads(classes, dim, scale).values())
        if heads == "linear":
            return [nn.Linear(dim, n) for n in classes.values()]
        found = load_heads(heads)
        missing = [name for name in classes if name not in found]
        if missing:
            raise ValueError(f"{heads} has no head for {', '.join(missing)}: it has {', '.join(found)}")
        for name, count in classes.items():
            check_head(name, found[name], count, dim)
        return [found[name] for name in classes]

    def encoder_of(self, task: str) -> ImageEncoder:
        """The encoder of a task."""
        place = self.task_names.index(task) if self.mode == "separate" else 0
        encoder = self.encoders[place]
        assert isinstance(encoder, ImageEncoder)
        return encoder

    def task_logits(self, batch: Any, task: str) -> Tensor:
        """Logits `(batch, classes)` of a task by its encoder and head."""
        logits: Tensor = self.heads[self.task_names.index(task)](default_features(self.encoder_of(task), batch))
        return logits

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Sum of the tasks' mean cross-entropies; with an encoder each, they have nothing in common."""
        if not hasattr(batch, "keys") or any(task not in self.task_names for task in batch):
            raise ValueError(
                f"a training batch must be a mapping from the tasks {', '.join(self.task_names)} to labelled batches, "
                f"got {', '.join(batch) if hasattr(batch, 'keys') else type(batch).__name__}"
            )
        heads = dict(zip(self.task_names, self.heads, strict=True))
        encoder = self.encoder_of(self.task_names[0])
        by_task = {task: self.encoder_of(task) for task in batch} if self.mode == "separate" else encoder
        losses = task_losses(by_task, heads, batch)
        self.log_dict({f"train/loss/{task}": loss.detach() for task, loss in losses.items()})
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True)
        return total

    def on_train_start(self) -> None:
        """Fit the schedule to the length of the training."""
        fit_schedule(self, self._schedule)

    def on_fit_end(self) -> None:
        """Write the encoders and heads."""
        folder = run_folder(self.trainer)
        if not self.trainer.is_global_zero or getattr(self.trainer, "fast_dev_run", False):
            return
        heads = {task: as_head(head) for task, head in zip(self.task_names, self.heads, strict=True)}
        if self.mode == "separate":
            experts = ((task, self.encoder_of(task)) for task in self.task_names)
            about = {"encoder": self.hparams["encoder"], "lr": self.lr, "steps": self.trainer.global_step}
            write_expert_folder(folder / "experts", self._base[0], experts, heads, about=about)
            log.info(f"Experts: {folder / 'experts'}")
            return
        from zoo.merging.backbones import save_encoder
        from zoo.merging.heads import save_heads

        save_encoder(self.encoder_of(self.task_names[0]), folder / "encoder")
        save_heads(folder / "heads.safetensors", heads)
        log.info(f"Encoder: {folder / 'encoder'}, heads: {folder / 'heads.safetensors'}")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine decay over the whole training."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer, scheduler = build_optimizer(parameters, self.lr, self.weight_decay, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
