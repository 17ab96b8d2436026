"""What AdaMerging, Surgery and the one-shot merges share: task vectors, networks with other weights, checkpoints."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from zoo.merging.backbones import build_encoder
from zoo.merging.calibration import with_weights
from zoo.merging.expert_module import ExpertModule
from zoo.merging.features import has_labels, without_labels
from zoo.merging.layers import group
from zoo.merging.matching import name_filter
from zoo.merging.merged_model import find_prefix, prefixed
from zoo.merging.task_vectors import TaskVectorStore
from zoo.merging.weights import open_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from zoo.merging.weights import Weights

log = logging.getLogger(__name__)

_CALIBRATION_BATCHES = 64


class MergingModule(ExpertModule):
    """A base and its experts as task vectors, ready to be merged; the arguments are those of `ExpertModule`."""

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers: the rows of the coefficients."""
        return list(self._layers())

    def _layers(self) -> dict[str, list[str]]:
        if self._store is not None:
            return self._store.layers

        wanted = name_filter(self._include, self._exclude)
        names = [name for name, _ in self._merged_part[0].named_parameters() if wanted(name)]
        if not names:
            raise ValueError(f"no parameter is left to merge: include={self._include!r}, exclude={self._exclude!r}")
        return group(names, self._granularity)

    @property
    def store(self) -> TaskVectorStore:
        """Base and task vectors, on the module's device; there from `setup` on."""
        if self._store is None:
            raise RuntimeError("the experts are read in setup(): call open_experts() outside of a Trainer")
        return self._store

    def prepare_data(self) -> None:
        """Train the experts of a recipe, on one process."""
        if self.recipe is not None and self._folder is None:
            self._train_recipe()

    def setup(self, stage: str) -> None:
        """Read the experts; refuse what the method cannot do.

        Raises:
            MisconfigurationException: For float16 precision and for strategies that cut parameters into pieces.
        """
        # Heads and networks are frozen on purpose.
        warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
        precision = str(self.trainer.precision)
        if precision.startswith("16"):
            raise MisconfigurationException(
                f"precision={precision}: gradients of the merged weights would underflow without a scaler, which works "
                "on optimizers only. Use bf16-mixed or 32-true."
            )
        strategy = type(self.trainer.strategy).__name__
        if "FSDP" in strategy or "DeepSpeed" in strategy or "ModelParallel" in strategy:
            raise MisconfigurationException(
                f"{strategy} cuts registered parameters into pieces, and merged weights are none. Use ddp; task "
                "vectors that are too large fit with tau_dtype: bfloat16 or mmap."
            )
        if self._zero_shot and self._trained_on.get("zero_shot") is None:
            self._fill_zero_shot()
        self.open_experts(self.trainer.strategy.root_device)

    def open_experts(self, device: torch.device | str = "cpu") -> TaskVectorStore:
        """Read base and experts; later calls cost nothing.

        Raises:
            ValueError: If they do not fit each other, or are not those of the checkpoint.
        """
        if self._store is None:
            if self.recipe is not None and self._folder is None:
                self._train_recipe()
            if self.recipe is not None and self._folder is not None:
                trained = build_encoder(self._folder.pretrained)
                self.encoder.load_state_dict(trained.state_dict())
            self._store = self._read_store().to(device)
            self._check_layers()
            self._keep(self.encoder)
        if self._store.device != torch.device(device):
            self._store = self._store.to(device)
        self.encoder.to(device)
        return self._store

    def _read_store(self) -> TaskVectorStore:
        base, experts = self.sources()
        store = TaskVectorStore.from_checkpoints(
            base,
            experts,
            include=self._include,
            exclude=self._exclude,
            layer_fn=self._granularity,
            key_map=self._key_map,
            dtype=self._tau_dtype,
            mmap=self._mmap,
            buffers=self._statistics,
            model=self._merged_part[0],
        )
        self.prefix = find_prefix(self.encoder, store.param_names)
        log.info(
            f"{len(store.task_names)} experts, {store.num_parameters:,} merged parameters in {len(store.layer_names)} "
            f"layers; cosines between task vectors up to {_largest_cosine(store):.2f}"
        )
        return store

    def opened(self) -> tuple[Weights, dict[str, Weights]]:
        """Base and experts under the names of the network: some networks have others on disk."""
        base, experts = self.sources()
        network = self._merged_part[0]
        opened = open_weights(base, "pretrained", key_map=self._key_map, model=network)
        return opened, {
            task: open_weights(source, f"expert {task}", key_map=self._key_map, base=opened, model=network)
            for task, source in experts.items()
        }

    def _check_layers(self) -> None:
        trained = self._trained_on.get("fingerprint")
        if trained is not None and trained != self.store.fingerprint():
            raise ValueError(
                "these are not the base and the experts that the checkpoint was made with: their names, shapes or "
                f"values differ. It was made with {self._trained_on.get('folder') or 'experts given one by one'}."
            )

    def call(self, tensors: Mapping[str, Tensor]) -> Callable[..., Any]:
        """The network with other weights, as a function.

        Args:
            tensors: By name as in the store.
        """
        return with_weights(self.encoder, prefixed(tensors, self.prefix))

    def logits_with(self, tensors: Mapping[str, Tensor], batch: Any, task: str) -> Tensor:
        """Logits `(batch, classes)` of a task with other weights; labels in the batch are not looked at."""
        features = self.feature_fn(self.call(tensors), without_labels(batch))
        logits: Tensor = self.head(task)(features)
        return logits

    def with_weights(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the network with other weights.

        Args:
            tensors: By name as in the store.
        """
        network = copy.deepcopy(self.encoder)
        own = network.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[self.prefix + name].copy_(tensor)
        return network

    @torch.no_grad()
    def _keep(self, network: nn.Module) -> None:
        """Put what is not merged into a network: what was excluded, and statistics."""
        own = network.state_dict()
        for name, tensor in self.store.kept.items():
            if self.prefix + name in own and tensor.is_floating_point():
                own[self.prefix + name].copy_(tensor)

    def exported(self, tensors: Mapping[str, Tensor], path: str | Path | None = None) -> dict[str, Tensor]:
        """Merged parameters as a whole state dict with the base's names and types.

        Args:
            tensors: By name as in the store.
            path: File to write it to, as safetensors.
        """
        if path is not None:
            self.store.write(path, tensors)
        return self.store.complete(tensors)

    def calibration_batches(self) -> Mapping[str, Iterable[Any]]:
        """Inputs by task for merges that need some: those of the data's stream, or else of its training part.

        Raises:
            ValueError: If there is no data module that gives them.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "train_loader"):
            raise ValueError(
                "this merge needs inputs of each task: give the Trainer a ClassificationTasksData, or merge with "
                "fisher_merge or regmean_merge yourself"
            )
        loader = data.train_loader(tasks=self.merge_tasks, alone=True)
        drawn = [batch for batch, _ in zip(loader, range(_CALIBRATION_BATCHES), strict=False)]
        return {task: [batch[task] for batch in drawn] for task in self.merge_tasks}

    def _check_tasks(self, batch: Mapping[str, Any]) -> None:
        """Refuse a training batch that has other tasks than the merged experts."""
        if not hasattr(batch, "keys"):
            raise ValueError(
                f"a training batch must be a mapping from tasks to inputs, got {type(batch).__name__}: use "
                "ClassificationTasksData, or a CombinedLoader over one loader per task"
            )
        if set(batch) != set(self.merge_tasks):
            hint = ""
            if set(batch) > set(self.merge_tasks):
                hint = f" (for a part of the tasks: --data.seen_tasks [{', '.join(self.merge_tasks)}])"
            raise ValueError(
                f"the training batch has the tasks {', '.join(batch)}, the merged experts are "
                f"{', '.join(self.merge_tasks)}{hint}"
            )
        for task, inputs in batch.items():
            if has_labels(inputs) and task not in self._said:
                self._said.add(task)
                log.info(f"Labels in the batches of {task} are dropped: adaptation never looks at them.")

    def groups(self) -> Mapping[str, Sequence[str]]:
        """Seen and unseen tasks, where some are unseen."""
        unseen = [task for task in self.task_names if task not in self.merge_tasks]
        return {"seen": self.merge_tasks, "unseen": unseen} if unseen else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where base and experts came from, and what tells them from others."""
        checkpoint["merging"] = {
            "folder": None if self._folder is None else str(self._folder.root.resolve()),
            "fingerprint": None if self._store is None else self._store.fingerprint(),
            "zero_shot": self._trained_on.get("zero_shot"),
            "layer_names": self.layer_names,
            "merge_tasks": self.merge_tasks,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember them, to be compared with the ones that are read."""
        self._trained_on = dict(checkpoint.get("merging") or {})
        if self._store is not None:
            # A Trainer calls `setup` before it loads a checkpoint into a module that is there already.
            self._check_layers()


def _largest_cosine(store: TaskVectorStore) -> float:
    cosine = store.cosine()
    return float((cosine - torch.eye(len(cosine))).max())
