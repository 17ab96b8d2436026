"""What an item's ID embedding holds: its likeness to content and to structure, as numbers.

The paper shows pictures of ten users' items; here two measures over all pairs of items stand beside them: how well the
cosine of two IDs tells pairs that users like together from the others (AUC), and how far it orders pairs as content or
co-occurrence does (Spearman's correlation of ranks).
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.idsf.item_pairs import (
    finite_matrix,
    num_pairs,
    pair_auc,
    pair_cosines,
    pair_index,
    rank_correlation,
    standard_ranks,
    unit_rows,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

STRUCTURE = "structure"
MAX_ITEMS = 8192
"""Items whose pairs are all compared (33.5 million pairs, 134 MB a similarity); of more items as many are drawn."""


class StudySample(NamedTuple):
    """A few users and the training items of them all.

    Attributes:
        user_ids: int64 `(users,)`.
        item_ids: int64 `(items,)`, distinct, those of the first user first.
        groups: int64 `(items,)`, the place in `user_ids` of the first of these users who has the item.
    """

    user_ids: Tensor
    item_ids: Tensor
    groups: Tensor


class IdSemanticsReport(NamedTuple):
    """What representations of items say about co-liking, content and structure.

    Attributes:
        scores: By representation: `auc`, `spearman/<content>` and `spearman/structure`.
        num_items: Items compared.
        num_excluded: Items left out because no training interaction has them.
        num_pairs: Pairs of the items compared.
        num_related: Those of them that enough users like in the held-out interactions.
    """

    scores: dict[str, dict[str, float]]
    num_items: int
    num_excluded: int
    num_pairs: int
    num_related: int


def top_k_cosine(vectors: Tensor, k: int = 10) -> Tensor:
    """Cosine similarities of which each row keeps its k largest, itself left out; the others are 0.

    Args:
        vectors: `(n, d)`.
        k: Neighbours of each row; all where there are no more. Of equal ones the earlier is kept.

    Returns:
        float32 `(n, n)`, in general not symmetric.

    Raises:
        ValueError: If the vectors are no finite matrix, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    unit = unit_rows(vectors, "vectors")
    cosine = (unit @ unit.T).round(decimals=7).float().fill_diagonal_(-math.inf)
    values, places = cosine.sort(dim=1, descending=True, stable=True)
    kept = min(k, max(len(unit) - 1, 0))
    return torch.zeros_like(cosine).scatter_(1, places[:, :kept], values[:, :kept])


def co_interaction(edges: Tensor, num_users: int, num_items: int, items: Tensor | None = None) -> Tensor:
    """Number of users that two items share: the item block of A^2, with a diagonal of zeros.

    Args:
        edges: int64 `(2, E)`, user and item of each interaction; repeated ones count once.
        num_users: Users, with ids from 0.
        num_items: Items, with ids from 0.
        items: int64 `(n,)`, distinct items to compare; all by default.

    Returns:
        int64 `(n, n)`, symmetric.

    Raises:
        ValueError: If an id is out of range, or an item is named twice.
    """
    items = torch.arange(num_items) if items is None else items
    return torch.from_numpy(_shared_users(edges, num_users, num_items, items)[0].toarray())


def most_shared(edges: Tensor, num_users: int, num_items: int) -> int:
    """Largest number of users that two items share; 0 without interactions.

    Args:
        edges: int64 `(2, E)`, user and item of each interaction.
        num_users: Users, with ids from 0.
        num_items: Items, with ids from 0.
    """
    shared = _shared_users(edges, num_users, num_items, torch.arange(num_items))[0]
    return int(shared.max()) if shared.nnz else 0


def cosine_auc(vectors: Tensor, related: Tensor, max_items: int = MAX_ITEMS, seed: int = 0) -> float:
    """Chance that the cosine of a related pair exceeds that of an unrelated one, equal ones counting half.

    It is exact over all pairs of items; a vector of zeros has cosine 0 with every other.

    Args:
        vectors: `(n, d)`.
        related: The related pairs, int64 `(2, P)` in any order, or bool `(n, n)`, of which the upper triangle is read.
        max_items: Of more items, as many are drawn, and the pairs between them compared.
        seed: Of that draw.

    Raises:
        ValueError: If sizes do not fit, a value is not finite, or all pairs or none are related.
    """
    unit = unit_rows(vectors, "vectors")
    number = len(unit)
    if related.dtype == torch.bool:
        if related.shape != (number, number):
            raise ValueError(f"{number} vectors need a relation of {(number, number)}, got {tuple(related.shape)}")
        first, second = related.cpu().triu(1).nonzero().T
    elif related.is_floating_point() or related.ndim != 2 or len(related) != 2:
        raise ValueError(f"expected int64 (2, pairs) or bool (n, n), got {related.dtype} {tuple(related.shape)}")
    else:
        first, second = related.cpu().long()
        if related.numel() and not 0 <= int(related.min()) <= int(related.max()) < number:
            raise ValueError(
                f"related pairs must be of items 0 to {number - 1}, got {related.min()} to {related.max()}"
            )
        if bool((first == second).any()):
            raise ValueError("an item is not related to itself: a pair has twice the same")
    kept = _draw(number, max_items, seed)
    place = torch.full((number,), -1).index_copy(0, kept, torch.arange(len(kept)))
    first, second = place[first], place[second]
    inside = (first >= 0) & (second >= 0)
    is_related = torch.zeros(num_pairs(len(kept)), dtype=torch.bool)
    is_related[pair_index(first[inside], second[inside], len(kept))] = True
    if is_related.all() or not is_related.any():
        raise ValueError(f"{int(is_related.sum())} of {len(is_related)} pairs are related; both kinds are needed")
    return pair_auc(pair_cosines(unit[kept]), is_related)


def cosine_spearman(
    vectors: Tensor, reference: Tensor, similarity: bool = False, max_items: int = MAX_ITEMS, seed: int = 0
) -> float:
    """Spearman's correlation, over pairs of items, of the cosine with a reference; equal values share a mean rank.

    Args:
        vectors: `(n, d)`.
        reference: Vectors `(n, D)`, whose cosine is taken, or similarities `(n, n)`, whose upper triangle is read.
        similarity: Whether the reference is similarities.
        max_items: Of more items, as many are drawn, and the pairs between them compared.
        seed: Of that draw.

    Returns:
        In [-1, 1]; 0 where one of the two is the same for all pairs.

    Raises:
        ValueError: If sizes do not fit, a value is not finite, or there are fewer than 3 items.
    """
    unit = unit_rows(vectors, "vectors")
    number = len(unit)
    if number < 3 or len(reference) != number or (similarity and reference.shape != (number, number)):
        shape = "(n, n)" if similarity else "(n, d)"
        raise ValueError(
            f"{number} vectors need a reference {shape} of as many, at least 3; got {tuple(reference.shape)}"
        )
    kept = _draw(number, max_items, seed)
    if similarity:
        square = finite_matrix(reference, "reference")[kept][:, kept]
        first, second = torch.triu_indices(len(kept), len(kept), 1)
        other = square[first, second].float()
    else:
        other = pair_cosines(unit_rows(reference, "reference")[kept])
    return rank_correlation(standard_ranks(pair_cosines(unit[kept])), standard_ranks(other))


def measure_id_semantics(
    representations: Mapping[str, Tensor],
    held_out_edges: Tensor,
    train_edges: Tensor,
    num_users: int,
    num_items: int,
    content: Mapping[str, Tensor],
    min_shared: int = 3,
    max_items: int = MAX_ITEMS,
    seed: int = 0,
) -> IdSemanticsReport:
    """Measure each representation against co-liking, content and structure.

    `auc` is that of its cosine for the pairs which `min_shared` users or more have both among their held-out
    interactions; `spearman/<content>` the correlation of ranks with the cosine of each content; `spearman/structure`
    that with the normalised co-occurrence in training, C_ij / sqrt(n_i n_j). Items without a training interaction have
    no place in that structure and are left out of all of them. Where all pairs or none are related, `auc` is NaN.

    Args:
        representations: `(num_items, d)` by name, such as the IDs of each modality, projected and raw features.
        held_out_edges: int64 `(2, E)`, user and item of the interactions not trained on.
        train_edges: int64 `(2, E)`, those trained on.
        num_users: Users, with ids from 0.
        num_items: Items, with ids from 0.
        content: `(num_items, D)` by name.
        min_shared: Users that make a pair related.
        max_items: Of more items, as many are drawn, and the pairs between them compared.
        seed: Of that draw.

    Raises:
        ValueError: If a matrix has no row for each item, a value is not finite, an id is out of range, `min_shared` is
            below 1, or fewer than 3 items have a training interaction.
    """
    for name, matrix in [*representations.items(), *content.items()]:
        if matrix.ndim != 2 or len(matrix) != num_items:
            raise ValueError(f"{name!r}: expected a row for each of {num_items} items, got {tuple(matrix.shape)}")
    if min_shared < 1:
        raise ValueError(f"min_shared must be at least 1, got {min_shared}")
    _check_edges(train_edges, num_users, num_items)
    warm = torch.unique(train_edges[1].cpu())
    if len(warm) < 3:
        raise ValueError(f"expected 3 items or more with a training interaction, got {len(warm)}")
    items = warm[_draw(len(warm), max_items, seed)]
    counts, _ = _shared_users(held_out_edges, num_users, num_items, items)
    is_related = _pack(counts) >= min_shared
    num_related = int(is_related.sum())
    log.info(
        "compared %d items by pairs, %d without a training interaction left out; %d of %d pairs related",
        len(items),
        num_items - len(warm),
        num_related,
        len(is_related),
    )
    both_kinds = 0 < num_related < len(is_related)
    if not both_kinds:
        log.warning("%d of %d pairs are liked by %d users: no AUC", num_related, len(is_related), min_shared)
    references = {name: standard_ranks(pair_cosines(unit_rows(own[items], name))) for name, own in content.items()}
    references[STRUCTURE] = standard_ranks(_co_occurrence(train_edges, num_users, num_items, items))
    scores = {}
    for name, matrix in representations.items():
        cosines = pair_cosines(unit_rows(matrix[items], name))
        row = {"auc": pair_auc(cosines, is_related) if both_kinds else math.nan}
        ranks = standard_ranks(cosines)
        scores[name] = row | {f"spearman/{other}": rank_correlation(ranks, own) for other, own in references.items()}
    return IdSemanticsReport(scores, len(items), num_items - len(warm), len(is_related), num_related)


def id_semantics_report(
    representations: Mapping[str, Tensor],
    held_out_edges: Tensor,
    train_edges: Tensor,
    num_users: int,
    num_items: int,
    content: Mapping[str, Tensor],
    min_shared: int = 3,
) -> dict[str, dict[str, float]]:
    """The scores alone of `measure_id_semantics`, by representation: `auc`, `spearman/<content>`, `spearman/structure`.

    Args:
        representations: `(num_items, d)` by name.
        held_out_edges: int64 `(2, E)`.
        train_edges: int64 `(2, E)`.
        num_users: Users, with ids from 0.
        num_items: Items, with ids from 0.
        content: `(num_items, D)` by name.
        min_shared: Users that make a pair related.

    Raises:
        ValueError: As `measure_id_semantics`.
    """
    return measure_id_semantics(
        representations, held_out_edges, train_edges, num_users, num_items, content, min_shared
    ).scores


def study_sample(
    train_edges: Tensor, num_users: int = 10, seed: int = 0, min_items: int = 5, max_items: int = 60
) -> StudySample:
    """Users to draw, with all of their training items.

    Users with `min_items` to `max_items` items are drawn at random; where they are too few, those nearest to that range
    follow, and of more than `max_items` items of a user as many are drawn.

    Args:
        train_edges: int64 `(2, E)`, user and item.
        num_users: Users to draw; fewer where there are fewer.
        seed: Of the draw.
        min_items: Fewest items of a user.
        max_items: Most items of a user.

    Raises:
        ValueError: If there is no interaction, or a bound is out of range.
    """
    if train_edges.ndim != 2 or len(train_edges) != 2 or train_edges.shape[1] == 0:
        raise ValueError(f"expected interactions (2, E), at least one, got {tuple(train_edges.shape)}")
    if num_users < 1 or not 1 <= min_items <= max_items:
        raise ValueError(f"expected 1 <= min_items <= max_items and a user, got {min_items}, {max_items}, {num_users}")
    generator = torch.Generator().manual_seed(seed)
    edges = torch.unique(train_edges.cpu(), dim=1)
    users, counts = torch.unique_consecutive(edges[0], return_counts=True)
    shuffled = torch.randperm(len(users), generator=generator)
    distance = torch.maximum(min_items - counts, counts - max_items).clamp(min=0)[shuffled]
    chosen = users[shuffled[distance.argsort(stable=True)[:num_users]]]
    found: dict[int, int] = {}
    for group, user in enumerate(chosen.tolist()):
        own = edges[1, edges[0] == user]
        if len(own) > max_items:
            own = own[torch.randperm(len(own), generator=generator)[:max_items].sort().values]
        for item in own.tolist():
            found.setdefault(item, group)
    return StudySample(chosen, torch.tensor(list(found)), torch.tensor(list(found.values())))


def _draw(number: int, most: int, seed: int) -> Tensor:
    if most < 3:
        raise ValueError(f"max_items must be at least 3, got {most}")
    if number <= most:
        return torch.arange(number)
    log.info("drew %d of %d items to compare", most, number)
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def _check_edges(edges: Tensor, num_users: int, num_items: int) -> None:
    if edges.ndim != 2 or len(edges) != 2 or edges.is_floating_point():
        raise ValueError(f"expected interactions int64 (2, E), got {edges.dtype} {tuple(edges.shape)}")
    for name, ids, limit in (("user", edges[0], num_users), ("item", edges[1], num_items)):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            raise ValueError(f"{name} ids must be 0 to {limit - 1}, got {int(ids.min())} to {int(ids.max())}")


def _shared_users(edges: Tensor, num_users: int, num_items: int, items: Tensor) -> tuple[Any, np.ndarray]:
    """Users that each two of the items share, as a sparse matrix with no diagonal, and the users of each item."""
    from scipy.sparse import csr_array

    _check_edges(edges, num_users, num_items)
    items = items.cpu()
    if len(items) and not 0 <= int(items.min()) <= int(items.max()) < num_items:
        raise ValueError(f"items must be 0 to {num_items - 1}, got {int(items.min())} to {int(items.max())}")
    if len(torch.unique(items)) != len(items):
        raise ValueError("items to compare must be distinct")
    place = torch.full((num_items,), -1).index_copy(0, items, torch.arange(len(items)))
    user_ids, columns = edges[0].cpu(), place[edges[1].cpu()]
    user_ids, columns = torch.unique(torch.stack((user_ids, columns))[:, columns >= 0], dim=1)
    ones = np.ones(len(columns), dtype=np.int64)
    has = csr_array((ones, (user_ids.numpy(), columns.numpy())), shape=(num_users, len(items)))
    shared = (has.T @ has).tocsr()
    users = shared.diagonal()
    shared.setdiag(0)
    return shared, users


def _pack(matrix: Any) -> Tensor:
    """Upper triangle of a symmetric sparse matrix, float32 `(n (n - 1) / 2,)`."""
    from scipy.sparse import triu

    upper = triu(matrix, k=1).tocoo()
    number = matrix.shape[0]
    index = pair_index(torch.from_numpy(upper.row).long(), torch.from_numpy(upper.col).long(), number)
    return torch.zeros(num_pairs(number)).index_copy_(0, index, torch.from_numpy(upper.data).float())


def _co_occurrence(edges: Tensor, num_users: int, num_items: int, items: Tensor) -> Tensor:
    """C_ij / sqrt(n_i n_j) of each pair, from the users that two items share and those that each has."""
    shared, users = _shared_users(edges, num_users, num_items, items)
    shared = shared.tocoo()
    # Square roots of equal products are equal; products of square roots are not.
    shared.data = shared.data / np.sqrt((users[shared.row] * users[shared.col]).astype(np.float64))
    return _pack(shared)
