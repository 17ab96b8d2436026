"""Tokenizers of the victims: trained on the catalogue, or those of a checkpoint; kept as text in the victim's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.common.pretrained import transformers_library

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
"""Ids 0 to 4 of a trained tokenizer."""
WORD_STARTS = ("Ġ", "▁")
"""What pieces that begin a word begin with: in byte-level and in SentencePiece vocabularies."""
_ALPHABET = 256


def build_tokenizer(
    name: str | Path, texts: Iterable[str] = (), vocab_size: int = 2000, extra_tokens: Sequence[str] = ()
) -> Any:
    """A fast tokenizer of transformers.

    Args:
        name: "train" for byte pairs learnt from `texts` (no character is unknown to them), or a folder or hub id.
        texts: What "train" learns from.
        vocab_size: Most tokens that "train" makes.
        extra_tokens: Special tokens that are added where they are missing.

    Returns:
        The tokenizer. One that was trained has the specials `<pad>`, `<s>`, `</s>`, `<unk>` and `<mask>` first.

    Raises:
        FileNotFoundError: If the folder or hub id has no tokenizer.
        ImportError: If transformers is missing.
        ValueError: If "train" has no text, or no room for the 256 bytes.
    """
    tokenizer = _trained(list(texts), vocab_size, extra_tokens) if str(name) == "train" else _loaded(name)
    missing = [token for token in extra_tokens if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return tokenizer


def tokenizer_text(tokenizer: Any) -> str:
    """A tokenizer as text, for a checkpoint (see `tokenizer_from_text`)."""
    names = ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token")
    specials = {name: getattr(tokenizer, name, None) for name in names}
    return json.dumps({"tokenizer": tokenizer.backend_tokenizer.to_str(), "specials": specials}, ensure_ascii=False)


def tokenizer_from_text(text: str) -> Any:
    """The tokenizer of `tokenizer_text`."""
    from tokenizers import Tokenizer

    content = json.loads(text)
    specials = {name: token for name, token in content["specials"].items() if token is not None}
    backend = Tokenizer.from_str(content["tokenizer"])
    return transformers_library().PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def encode_plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Pieces of texts without special tokens around them, and without reading any in them.

    Text that spells a special token, such as `</s>` in a title, becomes ordinary pieces.

    Raises:
        ValueError: If a text yields a special id all the same, as with tokenizers that cannot be told otherwise.
    """
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
    )["input_ids"]
    forbidden = forbidden_ids(tokenizer)
    for text, row in zip(texts, rows, strict=True):
        found = forbidden.intersection(row)
        if found:
            names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(found))))
            raise ValueError(f"{text!r} yields the special token {names}: remove it from the text")
    return rows


def forbidden_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of special tokens that no text may yield: all but the one for what is unknown."""
    # Added tokens are not all special: some vocabularies add runs of blanks.
    special = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(special) - {tokenizer.unk_token_id}


def word_start_ids(tokenizer: Any) -> list[int]:
    """Ids of pieces that begin a word."""
    return sorted(index for token, index in tokenizer.get_vocab().items() if token.startswith(WORD_STARTS))


def _trained(texts: list[str], vocab_size: int, extra_tokens: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = transformers_library()
    if not any(text.strip() for text in texts):
        raise ValueError("there is no text to train a tokenizer on")
    specials = [*SPECIAL_TOKENS, *extra_tokens]
    if vocab_size < len(specials) + _ALPHABET:
        raise ValueError(
            f"vocab_size must be at least {len(specials) + _ALPHABET}, one for each byte, got {vocab_size}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    pad, start, end, unknown, mask = SPECIAL_TOKENS
    return library.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=start, eos_token=end, unk_token=unknown, mask_token=mask
    )


def _loaded(name: str | Path) -> Any:
    library = transformers_library()
    folder = Path(name).expanduser()
    if str(name).startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"{name} is not a folder; give one with tokenizer.json, a hub id, or 'train'")
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(folder if folder.is_dir() else name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"the tokenizer of {name} cannot be read: {reason}. Give a folder with tokenizer.json, a hub id that is "
            "in reach, or 'train' for one that is learnt from the titles"
        ) from error
    # Of a folder with a config and no vocabulary transformers makes a tokenizer that knows nothing.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise FileNotFoundError(
            f"the tokenizer of {name} has no vocabulary. Give a folder with tokenizer.json, or 'train' for one that is "
            "learnt from the titles"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name} is not a fast one (tokenizer.json): convert it first")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name} has neither a padding nor an end token: name one in its folder")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
