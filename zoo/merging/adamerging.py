"""AdaMerging: merging coefficients learnt on unlabelled inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Adam

from zoo.common.artifacts import log_figure, log_table
from zoo.common.hyperparameters import plain_hyperparameters
from zoo.merging.coefficient_files import load_coefficients, save_coefficients
from zoo.merging.constraints import MergingCoefficients
from zoo.merging.merging_module import MergingModule
from zoo.merging.objectives import objective as find_objective
from zoo.merging.transforms import Ties

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zoo.merging.task_vectors import TaskVectorStore


class AdaMerging(MergingModule):
    """Learns one merging coefficient a task (and layer) at test time (Yang et al., ICLR 2024, arXiv 2310.02575).

    Minimises the entropy of the merged model's predictions over unlabelled inputs of all tasks (eq. 5 and 6). A
    training batch is a mapping from tasks to batches; labels in it are never looked at. Each optimizer step merges once
    and differentiates by products with the task vectors: no graph runs through the merge, activations of one task live
    at a time, and processes exchange the gradients of the coefficients alone.

    Args:
        granularity: "layer" (one coefficient for each parameter tensor and task), "task", "block", "module", or a
            function of names.
        init: What coefficients start from; 0.3 is Task Arithmetic.
        constraint: "clamp" to [0, 1] as published (a coefficient that leaves never returns), "project", "sigmoid" or
            "none".
        preprocess: None, or "ties": AdaMerging++, on task vectors that are trimmed and agree in sign.
        density: Share of the entries that "ties" keeps. The published 0.2 counts CLIP's unmoved text tower; on an image
            tower alone 0.2583 keeps the same entries.
        objective: "entropy", "im" (entropy minus that of the mean prediction), "expert_ce" or "expert_kl" (the experts'
            predictions as targets).
        entropy_norm: Whether to divide by the logarithm of the number of classes.
        lr: Adam's learning rate.
        betas: Adam's.
        batches_per_step: Batches whose gradients a step adds up.
        coef_path: Coefficients to start from: a file of `export_coefficients`.
        sources: What is merged: the arguments of `MergingModule`.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    def __init__(
        self,
        tasks: list[dict[str, Any]],
        granularity: Any = "layer",
        init: float = 0.3,
        constraint: str = "clamp",
        preprocess: str | None = None,
        density: float = 0.2,
        objective: str = "entropy",
        entropy_norm: bool = False,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        batches_per_step: int = 2,
        coef_path: str | None = None,
        **sources: Any,
    ) -> None:
        super().__init__(tasks, granularity=granularity, **sources)
        own = {"tasks": tasks, "granularity": granularity, **sources}
        self.save_hyperparameters(ignore=plain_hyperparameters(own))
        self.automatic_optimization = False
        if preprocess not in (None, "ties"):
            raise ValueError(f"preprocess must be empty or 'ties', got {preprocess!r}")
        if batches_per_step < 1:
            raise ValueError(f"batches_per_step must be at least 1, got {batches_per_step}")
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self._ties = Ties(density) if preprocess else None
        self.objective, self.entropy_norm = find_objective(objective), entropy_norm
        self.lr, self.betas, self.batches_per_step = lr, (float(betas[0]), float(betas[1])), batches_per_step
        self.coefficients_ = MergingCoefficients(len(self.layer_names), len(self.merge_tasks), init, constraint)
        if coef_path is not None:
            saved = load_coefficients(coef_path)
            self.coefficients_.assign(saved.select(self.layer_names, self.merge_tasks))
        self._merged: Tensor | None = None
        self._gradient: Tensor | None = None
        self._fresh = False

    def _read_store(self) -> TaskVectorStore:
        store = super()._read_store()
        if store.layer_names != self.layer_names:
            raise ValueError(
                f"the experts have {len(store.layer_names)} layers to merge, the network {len(self.layer_names)}: "
                f"{_difference(store.layer_names, self.layer_names)}"
            )
        return store if self._ties is None else store.transform(self._ties)

    def coefficients(self) -> Tensor:
        """The effective coefficients, `(L, K)`."""
        value: Tensor = self.coefficients_()
        return value.detach()

    def _merge(self) -> dict[str, Tensor]:
        """Merged weights with the present coefficients, as views of one buffer that every merge writes to."""
        if self._merged is None or self._merged.device != self.store.device:
            self._merged, self._fresh = torch.empty_like(self.store.theta0), False
        if not self._fresh:
            self.store.merge_flat(self.coefficients(), self._merged)
            self._fresh = True
        return self.store.views(self._merged)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add the gradients of all tasks' objectives; after `batches_per_step` batches, take a step.

        Args:
            batch: By task, inputs `(batch, ...)`.
            batch_idx: Its place.
        """
        self._check_tasks(batch)
        first = batch_idx % self.batches_per_step == 0
        if self._gradient is None or self._gradient.device != self.store.device:
            self._gradient = torch.zeros_like(self.store.theta0)
        if first:
            self._gradient.zero_()
            self._fresh = False
        with torch.no_grad():
            leaves = self._merge()
        gradients = self.store.views(self._gradient)
        for name, leaf in leaves.items():
            # Accumulated in place, tensor by tensor: a second set of gradients is never there.
            leaf.requires_grad_()
            leaf.grad = gradients[name]
        losses = {task: self._task_loss(leaves, inputs, task) for task, inputs in batch.items()}
        self.log_dict({f"train/{self.objective.name}/{task}": loss for task, loss in losses.items()})
        mean = torch.stack(list(losses.values())).mean()
        self.log("train/loss", mean, prog_bar=True)
        last = (batch_idx + 1) % self.batches_per_step == 0
        if last or batch_idx + 1 == self.trainer.num_training_batches:
            self._step()

    def _task_loss(self, leaves: dict[str, Tensor], inputs: Any, task: str) -> Tensor:
        logits = self.logits_with(leaves, inputs, task)
        target = None
        if self.objective.needs_expert:
            with torch.no_grad():
                target = self.logits_with(self.store.expert(task), inputs, task)
        loss = self.objective(logits, target, normalize=self.entropy_norm)
        # Not manual_backward: nothing registered has a gradient here, so there is nothing to exchange.
        torch.autograd.backward(loss)
        return loss.detach()

    def _step(self) -> None:
        assert self._gradient is not None
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        gradient = self.store.coef_grad(self._gradient)
        optimizer.zero_grad()
        self.manual_backward(self.coefficients_.surrogate(gradient))
        optimizer.step()
        self.coefficients_.after_step()
        self._fresh = False

    def on_train_epoch_end(self) -> None:
        """Log the mean coefficient of each task."""
        means = self.coefficients().mean(0)
        self.log_dict({f"coef/{task}": mean for task, mean in zip(self.merge_tasks, means, strict=True)})

    def on_fit_end(self) -> None:
        """Draw the coefficients and the course of the adaptation."""
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            from zoo.merging.figures import plot_adaptation, plot_coefficients

            coef = self.coefficients().cpu()
            log_figure(self, "coefficients", plot_coefficients(coef, self.layer_names, self.merge_tasks))
            if any(len(points) > 1 for points in self.history["acc"].values()):
                log_figure(self, "adaptation", plot_adaptation(self.history))
            rows = [[layer, *row] for layer, row in zip(self.layer_names, coef.tolist(), strict=True)]
            log_table(self, "coefficients", ["layer", *self.merge_tasks], rows)

    def task_logits(self, batch: Any, task: str) -> Tensor:
        """Logits `(batch, classes)` of the merged model."""
        with torch.no_grad():
            return self.logits_with(self._merge(), batch, task)

    def on_validation_start(self) -> None:
        """Merge anew."""
        self._fresh = False

    def on_test_start(self) -> None:
        """Merge anew: a checkpoint may have been loaded."""
        self._fresh = False

    def on_predict_start(self) -> None:
        """Merge anew, and open the file of predictions."""
        self._fresh = False
        super().on_predict_start()

    def export(self, path: str | Path | None = None) -> dict[str, Tensor]:
        """The merged weights as a plain state dict that `load_state_dict` and `from_pretrained` take.

        Args:
            path: File to write them to, as safetensors.
        """
        return self.exported(self.store.merge(self.coefficients()), path)

    def export_coefficients(self, path: str | Path) -> None:
        """Write the coefficients with the names of layers and tasks, as `coef_path` takes them."""
        about = {key: self.hparams.get(key) for key in ("granularity", "preprocess", "density")}
        save_coefficients(path, self.coefficients(), self.layer_names, self.merge_tasks, about)

    def configure_optimizers(self) -> Adam:
        """Adam on the coefficients."""
        return Adam(self.coefficients_.parameters(), lr=self.lr, betas=self.betas)


def _difference(there: list[str], here: list[str]) -> str:
    extra, missing = [n for n in there if n not in set(here)], [n for n in here if n not in set(there)]
    return (
        f"only in the experts {', '.join(extra[:5]) or 'none'}; only in the network {', '.join(missing[:5]) or 'none'}"
    )
