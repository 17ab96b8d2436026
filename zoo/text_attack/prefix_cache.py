"""Keys and values of the prompts' beginnings, computed once and shared by all titles that are asked about.

A decoder reads from left to right: what it computes for the part before the title does not depend on the title.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zoo.common.pretrained import transformers_library

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class Prefix(NamedTuple):
    """Beginnings of prompts after a decoder has read them.

    Attributes:
        keys: For each layer `(users, heads, length, width)`.
        values: Likewise.
        mask: int64 `(users, length)`; beginnings are filled on the left.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor

    def users(self, rows: slice) -> Prefix:
        """Some users, without a copy."""
        return Prefix(tuple(k[rows] for k in self.keys), tuple(v[rows] for v in self.values), self.mask[rows])

    @property
    def nbytes(self) -> int:
        """Memory of keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def positions(mask: Tensor) -> Tensor:
    """Positions int64 `(batch, length)` of tokens whose rows are filled on the left: 0 for the first that counts."""
    return (mask.cumsum(1) - 1).clamp_(min=0)


def read_prefix(network: nn.Module, inputs: dict[str, Tensor], mask: Tensor) -> Prefix | None:
    """Let a decoder read beginnings of prompts.

    Args:
        network: A causal language model of transformers.
        inputs: `input_ids` `(users, length)` or `inputs_embeds` `(users, length, width)`, filled on the left.
        mask: int64 `(users, length)`.

    Returns:
        Keys and values; None if the decoder keeps others than those of all tokens (sliding windows, recurrent states).
    """
    outputs = network(**inputs, attention_mask=mask, position_ids=positions(mask), use_cache=True, logits_to_keep=1)
    out = outputs[_cache_name(network)]
    plain = _cache_parts().DynamicLayer
    if any(type(layer) is not plain for layer in out.layers):
        return None
    return Prefix(tuple(layer.keys for layer in out.layers), tuple(layer.values for layer in out.layers), mask)


def read_tails(network: nn.Module, prefix: Prefix, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Logits after the last token of prompts whose beginnings were read.

    Args:
        network: The causal language model.
        prefix: Of `users` users.
        inputs: `input_ids` `(users * tails, length)` or `inputs_embeds`, those of one user behind each other, filled
            on the left.
        mask: int64 `(users * tails, length)`.

    Returns:
        `(users * tails, vocabulary)`.
    """
    repeats = len(mask) // len(prefix.mask)
    before = prefix.mask.repeat_interleave(repeats, 0)
    place = before.sum(1, keepdim=True) + positions(mask)
    layers = [_shared_layer(keys, values, repeats) for keys, values in zip(prefix.keys, prefix.values, strict=True)]
    logits: Tensor = network(
        **inputs,
        attention_mask=torch.cat((before, mask), 1),
        position_ids=place,
        **{_cache_name(network): _cache_parts().Cache(layers=layers)},
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1]


def read_whole(network: nn.Module, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Logits `(batch, vocabulary)` after the last token of prompts that are filled on the left."""
    logits: Tensor = network(
        **inputs, attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=1
    ).logits
    return logits[:, -1]


def _cache_name(network: nn.Module) -> str:
    """What transformers calls the cache: its name up to 5.23 is the second one."""
    model: Any = network
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _cache_parts() -> Any:
    transformers_library()
    import transformers.cache_utils

    return transformers.cache_utils


def _shared_layer(keys: Tensor, values: Tensor, repeats: int) -> Any:
    """A layer's cache that many prompts share: one copy per call, and nothing is added to it."""

    class SharedLayer(_cache_parts().DynamicLayer):  # type: ignore[misc]
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return _behind(self.keys, key_states, repeats), _behind(self.values, value_states, repeats)

    layer = SharedLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _behind(shared: Tensor, own: Tensor, repeats: int) -> Tensor:
    users, heads, length, width = shared.shape
    out = own.new_empty(len(own), heads, length + own.shape[2], width)
    out.view(users, repeats, heads, -1, width)[:, :, :, :length] = shared[:, None]
    out[:, :, length:] = own
    return out


class PrefixCache:
    """Beginnings that were read, kept for the next call while users and weights stay.

    Args:
        max_bytes: Most memory of what is kept; chunks beyond it are read anew in each call.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"cache_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._users: weakref.ref[Any] | None = None
        self._version: tuple[int, ...] = ()
        self._kept: dict[int, Prefix] = {}
        self._bytes = 0

    def get(self, users: Any, chunk: int, version: tuple[int, ...], read: Callable[[], Prefix | None]) -> Prefix | None:
        """A chunk's beginnings, from what is kept or by reading.

        Args:
            users: The users, known by identity; other users than those of the last call replace them.
            chunk: Number of a chunk of them.
            version: Changes with the weights.
            read: Reads the chunk.
        """
        if self._users is None or self._users() is not users or self._version != version:
            self.clear()
            self._users, self._version = weakref.ref(users), version
        kept = self._kept.get(chunk)
        if kept is None:
            kept = read()
            if kept is not None and self._bytes + kept.nbytes <= self.max_bytes:
                self._kept[chunk] = kept
                self._bytes += kept.nbytes
        return kept


def weight_version(network: nn.Module) -> tuple[int, ...]:
    """Changes whenever a weight is changed in place or replaced."""
    return tuple(part for weight in network.parameters() for part in (weight._version, weight.data_ptr()))
