"""Representation surgery on top of any merge."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from zoo.common.artifacts import log_figure, log_table
from zoo.common.hyperparameters import plain_hyperparameters
from zoo.merging.backbones import ImageEncoder
from zoo.merging.bias import TaskRepresentationBias, warn_nothing_to_repair
from zoo.merging.closed_form import LinearSurgery, ShiftSurgery
from zoo.merging.deep_surgery import DeepSurgery
from zoo.merging.feature_cache import FeatureCache, TargetCache, feature_pair, fingerprint_of
from zoo.merging.features import without_labels
from zoo.merging.merged_model import MergedModel, freeze
from zoo.merging.merging_module import MergingModule
from zoo.merging.rules import check_rule, merge_by_rule
from zoo.merging.surgery import SurgeryBank, surgery_loss
from zoo.merging.task_model import TaskModel, task_model

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

SURGERIES = ("lowrank", "linear", "shift")
DEPTHS = ("last", "all")


class RepresentationSurgery(MergingModule):
    """Repairs the features of a merged encoder for each task (Yang et al., ICML 2024, arXiv 2402.02705).

    A private module of low rank per task predicts from the merged encoder's features how far they are from the
    expert's, and subtracts it. It learns from unlabelled inputs; merged encoder, experts and heads are frozen. Features
    of both are computed once per image and kept (`cache_features`), which changes nothing but the time.

    Args:
        base: The merge to repair: a rule of `RULES`, such as "average", "task_arithmetic", "ties" or "adamerging".
        base_options: Its options, such as `coef`, or `coef_path` for coefficients of AdaMerging.
        merged: A merged encoder of one's own instead: a module with the encoder's architecture, a `MergedModel`, or
            a file or state dict with its weights.
        surgery: "lowrank" (trained, the method), or a control in closed form: "linear" (least squares, of the rank
            given) or "shift" (subtracts the mean difference).
        depth: "last" repairs the final features; "all" repairs every block's output as well (SurgeryV2, arXiv
            2410.14389).
        rank: Width of the modules.
        bias: Whether their linear maps have one.
        activation: "relu", "gelu" or "none".
        loss: "l1", "mse", "smooth_l1" or "cosine".
        match: Compare features "raw" or "normalized".
        lr: Adam's learning rate.
        betas: Adam's.
        blocks: Path of the encoder's list of blocks for depth "all"; found by itself where there is one.
        cache_features: Whether to keep the features of all images of the stream.
        cache_dir: Folder to keep them in for the next run.
        online: One pass over a stream in batches as they come, without a cache (use `--data.batch_size 1`).
        strict_fingerprint: Whether modules trained on another merged encoder are refused.
        tsne_images: Images of each task in the joint picture of merged, repaired and expert's features; 0 for none.
        sources: What is merged: the arguments of `MergingModule`.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    def __init__(
        self,
        tasks: list[dict[str, Any]],
        base: str = "task_arithmetic",
        base_options: dict[str, Any] | None = None,
        merged: Any = None,
        surgery: str = "lowrank",
        depth: str = "last",
        rank: int = 16,
        bias: bool = False,
        activation: str = "relu",
        loss: str = "l1",
        match: str = "raw",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        blocks: str | None = None,
        cache_features: bool = True,
        cache_dir: str | None = None,
        online: bool = False,
        strict_fingerprint: bool = True,
        tsne_images: int = 0,
        **sources: Any,
    ) -> None:
        super().__init__(tasks, **sources)
        self.save_hyperparameters(ignore=plain_hyperparameters({"tasks": tasks, "merged": merged, **sources}))
        for name, value, allowed in (("surgery", surgery, SURGERIES), ("depth", depth, DEPTHS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if depth == "all" and surgery != "lowrank":
            raise ValueError(f"surgery={surgery!r} has a closed form for depth='last' only")
        if merged is None:
            check_rule(base, base_options or {})
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.base, self.base_options, self._given = base, dict(base_options or {}), (merged,)
        self.surgery, self.depth, self.rank, self.loss, self.match = surgery, depth, rank, loss, match
        self.lr, self.betas, self.blocks = lr, (float(betas[0]), float(betas[1])), blocks
        self.cache_features, self.cache_dir, self.online = cache_features and not online, cache_dir, online
        self.strict_fingerprint, self.tsne_images = strict_fingerprint, tsne_images
        surgery_loss(torch.ones(1, 2), torch.ones(1, 2), loss, match)  # type: ignore[arg-type]
        self.bank = self._build_bank(bias, activation)
        self.biases = nn.ModuleDict({when: TaskRepresentationBias(self.merge_tasks) for when in ("before", "after")})
        self.automatic_optimization = surgery == "lowrank"
        self._merged_encoder: tuple[nn.Module, ...] = ()
        self._merged_print: str | None = None
        self._expert: tuple[str, nn.Module] | None = None
        self._cache: FeatureCache | TargetCache | None = None
        self._seen: tuple[Tensor, Tensor]
        self._pictured: dict[str, dict[str, list[Tensor]]] = {}

    def _build_bank(self, bias: bool, activation: str) -> SurgeryBank | DeepSurgery:
        dim = getattr(self.encoder, "dim", None)
        if dim is None:
            weight = getattr(self.head(self.merge_tasks[0]), "weight", None)
            if weight is None:
                raise ValueError(
                    f"the number of features is not known: {type(self.encoder).__name__} has no `dim`, and the head no "
                    "`weight`. Give heads of LinearHead or CosineHead, or a network with a `dim`"
                )
            dim = weight.shape[1]
        if self.surgery == "shift":
            return SurgeryBank.from_modules({task: ShiftSurgery(int(dim)) for task in self.merge_tasks})
        if self.surgery == "linear":
            rank = self.rank if self.rank < int(dim) else None
            return SurgeryBank.from_modules({task: LinearSurgery(int(dim), rank) for task in self.merge_tasks})
        if self.depth == "last":
            return SurgeryBank(self.merge_tasks, int(dim), self.rank, bias, activation)  # type: ignore[arg-type]
        if not isinstance(self.encoder, ImageEncoder):
            raise ValueError("depth='all' needs an encoder of build_encoder; for others use DeepSurgery itself")
        return DeepSurgery.for_model(
            self.encoder,
            self.encoder.dummy_images(),
            self.merge_tasks,
            self.rank,
            bias,
            activation,  # type: ignore[arg-type]
            blocks=self.blocks,
            feature_fn=self.feature_fn,
        )

    def setup(self, stage: str) -> None:
        """Read the experts, merge them, and keep the features of the stream."""
        super().setup(stage)
        if not self._merged_encoder:
            self._merged_encoder = (freeze(self._merge()),)
            self._check_fingerprint()
        if stage == "fit" and (self.cache_features or self.surgery != "lowrank"):
            self._fill_cache()

    def _merge(self) -> nn.Module:
        given = self._given[0]
        device = self.store.device
        if isinstance(given, MergedModel):
            return given.materialize().to(device)
        if isinstance(given, nn.Module):
            return copy.deepcopy(given).to(device)
        if given is not None:
            from zoo.merging.weights import open_weights

            found = open_weights(given, "merged", key_map=self._key_map, model=self._merged_part[0])
            tensors = {name: found.finite(name).to(device) for name in self.store.param_names}
        else:
            tensors = merge_by_rule(self, self.base, self.base_options, self.calibration_batches)
        return self.with_weights(tensors)

    @property
    def merged_encoder(self) -> nn.Module:
        """The merged encoder, frozen; there from `setup` on."""
        if not self._merged_encoder:
            raise RuntimeError("the experts are merged in setup(): let a Trainer fit, test or predict first")
        return self._merged_encoder[0]

    def expert(self, task: str) -> nn.Module:
        """The encoder of a task's expert; one at a time is kept."""
        if self._expert is None or self._expert[0] != task:
            self.__dict__["_expert"] = (task, freeze(self.with_weights(self.store.expert(task))))
        assert self._expert is not None
        return self._expert[1]

    def _fingerprint(self) -> str:
        # The merged encoder is frozen, and every checkpoint asks.
        if self._merged_print is None:
            self._merged_print = fingerprint_of(dict(self.merged_encoder.state_dict()))
        return self._merged_print

    def _check_fingerprint(self) -> None:
        trained = self._trained_on.get("merged")
        if trained is None or trained == self._fingerprint():
            return
        text = (
            "the surgery modules were trained on another merged encoder than this one: its features are others. Merge "
            "with the options of the training"
        )
        if self.strict_fingerprint:
            raise ValueError(f"{text}, or accept it with strict_fingerprint=False")
        log.info(text)

    def _fill_cache(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "eval_loader"):
            raise ValueError(
                "cache_features needs a data module with numbered images and without random augmentation, such as "
                "ClassificationTasksData: give one, or set cache_features=False"
            )
        part = "train" if getattr(data, "stream", "none") == "none" else "stream"
        loaders = {task: data.eval_loader(task, part) for task in self.merge_tasks}
        prints = None
        if self.cache_dir is not None:
            weights = (self._fingerprint(), self.store.fingerprint())
            prints = {task: fingerprint_of(*weights, data.fingerprint(part, task)) for task in self.merge_tasks}
        common: dict[str, Any] = {
            "feature_fn": self.feature_fn,
            "fingerprints": prints,
            "device": self.store.device,
            "sharded": self.trainer.world_size > 1,
        }
        if isinstance(self.bank, DeepSurgery):
            targets = TargetCache(self.cache_dir)
            targets.build(self.bank, self.expert, loaders, blocks=self.blocks, **common)
            self._cache = targets
        else:
            features = FeatureCache(self.cache_dir)
            features.build(self.merged_encoder, self.expert, loaders, **common)
            self._cache = features
            before = {task: (z - z_ind).abs().mean() for task in self.merge_tasks for z, z_ind in [self._all(task)]}
            warn_nothing_to_repair(before)
        if hasattr(data, "rows_only") and isinstance(self._cache, FeatureCache):
            # Nothing looks at the images any more.
            data.rows_only = True

    def _all(self, task: str) -> tuple[Tensor, Tensor]:
        assert isinstance(self._cache, FeatureCache)
        z, z_ind = self._cache.gather(task, self._cache.rows(task))
        return z, z_ind

    def on_fit_start(self) -> None:
        """Fit the controls, which have a closed form."""
        if self.surgery == "lowrank":
            return
        assert isinstance(self.bank, SurgeryBank)
        for task in self.merge_tasks:
            z, z_ind = self._all(task)
            own = self.bank[task]
            if isinstance(own, ShiftSurgery):
                fitted: nn.Module = ShiftSurgery.fit(z, z_ind)
            else:
                assert isinstance(own, LinearSurgery)
                fitted = LinearSurgery.fit(z, z_ind, own.rank if own.rank < z.shape[1] else None)
            own.load_state_dict(fitted.state_dict())

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor | None:
        """Sum of the tasks' distances between repaired and expert's features.

        Args:
            batch: By task, inputs, or numbers of images whose features are kept.
            batch_idx: Its place.
        """
        if self.surgery != "lowrank":
            self.trainer.should_stop = True
            return None
        self._check_tasks(batch)
        losses = {task: self._task_loss(inputs, task, batch_idx) for task, inputs in batch.items()}
        self.log_dict({f"train/loss/{task}": loss.detach() for task, loss in losses.items()})
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach() / len(losses), prog_bar=True)
        return total

    def _task_loss(self, inputs: Any, task: str, batch_idx: int) -> Tensor:
        where = f"task {task}, batch {batch_idx}"
        if isinstance(self.bank, DeepSurgery):
            bare = without_labels(inputs)
            with self.bank.attach(self.merged_encoder, self.blocks), self.bank.task(task):
                z_hat = self.bank(self.feature_fn(self.merged_encoder, bare))
                targets = (
                    self._cache.gather(task, inputs.rows)
                    if self._cache is not None
                    else self.bank.targets(self.expert(task), bare, self.feature_fn, self.blocks)
                )
                return self.bank.loss(z_hat, targets, self.loss, self.match)  # type: ignore[arg-type]
        if self._cache is not None:
            z, z_ind = (part.to(self.device) for part in self._cache.gather(task, inputs.rows))
        else:
            z, z_ind = feature_pair(
                self.merged_encoder, self.expert(task), without_labels(inputs), where, self.feature_fn
            )
        return surgery_loss(self.bank(z, task), z_ind, self.loss, self.match)  # type: ignore[arg-type]

    def repaired(self, batch: Any, task: str) -> tuple[Tensor, Tensor]:
        """Features `(batch, d)` of a batch before and after surgery; a task that was not merged is not repaired."""
        with torch.no_grad():
            z = self.feature_fn(self.merged_encoder, without_labels(batch))
            if task not in self.merge_tasks:
                return z, z
            if isinstance(self.bank, DeepSurgery):
                with self.bank.attach(self.merged_encoder, self.blocks), self.bank.task(task):
                    return z, self.bank(self.feature_fn(self.merged_encoder, without_labels(batch)))
            return z, self.bank(z, task)

    def task_logits(self, batch: Any, task: str) -> Tensor:
        """Logits `(batch, classes)` of the repaired features."""
        self._seen = self.repaired(batch, task)
        logits: Tensor = self.head(task)(self._seen[1])
        return logits

    def _evaluate(self, batch: Any, dataloader_idx: int, stage: str) -> Tensor:
        logits = super()._evaluate(batch, dataloader_idx, stage)
        task = self.task_of(batch, dataloader_idx)
        if task in self.merge_tasks:
            z, z_hat = self._seen
            with torch.no_grad():
                z_ind = self.feature_fn(self.expert(task), without_labels(batch))
            for when, features in (("before", z), ("after", z_hat)):
                bias = self.biases[when]
                assert isinstance(bias, TaskRepresentationBias)
                bias.update(features, z_ind, task)
            if stage == "test" and self.tsne_images:
                self._picture(task, {"merged": z, "repaired": z_hat, "individual": z_ind})
        return logits

    def _picture(self, task: str, features: Mapping[str, Tensor]) -> None:
        kept = self._pictured.setdefault(task, {source: [] for source in features})
        for source, found in features.items():
            room = self.tsne_images - sum(len(part) for part in kept[source])
            if room > 0:
                kept[source].append(found[:room].detach().float().cpu())

    def _log_scores(self, stage: str) -> dict[str, dict[str, float]]:
        found = super()._log_scores(stage)
        values: dict[str, dict[str, float]] = {}
        for when in ("before", "after"):
            bias = self.biases[when]
            assert isinstance(bias, TaskRepresentationBias)
            values[when] = {task: float(value) for task, value in bias.compute().items() if value == value}
            bias.reset()
        self.log_dict({f"{stage}/bias_l1/{task}": value for task, value in values["after"].items()})
        self.log_dict({f"{stage}/bias_l1_before/{task}": value for task, value in values["before"].items()})
        if not isinstance(self._cache, FeatureCache):
            warn_nothing_to_repair({task: value for task, value in values["before"].items() if task != "mean"})
        if stage == "test" and values["before"]:
            self._draw(values)
        return found

    def _draw(self, values: Mapping[str, Mapping[str, float]]) -> None:
        rows = [[task, values["before"][task], values["after"][task]] for task in values["before"]]
        log_table(self, "test/bias_l1", ["task", "before", "after"], rows)
        if not self.trainer.is_global_zero:
            return
        from zoo.merging.figures import plot_bias

        before, after = ({t: v for t, v in values[when].items() if t != "mean"} for when in ("before", "after"))
        log_figure(self, "test/bias_l1", plot_bias(before, after))
        if self._pictured:
            from zoo.merging.feature_figures import plot_tsne_grid

            joint = {
                task: {source: torch.cat(parts) for source, parts in by_source.items()}
                for task, by_source in list(self._pictured.items())[:4]
            }
            log_figure(self, "test/tsne", plot_tsne_grid(joint))
            self._pictured = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which merged encoder the modules are for."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["merging"]["merged"] = self._fingerprint() if self._merged_encoder else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the merged encoder with the one that the modules are for."""
        super().on_load_checkpoint(checkpoint)
        if self._merged_encoder:
            self._check_fingerprint()

    def export(self) -> dict[str, dict[str, Tensor]]:
        """State dict of each task's module (depth "last"), or of its modules at all blocks."""
        if isinstance(self.bank, DeepSurgery):
            return {task: self.bank.only(task).state_dict() for task in self.merge_tasks}
        return {task: self.bank[task].state_dict() for task in self.merge_tasks}

    def as_task_model(self, task: str) -> TaskModel:
        """Merged encoder, repair and head of one task as a module to deploy."""
        return task_model(self.merged_encoder, self.bank, self.head(task), task, self.feature_fn, self.blocks)

    def configure_optimizers(self) -> Adam | None:
        """Adam on the modules."""
        if self.surgery != "lowrank":
            return None
        return Adam(self.bank.parameters(), lr=self.lr, betas=self.betas)
