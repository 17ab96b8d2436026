"""Watches in a Lightning run how far a model's features lie from those of the tasks' experts."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from zoo.common.artifacts import log_figure
from zoo.merging.bias import TaskRepresentationBias
from zoo.merging.feature_figures import plot_tsne_grid
from zoo.merging.features import FeatureFn, default_features, without_labels
from zoo.merging.figures import plot_bias

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

INDIVIDUAL = "individual"


class RepresentationBiasCallback(Callback):
    """Logs the mean absolute difference of a module's features from the experts', by task (Yang et al., 2402.02705).

        RepresentationBiasCallback({"mnist": mnist_encoder, "svhn": svhn_encoder})

    Every validation logs `bias_l1/<task>` and `bias_l1/mean`. At the end of a fit the picture `bias_l1` compares the
    first validation with the last; a `trainer.validate(...)` before the fit counts. The task of a batch is its field or
    key `task`; without one, the loaders are those of the experts, in their order. Tasks without an expert are left out.

    Args:
        experts: By task a network. It is put into evaluation mode, and is on the module's device while it is in use.
        features: Features `(batch, dimension)` of an expert, from (expert, batch without labels).
        module_features: The same of the module; `features` by default, which calls it as the experts are called.
        every_n_epochs: Validations of every n-th epoch of a fit count.

    Raises:
        ValueError: If there is no expert, an option is out of range, the task of a batch is not known, or shapes of
            features differ.
    """

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        features: FeatureFn = default_features,
        module_features: FeatureFn | None = None,
        every_n_epochs: int = 1,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self._experts, self._every = _Experts(experts, features), every_n_epochs
        self._module_features = module_features or features
        self._metric: TaskRepresentationBias | None = None
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, when it is time."""
        due = not _fitting(trainer) or (trainer.current_epoch + 1) % self._every == 0
        if due and not trainer.sanity_checking:
            self._metric = TaskRepresentationBias(list(self._experts.networks)).to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        task = None if self._metric is None else self._experts.task_of(trainer, batch, dataloader_idx)
        if task is None:
            return
        assert self._metric is not None
        inputs = without_labels(batch)
        with trainer.precision_plugin.forward_context():
            own = _evaluated(pl_module, self._module_features, inputs)
            self._metric.update(own, self._experts.features_of(task, inputs, pl_module.device), task)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the biases of all processes' batches."""
        self._experts.release()
        if self._metric is None:
            return
        # A process without a batch takes part in the sum of the others.
        self._metric._update_count = max(1, self._metric._update_count)
        found = {task: float(bias) for task, bias in self._metric.compute().items()}
        self._metric = None
        found = {task: bias for task, bias in found.items() if not math.isnan(bias)}
        # Every process has the same numbers; the average over them keeps Lightning from asking for it.
        pl_module.log_dict({f"bias_l1/{task}": bias for task, bias in found.items()}, sync_dist=True, batch_size=1)
        found.pop("mean", None)
        self._last = {"step": trainer.global_step, "biases": found}
        self._first = self._first or self._last

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the first and the last biases."""
        before, after = self._first.get("biases"), self._last.get("biases")
        if not before or not after or self._first["step"] == self._last["step"] or not trainer.is_global_zero:
            return
        both = [task for task in before if task in after]
        labels = (f"step {self._first['step']}", f"step {self._last['step']}")
        figure = plot_bias({task: before[task] for task in both}, {task: after[task] for task in both}, labels)
        log_figure(pl_module, "bias_l1", figure)

    def state_dict(self) -> dict[str, Any]:
        """The first biases, for the checkpoint."""
        return {"first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the first biases of the run that goes on."""
        self._first = state_dict["first"]


class TSNECallback(Callback):
    """Draws the features of a module and of the experts for the same inputs in one plane, a panel for each task.

        TSNECallback(experts, {"merged": merged_features, "repaired": repaired_features})

    The picture is `tsne`, of inputs spread evenly over the validation loaders of the first process. For the task of a
    batch see `RepresentationBiasCallback`.

    Args:
        experts: By task a network; see `RepresentationBiasCallback`.
        sources: By name, features `(batch, dimension)` from (module, batch without labels); "merged" by default, with
            `features`.
        features: The same from (expert, batch without labels), drawn as "individual".
        max_images: Inputs of each task. The time grows with them: 150 of three sources are about a second for a task.
        every_n_epochs: Draw after the validations of every n-th epoch of a fit; 0 for the end of the fit alone.
        seed: Of the embedding.

    Raises:
        ValueError: If there is no expert, an option is out of range, or the task of a batch is not known.
    """

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        sources: Mapping[str, FeatureFn] | None = None,
        features: FeatureFn = default_features,
        max_images: int = 150,
        every_n_epochs: int = 0,
        seed: int = 0,
    ) -> None:
        if max_images < 4:
            raise ValueError(f"max_images must be at least 4, got {max_images}")
        if every_n_epochs < 0:
            raise ValueError(f"every_n_epochs must not be negative, got {every_n_epochs}")
        self._sources = dict(sources or {"merged": features})
        if INDIVIDUAL in self._sources:
            raise ValueError(f"the source {INDIVIDUAL!r} is that of the experts: give yours another name")
        self._experts, self._images, self._every, self._seed = (
            _Experts(experts, features),
            max_images,
            every_n_epochs,
            seed,
        )
        self._found: dict[str, dict[str, list[Tensor]]] = {}
        self._drawn_at = -1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the features of the validation before."""
        self._found = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the features of some inputs."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        task = self._experts.task_of(trainer, batch, dataloader_idx)
        if task is None:
            return
        names = [*list(self._sources)[:1], INDIVIDUAL, *list(self._sources)[1:]]
        kept = self._found.setdefault(task, {name: [] for name in names})
        room = self._images - sum(map(len, kept[INDIVIDUAL]))
        # Data sets are often sorted by class: a few inputs of each batch.
        wanted = self._images / trainer.num_val_batches[dataloader_idx]
        inputs = _evenly_chosen(without_labels(batch), min(room, max(1, math.ceil(wanted))))
        if inputs is None:
            return
        with trainer.precision_plugin.forward_context():
            for name, features in self._sources.items():
                kept[name].append(_evaluated(pl_module, features, inputs).float().cpu())
            kept[INDIVIDUAL].append(self._experts.features_of(task, inputs, pl_module.device).float().cpu())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw when it is time."""
        self._experts.release()
        due = not _fitting(trainer) or (self._every and (trainer.current_epoch + 1) % self._every == 0)
        if due and not trainer.sanity_checking:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last validation."""
        if self._drawn_at != trainer.global_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_at = trainer.global_step
        joined = {
            task: {source: torch.cat(parts) for source, parts in own.items()}
            for task, own in self._found.items()
            if own[INDIVIDUAL]
        }
        if joined and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            log_figure(pl_module, "tsne", plot_tsne_grid(joined, self._seed))


class _Experts:
    """Experts by task, of which one at a time is on the device of the module."""

    def __init__(self, networks: Mapping[str, nn.Module], features: FeatureFn) -> None:
        if not networks:
            raise ValueError("experts is empty: give a network for each task")
        self.networks, self._features = dict(networks), features
        self._active: tuple[str, torch.device] | None = None
        self._said: set[str] = set()

    def task_of(self, trainer: Trainer, batch: Any, dataloader_idx: int) -> str | None:
        """The task of a batch, or None if it has no expert."""
        task = batch.get("task") if isinstance(batch, dict) else getattr(batch, "task", None)
        if task is None:
            loaders = len(trainer.num_val_batches)
            if loaders != len(self.networks):
                raise ValueError(
                    f"the batch does not tell its task, and {loaders} validation loaders are not those of the experts "
                    f"{', '.join(self.networks)}: give batches a field 'task', or one loader per expert in this order"
                )
            task = list(self.networks)[dataloader_idx]
        if task not in self.networks and task not in self._said:
            self._said.add(task)
            log.info(f"There is no expert of {task}: its features are not compared.")
        return task if task in self.networks else None

    @torch.no_grad()
    def features_of(self, task: str, inputs: Any, device: torch.device) -> Tensor:
        """Features of a batch by the expert of its task."""
        expert = self.networks[task]
        if self._active is None or self._active[0] != task:
            self.release()
            parameter = next(expert.parameters(), None)
            self._active = (task, device if parameter is None else parameter.device)
            expert.to(device).eval()
        return self._features(expert, inputs)

    def release(self) -> None:
        """Bring the expert back to where it was."""
        if self._active is not None:
            task, device = self._active
            self.networks[task].to(device)
            self._active = None


def _fitting(trainer: Trainer) -> bool:
    # `trainer.training` is false in the validations of a fit.
    return trainer.state.fn == TrainerFn.FITTING


@torch.no_grad()
def _evaluated(pl_module: LightningModule, features: FeatureFn, inputs: Any) -> Tensor:
    return features(pl_module, inputs)


def _evenly_chosen(batch: Any, count: int) -> Any:
    """That many inputs of a batch, or None if there are none to take."""
    lengths: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: lengths.append(len(tensor)) if tensor.ndim else None)
    if not lengths or count < 1:
        return None
    rows = torch.linspace(0, lengths[0] - 1, min(count, lengths[0])).long()
    return apply_to_collection(
        batch,
        Tensor,
        lambda tensor: tensor[rows.to(tensor.device)] if tensor.ndim and len(tensor) == lengths[0] else tensor,
    )
