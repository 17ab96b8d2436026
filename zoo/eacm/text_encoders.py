"""What an `EmotionTagger` reads texts with: a GRU, a small transformer, or a pre-trained one."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo.common.pretrained import load_pretrained, transformers_library

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WORD_ENCODERS = ("gru", "tiny")
"""Encoders that read the words of the dialogue vocabulary; all others read texts with a tokenizer of their own."""
_TINY_POSITIONS = 512


class WordEncoder(nn.Module):
    """States of words: embeddings for each vocabulary, and a bidirectional GRU or a small BERT that they share.

    Args:
        kind: "gru" or "tiny".
        vocab_sizes: Size of each vocabulary, by name.
        embedding_size: Of a word; "tiny" takes `hidden_size`.
        hidden_size: Of the states; half of it is one direction's.
        dropout: Of the embeddings.
    """

    def __init__(
        self, kind: str, vocab_sizes: Mapping[str, int], embedding_size: int, hidden_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        size = embedding_size if kind == "gru" else hidden_size
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(count, size, padding_idx=0) for name, count in vocab_sizes.items()}
        )
        self.dropout = nn.Dropout(dropout)
        self.gru: nn.GRU | None = None
        self.network: nn.Module | None = None
        if kind == "gru":
            self.gru = nn.GRU(size, hidden_size // 2, batch_first=True, bidirectional=True)
        else:
            self.network = _tiny_bert(hidden_size, dropout)

    def forward(self, ids: Tensor, mask: Tensor, vocabulary: str) -> Tensor:
        """States `(batch, length, hidden_size)`.

        Args:
            ids: int64 `(batch, length)`.
            mask: bool `(batch, length)`; each row has a word, and padding comes after its words.
            vocabulary: The one that the ids are from.

        Raises:
            ValueError: If a text is too long.
        """
        vectors = self.dropout(self.embeddings[vocabulary](ids))
        if self.network is not None:
            if ids.shape[1] > _TINY_POSITIONS:
                raise ValueError(f"a text has {ids.shape[1]} words, the encoder 'tiny' reads up to {_TINY_POSITIONS}")
            output: Tensor = self.network(inputs_embeds=vectors, attention_mask=mask.long()).last_hidden_state
            return output
        assert self.gru is not None
        # Packed: the backward direction must not begin in the padding.
        packed = pack_padded_sequence(vectors, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=ids.shape[1])
        return states


class PretrainedEncoder(nn.Module):
    """States of a transformer from a folder or the hub, and its tokenizer.

    Args:
        name: A folder of `save_pretrained` with its tokenizer, or a hub id.
        max_length: Most tokens of a text, special ones included; the rest is cut off.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the checkpoint is damaged, or no encoder with a tokenizer that can pad.
    """

    def __init__(self, name: str, max_length: int) -> None:
        super().__init__()
        library = transformers_library()
        config = load_pretrained(name, library.AutoConfig, weights=False)
        if config.is_encoder_decoder:
            raise ValueError(f"{name} is an encoder and decoder ({config.model_type}), expected an encoder")
        # Poolers are often missing from checkpoints, and not used here.
        options = {"add_pooling_layer": False} if _has_pooler(library, config) else {}
        # It comes in evaluation mode, without dropout.
        self.network: nn.Module = load_pretrained(name, library.AutoModel, **options).train()
        self.hidden_size = int(config.hidden_size)
        self.tokenizer: Any = load_pretrained(name, library.AutoTokenizer, weights=False)
        if not self.tokenizer.is_fast or self.tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of {name} must be a fast one (tokenizer.json) with a padding token")
        positions = getattr(config, "max_position_embeddings", None)
        # Positions of RoBERTa's kind begin after that of the padding.
        offset = self.tokenizer.pad_token_id + 1 if config.model_type in _SHIFTED else 0
        self.max_length = max_length if positions is None else min(max_length, positions - offset)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of texts, int64 and bool `(texts, length)`."""
        rows = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, padding_side="right",
            return_tensors="pt",
        )  # fmt: skip
        return rows["input_ids"], rows["attention_mask"].bool()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States `(batch, length, hidden_size)`."""
        states: Tensor = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states

    def tokenizer_text(self) -> str:
        """The tokenizer as text, for a checkpoint."""
        specials = {
            name: getattr(self.tokenizer, name, None) for name in ("pad_token", "unk_token", "cls_token", "sep_token")
        }
        return json.dumps({"tokenizer": self.tokenizer.backend_tokenizer.to_str(), "specials": specials})

    def restore_tokenizer(self, text: str) -> None:
        """Take the tokenizer of `tokenizer_text`: the folder's may have changed since."""
        from tokenizers import Tokenizer

        content = json.loads(text)
        specials = {name: token for name, token in content["specials"].items() if token is not None}
        backend = Tokenizer.from_str(content["tokenizer"])
        self.tokenizer = transformers_library().PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


_SHIFTED = ("roberta", "xlm-roberta", "camembert", "longformer")


def _has_pooler(library: Any, config: Any) -> bool:
    network = library.AutoModel._model_mapping.get(type(config), None)
    return network is not None and "add_pooling_layer" in inspect.signature(network.__init__).parameters


def _tiny_bert(hidden_size: int, dropout: float) -> nn.Module:
    library = transformers_library()
    config = library.BertConfig(
        vocab_size=1,  # words come as vectors
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=_TINY_POSITIONS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    network: nn.Module = library.BertModel(config, add_pooling_layer=False)
    # Never looked up: under DDP a parameter without a gradient would be an error.
    embeddings: nn.Module = network.get_input_embeddings()  # type: ignore[operator]
    embeddings.requires_grad_(False)
    return network
