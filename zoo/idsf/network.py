"""The network of IDSF: a content branch with IDs, and one light graph convolution for all modalities."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.idsf.attention import AttentionFusion, MeanFusion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zoo.idsf.graph import BipartiteGraph

READOUTS = ("sum_norm", "mlp_ln")
ID_MODES = ("per_modality", "shared", "none")
FUSIONS = ("attention", "mean")


class ContentViews(NamedTuple):
    """The content branch of some items.

    Attributes:
        projected: c_m, `(items, d)` for each modality.
        ids: E_m, the IDs of the same items, `(items, d)` for each modality; empty where the branch has no IDs.
        specific: s_m, content corrected by its IDs, `(items, d)` for each modality.
        fused: f, `(items, d)`, over all modalities.
    """

    projected: list[Tensor]
    ids: list[Tensor]
    specific: list[Tensor]
    fused: Tensor

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of views that the contrastive loss pulls together (section 2.4): 3 of each modality, 1 without IDs."""
        pairs = [(specific, self.fused) for specific in self.specific]
        if self.ids:
            pairs += list(zip(self.projected, self.specific, strict=True))
            pairs += list(zip(self.ids, self.specific, strict=True))
        return pairs


class Encoded(NamedTuple):
    """Vectors of some users and items.

    Attributes:
        users: `(users, d)`.
        items: `(items, d)`.
        content: Content branch of the same items; None where the network has none.
    """

    users: Tensor
    items: Tensor
    content: ContentViews | None


class IDSFNetwork(nn.Module):
    """User and item vectors from features, IDs and the graph (sections 2.1 to 2.6 of the method).

    Args:
        num_users: U.
        num_items: I.
        feature_sizes: Width D_m of each modality's features, in the order in which they are given to `forward`.
        hidden_size: d.
        num_layers: Steps L along the graph.
        id_weight: gamma, what the IDs weigh in each step.
        readout: "sum_norm": structure + content of unit length; "mlp_ln": sum of two heads with layer norm.
        id_mode: Item IDs "per_modality", "shared" by all, or "none".
        fusion: "attention", or "mean" in place of each attention.
        use_content: Whether the content branch is part of the item vectors.
        use_structure: Whether the graph is; users come from it in any case.
        use_id_content: Whether IDs are part of the content branch.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        feature_sizes: Mapping[str, int],
        hidden_size: int = 128,
        num_layers: int = 2,
        id_weight: float = 0.3,
        readout: str = "sum_norm",
        id_mode: str = "per_modality",
        fusion: str = "attention",
        use_content: bool = True,
        use_structure: bool = True,
        use_id_content: bool = True,
    ) -> None:
        super().__init__()
        for name, value, choices in (("readout", readout, READOUTS), ("id_mode", id_mode, ID_MODES),
                                     ("fusion", fusion, FUSIONS)):  # fmt: skip
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if id_weight < 0 or num_layers < 0 or hidden_size < 1:
            raise ValueError(
                "id_weight and num_layers must be at least 0 and hidden_size at least 1, got "
                f"{id_weight}, {num_layers} and {hidden_size}"
            )
        if not feature_sizes:
            raise ValueError("IDSF needs a modality at least; for interactions alone use LightGCN")
        if not (use_content or use_structure):
            raise ValueError("use_content and use_structure are both off: nothing is left of the items")
        self.num_users, self.num_items, self.num_layers = num_users, num_items, num_layers
        self.id_weight = 0.0 if id_mode == "none" else id_weight
        self.readout, self.use_content, self.use_structure = readout, use_content, use_structure
        self.use_id_content = use_content and use_id_content and id_mode != "none"
        # The order of names does not matter: weights are drawn in sorted order.
        self.modalities = sorted(feature_sizes)
        count = len(self.modalities)
        # Nothing is made that no gradient would reach: DDP takes that for an error.
        in_graph = self.id_weight > 0 and num_layers > 0
        self.user_id = id_table(num_users, hidden_size) if in_graph else None
        self.user_preference = nn.ParameterList(id_table(num_users, hidden_size) for _ in range(count))
        tables = {"per_modality": count, "shared": 1, "none": 0}[id_mode]
        if not (in_graph or self.use_id_content):
            tables = 0
        self.item_id = nn.ParameterList(id_table(num_items, hidden_size) for _ in range(tables))
        self.projection = nn.ModuleList(nn.Linear(feature_sizes[name], hidden_size) for name in self.modalities)

        def unit() -> nn.Module:
            return AttentionFusion(hidden_size) if fusion == "attention" else MeanFusion()

        self.id_attention = nn.ModuleList(unit() for _ in range(count)) if self.use_id_content else None
        self.content_attention = unit() if use_content and count > 1 else None
        self.item_attention = unit() if use_structure and count > 1 else None
        self.user_attention = unit() if count > 1 else None
        heads = readout == "mlp_ln"
        self.structure_head = _head(hidden_size) if heads and use_structure else None
        self.content_head = _head(hidden_size) if heads and use_content else None

    def ids(self) -> list[Tensor]:
        """E_m for each modality; empty without IDs."""
        if len(self.item_id) == 1:
            return [self.item_id[0]] * len(self.modalities)
        return list(self.item_id)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """c_m = X_m W_m + b_m of features `(items, D_m)` in the order of `modalities`, `(items, d)` each."""
        return [layer(values) for layer, values in zip(self.projection, features, strict=True)]

    def content(self, projected: Sequence[Tensor], item_ids: Tensor | None = None) -> ContentViews:
        """Content branch (section 2.3) of some items, or of all.

        Args:
            projected: c_m of all items, `(num_items, d)` each.
            item_ids: int64 `(items,)`.
        """
        rows = list(projected) if item_ids is None else [values[item_ids] for values in projected]
        if self.id_attention is None:
            ids, specific = [], rows
        else:
            ids = self.ids() if item_ids is None else [table[item_ids] for table in self.ids()]
            specific = [unit([content, own]) for unit, content, own in zip(self.id_attention, rows, ids, strict=True)]
        fused = specific[0] if self.content_attention is None else self.content_attention(specific)
        return ContentViews(rows, ids, specific, fused)

    def structure(self, projected: Sequence[Tensor], graph: BipartiteGraph) -> Tensor:
        """Graph branch (section 2.5), all modalities in one sparse product a layer.

        Args:
            projected: c_m of all items, `(num_items, d)` each.
            graph: Users and items.

        Returns:
            h_m of users, then items, float32 `(num_users + num_items, modalities, d)`: the mean over the layers 0 to L.
        """
        # The mean over the layers is taken at the start: what follows is linear.
        share = 1 / (self.num_layers + 1)
        users = torch.cat([_unit_rows(table, share) for table in self.user_preference], dim=1)
        items = torch.cat([_unit_rows(content, share) for content in projected], dim=1)
        added = None
        if self.user_id is not None:
            weight = self.id_weight * share
            added = torch.cat(
                [(self.user_id * weight).repeat(1, len(self.modalities)), torch.cat(self.ids(), dim=1) * weight]
            )
        total = graph.convolve(torch.cat([users, items]), self.num_layers, added)
        return total.view(len(total), len(self.modalities), -1)

    def forward(
        self,
        features: Sequence[Tensor],
        graph: BipartiteGraph,
        user_ids: Tensor | None = None,
        item_ids: Tensor | None = None,
    ) -> Encoded:
        """Vectors of some users and items, or of all.

        The graph takes all of them in any case; what comes after it is computed for those asked for.

        Args:
            features: X_m `(num_items, D_m)`, in the order of `modalities`.
            graph: Users and items.
            user_ids: int64 `(users,)`.
            item_ids: int64 `(items,)`.
        """
        projected = self.project(features)
        hidden = self.structure(projected, graph)
        user_part, item_part = hidden[: self.num_users], hidden[self.num_users :]
        users = _fuse(self.user_attention, user_part if user_ids is None else user_part[user_ids])
        content = self.content(projected, item_ids) if self.use_content else None
        items: Tensor | None = None
        if self.use_structure:
            items = _fuse(self.item_attention, item_part if item_ids is None else item_part[item_ids])
            if self.structure_head is not None:
                items = self.structure_head(items)
        if content is not None:
            fused = (
                F.normalize(content.fused.float()) if self.content_head is None else self.content_head(content.fused)
            )
            items = fused if items is None else items + fused
        assert items is not None
        return Encoded(users.float(), items.float(), content)

    @torch.no_grad()
    def attention_weights(self, features: Sequence[Tensor], graph: BipartiteGraph) -> dict[str, Tensor]:
        """Weights of every attention, by the names "id/<modality>", "content", "items" and "users".

        Returns:
            float32 `(rows, inputs)` each. The inputs of "id/<modality>" are content and ID, those of the others the
            modalities in the order of `modalities`.
        """
        projected = self.project(features)
        hidden = self.structure(projected, graph)
        found: dict[str, Tensor] = {}
        views = self.content(projected) if self.use_content else None
        if self.id_attention is not None and views is not None:
            for name, unit, content, own in zip(
                self.modalities, self.id_attention, views.projected, views.ids, strict=True
            ):
                found[f"id/{name}"] = unit.weights([content, own])  # type: ignore[operator]
        if self.content_attention is not None and views is not None:
            found["content"] = self.content_attention.weights(views.specific)  # type: ignore[operator]
        parts = {"items": (self.item_attention, hidden[self.num_users :]),
                 "users": (self.user_attention, hidden[: self.num_users])}  # fmt: skip
        for name, (fusion, part) in parts.items():
            if fusion is not None:
                found[name] = fusion.weights(part.unbind(1))  # type: ignore[operator]
        return found


def _fuse(unit: nn.Module | None, hidden: Tensor) -> Tensor:
    """Vectors `(rows, d)` from those of all modalities `(rows, modalities, d)`."""
    views = hidden.unbind(1)
    fused: Tensor = views[0] if unit is None else unit(views)
    return fused


def _unit_rows(x: Tensor, length: float) -> Tensor:
    """Rows scaled to a length, float32; rows of zeros stay."""
    x = x.float()
    scaled: Tensor = x * (length / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12))
    return scaled


def id_table(rows: int, hidden_size: int) -> nn.Parameter:
    """A table of IDs `(rows, d)`, drawn by the rule of Xavier Glorot (uniform)."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, hidden_size)))


def _head(hidden_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.LayerNorm(hidden_size, eps=1e-6))
