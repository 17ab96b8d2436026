"""Words of dialogues: tokenizers of whole words, learnt from training texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

SEPARATOR = "[SEP]"
"""Between the turns of a post: an ordinary word."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[EOS]", "[GO]", SEPARATOR)
"""At the ids 0, 1, 2, ..."""
PAD_ID, UNK_ID, EOS_ID, GO_ID, SEP_ID = range(len(SPECIAL_TOKENS))
_APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
_WORD = r"\w+(?:'\w+)*|[^\w\s]"


def word_tokenizer(vocabulary: dict[str, int] | None = None) -> Tokenizer:
    """A tokenizer with a given vocabulary.

    Texts are lower-cased, typographic apostrophes become plain ones, and each digit becomes 0. A word is a run of word
    characters with apostrophes inside, or a single other character that is not blank.

    Args:
        vocabulary: Id of each word, special tokens included; only these by default.

    Raises:
        ImportError: If tokenizers is not installed.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
        from tokenizers.models import WordLevel
    except ImportError as error:
        raise ImportError("dialogues need tokenizers: pip install 'lightning-method-zoo[hub]'") from error
    if vocabulary is None:
        vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(_APOSTROPHE, "'"),
            normalizers.Replace(Regex(r"\d"), "0"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    # Of the special tokens only the separator may be written in a text: "[GO]" in one is three words.
    tokenizer.add_tokens([AddedToken(SEPARATOR, normalized=False, special=False)])
    return tokenizer


def learn_tokenizer(texts: Sequence[str], vocab_size: int, min_count: int = 1) -> Tokenizer:
    """A tokenizer of the most frequent words, ties in alphabetical order: the same in every process.

    Args:
        texts: What to learn from.
        vocab_size: Largest size of the vocabulary, special tokens included.
        min_count: Rarer words become `[UNK]`.

    Raises:
        ValueError: If no word is left.
    """
    learner = word_tokenizer()
    from tokenizers.trainers import WordLevelTrainer

    trainer = WordLevelTrainer(
        vocab_size=max(vocab_size - len(SPECIAL_TOKENS), 0), min_frequency=min_count, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learnt = learner.get_vocab(with_added_tokens=False)
    words = [word for word in sorted(learnt, key=learnt.__getitem__) if word not in SPECIAL_TOKENS]
    words = words[: vocab_size - len(SPECIAL_TOKENS)]
    if not words:
        raise ValueError(
            f"no word is left for the vocabulary: {len(texts)} texts, vocab_size={vocab_size} (of which "
            f"{len(SPECIAL_TOKENS)} are special tokens), min_count={min_count}"
        )
    return word_tokenizer({word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))})
