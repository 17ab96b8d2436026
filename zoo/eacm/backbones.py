"""Language models of transformers that reply: small and fresh over the dialogue's words, or pre-trained ones."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.common.pretrained import load_pretrained, transformers_library
from zoo.eacm.types import EOS_ID, GO_ID, PAD_ID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TINY = ("tiny", "tiny-seq2seq")
"""Backbones with fresh weights over the words of the dialogue vocabulary."""


class Pieces(NamedTuple):
    """Posts and replies in a backbone's own tokens, filled on the right.

    Attributes:
        post_ids: int64 `(batch, post length)`.
        post_mask: bool `(batch, post length)`, False on padding.
        reply_in: int64 `(batch, reply length)`: what stands before each token of the reply.
        reply_out: int64 `(batch, reply length)`: the reply, then its end.
        reply_mask: bool `(batch, reply length)`, False on padding.
    """

    post_ids: Tensor
    post_mask: Tensor
    reply_in: Tensor
    reply_out: Tensor
    reply_mask: Tensor


def tiny_backbone(name: str, vocab_size: int, options: Mapping[str, Any] | None) -> nn.Module:
    """A small network with fresh weights, in train mode and float32.

    Args:
        name: "tiny" (a Llama) or "tiny-seq2seq" (a T5).
        vocab_size: Number of words.
        options: `hidden_size` (64), `num_layers` (2), `num_heads` (4), `intermediate_size` (128), `dropout` (0).

    Raises:
        ValueError: If an option is unknown or out of its range.
    """
    library = transformers_library()
    config = _tiny_config(library, name, vocab_size, **(options or {}))
    kind = library.LlamaForCausalLM if name == "tiny" else library.T5ForConditionalGeneration
    network: nn.Module = kind(config)
    return network.float().train()


def named_backbone(name: str, config: Mapping[str, Any] | None) -> nn.Module:
    """A causal language model, or an encoder and decoder, in train mode and float32.

    Args:
        name: A folder of `save_pretrained`, or a hub id.
        config: Its config for fresh weights, so that no file is read; None to load it with its weights.

    Raises:
        FileNotFoundError: If the folder lacks files, or the hub cannot be reached.
        ValueError: If the checkpoint is damaged, or no language model.
    """
    library = transformers_library()
    if config is None:
        found = load_pretrained(name, library.AutoConfig, weights=False)
    else:
        values = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
        found = library.AutoConfig.for_model(config["model_type"], **values)
    seq2seq = bool(getattr(found, "is_encoder_decoder", False))
    known = library.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if seq2seq else library.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(found) not in known:
        raise ValueError(f"{name} is a {found.model_type}, which is no language model that could reply")
    loader = library.AutoModelForSeq2SeqLM if seq2seq else library.AutoModelForCausalLM
    if config is None:
        network: nn.Module = load_pretrained(name, loader)
    else:
        network = loader.from_config(found, dtype=torch.float32)
    return network.train()


def config_values(network: nn.Module) -> dict[str, Any]:
    """A network's config as plain values, for a checkpoint."""
    config: Any = network.config
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


class ReplyTokenizer:
    """Posts and replies in the tokens of a pre-trained backbone.

    A post is its last tokens, with the begin of a text before it where the tokenizer has one, then a line break for a
    causal model (or the separator or end of a text, for a tokenizer without line breaks); ` [SEP] ` between its turns
    becomes the same. A reply ends with the end of a text.

    Args:
        tokenizer: One of transformers.
        seq2seq: Whether the backbone is an encoder and decoder.
        start: Its first input ("decoder_start_token_id"); None for a causal model.
        max_tokens: Most tokens of a post.

    Raises:
        ValueError: If the tokenizer has no end of a text, or is not a fast one.
    """

    def __init__(self, tokenizer: Any, seq2seq: bool, start: int | None, max_tokens: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the backbone's tokenizer has no end of a text (eos_token): a reply could not end")
        if not tokenizer.is_fast:
            raise ValueError(
                "the backbone's tokenizer must be a fast one (tokenizer.json): a checkpoint keeps it as text"
            )
        self.tokenizer, self.seq2seq, self.start, self.max_tokens = tokenizer, seq2seq, start, max_tokens
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        specials = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
        self.banned = sorted({token for token in specials if token is not None} - {self.eos_id})
        with_specials = tokenizer("a")["input_ids"]
        begins = tokenizer.bos_token_id is not None and with_specials[:1] == [tokenizer.bos_token_id]
        self.begin = [int(tokenizer.bos_token_id)] if begins else []
        line = self._ids(["\n"])[0]
        if not line or tokenizer.unk_token_id in line:
            line = [self.eos_id if tokenizer.sep_token_id is None else int(tokenizer.sep_token_id)]
        self.between = line

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return rows

    def posts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of posts, int64 and bool `(posts, length)`."""
        turns = [text.split(" [SEP] ") for text in texts]
        flat = self._ids([turn for own in turns for turn in own])
        rows, place = [], 0
        for own in turns:
            row: list[int] = []
            for tokens in flat[place : place + len(own)]:
                row += [*self.between, *tokens] if row else tokens
            place += len(own)
            end = [self.eos_id] if self.seq2seq else self.between
            rows.append([*self.begin, *row[-self.max_tokens :], *end])
        return _padded(rows, self.pad_id)

    def pieces(self, posts: Sequence[str], replies: Sequence[str], ended: Sequence[bool]) -> Pieces:
        """Posts with given replies.

        Args:
            posts: As written.
            replies: What counts of them.
            ended: Whether a reply's end counts.
        """
        post_ids, post_mask = self.posts(posts)
        rows = [tokens + [self.eos_id] * end for tokens, end in zip(self._ids(replies), ended, strict=True)]
        reply_out, reply_mask = _padded(rows, self.pad_id)
        if self.start is None:
            # The post's last token is what the first one follows.
            first = torch.full((len(rows), 1), self.between[-1])
            post_ids, post_mask = _without_last(post_ids, post_mask)
        else:
            first = torch.full((len(rows), 1), self.start)
        return Pieces(post_ids, post_mask, torch.cat((first, reply_out[:, :-1]), 1), reply_out, reply_mask)

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say."""
        said: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return said

    def to_text(self) -> str:
        """As text, for a checkpoint."""
        names = ("pad_token", "unk_token", "bos_token", "eos_token", "sep_token")
        specials = {name: getattr(self.tokenizer, name, None) for name in names}
        return json.dumps({"tokenizer": self.tokenizer.backend_tokenizer.to_str(), "specials": specials})


def read_tokenizer(text: str) -> Any:
    """The tokenizer of `ReplyTokenizer.to_text`."""
    from tokenizers import Tokenizer

    content = json.loads(text)
    specials = {name: token for name, token in content["specials"].items() if token is not None}
    backend = Tokenizer.from_str(content["tokenizer"])
    return transformers_library().PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    longest = max((len(row) for row in rows), default=0)
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]


def first_words(tokenizer: Any, text: str, count: int) -> str:
    """A text up to the end of so many words of a dialogue tokenizer."""
    offsets = tokenizer.encode(text).offsets[:count]
    return text[: offsets[-1][1]] if offsets else ""


def surface_words(tokenizer: Any, text: str) -> list[str]:
    """A text split as by a dialogue tokenizer; words that it does not know stay as they are."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def last_to_end(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of tokens filled on the left in place of the right.

    Args:
        ids: int64 `(batch, length)`.
        mask: bool `(batch, length)`, False on padding on the right.
    """
    places = torch.arange(ids.shape[1], device=ids.device) - (ids.shape[1] - mask.sum(1))[:, None]
    return ids.gather(1, places.clamp(min=0)), places >= 0


def _without_last(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1)[:, None] - 1
    return ids, mask & kept


def _tiny_config(
    library: Any,
    name: str,
    vocab_size: int,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int = 128,
    dropout: float = 0.0,
    **unknown: Any,
) -> Any:
    if unknown:
        known = [key for key in inspect.signature(_tiny_config).parameters if key not in _NO_OPTIONS]
        raise ValueError(f"the {name} backbone has no {', '.join(unknown)}; it has {', '.join(known)}")
    sizes = {
        "hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads,
        "intermediate_size": intermediate_size,
    }  # fmt: skip
    for option, size in sizes.items():
        if size < 1:
            raise ValueError(f"{option} must be at least 1, got {size}")
    if hidden_size % (2 * num_heads):
        raise ValueError(f"hidden_size / num_heads must be even, got {hidden_size} / {num_heads}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    specials = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": GO_ID}
    if name == "tiny-seq2seq":
        return library.T5Config(
            vocab_size=vocab_size, d_model=hidden_size, d_kv=hidden_size // num_heads, d_ff=intermediate_size,
            num_layers=num_layers, num_heads=num_heads, dropout_rate=dropout, decoder_start_token_id=GO_ID, **specials,
        )  # fmt: skip
    return library.LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=num_heads,
        num_key_value_heads=num_heads, intermediate_size=intermediate_size, max_position_embeddings=2048,
        initializer_range=hidden_size**-0.5, attention_dropout=dropout, dtype=torch.float32, **specials,
    )  # fmt: skip


_NO_OPTIONS = ("library", "name", "vocab_size", "unknown")
