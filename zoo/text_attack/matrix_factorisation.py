"""Vectors of users and items from who had what: logistic matrix factorisation."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.common.keyed_random import keyed_integers

log = logging.getLogger(__name__)


def fit_matrix_factorisation(
    pairs: Tensor,
    num_users: int,
    num_items: int,
    size: int,
    *,
    epochs: int = 30,
    batch_size: int = 4096,
    lr: float = 1e-2,
    weight_decay: float = 1e-5,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Vectors whose product is the log-odds of an interaction (Johnson 2014), by Adam on sampled negatives.

    Each pair is told from one item drawn uniformly in each epoch. The same on every process and in every run.

    Args:
        pairs: int64 `(pairs, 2)`: a user and an item each.
        num_users: Number of users.
        num_items: Number of items.
        size: Width of the vectors.
        epochs: Passes over the pairs.
        batch_size: Pairs of a step.
        lr: Learning rate.
        weight_decay: Penalty on the vectors of a batch.
        seed: Of the first vectors, the order and the negatives.

    Returns:
        Float32 `(num_users, size)` and `(num_items, size)`, on the CPU.

    Raises:
        ValueError: If there is no pair, or an id is out of its range.
    """
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"pairs must be (pairs, 2) with a pair at least, got {tuple(pairs.shape)}")
    for name, column, count in (("user", 0, num_users), ("item", 1, num_items)):
        low, high = int(pairs[:, column].min()), int(pairs[:, column].max())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(f"the {name} id {wrong} is not in 0..{count - 1}: num_{name}s is {count}")
    pairs = pairs.cpu()
    draw = torch.Generator().manual_seed(seed)
    users = (torch.randn(num_users, size, generator=draw) * size**-0.5).requires_grad_()
    items = (torch.randn(num_items, size, generator=draw) * size**-0.5).requires_grad_()
    optimizer = torch.optim.Adam([users, items], lr=lr, foreach=True)
    loss = torch.zeros(())
    with torch.enable_grad():
        for epoch in range(epochs):
            order = torch.randperm(len(pairs), generator=draw)
            negatives = keyed_integers(num_items, seed, epoch, torch.arange(len(pairs)))
            for rows in torch.split(order, batch_size):
                user, positive, negative = users[pairs[rows, 0]], items[pairs[rows, 1]], items[negatives[rows]]
                liked, other = (user * positive).sum(1), (user * negative).sum(1)
                penalty = sum(part.square().sum(1).mean() for part in (user, positive, negative))
                loss = F.softplus(-liked).mean() + F.softplus(other).mean() + weight_decay * penalty
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    log.info("matrix factorisation of %d pairs: %d epochs, last loss %.3f", len(pairs), epochs, float(loss.detach()))
    return users.detach(), items.detach()


def load_vectors(path: str | Path, num_users: int, num_items: int, size: int) -> tuple[Tensor, Tensor]:
    """Vectors of a safetensors file with `user_embeddings` and `item_embeddings`.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it lacks one of them, or they have another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not a file: cf_embeddings needs a safetensors file with user_embeddings and item_embeddings, "
            "or leave it out to have them learnt from the data"
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error})") from error
    out = []
    for name, count in (("user_embeddings", num_users), ("item_embeddings", num_items)):
        if name not in tensors:
            raise ValueError(f"{path} has no {name}; it has {', '.join(sorted(tensors)) or 'nothing'}")
        if tuple(tensors[name].shape) != (count, size):
            raise ValueError(f"{name} of {path} has the shape {tuple(tensors[name].shape)}, expected {(count, size)}")
        out.append(tensors[name].float())
    return out[0], out[1]
