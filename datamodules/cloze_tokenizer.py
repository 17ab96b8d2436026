"""Tokenizers for cloze questions: from a folder or the hub, or trained on the spot from the texts at hand."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.cloze_text import MARKS, PLACEHOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TRAINED = ("train", "words")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_CHARACTERS = 1_000  # of an alphabet; words with rarer ones become [UNK]
_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "spm.model", "sentencepiece.bpe.model")


def _library() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("cloze questions need transformers: pip install 'lightning-method-zoo[hub]'") from error
    module: ModuleType = transformers
    return module


def load_tokenizer(
    name: str, texts: Callable[[], Iterable[str]], vocab_size: int = 8_000, marks: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer by name.

    Args:
        name: A folder, a hub id, "train" (a lower-cased WordPiece vocabulary trained on `texts`) or "words" (their most
            frequent lower-cased words). Training gives the same vocabulary in every process.
        texts: Gives the texts to train on; called only in training. `@placeholder` in them is left out.
        vocab_size: Largest size of a trained vocabulary, special tokens included and marks not.
        marks: Whether to add the tokens `[OPTION]` and `[/OPTION]`, which may stand round an option.

    Raises:
        ImportError: If transformers is not installed.
        FileNotFoundError: If the folder lacks files, or the hub cannot be reached and its cache has nothing.
        ValueError: If the tokenizer has no padding token or gives no offsets, or there is nothing to train on.
    """
    transformers = _library()
    tokenizer: Any
    if name in TRAINED:
        train = _word_pieces if name == "train" else _words
        tokenizer = _wrapped(transformers, train(_counted(texts()), vocab_size), name)
    else:
        tokenizer = _loaded(transformers, name)
        check_tokenizer(tokenizer, name)
    if marks:
        from tokenizers import AddedToken

        # With `lstrip` the space before a mark is no token of its own in byte-level vocabularies.
        tokens = [AddedToken(mark, lstrip=True, normalized=False, special=True) for mark in MARKS]
        tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Check that a tokenizer gives offsets and can pad.

    Raises:
        ValueError: If it does not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"the tokenizer {name} ({type(tokenizer).__name__}) gives no offsets, which say where the option is: use "
            "one that the library `tokenizers` runs (a folder with tokenizer.json), or 'train'"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer {name} has no padding token: set one (tokenizer.pad_token = tokenizer.eos_token), save it "
            "with save_pretrained, and give that folder"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> int:
    """A number that tells tokenizers apart: the CRC-32 of everything that decides on token ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are settings of the last call.
    state.pop("truncation"), state.pop("padding")
    special = [tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id]
    return zlib.crc32(json.dumps([state, special], sort_keys=True).encode())


def _loaded(transformers: ModuleType, name: str) -> Any:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
            raise FileNotFoundError(
                f"{name} is not a folder; give a folder with tokenizer.json and tokenizer_config.json, as "
                "save_pretrained writes them, a hub id, 'train' or 'words'"
            )
    elif not any((folder / file).is_file() for file in _FILES):
        raise FileNotFoundError(
            f"the folder {name} has no tokenizer: put tokenizer.json and tokenizer_config.json there, as "
            "save_pretrained of a tokenizer writes them"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(folder if folder.is_dir() else name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if folder.is_dir():
            raise ValueError(f"the tokenizer in the folder {name} cannot be read: {reason}") from error
        raise FileNotFoundError(
            f"{name} is no local folder, and the hub did not give its tokenizer ({reason}). Check the name, or run "
            f"`hf download {name} --local-dir FOLDER` where there is a network and give that folder, or train one here "
            "with 'train'"
        ) from error


def _counted(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, normalised and cut as the trained tokenizers do it."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    chunks: Counter[str] = Counter()
    for text in texts:
        chunks.update(normalizer.normalize_str(text.replace(PLACEHOLDER, " ")).split())
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for word, _ in splitter.pre_tokenize_str(chunk):
            words[word] += count
    if not words:
        raise ValueError("there is no word to train a tokenizer on: the texts are empty")
    return words


def _words(counts: Counter[str], vocab_size: int) -> Any:
    from tokenizers.models import WordLevel

    room = vocab_size - len(SPECIAL_TOKENS)
    if room < 1:
        raise ValueError(f"vocab_size must be at least {len(SPECIAL_TOKENS) + 1}, got {vocab_size}")
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words[:room]))}
    return WordLevel(vocabulary, unk_token="[UNK]")


def _word_pieces(counts: Counter[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.trainers import WordPieceTrainer

    characters: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    alphabet = sorted(characters, key=lambda character: (-characters[character], character))[:MAX_CHARACTERS]
    known = set(alphabet)
    inner = sorted({character for word in counts for character in word[1:]} & known)
    least = len(SPECIAL_TOKENS) + len(alphabet) + len(inner)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is too small: the characters of the texts alone take {least}")
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        # The trainer numbers continuing characters as it meets them in a hash table, and breaks ties between merges by
        # these numbers. Given as special tokens they have fixed ones; the model below knows them as plain pieces.
        special_tokens=[*SPECIAL_TOKENS, *(f"##{character}" for character in inner)],
    )
    learner = Tokenizer(WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = WhitespaceSplit()
    ordered = sorted(counts)
    learner.train_from_iterator((" ".join([word] * counts[word]) for word in ordered), trainer)
    return WordPiece(learner.get_vocab(with_added_tokens=True), unk_token="[UNK]")


def _wrapped(transformers: ModuleType, model: Any, name: str) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors

    backend: Tokenizer = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    if name == "train":
        backend.decoder = decoders.WordPiece()
    pad, unknown, first, separator, mask = SPECIAL_TOKENS
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        unk_token=unknown,
        cls_token=first,
        sep_token=separator,
        mask_token=mask,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
