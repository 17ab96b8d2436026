"""Training of several tasks at once: any backbone, weighting, aggregator and optimizer of the room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zoo.adatask.aggregators import aggregator as build_aggregator
from zoo.adatask.aggregators import default_compose
from zoo.adatask.backbones import MultiTaskOutput, build_backbone
from zoo.adatask.build import build_optimizer, check_by_task, check_training
from zoo.adatask.conflicts import GradVac, PCGrad
from zoo.adatask.delta_m import delta_m
from zoo.adatask.feedback_weightings import FAMO, GradNorm
from zoo.adatask.hooks import TaskGradMixin
from zoo.adatask.losses import task_loss
from zoo.adatask.metrics import MeanLoss, TaskMetrics, primary, score
from zoo.adatask.predictions import readable
from zoo.adatask.tasks import task_specs
from zoo.adatask.types import inputs_of
from zoo.adatask.weightings import DynamicWeightAverage, EqualWeighting, RandomLossWeighting
from zoo.adatask.weightings import weighting as build_weighting
from zoo.common.artifacts import log_figure, log_table
from zoo.common.predictions import PredictionFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.adatask.types import TaskBatch

ROW_KINDS = ("binary", "multiclass", "regression")
"""Kinds of tasks with one label a row or image."""


class MultiTaskModule(TaskGradMixin, LightningModule):
    """A network with one output per task, trained by `AdaTask` (Yang et al., AAAI 2023, arXiv 2211.15055) or others.

    Args:
        tasks: One mapping per task with `name`, `kind` ("binary", "multiclass", "regression", "segmentation", "depth",
            "normals"), and where they apply `num_outputs`, `target_mean`, `target_std` (see `TaskSpec`).
        cardinalities: Codes of each categorical column of a table.
        num_numeric: Numeric columns of a table.
        in_channels: Channels of images.
        backbone: "shared_bottom", "mmoe", "ple" (tables), "lenet", "segnet", "mtan" (images), or "single_task": one
            network per task, of the kind that the option `base` names.
        backbone_options: Further arguments of the backbone. Tables: `embedding_size`, `tower_sizes`, `dropout`, and
            `hidden_sizes` (shared_bottom), `num_experts` and `expert_sizes` (mmoe), `num_levels`, `num_shared_experts`,
            `num_task_experts` and `expert_sizes` (ple). Images: `filters` (segnet, mtan), `width`, `hidden_size` and
            `pooled_size` (lenet).
        optimizer: "adatask", "mtadam", "adam", "adamw", "rmsprop", "adagrad" or "sgd".
        lr: Learning rate.
        rule: Rule of "adatask" (others refuse this and the next two options): "adam", "rmsprop" or "adagrad".
        reduction: "sum" of the tasks' updates, as published, or their "mean" ("adatask").
        task_weights: Factor of each task's update after the preconditioning ("adatask").
        optimizer_options: Further arguments of the optimizer, such as `betas`, `weight_decay` or `low_memory`.
        joint_parameters: Regular expression of names of parameters whose gradients are summed before the rule, and
            which aggregators leave alone; None separates whatever tasks share.
        loss_weights: Constant factors of the losses, one per task. On shared parameters AdaTask cancels them.
        loss_scale: "natural" units of regression losses, or "standardised": divided by the targets' variance.
        weighting: "equal", "uncertainty" (UW), "dwa", "rlw", "imtl_l", "famo" or "gradnorm".
        weighting_options: Further arguments of the weighting: `initial` (uncertainty, imtl_l), `temperature` (dwa),
            `seed` (rlw), `lr`, `gamma` and `min_losses` (famo), `alpha` and `lr` (gradnorm).
        weighting_lr: Learning rate of the weighting's own parameters.
        aggregator: None, "pcgrad", "gradvac", "mgda", "cagrad", "imtl_g", "nash_mtl", "aligned_mtl" or "upgrad".
        aggregator_options: Further arguments of the aggregator: `seed` (pcgrad), `beta` and `seed` (gradvac),
            `normalize` (mgda), `c` and `rescale` (cagrad), `scale_mode` (aligned_mtl).
        compose: Where the aggregator works with "adatask": "pre" on the gradients, "post" on the updates; by default
            "pre" for those that change gradients and "post" for those that weigh them.
        backward_mode: How gradients by task are computed: "loop", "cut" or "batched".
        clip_mode: What `gradient_clip_val` bounds with "adatask": each "task" or all of them, "joint".
        lr_step_epochs: Epochs after which the learning rate is multiplied by `lr_gamma`, again and again; 0 for never.
        lr_gamma: That factor.
        select: Test the "best" epoch by mean validation score, or the "last" one. Where a task's main metric is an
            error (depth, normals) there is no such score, and the last one is tested.
        baseline: Metrics of single-task models by "metric/task"; the test then reports `test/delta_m`.

    Raises:
        ValueError: If an option is unknown or out of its range.
    """

    def __init__(
        self,
        tasks: list[dict[str, Any]],
        cardinalities: list[int] | None = None,
        num_numeric: int = 0,
        in_channels: int = 3,
        backbone: str = "shared_bottom",
        backbone_options: dict[str, Any] | None = None,
        optimizer: str = "adatask",
        lr: float = 1e-3,
        rule: str = "adam",
        reduction: str = "sum",
        task_weights: list[float] | None = None,
        optimizer_options: dict[str, Any] | None = None,
        joint_parameters: str | None = None,
        loss_weights: list[float] | None = None,
        loss_scale: Literal["natural", "standardised"] = "natural",
        weighting: str = "equal",
        weighting_options: dict[str, Any] | None = None,
        weighting_lr: float = 0.025,
        aggregator: str | None = None,
        aggregator_options: dict[str, Any] | None = None,
        compose: str | None = None,
        backward_mode: str = "loop",
        clip_mode: str = "task",
        lr_step_epochs: int = 0,
        lr_gamma: float = 0.5,
        select: str = "best",
        baseline: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.specs = task_specs(tasks)
        tasks = [spec.as_dict() for spec in self.specs]
        self.save_hyperparameters()
        check_training(
            optimizer, clip_mode=clip_mode, backward_mode=backward_mode, select=select, lr_step_epochs=lr_step_epochs
        )
        for name, there in (
            ("rule", rule != "adam"),
            ("reduction", reduction != "sum"),
            ("task_weights", task_weights is not None),
            ("compose", compose is not None),
        ):
            if there and optimizer != "adatask":
                raise ValueError(f"{name} belongs to optimizer='adatask', not to {optimizer!r}")
        self.task_names = [spec.name for spec in self.specs]
        outputs = {spec.name: spec.num_outputs for spec in self.specs}
        self.backbone = build_backbone(
            backbone,
            outputs,
            cardinalities=cardinalities,
            num_numeric=num_numeric,
            in_channels=in_channels,
            **(backbone_options or {}),
        )
        check_by_task(self.task_names, loss_weights, baseline)
        if optimizer == "adatask" and any(weight != 1 for weight in loss_weights or []):
            rank_zero_warn(
                f"loss_weights={loss_weights} are cancelled by AdaTask's normalisation on shared parameters: use "
                "task_weights, which multiply the updates"
            )
        self.loss_weights, self.loss_scale = loss_weights, loss_scale
        self.weighting = build_weighting(weighting, len(self.specs), **(weighting_options or {}))
        self.aggregator = None if aggregator is None else build_aggregator(aggregator, **(aggregator_options or {}))
        self.compose = compose or ("pre" if aggregator is None else default_compose(aggregator))
        self.backward_mode, self.clip_mode, self.select, self.baseline = backward_mode, clip_mode, select, baseline
        self.optimizer_name, self.lr, self.weighting_lr = optimizer, lr, weighting_lr
        if self.needs_gradient_norms and (optimizer_options or {}).get("low_memory"):
            raise ValueError("weighting='gradnorm' needs the gradients that low_memory does not keep")
        own = {"rule": rule, "reduction": reduction, "task_weights": task_weights} if optimizer == "adatask" else {}
        self.optimizer_options = {**own, **(optimizer_options or {})}
        self.joint_parameters = joint_parameters
        self.lr_step_epochs, self.lr_gamma = lr_step_epochs, lr_gamma
        self.metrics = nn.ModuleDict(
            {stage: nn.ModuleDict({s.name: TaskMetrics(s) for s in self.specs}) for stage in ("val", "test")}
        )
        self.train_losses = nn.ModuleDict({name: MeanLoss() for name in self.task_names})
        self._last_batch: TaskBatch | None = None
        self._predictions = PredictionFile(self)
        self.configure_optimizers()  # an option that does not fit is refused before any data is read

    @property
    def monitor(self) -> str | None:
        """The metric that chooses the epoch to test."""
        by_score = all(primary(spec.kind)[1] for spec in self.specs)
        return "val/score" if self.select == "best" and by_score else None

    monitor_mode = "max"

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by task of `(categories, numbers)` of a table, or of `images`."""
        found: MultiTaskOutput = self.backbone(*inputs)
        return found.outputs

    def _run(self, batch: TaskBatch) -> MultiTaskOutput:
        found: MultiTaskOutput = self.backbone(*inputs_of(batch))
        return found

    def _losses_of(self, batch: TaskBatch, outputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Loss of each task, none attached to another, and the labels behind them `(tasks,)`."""
        losses, counts = [], []
        for spec in self.specs:
            mask = batch.masks.get(spec.name)
            loss, count = task_loss(spec, outputs[spec.name], batch.targets[spec.name], mask, self.loss_scale)
            losses.append(loss)
            counts.append(count)
        return losses, torch.stack(counts)

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor | None:
        """Sum of the weighted losses; their gradients stay apart where the method needs it."""
        found = self._run(batch)
        losses, counts = self._losses_of(batch, found.outputs)
        for name, loss, count in zip(self.task_names, losses, counts, strict=True):
            self._train_loss(name).update(loss, count)
        self._last_batch = batch
        # Waiting for the counts costs a synchronisation, so only where labels can be missing.
        present = [count > 0 for count in counts.tolist()] if batch.masks else [True] * len(self.specs)
        weighted = self._weighted(losses, counts, present)
        # Without a need for separate gradients a monitor must see what is stepped with; low_memory cannot average.
        labels = counts if self.separates and not self.optimizer_options.get("low_memory") else None
        total = self.joint_loss(dict(zip(self.task_names, weighted, strict=True)), labels, found.features)
        if total is not None:
            self.log("train/loss", total.detach(), batch_size=len(inputs_of(batch)[0]))
        return total

    def _weighted(self, losses: list[Tensor], counts: Tensor, present: list[bool]) -> list[Tensor | None]:
        """Each loss times its weight; without a label None, or 0 for an optimizer that takes the sum.

        The weights come from copies of the losses: through a common tensor the gradient of one loss would run into
        the graphs of all others.
        """
        values, totals = self._over_processes(losses, counts)
        with torch.enable_grad():
            values.requires_grad_()
            own = self.weighting(values, totals > 0)
            (weights,) = torch.autograd.grad(own.sum(), values, retain_graph=True)
        if not self.separates:
            # DistributedDataParallel averages over processes, which may have unequally many labels.
            weights = weights * counts * self._world_size() / totals.clamp(min=1)
        factors = self.loss_weights or [1.0] * len(losses)
        learnt = any(True for _ in self.weighting.parameters())
        result: list[Tensor | None] = []
        for k, (loss, factor) in enumerate(zip(losses, factors, strict=True)):
            if self.separates and not present[k]:
                result.append(None)
                continue
            weighted = loss * (weights[k] * factor)
            result.append(weighted + (own[k] - own[k].detach()) if learnt else weighted)
        return result

    def _over_processes(self, losses: list[Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
        """Losses times their constant factors, and labels, of the batches of all processes: `(tasks,)` each."""
        factors = self.loss_weights or [1.0] * len(losses)
        values = torch.stack([loss.detach().float() * factor for loss, factor in zip(losses, factors, strict=True)])
        fixed = isinstance(self.weighting, (EqualWeighting, RandomLossWeighting, DynamicWeightAverage))
        if self._world_size() == 1 or (fixed and self.separates):
            return values, counts
        sums: Tensor = self.trainer.strategy.reduce(torch.cat([values * counts, counts]), reduce_op="sum")
        totals = sums[len(losses) :]
        return sums[: len(losses)] / totals.clamp(min=1), totals

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients by task, and what a weighting learns from them."""
        super().backward(loss, *args, **kwargs)
        if self.needs_gradient_norms and not self.trainer.fit_loop._should_accumulate():
            gradients = self.task_gradients()
            shared = gradients.shared()
            if shared:
                self.weighting.after_backward(gradients.matrix(shared).float().norm(dim=1))

    @property
    def needs_gradient_norms(self) -> bool:
        """Whether the weighting learns from the norms of the tasks' gradients."""
        return isinstance(self.weighting, GradNorm)

    @property
    def separates(self) -> bool:
        """Whether the step itself depends on gradients by task."""
        by_task = self.optimizer_name in ("adatask", "mtadam") or self.aggregator is not None
        return by_task or self.needs_gradient_norms

    def _by_task(self) -> bool:
        return self.separates or self.watch_tasks

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then show the weighting the losses after it, if it learns from them.

        Not at the end of the batch: a checkpoint may be written before the module's hook there.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if isinstance(self.weighting, FAMO) and self._last_batch is not None:
            batch = self._last_batch
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                losses, counts = self._losses_of(batch, self._run(batch).outputs)
            self.weighting.after_step(self._over_processes(losses, counts)[0])
        self._last_batch = None

    def _train_loss(self, name: str) -> MeanLoss:
        metric = self.train_losses[name]
        assert isinstance(metric, MeanLoss)
        return metric

    def _stage_metrics(self, stage: str) -> dict[str, TaskMetrics]:
        found = self.metrics[stage]
        assert isinstance(found, nn.ModuleDict)
        return {name: metrics for name, metrics in found.items() if isinstance(metrics, TaskMetrics)}

    def on_train_epoch_end(self) -> None:
        """Log each task's mean training loss; tell the weighting that an epoch is over."""
        means = []
        for name in self.task_names:
            metric = self._train_loss(name)
            value = metric.compute()
            means.append(value)
            self.log(f"train/loss/{name}", value)
            metric.reset()
        self.weighting.end_epoch(torch.stack(means).float())

    def _evaluate(self, batch: TaskBatch, stage: str) -> dict[str, Tensor]:
        outputs = self._run(batch).outputs
        users = getattr(batch, "user_ids", None)
        for name, metrics in self._stage_metrics(stage).items():
            metrics.update(outputs[name], batch.targets[name], batch.masks.get(name), users)
        return outputs

    def _log_metrics(self, stage: str) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, metrics in self._stage_metrics(stage).items():
            values |= {f"{metric}/{name}": value for metric, value in metrics.compute().items()}
            metrics.reset()
        mean = score(values, self.specs)
        for name, value in values.items():
            self.log(f"{stage}/{name}", value)
        if mean is not None:
            self.log(f"{stage}/score", mean, prog_bar=True)
        return values

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Collect the metrics of all tasks."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log `val/<metric>/<task>` and `val/score`, the mean of the tasks' main metrics."""
        self._log_metrics("val")

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Collect the metrics of all tasks, and show the first images."""
        outputs = self._evaluate(batch, "test")
        if batch_idx == 0 and hasattr(batch, "images") and self.trainer.is_global_zero:
            from zoo.adatask.image_figures import plot_examples

            log_figure(self, "test/examples", plot_examples(self.specs, batch, outputs))

    def on_test_epoch_end(self) -> None:
        """Log `test/<metric>/<task>`, their table, and `test/delta_m` against a baseline."""
        values = {name: float(value) for name, value in self._log_metrics("test").items()}
        rows = [[*name.split("/", 1)[::-1], value] for name, value in values.items()]
        log_table(self, "test/metrics", ["task", "metric", "value"], rows)
        if self.baseline:
            missing = sorted(self.baseline.keys() - values.keys())
            if missing:
                raise ValueError(f"baseline has {', '.join(missing)}, the test has {', '.join(values)}")
            self.log("test/delta_m", delta_m({name: values[name] for name in self.baseline}, self.baseline))

    def on_predict_start(self) -> None:
        """Open `predictions.jsonl` in the run's folder (one file per process), if a task has one label a row."""
        if any(spec.kind in ROW_KINDS for spec in self.specs):
            self._predictions.open()

    def predict_step(self, batch: TaskBatch, batch_idx: int) -> dict[str, Tensor]:
        """Predictions by task: probabilities, classes or natural units (see `predictions.readable`).

        Tasks with one label a row are also written as lines `{"row": ..., "<task>": ...}`, where `row` is the batch's
        own number of the row (None in a batch that has none).
        """
        outputs = self._run(batch).outputs
        found = {spec.name: readable(spec, outputs[spec.name]) for spec in self.specs}
        columns = {spec.name: found[spec.name].tolist() for spec in self.specs if spec.kind in ROW_KINDS}
        if columns and self._predictions.is_open:
            count, rows = len(next(iter(columns.values()))), getattr(batch, "rows", None)
            names = [None] * count if rows is None else rows.tolist()
            self._predictions.write(
                {"row": names[i], **{name: column[i] for name, column in columns.items()}} for i in range(count)
            )
        return found

    def on_predict_end(self) -> None:
        """Close the file."""
        self._predictions.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what an aggregator remembers, and the training losses of an epoch that is not over."""
        if isinstance(self.aggregator, (PCGrad, GradVac)):
            checkpoint["aggregator"] = self.aggregator.state_dict()
        checkpoint["train_losses"] = {}
        for name in self.task_names:
            metric = self._train_loss(name)
            with metric.sync_context(should_sync=self.trainer.world_size > 1):
                sums = [metric.total.clone(), metric.count.clone()]
            checkpoint["train_losses"][name] = sums

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them."""
        if isinstance(self.aggregator, (PCGrad, GradVac)) and "aggregator" in checkpoint:
            self.aggregator.load_state_dict(checkpoint["aggregator"])
        # The sums are those of all processes; one of them goes on with them.
        if self._trainer is None or not self.trainer.is_global_zero:
            return
        for name, (total, count) in checkpoint.get("train_losses", {}).items():
            metric = self._train_loss(name)
            metric.total, metric.count = total.to(self.device), count.to(self.device)
            metric._update_count = int(count > 0)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, with the weighting's parameters in a group of their own."""
        learnt = list(self.weighting.named_parameters("weighting"))
        extra = {"params": learnt, "lr": self.weighting_lr, "shared": False, "weight_decay": 0.0} if learnt else None
        optimizer = build_optimizer(
            self.optimizer_name,
            ((name, parameter) for name, parameter in self.backbone.named_parameters() if parameter.requires_grad),
            self.task_names,
            lr=self.lr,
            joint_parameters=self.joint_parameters,
            extra_group=extra,
            aggregator=self.aggregator,
            compose=self.compose,
            **self.optimizer_options,
        )
        if not self.lr_step_epochs:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, self.lr_step_epochs, self.lr_gamma)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
