"""Token rows of uneven length as padded batches, for networks that only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn


def load_network(name: str | Path, loader: Any, way_out: str, **options: Any) -> tuple[Any, Any]:
    """A network of transformers and its tokenizer, from a folder or a hub id.

    Args:
        name: The folder or hub id.
        loader: A class of transformers with `from_pretrained`.
        way_out: What to use in place of it, for the error.
        **options: More arguments of `from_pretrained`.

    Returns:
        The network in eval mode, without gradients, and the fast tokenizer.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the checkpoint is damaged, or has no fast tokenizer.
    """
    from zoo.common.pretrained import load_pretrained, transformers_library

    try:
        network: nn.Module = load_pretrained(name, loader, **options)
        tokenizer = load_pretrained(name, transformers_library().AutoTokenizer, weights=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {way_out}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{name} has no fast tokenizer (tokenizer.json): save it with one")
    return network.requires_grad_(False).eval(), tokenizer


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    ids = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(place for place in range(len(ids)) if ids[place : place + len(inner)] == inner)
    return ids[:start], ids[start + len(inner) :]


def longest_input(network: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens, special ones included, that a network can read; None where it has no limit."""
    config: Any = network.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    # RoBERTa and its kin number positions from the padding id + 1.
    if positions and config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet"):
        positions -= (config.pad_token_id if config.pad_token_id is not None else 1) + 1
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < 10**9]
    return min(limits, default=None)


def padded_batches(
    rows: Sequence[Sequence[int]], batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows of similar length together, padded on the right.

    Args:
        rows: Token ids, each row with one or more.
        batch_size: Most rows of a batch.
        device: Where the tensors go.

    Yields:
        The rows' places in `rows`; int64 ids `(batch, length)`, 0 as padding; int64 mask `(batch, length)`, 1 for
        tokens.
    """
    order = sorted(range(len(rows)), key=lambda place: (len(rows[place]), place))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        lengths = torch.tensor([len(rows[place]) for place in places])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[mask] = torch.tensor([token for place in places for token in rows[place]], dtype=torch.long)
        yield places, ids.to(device), mask.long().to(device)


def device_of(network: nn.Module) -> torch.device:
    """Where a network's weights are."""
    return next(network.parameters()).device
