"""Words that a masked language model puts in a word's place: BAE's and BERT-Attack's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from zoo.text_attack.synonym_files import WORD
from zoo.text_attack.token_batches import device_of, frame, load_network, longest_input, padded_batches

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from typing_extensions import Self

_WAY_OUT = 'A recipe without a language model, such as recipe="deepwordbug", needs none'
_PER_PIECE = 8
_LETTERS = re.compile(r"\w+")


class _Vocabulary(NamedTuple):
    surfaces: list[str]  # text of each token, "" for what is no part of a word
    starts: Tensor  # bool (vocab_size,), a word or the start of one
    continues: Tensor  # bool (vocab_size,), a later piece of a word


class _Row(NamedTuple):
    ids: list[int]
    places: list[int]  # where in `ids` the word is
    bare: bool  # whether it starts the text without the mark of a word's start


class MaskedLanguageModel:
    """A masked language model of transformers, such as BERT, RoBERTa or DistilBERT.

    Args:
        name: A folder of `save_pretrained`, with its tokenizer, or a hub id.
        batch_size: Texts of a forward pass.

    Attributes:
        name: As given.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the checkpoint is damaged, or its tokenizer has no mask token.
    """

    def __init__(self, name: str | Path, *, batch_size: int = 16) -> None:
        from zoo.common.pretrained import transformers_library

        self.name = str(name)
        self._batch_size = batch_size
        loader = transformers_library().AutoModelForMaskedLM
        self._network, self._tokenizer = load_network(name, loader, _WAY_OUT)
        if self._tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer of {name} has no mask token. {_WAY_OUT}")
        self._before, self._after = frame(self._tokenizer)
        self._longest = longest_input(self._network, self._tokenizer)
        self._vocabulary = _vocabulary(self._tokenizer, self._network)

    def to(self, device: torch.device | str) -> Self:
        """Move the network."""
        self._network.to(device)
        return self

    def word_candidates(
        self,
        contexts: Sequence[tuple[str, str, str]],
        method: Literal["bae", "bert-attack"] = "bae",
        max_candidates: int = 48,
        min_prob: float = 5e-4,
    ) -> list[list[str]]:
        """Words that fit in the place of a word, for many places at once.

        "bae" (Garg and Ramakrishnan 2020) masks the word and takes the most likely whole words. "bert-attack" (Li et
        al. 2020) leaves the word in and takes what the network reads at its pieces: whole words at a word of one
        piece; otherwise products of the 8 best of each piece, ordered by the product of their probabilities.

        Args:
            contexts: Text before the word, the word, and text after it, blanks included.
            method: "bae" or "bert-attack".
            max_candidates: Most words of a place.
            min_prob: Least probability of a word, or of each piece of it.

        Returns:
            Lower-case words of each place, the most likely first, without the word itself.

        Raises:
            ValueError: If an argument is out of its range, or a word is empty.
        """
        if method not in ("bae", "bert-attack"):
            raise ValueError(f"method={method!r}, expected 'bae' or 'bert-attack'")
        if max_candidates < 1:
            raise ValueError(f"max_candidates={max_candidates}, expected 1 or more")
        if not 0 <= min_prob < 1:
            raise ValueError(f"min_prob={min_prob}, expected a probability below 1")
        for before, word, after in contexts:
            if not word.strip():
                raise ValueError(f"no word between {before!r} and {after!r}")
        make_row = self._masked_row if method == "bae" else self._plain_row
        rows = [make_row(*context) for context in contexts]
        results: list[list[str]] = [[] for _ in contexts]
        for place, probabilities in self._read(rows):
            row = rows[place]
            find = self._whole_words if len(row.places) == 1 else self._products
            ranked = find(probabilities, row, max_candidates, min_prob)
            words = dict.fromkeys(word.lower() for word in ranked)
            words.pop(contexts[place][1].lower(), None)
            results[place] = list(words)[:max_candidates]
        return results

    @torch.no_grad()
    def _read(self, rows: list[_Row]) -> Iterator[tuple[int, Tensor]]:
        for places, ids, mask in padded_batches([row.ids for row in rows], self._batch_size, device_of(self._network)):
            logits = self._network(input_ids=ids, attention_mask=mask).logits
            for at, place in enumerate(places):
                yield place, logits[at, rows[place].places].float().softmax(-1).cpu()

    def _whole_words(self, probabilities: Tensor, row: _Row, count: int, min_prob: float) -> list[str]:
        # The word itself, and other spellings of a word in capitals, may be among them and are dropped.
        best = _best(probabilities[0], self._starts(row), 2 * count + 2, min_prob)
        return [self._vocabulary.surfaces[token] for token, _ in best]

    def _products(self, probabilities: Tensor, row: _Row, count: int, min_prob: float) -> list[str]:
        vocabulary = self._vocabulary
        beams: list[tuple[float, str]] = [(0.0, "")]
        for at, (token, values) in enumerate(zip(row.places, probabilities, strict=True)):
            piece = row.ids[token]
            # A hyphen within a word stays.
            options = [(self._text_of(piece), 0.0)]
            if vocabulary.surfaces[piece]:
                later = at > 0 and bool(vocabulary.continues[piece])
                best = _best(values, vocabulary.continues if later else self._starts(row), _PER_PIECE, min_prob)
                options = [(vocabulary.surfaces[choice], value) for choice, value in best]
            grown = [(total + value, text + surface) for total, text in beams for surface, value in options]
            # Sums are ordered alike for any rest, so the best so far are enough for the best in the end; twice as many
            # and two more, because other spellings of a word, and the word itself, are dropped.
            beams = sorted(grown, key=lambda beam: -beam[0])[: 2 * count + 2]
        return [text for _, text in beams if WORD.fullmatch(text)]

    def _starts(self, row: _Row) -> Tensor:
        return self._vocabulary.starts | self._vocabulary.continues if row.bare else self._vocabulary.starts

    def _text_of(self, token: int) -> str:
        text: str = self._tokenizer.convert_tokens_to_string([self._tokenizer.convert_ids_to_tokens(token)])
        return text.strip()

    def _masked_row(self, before: str, word: str, after: str) -> _Row:
        mask = self._tokenizer.mask_token_id
        ids = self._tokenizer(before + self._tokenizer.mask_token + after, add_special_tokens=False)["input_ids"]
        # A title may spell the mask token itself.
        earlier = self._tokenizer(before, add_special_tokens=False)["input_ids"].count(mask) if before else 0
        place = [at for at, token in enumerate(ids) if token == mask][earlier]
        bare = not before.strip() and self._plain_row("", word, "").bare
        return self._framed(ids, [place], bare)

    def _plain_row(self, before: str, word: str, after: str) -> _Row:
        encoded = self._tokenizer(before + word + after, add_special_tokens=False, return_offsets_mapping=True)
        first, last = len(before), len(before) + len(word)
        places = [at for at, (start, end) in enumerate(encoded["offset_mapping"]) if start < last and end > first]
        if not places:
            raise ValueError(f"the word {word!r} of {before + word + after!r} has no tokens for {self.name}")
        ids = encoded["input_ids"]
        return self._framed(ids, places, not before.strip() and bool(self._vocabulary.continues[ids[places[0]]]))

    def _framed(self, ids: list[int], places: list[int], bare: bool) -> _Row:
        room = len(ids) if self._longest is None else self._longest - len(self._before) - len(self._after)
        # A title too long for the network is read around the word.
        middle = (places[0] + places[-1] + 1 - room) // 2
        start = min(max(middle, 0), max(len(ids) - room, 0))
        inner = [place - start for place in places if start <= place < start + room]
        return _Row(
            [*self._before, *ids[start : start + room], *self._after],
            [place + len(self._before) for place in inner],
            bare,
        )


def _best(probabilities: Tensor, allowed: Tensor, count: int, min_prob: float) -> list[tuple[int, float]]:
    """Tokens of those allowed with their log-probabilities, the most likely first, ties by the token's number."""
    values = torch.where(allowed, probabilities, -1.0)
    order = values.sort(descending=True, stable=True).indices[:count]
    chosen = [int(token) for token in order if values[token] >= min_prob and values[token] > 0]
    return [(token, float(values[token].double().log())) for token in chosen]


def _vocabulary(tokenizer: Any, network: Any) -> _Vocabulary:
    size = int(network.config.vocab_size)
    tokens: list[str | None] = [None] * size
    for token, number in tokenizer.get_vocab().items():
        if number < size:
            tokens[number] = token
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    marks = _marks(token for token in tokens if token is not None)
    surfaces = [""] * size
    starts, continues = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    for number, token in enumerate(tokens):
        if token is None or number in special:
            continue
        if marks == "##":
            text = token.removeprefix("##")
            later = text != token
        else:
            # Byte-level tokens spell bytes: only the tokenizer knows their text.
            text = tokenizer.convert_tokens_to_string([token]).strip()
            later = not token.startswith(marks)
        if _LETTERS.fullmatch(text):
            surfaces[number] = text
            (continues if later else starts)[number] = True
    return _Vocabulary(surfaces, starts, continues)


def _marks(tokens: Iterable[str]) -> str:
    """How a vocabulary tells a word's start from its later pieces: "##" before these, or a mark before the start."""
    counts = dict.fromkeys(("##", "\u0120", "\u2581"), 0)
    for token in tokens:
        for mark in counts:
            counts[mark] += len(token) > len(mark) and token.startswith(mark)
    most = max(counts, key=lambda mark: counts[mark])
    return most if counts[most] else "##"
