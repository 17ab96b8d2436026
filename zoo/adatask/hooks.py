"""Gradients by task in Lightning's automatic optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from zoo.adatask.gradients import check_losses, scaled_grads
from zoo.adatask.optimizer import AdaTask
from zoo.adatask.task_gradients import TaskGradients

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning.pytorch import LightningModule as _Base
else:
    # A mixin proper: Lightning's own hooks come from the module that it is mixed into.
    _Base = object


class UnsupportedTrainingError(MisconfigurationException, RuntimeError):
    """A setting of the Trainer, or an optimizer, that cannot work with gradients by task."""


class TaskGradMixin(_Base):
    """Trains a LightningModule with `AdaTask`, or with a gradient aggregator before any other optimizer.

        class Model(TaskGradMixin, LightningModule):
            def training_step(self, batch, batch_idx):
                ...
                return self.joint_loss({"click": click_loss, "like": like_loss})

            def configure_optimizers(self):
                return AdaTask(self.parameters(), ["click", "like"])

    Optimization stays automatic. `accumulate_grad_batches` adds up the tasks' gradients; `gradient_clip_val` bounds
    each of them; with several processes they are averaged once per optimizer step, before anything is squared; under
    "16-mixed" the moments see unscaled gradients, and a step that overflows leaves them alone. Other hooks of a user
    that share a name with those below must call `super()`.

    Attributes:
        backward_mode: How gradients by task are computed: "loop", "cut" or "batched" (see `per_task_grads`). The
            latter two need `features` in `joint_loss`.
        clip_mode: What `gradient_clip_val` bounds: the whole gradient of each "task", or all of them side by side
            ("joint").
        aggregator: For optimizers other than AdaTask: function of the matrix `(tasks, shared elements)` that returns
            a matrix of that shape, or weights `(tasks,)`; the optimizer gets the sum.
        watch_tasks: Whether to keep gradients by task although nothing but a monitor needs them.
    """

    backward_mode: str = "loop"
    clip_mode: str = "task"
    aggregator: Callable[[Tensor], Tensor] | None = None
    watch_tasks: bool = False
    _losses: dict[str, Tensor | None] | None = None
    _counts: Tensor | None = None
    _features: Sequence[Tensor] | None = None
    _gradients: TaskGradients | None = None
    _finished: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of the bases in which Lightning's hooks hide those of the mixin."""
        super().__init_subclass__(**kwargs)
        bases = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in bases and bases.index("LightningModule") < bases.index("TaskGradMixin"):
            raise TypeError(f"class {cls.__name__}: TaskGradMixin must stand before LightningModule among the bases")

    def joint_loss(
        self,
        losses: Mapping[str, Tensor | None],
        counts: Tensor | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor | None:
        """What `training_step` returns: the sum of the losses, which stay apart for the backward pass.

        Args:
            losses: A scalar per task; None for a task without a label in this batch.
            counts: float `(tasks,)`, valid labels behind each loss. Accumulated batches and processes are then
                averaged over the labels; without counts over batches and processes.
            features: The tensors between trunk and heads, for `backward_mode` "cut" and "batched".

        Returns:
            The sum, or None if no task has a loss (Lightning then leaves the batch out).
        """
        self._losses, self._counts = dict(losses), counts
        self._features = [features] if isinstance(features, Tensor) else features
        found = [loss for loss in losses.values() if loss is not None]
        if found:
            return torch.stack([loss.reshape(()).float() for loss in found]).sum()
        # Other processes, or a step on what earlier batches have gathered, wait for this one's backward.
        waited_for = self._world_size() > 1 or (self._trainer is not None and self.trainer.accumulate_grad_batches > 1)
        return torch.zeros((), device=self.device, requires_grad=True) if waited_for else None

    def task_gradients(self) -> TaskGradients:
        """Gradients by task of the present step.

        Raises:
            RuntimeError: If the module does not keep them apart.
        """
        optimizer = self._optimizer()
        if isinstance(optimizer, AdaTask):
            return optimizer.gradients
        if self._gradients is None:
            raise RuntimeError("gradients by task are kept with AdaTask, with an aggregator, or if watch_tasks is set")
        return self._gradients

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, list):
            raise RuntimeError(f"gradients by task need one optimizer, this module has {len(optimizer)}")
        assert isinstance(optimizer, Optimizer)
        return optimizer

    def _by_task(self) -> bool:
        return self.aggregator is not None or self.watch_tasks or isinstance(self._optimizer(), AdaTask)

    def _world_size(self) -> int:
        return self.trainer.world_size if self._trainer is not None else 1

    def setup(self, stage: str) -> None:
        """Refuse strategies that shard gradients.

        Raises:
            UnsupportedTrainingError: Under FSDP, DeepSpeed or model parallelism.
        """
        super().setup(stage)
        if stage == "fit" and isinstance(
            self.trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
        ):
            raise UnsupportedTrainingError(
                f"{type(self.trainer.strategy).__name__} shards gradients and sums them over the tasks by itself, "
                "gradients by task need each process to have its own: use strategy='ddp'"
            )

    def on_train_start(self) -> None:
        """Take the exchange of gradients over from DistributedDataParallel, whose hooks never fire here.

        Raises:
            UnsupportedTrainingError: If the optimizer cannot do what the Trainer is set to.
        """
        super().on_train_start()
        optimizer = self._optimizer()
        if not self._by_task():
            return
        if isinstance(optimizer, LBFGS):
            raise UnsupportedTrainingError(
                "LBFGS evaluates the summed loss several times a step: gradients by task do not reach it. Use AdaTask, "
                "or a first-order optimizer with an aggregator"
            )
        if isinstance(optimizer, AdaTask) and optimizer.low_memory:
            for setting, value in (
                ("accumulate_grad_batches", self.trainer.accumulate_grad_batches > 1),
                ("gradient_clip_val", self.trainer.gradient_clip_val),
                ("several processes", self._world_size() > 1),
            ):
                if value:
                    raise UnsupportedTrainingError(
                        f"low_memory=True keeps no gradient until the step, which {setting} needs"
                    )
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
            wrapped.require_backward_grad_sync = False

    def on_train_end(self) -> None:
        """Let go of the optimizer's state, which Lightning moves off the device."""
        super().on_train_end()
        optimizer = self._optimizer()
        if isinstance(optimizer, AdaTask):
            optimizer.slots.forget()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Forget the gradients, by task as well."""
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        if self._gradients is not None:
            self._gradients.clear()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients of each task in place of those of the sum.

        Raises:
            RuntimeError: If `training_step` did not call `joint_loss`.
        """
        if not self._by_task():
            super().backward(loss, *args, **kwargs)
            return
        if self._finished:
            # An optimizer_zero_grad() of the user may not have come here.
            self._finished = False
            gradients = self.task_gradients() if self._gradients or isinstance(self._optimizer(), AdaTask) else None
            if gradients is not None:
                gradients.clear()
        losses, counts, features = self._losses, self._counts, self._features
        self._losses = self._counts = self._features = None
        if losses is None:
            raise RuntimeError("training_step must return self.joint_loss({task: loss, ...}): a sum cannot be split")
        accumulated = self.trainer.accumulate_grad_batches
        if counts is None and accumulated > 1:
            losses = {name: None if value is None else value / accumulated for name, value in losses.items()}
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        optimizer = self._optimizer()
        if any(value is not None for value in losses.values()):
            if isinstance(optimizer, AdaTask):
                optimizer.backward(losses, features, self.backward_mode, counts, scaler)
            else:
                self._accumulate(optimizer, losses, counts, features, scaler)
        elif not isinstance(optimizer, AdaTask):
            self._own_gradients(optimizer, list(losses))
        if not self.trainer.fit_loop._should_accumulate():
            self._finish(optimizer, None if scaler is None else scaler.get_scale())
            self._finished = True

    def _own_gradients(self, optimizer: Optimizer, names: Sequence[str]) -> TaskGradients:
        """Where gradients by task are kept for an optimizer that does not keep them."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        # Groups may grow during a fit, as a frozen backbone thaws.
        if self._gradients is None or count != len(self._gradients.parameters):
            self._gradients = TaskGradients.of_groups(optimizer.param_groups, names)
        return self._gradients

    def _accumulate(
        self,
        optimizer: Optimizer,
        losses: Mapping[str, Tensor | None],
        counts: Tensor | None,
        features: Sequence[Tensor] | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        gradients = self._own_gradients(optimizer, list(losses))
        ordered = check_losses(losses, gradients.names, "error" if scaler is None else "ignore")
        present = [loss is not None for loss in ordered]
        rows, factor = scaled_grads(ordered, gradients.parameters, features, self.backward_mode, scaler)
        gradients.accumulate(rows, present, counts, None if factor is None else 1 / factor)

    def _finish(self, optimizer: Optimizer, scale: float | None) -> None:
        """Average over the processes, and give the optimizer its gradient."""
        if isinstance(optimizer, AdaTask):
            if self._world_size() > 1:
                optimizer.gradients.all_reduce()
                optimizer.gradients.write_grad(scale)
                optimizer.mark_ready()
            return
        gradients = self.task_gradients()
        if self._world_size() > 1:
            gradients.all_reduce()
        shared = gradients.shared()
        matrix = gradients.matrix(shared) if self.aggregator is not None and shared else None
        # Under mixed precision an overflow is the scaler's business: it leaves the step out.
        if self.aggregator is not None and matrix is not None and (scale is None or bool(matrix.isfinite().all())):
            found = self.aggregator(matrix)
            gradients.replace(shared, found if found.ndim == 2 else found[:, None].to(matrix.dtype) * matrix)
        gradients.write_grad(scale)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Bound the gradients of the tasks, which are what `AdaTask` steps with; `.grad` alone would not do."""
        if not gradient_clip_val or not self._by_task():
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = self.task_gradients()
        if gradient_clip_algorithm == "value":
            if not isinstance(optimizer, AdaTask):
                super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
                return
            gradients.clip_value(gradient_clip_val)
        else:
            # Any other optimizer steps with the sum, and Lightning users expect its norm to be bounded.
            gradients.clip(gradient_clip_val, self.clip_mode if isinstance(optimizer, AdaTask) else "sum")
        gradients.write_grad()
