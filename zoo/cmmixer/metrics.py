"""Retrieval between video and audio over a full gallery, in both directions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

# Ranking takes up to 48 bytes for each pair of a query and a gallery item: 256 MB.
_PAIRS_AT_ONCE = 2**28 // 48
# Below every cosine, and above what stands for an item that takes no part.
_LAST = -2.0


def relevant_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Ranks of the relevant items of each query, from 1, best first.

    The rank of the j-th best relevant item (j from 1) is j plus the number of irrelevant items that score at least as
    much: ties count against the model. NaN scores as if it were the lowest score of all.

    Args:
        scores: Cosine similarities `(queries, gallery)`.
        relevant: bool, of the same shape.

    Returns:
        int64 `(queries, most)`, where `most` is the largest number of relevant items of a query; 0 where a query has
        fewer.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.5, 0.5, 0.1]])
        >>> relevant_ranks(scores, torch.tensor([[True, True, False, False]])).tolist()
        [[1, 3]]
    """
    scores = scores.masked_fill(scores.isnan(), _LAST)
    counts = relevant.sum(1)
    most = int(counts.amax())
    best = scores.masked_fill(~relevant, -torch.inf).topk(most, dim=1).values
    others = scores.masked_fill(relevant, -torch.inf)
    if most == 1:
        rivals = (others >= best).sum(1, keepdim=True)
    else:
        # One sort for all relevant items: where a whole class is relevant they are hundreds.
        rivals = others.shape[1] - torch.searchsorted(others.sort(dim=1).values, best)
    order = torch.arange(1, most + 1, device=scores.device)
    return (rivals + order).masked_fill(order > counts[:, None], 0)


class CrossModalRetrieval(Metric):
    """Ranks all audio for each video and all video for each audio, by cosine similarity.

    All vectors seen since the last reset are one gallery, under DDP those of all processes. Items with the id of the
    query are relevant. `compute` returns, for `v2a` (video queries) and `a2v`:

    - `v2a/r@k`: share of the queries whose best relevant item has a rank of at most k; 1 for k beyond the gallery;
    - `v2a/mdr`: median rank of the best relevant item;
    - `v2a/mrr`: mean of 1 / that rank;
    - `v2a/map`: mean over queries of the mean over relevant items of (relevant items so far) / rank;

    and `map`, the mean of both directions, `gallery_size`, and `chance@k`, what a random order has for r@k.

    Items tie exactly where their vectors are equal, and ties count against the model (`relevant_ranks`): with a
    constant encoder each query has its partner last. Vectors with NaN rank last.

    Args:
        ks: Cut-offs of r@k.
        prefix: Before each name, for instance "test/".
        repeats_expected: Whether ids are those of classes, so that no message says that they repeat.

    Raises:
        ValueError: If the cut-offs are not distinct and at least 1.

    Example:
        >>> import torch
        >>> metric = CrossModalRetrieval(ks=(1,))
        >>> metric.update(torch.eye(3), torch.eye(3)[[0, 2, 1]], torch.arange(3))
        >>> values = metric.compute()
        >>> round(float(values["v2a/r@1"]), 4), round(float(values["chance@1"]), 4)
        (0.3333, 0.3333)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    video: list[Tensor]
    audio: list[Tensor]
    pair_ids: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10, 25), prefix: str = "", repeats_expected: bool = False) -> None:
        super().__init__()
        if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
            raise ValueError(f"ks must be distinct cut-offs of at least 1, got {list(ks)}")
        self.ks, self.prefix = tuple(ks), prefix
        self._told = repeats_expected
        for name in ("video", "audio", "pair_ids"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, video: Tensor, audio: Tensor, pair_ids: Tensor) -> None:
        """Add pairs to the gallery.

        Args:
            video: Floating point `(batch, d)`, of any length.
            audio: Of the same shape; row i belongs to video i.
            pair_ids: int64 `(batch,)`; items of one id are relevant for each other.

        Raises:
            ValueError: If shapes or types do not fit.
        """
        if video.shape != audio.shape or video.ndim != 2 or not video.is_floating_point():
            raise ValueError(
                f"video and audio must be floating point of one shape (batch, d), got {video.dtype} "
                f"{tuple(video.shape)} and {audio.dtype} {tuple(audio.shape)}"
            )
        if pair_ids.dtype != torch.int64 or pair_ids.shape != video.shape[:1]:
            raise ValueError(
                f"pair_ids must be int64 of shape ({len(video)},), got {pair_ids.dtype} {tuple(pair_ids.shape)}"
            )
        self.video.append(video.detach().float())
        self.audio.append(audio.detach().float())
        self.pair_ids.append(pair_ids)

    def compute(self) -> dict[str, Tensor]:
        """The values by name, each with the prefix; they are listed with the class.

        Raises:
            ValueError: If there was no pair.
        """
        pair_ids = dim_zero_cat(self.pair_ids) if len(self.pair_ids) else torch.empty(0)
        if not len(pair_ids):
            raise ValueError("retrieval needs a gallery, but no pair was given: is the evaluation set empty?")
        video, audio = (F.normalize(dim_zero_cat(vectors), dim=1) for vectors in (self.video, self.audio))
        num_relevant = self._count_relevant(pair_ids)
        values = {f"v2a/{name}": value for name, value in self._rank(video, audio, pair_ids).items()}
        values |= {f"a2v/{name}": value for name, value in self._rank(audio, video, pair_ids).items()}
        values["map"] = (values["v2a/map"] + values["a2v/map"]) / 2
        values["gallery_size"] = torch.tensor(float(len(pair_ids)), device=pair_ids.device)
        values |= {f"chance@{k}": _chance(num_relevant, k) for k in self.ks}
        return {self.prefix + name: value.float() for name, value in values.items()}

    def _count_relevant(self, pair_ids: Tensor) -> Tensor:
        """Number of items of each row's id, `(gallery,)`."""
        _, group, sizes = torch.unique(pair_ids, return_inverse=True, return_counts=True)
        counts: Tensor = sizes[group]
        if len(sizes) < len(pair_ids) and not self._told:
            self._told = True
            logger.info(
                "%d of %d pairs share their id with others: a query has several relevant items, and r@k looks at the "
                "best-ranked one",
                int((counts > 1).sum()),
                len(pair_ids),
            )
        return counts

    def _rank(self, queries: Tensor, gallery: Tensor, pair_ids: Tensor) -> dict[str, Tensor]:
        # A product of matrices may round equal columns differently, and ties would be lost.
        # NaN equals nothing, and rows beside it would not be found equal: no unit vector has a 2.
        column = torch.unique(gallery.nan_to_num(2.0), dim=0, return_inverse=True)[1]
        place = torch.arange(len(gallery), device=gallery.device)
        distinct = gallery[torch.zeros_like(place).scatter_(0, column, place)[: int(column.amax()) + 1]]
        rows = max(1, _PAIRS_AT_ONCE // len(gallery))
        first, precision = [], []
        # A trainer's autocast would round the similarities.
        with torch.autocast(queries.device.type, enabled=False):
            for part, ids in zip(torch.split(queries, rows), torch.split(pair_ids, rows), strict=True):
                ranks = relevant_ranks((part @ distinct.T)[:, column], ids[:, None] == pair_ids)
                first.append(ranks[:, 0])
                order = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64, device=ranks.device)
                found = ranks > 0
                precision.append(torch.where(found, order / ranks, 0.0).sum(1) / found.sum(1))
        best = torch.cat(first).double()
        return {
            **{f"r@{k}": (best <= k).double().mean() for k in self.ks},
            "mdr": best.quantile(0.5),
            "mrr": best.reciprocal().mean(),
            "map": torch.cat(precision).mean(),
        }


def _chance(num_relevant: Tensor, k: int) -> Tensor:
    """Mean of 1 - C(N - R, k) / C(N, k), the odds that R of N items in random order have one in the first k."""
    left = len(num_relevant) - torch.arange(min(k, len(num_relevant)), device=num_relevant.device)
    missed = (1 - num_relevant[:, None].double() / left).clamp(min=0).prod(1)
    return (1 - missed).mean()
