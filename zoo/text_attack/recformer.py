"""RecFormer (Li et al. 2023, arXiv 2305.13731): items and histories as one kind of text, in one vector space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.common.pretrained import load_pretrained, local_folder, transformers_library

if TYPE_CHECKING:
    from collections.abc import Mapping

KINDS = ("roberta", "longformer")
TOKEN_TYPES = 4
"""The first token, an attribute's name, its value, padding."""
_FIRST, _KEY, _VALUE, _PAD = range(TOKEN_TYPES)


class ItemSequence(NamedTuple):
    """Histories as tokens, newest item first, without gaps.

    Attributes:
        input_ids: int64 `(batch, length)`.
        attention_mask: int64 `(batch, length)`.
        token_type_ids: int64 `(batch, length)`: 0 for `<s>`, 1 for an attribute's name, 2 for its value, 3 for padding.
        item_position_ids: int64 `(batch, length)`: 0 for `<s>` and padding, 1 for the newest item, 2, ...
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    item_position_ids: Tensor


def item_sequences(
    tokens: Tensor, lengths: Tensor, key_length: int, max_tokens: int, start_id: int, pad_id: int
) -> ItemSequence:
    """Put the items of each row behind each other, after `<s>`.

    Args:
        tokens: int64 `(batch, items, width)`: each item's tokens, its attribute's name first.
        lengths: int64 `(batch, items)`: how many of them count; 0 for no item.
        key_length: Tokens of the attribute's name.
        max_tokens: What longer sequences are cut to: the oldest go.
        start_id: Id of `<s>`.
        pad_id: Id of padding.
    """
    batch, items, width = tokens.shape
    device = tokens.device
    place = torch.arange(width, device=device)
    valid = (place < lengths[..., None]).flatten(1)
    kinds = torch.where(place < key_length, _KEY, _VALUE).expand(batch, items, width).flatten(1)
    positions = torch.arange(1, items + 1, device=device)[:, None].expand(batch, items, width).flatten(1)
    length = min(int(valid.sum(1).max()) if valid.numel() else 0, max_tokens - 1)
    # Where each kept token goes; the others go to one place behind the end, which is cut off.
    target = torch.where(valid, valid.cumsum(1) - 1, length).clamp(max=length)

    def packed(values: Tensor, fill: int, first: int) -> Tensor:
        out = values.new_full((batch, length + 1), fill).scatter_(1, target, values)[:, :length]
        return torch.cat([out.new_full((batch, 1), first), out], 1)

    counts = valid.sum(1, keepdim=True).clamp(max=length)
    mask = (torch.arange(length + 1, device=device) <= counts).long()
    return ItemSequence(
        packed(tokens.flatten(1), pad_id, start_id).masked_fill_(mask == 0, pad_id),
        mask,
        packed(kinds, _PAD, _FIRST).masked_fill_(mask == 0, _PAD),
        packed(positions, 0, 0).masked_fill_(mask == 0, 0),
    )


class RecFormer(nn.Module):
    """Vectors of item sequences: the state of `<s>` in an encoder with two more embeddings.

    word + position + token type + item position, then LayerNorm (section 3.2 of RecFormer's paper): the item position
    is added to the word embedding that the encoder is given.

    Args:
        backbone: "tiny" for a small network with fresh weights, a folder or a hub id of a Longformer or RoBERTa.
        options: For "tiny" only: `kind` ("roberta", with full attention, or "longformer"), `hidden_size` (48),
            `num_layers` (2), `num_heads` (4), `intermediate_size` (4 times as wide), `window` (16, of a Longformer),
            `dropout` (0.0), `initializer_range` (`hidden_size ** -0.5`).
        vocab_size: Rows of the word embedding of "tiny"; the least number of rows of another.
        max_items: Items of a sequence.
        max_tokens: Tokens of a sequence, `<s>` included.
        pad_id: The tokenizer's padding id, for "tiny".

    Raises:
        ValueError: If an option is unknown, or the backbone is of another kind or too short.
    """

    def __init__(
        self,
        backbone: str = "tiny",
        options: Mapping[str, Any] | None = None,
        vocab_size: int = 2000,
        max_items: int = 50,
        max_tokens: int = 1024,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        if max_items < 1 or max_tokens < 2:
            raise ValueError(f"max_items must be at least 1 and max_tokens 2, got {max_items} and {max_tokens}")
        if backbone == "tiny":
            self.encoder = _tiny(vocab_size, max_tokens, pad_id, **(options or {}))
        else:
            if options:
                raise ValueError(f"{', '.join(options)}: for the 'tiny' backbone only, {backbone} has its own config")
            self.encoder = _loaded(backbone, vocab_size)
        config: Any = self.encoder.config
        self.is_longformer = config.model_type == "longformer"
        self.pad_id, self.hidden_size = int(config.pad_token_id), int(config.hidden_size)
        room = config.max_position_embeddings - self.pad_id - 1
        if max_tokens > room:
            raise ValueError(f"max_tokens is {max_tokens}, but {backbone} takes sequences of at most {room} tokens")
        self.item_positions = nn.Embedding(max_items + 1, self.hidden_size)
        nn.init.normal_(self.item_positions.weight, std=config.initializer_range)

    def forward(self, sequence: ItemSequence, all_states: bool = False) -> Tensor:
        """Vectors of sequences, `(batch, hidden_size)`; with `all_states` of all tokens, `(batch, length, ...)`."""
        ids, mask = sequence.input_ids, sequence.attention_mask
        words = self.encoder.get_input_embeddings()(ids) + self.item_positions(sequence.item_position_ids)
        more: dict[str, Tensor] = {}
        if self.is_longformer:
            more["global_attention_mask"] = torch.zeros_like(mask).index_fill_(1, mask.new_zeros(1), 1)
        states: Tensor = self.encoder(
            inputs_embeds=words,
            attention_mask=mask,
            token_type_ids=sequence.token_type_ids,
            # As RoBERTa counts: from the padding's id + 1, padding itself at its id.
            position_ids=mask.cumsum(1) * mask + self.pad_id,
            **more,
        ).last_hidden_state
        return states if all_states else states[:, 0]


def _tiny(
    vocab_size: int,
    max_tokens: int,
    pad_id: int,
    kind: str = "roberta",
    hidden_size: int = 48,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int | None = None,
    window: int = 16,
    dropout: float = 0.0,
    initializer_range: float | None = None,
    **unknown: Any,
) -> Any:
    if unknown:
        raise ValueError(
            f"the tiny backbone has no {', '.join(unknown)}; it has kind, hidden_size, num_layers, num_heads, "
            "intermediate_size, window, dropout, initializer_range"
        )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if min(hidden_size, num_layers, num_heads) < 1 or hidden_size % num_heads:
        raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_heads ({num_heads})")
    if window < 2 or window % 2:
        raise ValueError(f"window must be even and at least 2, got {window}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    library = transformers_library()
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "intermediate_size": 4 * hidden_size if intermediate_size is None else intermediate_size,
        "max_position_embeddings": max_tokens + pad_id + 1,
        "type_vocab_size": TOKEN_TYPES,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        # A narrow network learns faster from this than from the 0.02 of wide ones.
        "initializer_range": hidden_size**-0.5 if initializer_range is None else initializer_range,
        "pad_token_id": pad_id,
        "layer_norm_eps": 1e-5,
    }
    if kind == "longformer":
        values["attention_window"] = [window] * num_layers
    return library.AutoModel.from_config(
        library.AutoConfig.for_model(kind, **values), dtype=torch.float32, add_pooling_layer=False
    ).train()


def _loaded(name: str, vocab_size: int) -> Any:
    library = transformers_library()
    folder = local_folder(name)
    config = load_pretrained(folder or name, library.AutoConfig)
    if config.model_type not in KINDS:
        raise ValueError(f"RecFormer needs a Longformer or a RoBERTa, {name} is a {config.model_type}")
    encoder = load_pretrained(name, library.AutoModel, add_pooling_layer=False)
    if config.type_vocab_size < TOKEN_TYPES:
        # Published encoders know one type of token: RecFormer's four begin as it.
        old = encoder.embeddings.token_type_embeddings
        new = nn.Embedding(TOKEN_TYPES, config.hidden_size)
        with torch.no_grad():
            new.weight.copy_(old.weight[:1].expand(TOKEN_TYPES, -1))
        encoder.embeddings.token_type_embeddings = new
        encoder.config.type_vocab_size = TOKEN_TYPES
    if encoder.get_input_embeddings().num_embeddings < vocab_size:
        encoder.resize_token_embeddings(vocab_size, mean_resizing=False)
    return encoder.train()
