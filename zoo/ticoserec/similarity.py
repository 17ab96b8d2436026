"""The nearest item of every item: from co-occurrence, from item2vec, from the model's own table, or from both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.common.keyed_random import keyed_integers
from zoo.ticoserec.jagged import row_and_position

_BLOCK = 2048  # rows of the similarity matrix at a time

METHODS = ("itemcf_iuf", "itemcf", "item2vec", "random")


class ItemSimilarity(NamedTuple):
    """Nearest neighbours under one notion of similarity.

    Attributes:
        most_similar: int64 `(num_items + 1,)`, the nearest other item; 0 for the padding id.
        scores: float32 `(num_items + 1,)`, similarity to that neighbour.
        minimum, maximum: Smallest and largest similarity over all pairs, for normalising.
    """

    most_similar: Tensor
    scores: Tensor
    minimum: float
    maximum: float

    @staticmethod
    def fit(
        item_ids: Tensor, lengths: Tensor, num_items: int, method: str = "itemcf_iuf", seed: int = 0
    ) -> ItemSimilarity:
        """Similarity from training sequences.

        Args:
            item_ids: integer `(items,)`, the training items of all users, user after user, ids 1..num_items.
            lengths: int64 `(users,)`.
            num_items: Number of items.
            method: "itemcf_iuf" or "itemcf" (co-occurrence over users, with or without inverse user frequency),
                "item2vec" (needs the extra `item2vec`), "random".
            seed: Seed of what is random: item2vec, and the stand-in neighbours of items without any.

        Raises:
            ValueError: If `method` is unknown or no two items occur together.
            ModuleNotFoundError: If item2vec is asked for and gensim is missing.
        """
        if method not in METHODS:
            raise ValueError(f"similarity must be one of {', '.join(METHODS)}, got {method!r}")
        if method == "random":
            return random_neighbours(item_ids, num_items, seed)
        if method == "item2vec":
            return _item2vec(item_ids, lengths, num_items, seed)
        return _item_cf(item_ids, lengths, num_items, inverse_user_frequency=method == "itemcf_iuf", seed=seed)

    def normalised(self) -> Tensor:
        """Scores brought to [0, 1] by the smallest and largest similarity of all pairs."""
        return (self.scores - self.minimum) / max(self.maximum - self.minimum, 1e-12)

    def to(self, device: torch.device) -> ItemSimilarity:
        """The same on another device."""
        return self._replace(most_similar=self.most_similar.to(device), scores=self.scores.to(device))


def _with_stand_ins(most_similar: np.ndarray, scores: np.ndarray, low: float, high: float, seed: int) -> ItemSimilarity:
    """Give items without a neighbour a random item that has one, with score 0."""
    lonely = np.flatnonzero(most_similar == 0)
    lonely = lonely[lonely > 0]
    others = np.flatnonzero(most_similar)
    if not len(others):
        raise ValueError("no two items occur together in any training sequence: there is no item similarity to learn")
    most_similar[lonely] = np.random.default_rng(seed).choice(others, len(lonely))
    return ItemSimilarity(torch.from_numpy(most_similar), torch.from_numpy(scores).float(), float(low), float(high))


def _item_cf(
    item_ids: Tensor, lengths: Tensor, num_items: int, *, inverse_user_frequency: bool, seed: int
) -> ItemSimilarity:
    """C_ij / sqrt(N_i N_j) with C = X^T D X, one block of rows at a time; equal scores go to the lower id."""
    from scipy import sparse

    users, _ = row_and_position(lengths)
    pairs = np.unique(users.numpy().astype(np.int64) * (num_items + 1) + item_ids.numpy())
    rows, columns = np.divmod(pairs, num_items + 1)
    ones = np.ones(len(pairs))
    seen = sparse.csr_matrix((ones, (rows, columns)), shape=(len(lengths), num_items + 1))
    sizes = np.diff(seen.indptr)
    weight = 1 / np.log1p(np.maximum(sizes, 1)) if inverse_user_frequency else np.ones(len(sizes))
    weighted = sparse.diags(weight) @ seen
    scale = 1 / np.sqrt(np.maximum(np.bincount(columns, minlength=num_items + 1), 1))
    by_item = (sparse.diags(scale) @ seen.T).tocsr()
    weighted = (weighted @ sparse.diags(scale)).tocsr()
    most_similar, scores = np.zeros(num_items + 1, np.int64), np.zeros(num_items + 1)
    low, high = np.inf, -np.inf
    for first in range(0, num_items + 1, _BLOCK):
        part = (by_item[first : first + _BLOCK] @ weighted).tocsr()
        part.setdiag(0, k=first)  # an item's similarity to itself lies on the block's shifted diagonal
        part.eliminate_zeros()
        part.sort_indices()
        filled = np.flatnonzero(np.diff(part.indptr))
        if not len(filled):
            continue
        best = np.maximum.reduceat(part.data, part.indptr[filled])
        is_best = part.data == np.repeat(best, np.diff(part.indptr)[filled])
        row_of = np.repeat(filled, np.diff(part.indptr)[filled])[is_best]
        _, where = np.unique(row_of, return_index=True)
        most_similar[first + filled] = part.indices[is_best][where]
        scores[first + filled] = best
        low, high = min(low, part.data.min()), max(high, part.data.max())
    return _with_stand_ins(most_similar, scores, low, high, seed)


def _item2vec(item_ids: Tensor, lengths: Tensor, num_items: int, seed: int) -> ItemSimilarity:
    """word2vec over the item lists: 20 dimensions, window 5, 100 epochs, cosine of the 20 nearest."""
    try:
        from gensim.models import Word2Vec
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "similarity='item2vec' needs gensim: pip install 'lightning-method-zoo[item2vec]', or use 'itemcf_iuf'"
        ) from error
    sentences = [row.tolist() for row in torch.split(item_ids, lengths.tolist())]
    model = Word2Vec(sentences, vector_size=20, window=5, min_count=0, epochs=100, seed=seed, workers=1)
    most_similar, scores = np.zeros(num_items + 1, np.int64), np.zeros(num_items + 1)
    low, high = np.inf, -np.inf
    for item in model.wv.index_to_key:
        nearest = model.wv.most_similar(item, topn=20)
        most_similar[item], scores[item] = nearest[0]
        low, high = min(low, nearest[-1][1]), max(high, nearest[0][1])
    return _with_stand_ins(most_similar, scores, low, high, seed)


def random_neighbours(item_ids: Tensor, num_items: int, key: int) -> ItemSimilarity:
    """Any item of the training set as the neighbour of each item; another `key` gives another table."""
    known = torch.unique(item_ids).long()
    items = torch.arange(num_items + 1, device=item_ids.device)
    most_similar = known[keyed_integers(len(known), key, items)]
    most_similar[0] = 0
    return ItemSimilarity(most_similar, torch.zeros(num_items + 1, device=item_ids.device), 0.0, 1.0)


@torch.no_grad()
def online_similarity(item_embedding: Tensor, block: int = 2048, least: bool = False) -> ItemSimilarity:
    """Neighbours by inner product of the model's current item vectors.

    Args:
        item_embedding: `(num_items + 1, hidden)`; row 0 is padding and never a neighbour.
        block: Rows per matrix product.
        least: Take the least similar item (the published code's reversed normalisation).
    """
    vectors = item_embedding.detach().float()
    count = len(vectors)
    most_similar = torch.zeros(count, dtype=torch.int64, device=vectors.device)
    scores = vectors.new_zeros(count)
    extremes = []
    for first in range(1, count, block):
        products = vectors[first : first + block] @ vectors[1:].T
        rows = torch.arange(len(products), device=vectors.device)
        products[rows, rows + first - 1] = torch.inf
        smallest, least_at = products.min(1)
        products[rows, rows + first - 1] = -torch.inf
        largest, most_at = products.max(1)
        here = slice(first, first + len(products))
        most_similar[here] = (least_at if least else most_at) + 1
        scores[here] = smallest if least else largest
        extremes.append(torch.stack([smallest.min(), largest.max()]))
    limits = torch.stack(extremes)
    return ItemSimilarity(most_similar, scores, float(limits[:, 0].min()), float(limits[:, 1].max()))


def hybrid_similarity(offline: ItemSimilarity, online: ItemSimilarity, reverse: bool = False) -> Tensor:
    """For each item the neighbour whose normalised similarity is larger; equal ones go to the offline table.

    Args:
        offline: From co-occurrence or item2vec.
        online: From the model's vectors.
        reverse: Compare (max - s) / (max - min) instead, as the published code does; `online` must then hold the
            least similar items.

    Returns:
        int64 `(num_items + 1,)`.
    """
    ours, theirs = offline.normalised(), online.normalised()
    if reverse:
        ours, theirs = 1 - ours, 1 - theirs
    return torch.where(theirs > ours, online.most_similar, offline.most_similar)
