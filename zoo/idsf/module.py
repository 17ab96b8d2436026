"""IDSF: content, IDs and structure of items, each learnt from several modalities."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.common.artifacts import log_figure, log_table
from zoo.common.keyed_random import mix_keys
from zoo.idsf.contrast import multi_view_nce
from zoo.idsf.figures import plot_attention, plot_embedding, plot_similarity
from zoo.idsf.graph import NORMS, BipartiteGraph
from zoo.idsf.losses import batch_penalty, ranking_loss
from zoo.idsf.network import ContentViews, IDSFNetwork
from zoo.idsf.recommender import TopNRecommender
from zoo.idsf.semantics import MAX_ITEMS, co_interaction, measure_id_semantics, most_shared, study_sample, top_k_cosine

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

SCOPES = ("batch", "all")
_COMPARED = 2048  # items of the table of ID semantics; `id_semantics_report` takes more


class IDSF(TopNRecommender):
    """ID embeddings as subtle features of content and structure (Liu et al., 2023, arXiv 2311.05956).

    Each modality has item IDs of its own. They correct its content (attention), are pulled towards it (contrastive
    loss), and are added in every step along the graph of users and items; attention joins the modalities.

    The defaults are those of the published code but for `contrast_scope` and `trainable_features`, which cost most of
    its time: "all" and True there.

    Args:
        num_users: Number of users U.
        num_items: Number of items I.
        modalities: Names of the features.
        feature_sizes: Their widths, in the order of `modalities`.
        hidden_size: Width d of all vectors.
        num_layers: Steps L along the graph.
        id_weight: gamma, what IDs weigh in each step along the graph; 0 leaves them to the content branch.
        cl_weight: alpha, weight of the contrastive loss; 0 leaves it out.
        temperature: tau of the contrastive loss.
        reg_weight: lambda, penalty on the final vectors of the batch.
        readout: "sum_norm" or "mlp_ln" (see `IDSFNetwork`).
        norm: Normalisation of the graph: "rw_self", "sym", "sym_self" or "rw" (see `BipartiteGraph`).
        id_mode: Item IDs "per_modality", "shared" by all modalities, or "none".
        fusion: "attention" or "mean".
        use_content: Whether item vectors have the content branch.
        use_structure: Whether item vectors have the graph branch.
        use_id_content: Whether IDs are part of the content branch.
        contrast_scope: "batch": the items of the batch (of all processes), at most `contrast_cap`; "all": all items.
        contrast_cap: See above.
        trainable_features: Whether the features are trained, too.
        lr: Learning rate of Adam.
        lr_decay: Its factor in `lr_decay_epochs` epochs.
        lr_decay_epochs: See above.
        num_negatives: Negative items of each interaction.
        ks: Cut-offs of the metrics.
        ndcg_variant: "standard" or "hits" (the published code's).
        top_k: Length of predicted lists.
        train_edges: int64 `(2, interactions)` for use without `InteractionData`.
        features: `(I, D_m)` by modality, likewise.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        modalities: list[str],
        feature_sizes: list[int],
        hidden_size: int = 128,
        num_layers: int = 2,
        id_weight: float = 0.3,
        cl_weight: float = 0.3,
        temperature: float = 0.5,
        reg_weight: float = 1e-5,
        readout: str = "sum_norm",
        norm: str = "rw_self",
        id_mode: str = "per_modality",
        fusion: str = "attention",
        use_content: bool = True,
        use_structure: bool = True,
        use_id_content: bool = True,
        contrast_scope: str = "batch",
        contrast_cap: int = 2048,
        trainable_features: bool = False,
        lr: float = 5e-4,
        lr_decay: float = 0.96,
        lr_decay_epochs: int = 50,
        num_negatives: int = 1,
        ks: list[int] = [10, 20],  # noqa: B006 - read only, and a plain YAML value
        ndcg_variant: str = "standard",
        top_k: int = 20,
        train_edges: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            num_users, num_items, modalities, feature_sizes, lr, lr_decay, lr_decay_epochs, num_negatives, ks,
            ndcg_variant, top_k, train_edges, features,
        )  # fmt: skip
        for name, value, choices in (("norm", norm, NORMS), ("contrast_scope", contrast_scope, SCOPES)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if not temperature > 0 or cl_weight < 0 or reg_weight < 0 or contrast_cap < 1:
            raise ValueError(
                "temperature must be above 0, cl_weight and reg_weight at least 0 and contrast_cap at least 1, got "
                f"{temperature}, {cl_weight}, {reg_weight} and {contrast_cap}"
            )
        self.save_hyperparameters(ignore=["train_edges", "features"])
        if len(self.modalities) == 1:
            log.info("one modality only (%s): there is nothing to attend to across modalities", self.modalities[0])
        self.norm, self.cl_weight, self.temperature, self.reg_weight = norm, cl_weight, temperature, reg_weight
        self.contrast_scope, self.contrast_cap = contrast_scope, contrast_cap
        self.network = IDSFNetwork(
            num_users, num_items, self.feature_sizes, hidden_size, num_layers, id_weight, readout, id_mode, fusion,
            use_content, use_structure, use_id_content,
        )  # fmt: skip
        self.contrasts = use_content and cl_weight > 0
        self.attends = len(self.modalities) > 1 or self.network.id_attention is not None
        self.trained_features = nn.ParameterList(
            nn.Parameter(torch.zeros(num_items, size)) for size in self.feature_sizes.values()
        ) if trainable_features else None  # fmt: skip
        self.graph: BipartiteGraph | None = None

    def prepare(self, edges: Tensor) -> None:
        """Build the graph."""
        self.graph = BipartiteGraph(edges, self.num_users, self.num_items, self.norm)
        precision = str(getattr(self._trainer, "precision", None))
        if "16" in precision:
            log.info("precision %s: the steps along the graph stay float32", precision)
        self._warn_of_memory()

    def _warn_of_memory(self) -> None:
        """Warn where the contrastive loss over all items takes more than half of the device's memory."""
        if not self.contrasts or self.contrast_scope != "all":
            return
        needed = contrast_bytes(self.num_items)
        # The trainer moves the model only after its setup.
        device = self.device if self._trainer is None else self._trainer.strategy.root_device
        if device.type == "cuda":
            available = torch.cuda.get_device_properties(device).total_memory
        else:
            import psutil

            available = psutil.virtual_memory().total
        if needed > available / 2:
            log.warning(
                "contrast_scope='all' takes about %.1f GB for %d items, more than half of the %.1f GB there are: "
                "contrast_scope='batch' is the way out", needed / 1e9, self.num_items, available / 1e9,
            )  # fmt: skip

    def fill_features(self, features: Mapping[str, Tensor], fresh: bool) -> None:
        """Keep the features as buffers, or start their training from them."""
        if self.trained_features is None:
            super().fill_features(features, fresh)
        elif fresh:
            for table, name in zip(self.trained_features, self.modalities, strict=True):
                table.copy_(features[name])

    def feature_list(self) -> list[Tensor]:
        """Features `(I, D_m)` in the order of `modalities`, trained or not."""
        return super().feature_list() if self.trained_features is None else list(self.trained_features)

    def _graph(self) -> BipartiteGraph:
        if self.graph is None:
            self.setup("fit")
        assert self.graph is not None
        return self.graph

    def encode(self) -> tuple[Tensor, Tensor]:
        """Vectors of all users `(U, d)` and all items `(I, d)`."""
        encoded = self.network(self.feature_list(), self._graph())
        return encoded.users, encoded.items

    def content_views(self) -> ContentViews:
        """Projected content c, IDs, specific s and fused f of all items (section 2.3)."""
        return self.network.content(self.network.project(self.feature_list()))

    def loss_parts(self, user_ids: Tensor, item_ids: Tensor, negative_ids: Tensor) -> dict[str, Tensor]:
        """BPR, penalty and contrastive loss (sections 2.4 and 2.6): `bpr`, `reg` and `cl`."""
        assert self.graph is not None
        chosen = torch.cat([item_ids, negative_ids.flatten()])
        index: Tensor | None = None  # places among the encoded items, for the contrastive loss
        if self.contrasts and self.contrast_scope == "all":
            rows, places = None, chosen
        else:
            joint = self._of_all_processes(chosen) if self.contrasts else chosen
            rows, joint_places = torch.unique(joint, return_inverse=True)
            places = torch.searchsorted(rows, chosen) if self.contrasts else joint_places
            if self.contrasts:
                index = self._capped(rows)
        encoded = self.network(self.feature_list(), self.graph, user_ids, rows)
        users, items = encoded.users, encoded.items[places]
        positives = items[: len(item_ids)]
        negatives = items[len(item_ids) :].view(*negative_ids.shape, -1)
        parts = {
            "bpr": ranking_loss(users, positives, negatives),
            "reg": self.reg_weight * batch_penalty(users, positives, negatives),
        }
        if self.contrasts and encoded.content is not None:
            parts["cl"] = self.cl_weight * self._contrast(encoded.content, index)
        return parts

    @property
    def _world_size(self) -> int:
        """Processes that share a batch; 1 without a Trainer."""
        return 1 if self._trainer is None and self._fabric is None else self.trainer.world_size

    def _of_all_processes(self, ids: Tensor) -> Tensor:
        """The ids of the whole global batch: what is contrasted must not depend on the number of processes."""
        world = self._world_size
        if world == 1:
            return ids
        # Batches are equally long on all processes.
        parts = [torch.empty_like(ids) for _ in range(world)]
        torch.distributed.all_gather(parts, ids)
        return torch.cat(parts)

    def _capped(self, item_ids: Tensor) -> Tensor:
        """Places of at most `contrast_cap` items, drawn at random, the same on all processes."""
        if len(item_ids) <= self.contrast_cap:
            return torch.arange(len(item_ids), device=item_ids.device)
        keys = mix_keys(self.current_epoch, self.global_step, item_ids)
        return keys.argsort()[: self.contrast_cap].sort().values

    def _contrast(self, views: ContentViews, index: Tensor | None) -> Tensor:
        """Sum of the contrastive losses of all pairs of views; processes share the anchors."""
        total = len(views.fused) if index is None else len(index)
        world = self._world_size
        # The module's own `global_rank` is 0 in every process of a Fabric.
        rank = 0 if world == 1 else self.trainer.global_rank
        rows = torch.arange(rank, total, world, device=views.fused.device)
        # DDP averages over processes: each takes its anchors' share of the mean, times their number.
        share = len(rows) * world / total
        losses = [multi_view_nce(anchors, others, self.temperature, index, rows) for anchors, others in views.pairs()]
        return torch.stack(losses).sum() * share

    # What the model has learnt.

    @torch.no_grad()
    def attention_weights(self) -> dict[str, Tensor]:
        """Weights of each attention (see `IDSFNetwork.attention_weights`)."""
        return self.network.attention_weights(self.feature_list(), self._graph())

    @torch.no_grad()
    def representations(self) -> dict[str, Tensor]:
        """Item vectors by what they are: "id/<modality>", "projected/<modality>", "raw/<modality>", `(I, any)` each."""
        features = self.feature_list()
        found = {f"id/{name}": table for name, table in zip(self.modalities, self.network.ids(), strict=False)}
        projected = self.network.project(features)
        found |= {f"projected/{name}": part for name, part in zip(self.modalities, projected, strict=True)}
        found |= {f"raw/{name}": part for name, part in zip(self.modalities, features, strict=True)}
        return {name: part.detach() for name, part in found.items()}

    def id_semantics_report(
        self, held_out_edges: Tensor, train_edges: Tensor, min_shared: int = 3, max_items: int = MAX_ITEMS
    ) -> dict[str, dict[str, float]]:
        """What IDs hold of content and structure (section 2.9): AUC and rank correlations by representation.

        Args:
            held_out_edges: int64 `(2, interactions)` of validation and test.
            train_edges: int64 `(2, interactions)` of training.
            min_shared: Two items are related if so many users have both in the held-out interactions.
            max_items: Of more items, as many are drawn at random and their pairs compared.
        """
        representations = {name: part.cpu() for name, part in self.representations().items()}
        content = {name: representations[f"raw/{name}"] for name in self.modalities}
        generator = torch.Generator().manual_seed(0)
        width = next(iter(representations.values())).shape[1]
        representations["untrained"] = torch.randn(self.num_items, width, generator=generator)
        held_out_edges, train_edges = held_out_edges.cpu(), train_edges.cpu()
        return measure_id_semantics(
            representations, held_out_edges, train_edges, self.num_users, self.num_items, content, min_shared, max_items
        ).scores

    @torch.no_grad()
    def export_embeddings(self, path: str | Path) -> Path:
        """Write `users` (U, d), `items` (I, d) and each table of IDs `id_<modality>` (I, d) into an `.npz` file.

        Scores are inner products of the first two.
        """
        users, items = self.vectors()
        arrays = {"users": users, "items": items}
        arrays |= {f"id_{name}": table for name, table in zip(self.modalities, self.network.ids(), strict=False)}
        target = Path(path)
        if target.suffix != ".npz":
            target = target.with_name(f"{target.name}.npz")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target, **{name: part.float().cpu().numpy() for name, part in arrays.items()})  # type: ignore[arg-type]
        return target

    def on_test_epoch_end(self) -> None:
        """Log `test/*`, and draw attention weights, similarities and the map of items."""
        super().on_test_epoch_end()
        data = getattr(self.trainer, "datamodule", None)
        edges = getattr(data, "train_edges", None) if self._given_edges is None else self._given_edges
        if not self.trainer.is_global_zero or not self._prepared or edges is None:
            return
        if self.attends:
            log_figure(self, "test/attention", plot_attention(*self._named_weights()))
        held_out = getattr(data, "held_out_edges", None)
        self._draw_study(edges.cpu(), None if held_out is None else held_out.cpu())

    def _named_weights(self) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        weights = self.attention_weights()
        names = {name: ["content", "ID"] if name.startswith("id/") else self.modalities for name in weights}
        return weights, names

    def _draw_study(self, edges: Tensor, held_out: Tensor | None) -> None:
        sample = study_sample(edges)
        shown = {name: part.cpu()[sample.item_ids].float() for name, part in self.representations().items()}
        everything = edges if held_out is None else torch.cat([edges, held_out], dim=1)
        shared = co_interaction(everything, self.num_users, self.num_items, sample.item_ids) > 0
        matrices = {"share a user": shared.float(), **{name: top_k_cosine(part) for name, part in shown.items()}}
        log_figure(self, "test/similarity", plot_similarity(matrices, sample.groups))
        log_figure(self, "test/items", plot_embedding(shown, sample.groups))
        if held_out is not None and held_out.shape[1]:
            # 3 as in the study; fewer where the data are too sparse for it.
            shared_by = max(1, min(3, most_shared(held_out, self.num_users, self.num_items)))
            report = self.id_semantics_report(held_out, edges, shared_by, _COMPARED)
            columns = sorted({key for scores in report.values() for key in scores})
            rows: list[list[Any]] = [[name, *(scores[key] for key in columns)] for name, scores in report.items()]
            log_table(self, "test/id_semantics", ["representation", *columns], rows)


def contrast_bytes(num_items: int) -> int:
    """Memory of one contrastive loss over all items, in bytes: a few matrices of 4,096 or fewer rows by 2 I columns."""
    return 4 * 3 * min(num_items, 4096) * 2 * num_items
