"""Sources of words that may stand in for a word: files, vectors, PPDB, WordNet, a masked language model.

TextFooler takes the neighbours in counter-fitted vectors. Where these are not at hand another source serves, and is
named in the results; none is ever taken in place of another.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from zoo.text_attack.synonym_files import (
    find_file,
    kind_of,
    read_pairs,
    read_user,
    read_wordnet_table,
    read_wordnet_yaml,
)
from zoo.text_attack.word_vectors import WordVectors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from zoo.text_attack.masked_lm import MaskedLanguageModel

log = logging.getLogger(__name__)

__all__ = [
    "OPTIONS",
    "CombinedSynonyms",
    "MaskedLMSynonyms",
    "NLTKWordNet",
    "PPDBSynonyms",
    "SynonymSource",
    "SynonymTable",
    "UserSynonyms",
    "WordNetSynonyms",
    "WordVectors",
    "synonym_source",
]

OPTIONS = (
    "synonyms can be (1) a file of your own with lines word<TAB>synonym synonym ...; (2) a file of word vectors in "
    'text format (counter-fitted, GloVe); (3) "ppdb": ppdb_synonyms.txt[.gz], with the antonym lists beside it, from '
    'the folder linguistic_constraints of github.com/nmrksic/counter-fitting; (4) "wordnet": '
    "wordnet_synonyms.tsv[.gz], or the folder src/yaml of github.com/globalwordnet/english-wordnet, or "
    '"ppdb+wordnet" for both; (5) "nltk": WordNet of the package nltk with its data. (3) and (4) are looked for in '
    'data_dir or $ZOO_DATA, and in its folder synonyms. A masked language model serves as "mlm:FOLDER"'
)


@runtime_checkable
class SynonymSource(Protocol):
    """Where word swaps come from."""

    @property
    def name(self) -> str:
        """What result files call the source."""
        ...

    def neighbours(self, word: str, count: int) -> list[str]:
        """At most `count` lower-case words that may replace a word, best first, without the word itself."""
        ...

    def cosine(self, a: str, b: str) -> float | None:
        """Similarity of two words in -1..1, or None where the source has none to give: lists have none."""
        ...


class SynonymTable:
    """Synonyms from a table in memory.

    Args:
        table: Synonyms of each word, best first. All in lower case.
        name: What result files call it.
        antonyms: Pairs of words that are no synonyms, whatever the table says.
    """

    def __init__(
        self, table: Mapping[str, Sequence[str]], name: str = "table", antonyms: Iterable[tuple[str, str]] = ()
    ) -> None:
        self.name = name
        opposites = {frozenset(pair) for pair in antonyms}
        self._table: dict[str, list[str]] = {}
        dropped = 0
        for word, synonyms in table.items():
            others = dict.fromkeys(synonym for synonym in synonyms if synonym != word)
            kept = [other for other in others if frozenset((word, other)) not in opposites]
            dropped += len(others) - len(kept)
            if kept:
                self._table[word] = kept
        log.info("%s: %d words with synonyms, %d synonyms left out as antonyms", name, len(self._table), dropped)

    def __len__(self) -> int:
        """Number of words that have synonyms."""
        return len(self._table)

    def neighbours(self, word: str, count: int) -> list[str]:
        """At most `count` synonyms, best first; none for an unknown word."""
        return self._table.get(word.lower(), [])[: max(count, 0)]

    def cosine(self, a: str, b: str) -> float | None:
        """None: a list has no measure."""
        return None


class UserSynonyms(SynonymTable):
    """Synonyms from a file with lines `word<TAB>synonym synonym ...`, in its order.

    Args:
        path: The file, plain or `.gz`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not of this form; it names the line.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        super().__init__(read_user(path), f"user:{path.name}")


class PPDBSynonyms(SynonymTable):
    """Pairs of the paraphrase database PPDB 2.0, as prepared for counter-fitting, without known antonyms.

    A pair counts both ways. The synonyms of a word are ordered by how often the file lists the pair.

    Args:
        path: A folder with ppdb_synonyms.txt[.gz], or such a file.
        antonyms: Files of antonyms, two words a line; None for ppdb_antonyms.txt[.gz] and wordnet_antonyms.txt[.gz]
            beside it, with a warning if there is neither; () for none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line has not two words; it names the line.
    """

    def __init__(self, path: str | Path, antonyms: Sequence[str | Path] | None = None) -> None:
        path = Path(path).expanduser()
        if path.is_dir():
            path = _in_folder(path, "ppdb_synonyms.txt")
        counts: dict[str, dict[str, int]] = {}
        for (a, b), count in read_pairs(path).items():
            counts.setdefault(a, {})[b] = count
            counts.setdefault(b, {})[a] = count
        table = {word: sorted(others, key=lambda other: -others[other]) for word, others in counts.items()}
        super().__init__(table, "ppdb", _antonyms(path.parent, antonyms))


class WordNetSynonyms(SynonymTable):
    """Single-word members of a word's synsets in Open English WordNet, without known antonyms.

    WordNet does not know which sense of a word is meant. The synonyms that share most synonyms with the word come
    first (the overlap of the two sets over their union), ties in the order of the alphabet.

    Args:
        path: A file with lines `word<TAB>n|v|a|r<TAB>synonym synonym ...`, a folder with wordnet_synonyms.tsv[.gz], or
            a copy of the repository or of its folder `src/yaml`.
        antonyms: As for `PPDBSynonyms`.

    Attributes:
        parts: The universal parts of speech of each word.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line or synset is not of its form; it names the line or synset.
    """

    def __init__(self, path: str | Path, antonyms: Sequence[str | Path] | None = None) -> None:
        path = Path(path).expanduser()
        by_part = read_wordnet(path)
        self.parts = {word: frozenset(parts) for word, parts in by_part.items()}
        near = {word: set().union(*parts.values()) for word, parts in by_part.items()}

        def order(word: str) -> list[str]:
            own = near[word] | {word}

            def key(other: str) -> tuple[float, str]:
                theirs = near.get(other, set()) | {other}
                return -len(own & theirs) / len(own | theirs), other

            return sorted(near[word], key=key)

        folder = path if path.is_dir() else path.parent
        super().__init__({word: order(word) for word in near}, "wordnet", _antonyms(folder, antonyms))


class NLTKWordNet:
    """Single-word lemmas of a word's synsets in NLTK's WordNet: frequent senses first.

    Raises:
        ImportError: If nltk is not installed.
        FileNotFoundError: If its WordNet is not on disk.
    """

    name = "nltk"

    def __init__(self) -> None:
        try:
            wordnet = import_module("nltk.corpus").wordnet
        except ImportError as error:
            raise ImportError(f"this source needs nltk: pip install nltk. Otherwise, {OPTIONS}") from error
        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise FileNotFoundError(
                f"NLTK has no WordNet on disk: `nltk.download('wordnet')` gets it. Otherwise, {OPTIONS}"
            ) from error
        self._wordnet = wordnet

    def neighbours(self, word: str, count: int) -> list[str]:
        """At most `count` lemmas, those of frequent senses first."""
        word = word.lower()
        lemmas = (lemma.lower() for synset in self._wordnet.synsets(word) for lemma in synset.lemma_names())
        return [lemma for lemma in dict.fromkeys(lemmas) if lemma != word and "_" not in lemma][: max(count, 0)]

    def cosine(self, a: str, b: str) -> float | None:
        """None: a list has no measure."""
        return None


class MaskedLMSynonyms:
    """Words that a masked language model reads into a word that stands alone, without the title around it.

    `MaskedWordSwap` uses the same model with its context, which is better; this serves where a source is asked for.
    """

    def __init__(self, masked_lm: MaskedLanguageModel, min_prob: float = 5e-4) -> None:
        self.name = f"mlm:{masked_lm.name}"
        self._masked_lm = masked_lm
        self._min_prob = min_prob
        self._known: dict[tuple[str, int], list[str]] = {}

    def neighbours(self, word: str, count: int) -> list[str]:
        """At most `count` words, the most likely first; they are kept."""
        key = word.lower(), count
        if count < 1:
            return []
        if key not in self._known:
            [self._known[key]] = self._masked_lm.word_candidates(
                [("", word.lower(), "")], method="bert-attack", max_candidates=count, min_prob=self._min_prob
            )
        return list(self._known[key])

    def cosine(self, a: str, b: str) -> float | None:
        """None: probabilities are no similarities."""
        return None


class CombinedSynonyms:
    """Several sources: the words of the first, then those of the next that are new."""

    def __init__(self, *sources: SynonymSource) -> None:
        if not sources:
            raise ValueError("no sources to combine, expected one or more")
        self.sources = sources
        self.name = "+".join(source.name for source in sources)

    def neighbours(self, word: str, count: int) -> list[str]:
        """At most `count` words."""
        found = dict.fromkeys(other for source in self.sources for other in source.neighbours(word, count))
        return list(found)[: max(count, 0)]

    def cosine(self, a: str, b: str) -> float | None:
        """That of the first source which has one."""
        values = (source.cosine(a, b) for source in self.sources)
        return next((value for value in values if value is not None), None)


def synonym_source(spec: str | Path | None, data_dir: str | Path | None = None) -> SynonymSource:
    """A source by its name or path.

    Args:
        spec: "ppdb", "wordnet", "ppdb+wordnet", "nltk", "mlm:FOLDER" (or hub id), or the path of a file (its first line
            tells the format) or folder.
        data_dir: Where "ppdb" and "wordnet" are looked for, and in its folder `synonyms`; `$ZOO_DATA` by default.

    Raises:
        FileNotFoundError: If there is no such source, or `spec` is None; the message lists the options.
        ValueError: If a file cannot be read.
    """
    if spec is None:
        raise FileNotFoundError(f"no source of synonyms is named: {OPTIONS}")
    text = str(spec)
    if text in ("ppdb", "wordnet", "ppdb+wordnet"):
        sources = [_named(part, data_dir) for part in text.split("+")]
        return sources[0] if len(sources) == 1 else CombinedSynonyms(*sources)
    if text == "nltk":
        return NLTKWordNet()
    if text.startswith("mlm:"):
        from zoo.text_attack.masked_lm import MaskedLanguageModel

        return MaskedLMSynonyms(MaskedLanguageModel(text.removeprefix("mlm:")))
    path = Path(spec).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"synonyms={text!r} is no known name, and no file or folder: {OPTIONS}")
    if path.is_dir():
        kinds = [kind for kind, there in _contents(path).items() if there]
        if len(kinds) != 1:
            found = "both PPDB and WordNet: name one file" if kinds else "neither PPDB nor WordNet"
            raise FileNotFoundError(f"the folder {path} has {found}; {OPTIONS}")
        return PPDBSynonyms(path) if kinds[0] == "ppdb" else WordNetSynonyms(path)
    readers = {"user": UserSynonyms, "vectors": WordVectors, "pairs": PPDBSynonyms, "wordnet": WordNetSynonyms}
    source: SynonymSource = readers[kind_of(path)](path)
    return source


def read_wordnet(path: Path) -> dict[str, dict[str, set[str]]]:
    """The synonyms of each word by universal part of speech, from any form that `WordNetSynonyms` takes."""
    if not path.is_dir():
        return read_wordnet_table(path)
    table = find_file(path, "wordnet_synonyms.tsv")
    if table is not None:
        return read_wordnet_table(table)
    return read_wordnet_yaml(path / "src" / "yaml" if (path / "src" / "yaml").is_dir() else path)


def synonym_folder(kind: str, data_dir: str | Path | None) -> Path:
    """The folder under `data_dir`, or `$ZOO_DATA`, that holds PPDB or WordNet.

    Raises:
        FileNotFoundError: If none does; the message lists the options.
    """
    root = data_dir or os.environ.get("ZOO_DATA")
    if not root:
        raise FileNotFoundError(f"no data_dir, and ZOO_DATA is not set, to find {kind} in: {OPTIONS}")
    base = Path(root).expanduser()
    for folder in (base, base / "synonyms"):
        if folder.is_dir() and _contents(folder)[kind]:
            return folder
    raise FileNotFoundError(f"neither {base} nor {base / 'synonyms'} holds {kind}: {OPTIONS}")


def _named(kind: str, data_dir: str | Path | None) -> SynonymSource:
    folder = synonym_folder(kind, data_dir)
    return PPDBSynonyms(folder) if kind == "ppdb" else WordNetSynonyms(folder)


def _contents(folder: Path) -> dict[str, bool]:
    synsets = any(any(place.glob("noun.*.yaml")) for place in (folder, folder / "src" / "yaml"))
    return {
        "ppdb": find_file(folder, "ppdb_synonyms.txt") is not None,
        "wordnet": synsets or find_file(folder, "wordnet_synonyms.tsv") is not None,
    }


def _in_folder(folder: Path, name: str) -> Path:
    path = find_file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder} has no {name} and no {name}.gz; {OPTIONS}")
    return path


def _antonyms(folder: Path, files: Sequence[str | Path] | None) -> set[tuple[str, str]]:
    if files is None:
        beside = [find_file(folder, name) for name in ("ppdb_antonyms.txt", "wordnet_antonyms.txt")]
        paths = [path for path in beside if path is not None]
        if not paths:
            log.warning("%s has no ppdb_antonyms.txt and no wordnet_antonyms.txt: antonyms may be swapped in", folder)
    else:
        paths = [Path(file).expanduser() for file in files]
    return {pair for path in paths for pair in read_pairs(path)}
