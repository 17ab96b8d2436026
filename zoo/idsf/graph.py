"""The graph of users and items, and graphs of similar items."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.idsf.sparse import CompressedRows, SparseMatrix

NORMS = ("sym", "sym_self", "rw", "rw_self")


class _Convolution(torch.autograd.Function):
    """Sum of e^(0), ..., e^(L) with e^(l) = A e^(l-1) + added: linear, so nothing needs to be kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        matrix: CompressedRows,
        transposed: CompressedRows,
        start: Tensor,
        added: Tensor | None,
        num_layers: int,
    ) -> Tensor:
        ctx.transposed, ctx.num_layers, ctx.adds = transposed, num_layers, added is not None
        layer, total = start, start.clone()
        for _ in range(num_layers):
            layer = matrix.matmul(layer)
            if added is not None:
                layer += added
            total += layer
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, Tensor | None, None]:
        # Of e^(l): that of the sum, and what comes back from e^(l+1).
        layer, added = gradient, None
        # Where backward is called under autocast: there is no such product in half precision.
        with torch.autocast(gradient.device.type, enabled=False):
            for _ in range(ctx.num_layers):
                if ctx.adds:
                    added = layer.clone() if added is None else added.add_(layer)
                layer = ctx.transposed.matmul(layer).add_(gradient)
        if ctx.adds and added is None:
            added = torch.zeros_like(gradient)
        return None, None, layer, added, None


class BipartiteGraph(SparseMatrix):
    """Normalised adjacency of users and items: A = [[0, R], [R^T, 0]] over users, then items.

    With degrees D of the matrix that is normalised, `norm` is

    - "sym": D^-1/2 A D^-1/2 (LightGCN);
    - "rw": D^-1 A;
    - "sym_self", "rw_self": the same of A + I. "rw_self" is the published IDSF's.

    Args:
        edges: int64 `(2, interactions)`, user ids and item ids; a pair given twice counts once.
        num_users: Number of users U.
        num_items: Number of items I.
        norm: See above.

    Raises:
        ValueError: If an id is out of range or `norm` is unknown.

    Example:
        >>> import torch
        >>> graph = BipartiteGraph(torch.tensor([[0, 1], [0, 0]]), num_users=2, num_items=1, norm="rw")
        >>> graph.propagate(torch.tensor([[1.0], [3.0], [5.0]])).flatten().tolist()  # users get the item's, and back
        [5.0, 5.0, 2.0]
    """

    def __init__(self, edges: Tensor, num_users: int, num_items: int, norm: str = "sym") -> None:
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        check_edges(edges, num_users, num_items)
        size = num_users + num_items
        pairs = torch.unique(edges[0] * num_items + edges[1])
        users, items = pairs // num_items, pairs % num_items + num_users
        rows, columns = torch.cat([users, items]), torch.cat([items, users])
        if norm.endswith("_self"):
            own = torch.arange(size, device=edges.device)
            rows, columns = torch.cat([rows, own]), torch.cat([columns, own])
        # A node without neighbours has an empty row, whatever its degree is said to be.
        degrees = rows.bincount(minlength=size).clamp(min=1).double()
        values = 1 / (degrees[rows] if norm.startswith("rw") else (degrees[rows] * degrees[columns]).sqrt())
        super().__init__(rows, columns, values.float(), (size, size))
        self.num_users, self.num_items, self.norm = num_users, num_items, norm

    def propagate(self, x: Tensor) -> Tensor:
        """One step along the edges.

        Args:
            x: `(num_users + num_items, width)`, users first. Several embeddings at once are several blocks of columns.

        Returns:
            float32 of the same shape, also under autocast.
        """
        return self.matmul(x)

    def convolve(self, start: Tensor, num_layers: int, added: Tensor | None = None) -> Tensor:
        """Sum over the layers of a light convolution: e^(0) = start, e^(l) = A e^(l-1) + added.

        Args:
            start: `(num_users + num_items, width)`, users first.
            num_layers: Steps L along the edges.
            added: What comes to every layer but the first, of the same shape.

        Returns:
            e^(0) + ... + e^(L), float32 of the same shape, also under autocast.
        """
        with torch.autocast(start.device.type, enabled=False):
            start = start.to(self.values.dtype)
            added = None if added is None else added.to(self.values.dtype)
            total: Tensor = _Convolution.apply(*self.compressed(), start, added, num_layers)  # type: ignore[no-untyped-call]
            return total


def check_edges(edges: Tensor, num_users: int, num_items: int) -> None:
    """Check a list of interactions.

    Raises:
        ValueError: If it is empty, or has another shape or ids out of range.
    """
    if edges.ndim != 2 or len(edges) != 2 or not edges.numel():
        raise ValueError(f"edges must be user and item ids of shape (2, interactions), got {tuple(edges.shape)}")
    for name, ids, size in (("user", edges[0], num_users), ("item", edges[1], num_items)):
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= size:
            wrong = int(((ids < 0) | (ids >= size)).sum())
            raise ValueError(f"{name} ids must lie in 0..{size - 1}, got {lowest}..{highest} ({wrong} out of range)")


def nearest_items(features: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The k items of the largest cosine of each item, itself not among them.

    Args:
        features: `(num_items, width)`.
        k: Neighbours of an item; at most `num_items - 1`.
        chunk: Items whose similarities are held at once.

    Returns:
        Item ids and cosines, both `(num_items, k)`, the nearest first.

    Raises:
        ValueError: If there are not so many items.
    """
    if not 1 <= k < len(features):
        raise ValueError(f"k must be between 1 and num_items - 1 = {len(features) - 1}, got {k}")
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    ids, cosines = [], []
    for first in range(0, len(unit), chunk):
        similarity = unit[first : first + chunk] @ unit.T
        own = torch.arange(len(similarity), device=unit.device)
        similarity[own, own + first] = -torch.inf
        best = similarity.topk(k, dim=1)
        ids.append(best.indices)
        cosines.append(best.values)
    return torch.cat(ids), torch.cat(cosines)


def item_neighbors(features: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """Each item and the others of the largest cosine to it, as the published graphs have them.

    Args:
        features: `(num_items, width)`.
        num_neighbors: k, the item itself among them; 2 at least.

    Returns:
        Item ids and cosines, both `(num_items, k)`, the item itself first.
    """
    ids, cosines = nearest_items(features, num_neighbors - 1)
    own = torch.arange(len(features), device=features.device)
    return torch.cat([own[:, None], ids], dim=1), torch.cat([torch.ones_like(cosines[:, :1]), cosines], dim=1)
