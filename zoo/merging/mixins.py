"""Test-time adaptation for LightningModules of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.common.artifacts import log_figure
from zoo.merging.metrics import TaskScores
from zoo.merging.objectives import objective as find_objective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule as _Base
    from torch import Tensor
else:
    # A mixin proper: Lightning's own hooks come from the module that it is mixed into.
    _Base = object


class EntropyAdaptation(_Base):
    """Adapts a LightningModule to inputs without labels, and shows entropy and accuracy of each task.

        class Model(EntropyAdaptation, LightningModule):
            task_names = ("mnist", "svhn")

            def training_step(self, batch, batch_idx):
                losses = [self.adaptation_loss(self(b.images), task=task) for task, b in batch.items()]
                return sum(losses)

            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                self.score(self(batch.images), batch.labels, task=batch.task)

    Entropy can fall while accuracy does, so both are logged: `<stage>/entropy/<task>` and `<stage>/acc/<task>` over all
    processes at the end of a validation or test, with their means over the tasks as `<stage>/entropy/mean` and
    `<stage>/acc/mean`. After a fit the picture `adaptation` shows both over the steps. Hooks of a user that share a
    name with those below must call `super()`.

    Attributes:
        task_names: The tasks; a module with one need not name it.
        adaptation_history: Validations so far, pairs (step, value) by "entropy" and "acc", and task.
    """

    task_names: Sequence[str] = ("all",)
    _history: dict[str, dict[str, list[tuple[int, float]]]] | None = None
    _kept: dict[str, TaskScores] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of the bases in which Lightning's hooks hide those of the mixin."""
        super().__init_subclass__(**kwargs)
        bases = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in bases and bases.index("LightningModule") < bases.index("EntropyAdaptation"):
            raise TypeError(
                f"class {cls.__name__}: EntropyAdaptation must stand before LightningModule among the bases"
            )

    @property
    def adaptation_history(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Entropies and accuracies of the validations so far."""
        if self._history is None:
            self._history = {"entropy": {}, "acc": {}}
        return self._history

    def adaptation_loss(
        self,
        logits: Tensor,
        objective: str = "entropy",
        *,
        task: str | None = None,
        expert_logits: Tensor | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """What a training step minimises on one batch of one task; logged as `train/<objective>/<task>`.

        Args:
            logits: `(batch, classes)`.
            objective: "entropy", "im", "expert_ce" or "expert_kl" (see `zoo.merging.objectives`).
            task: One of `task_names`; not needed where there is one.
            expert_logits: `(batch, classes)` of the task's expert, for the objectives that look at it.
            normalize: Divide by log(classes), so that tasks with many classes do not weigh more.

        Returns:
            Scalar in nats, to be added up over the tasks.

        Raises:
            ValueError: If the objective or the task is unknown, or the logits are malformed or not finite.
        """
        name = self._task(task)
        loss = find_objective(objective)(logits, expert_logits, normalize=normalize)
        # Of this process: others may adapt to other tasks at this step, and waiting for them would never end.
        self.log(f"train/{objective}/{name}", loss.detach(), batch_size=len(logits))
        return loss

    def score(self, logits: Tensor, labels: Tensor | None = None, *, task: str | None = None) -> None:
        """Count a batch of a validation or test step.

        Args:
            logits: `(batch, classes)`.
            labels: int64 `(batch,)`; without them the entropy is counted alone.
            task: One of `task_names`; not needed where there is one.

        Raises:
            ValueError: If the task is unknown.
            RuntimeError: Outside of a validation or test.
        """
        if self.trainer.testing:
            stage = "test"
        elif self.trainer.validating or self.trainer.sanity_checking:
            stage = "val"
        else:
            raise RuntimeError("score() counts batches of validation and test steps; training logs its objective")
        self._scores(stage).update(self._task(task), logits.detach(), labels)

    def on_validation_epoch_end(self) -> None:
        """Log the entropies and accuracies, and keep them for the picture."""
        super().on_validation_epoch_end()
        for key, by_task in self._log_scores("val").items():
            for task, value in by_task.items() if not self.trainer.sanity_checking else ():
                self.adaptation_history[key].setdefault(task, []).append((self.trainer.global_step, value))

    def on_test_epoch_end(self) -> None:
        """Log the entropies and accuracies."""
        super().on_test_epoch_end()
        self._log_scores("test")

    def on_train_end(self) -> None:
        """Draw entropies and accuracies over the steps."""
        super().on_train_end()
        lengths = [len(points) for own in self.adaptation_history.values() for points in own.values()]
        if max(lengths, default=0) > 1 and self.trainer.is_global_zero:
            from zoo.merging.figures import plot_adaptation

            log_figure(self, "adaptation", plot_adaptation(self.adaptation_history))

    def _log_scores(self, stage: str) -> dict[str, dict[str, float]]:
        # Made here at the latest: a process without a batch takes part in the sums of the others.
        scores = self._scores(stage)
        found = scores.compute()
        scores.reset()
        for key, by_task in found.items():
            if by_task:
                values = {**by_task, "mean": sum(by_task.values()) / len(by_task)}
                # Every process has the same numbers; the average over them keeps Lightning from asking for it.
                self.log_dict({f"{stage}/{key}/{t}": v for t, v in values.items()}, sync_dist=True, batch_size=1)
        return found

    @property
    def _stages(self) -> dict[str, TaskScores]:
        if self._kept is None:
            self._kept = {}
        return self._kept

    def _scores(self, stage: str) -> TaskScores:
        # In a plain dict, so that it is no part of the module; hence it is moved by hand.
        if stage not in self._stages:
            self._stages[stage] = TaskScores(self.task_names).to(self.device)
        return self._stages[stage]

    def _task(self, task: str | None) -> str:
        names = list(self.task_names)
        if task is None and len(names) == 1:
            return names[0]
        if task not in names:
            raise ValueError(f"task must be one of task_names ({', '.join(names)}), got {task!r}")
        return task
