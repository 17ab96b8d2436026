"""Where word swaps come from: files, PPDB, WordNet, vectors."""

from __future__ import annotations

import gzip
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from zoo.text_attack.synonyms import (
    CombinedSynonyms,
    MaskedLMSynonyms,
    NLTKWordNet,
    PPDBSynonyms,
    SynonymSource,
    SynonymTable,
    UserSynonyms,
    WordNetSynonyms,
    WordVectors,
    synonym_source,
)

if TYPE_CHECKING:
    from pathlib import Path

FIVE = r"\(1\).*\(2\).*\(3\).*\(4\).*\(5\)"
SYNSETS = """\
00000001-n:
  members:
  - car
  - automobile
  - motor car
  partOfSpeech: n
00000002-n:
  members: [car, Carriage]
  partOfSpeech: n
00000003-s:
  members: [big, large]
  partOfSpeech: s
"""


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "synonyms"
    folder.mkdir(parents=True)
    write(folder / "ppdb_synonyms.txt.gz", "big large\nbig huge \nhuge big\nbig small\nbig big\n")
    write(folder / "ppdb_antonyms.txt.gz", "small big\n")
    write(
        folder / "wordnet_synonyms.tsv",
        "big\ta\tbad great large\nlarge\ta\tbig great\ngreat\ta\tbig large\nbad\tn\tbig\n",
    )
    return folder


# Files of one's own


@pytest.mark.parametrize("name", ["mine.tsv", "mine.txt.gz"])
def test_a_file_of_ones_own_keeps_its_order_in_lower_case(tmp_path: Path, name: str) -> None:
    source = UserSynonyms(write(tmp_path / name, "\ufeffBig\tHuge large huge big\n\nfast\tquick\nbig\tvast\n"))
    assert source.neighbours("BIG", 9) == ["huge", "large", "vast"]
    assert source.neighbours("big", 2) == ["huge", "large"]
    assert source.neighbours("big", 0) == source.neighbours("unknown", 5) == []
    assert source.cosine("big", "huge") is None
    assert source.name == f"user:{name}"
    assert len(source) == 2
    assert isinstance(source, SynonymSource)


@pytest.mark.parametrize("line", ["big huge", "big\t", "\thuge", "two words\thuge", "big\tn\thuge"])
def test_a_wrong_line_of_a_file_of_ones_own_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "mine.tsv", f"fast\tquick\n{line}\n")
    with pytest.raises(ValueError, match=r"mine\.tsv, line 2: .* expected word<TAB>synonym synonym"):
        UserSynonyms(path)


def test_files_that_are_empty_missing_damaged_or_not_utf8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"empty\.tsv is empty, expected word<TAB>"):
        UserSynonyms(write(tmp_path / "empty.tsv", "\n \n"))
    with pytest.raises(FileNotFoundError, match=r"none\.tsv does not exist"):
        UserSynonyms(tmp_path / "none.tsv")
    (tmp_path / "latin.tsv").write_bytes("fast\tquick\n\ncaf\u00e9\tbar\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.tsv, line 3: not UTF-8"):
        UserSynonyms(tmp_path / "latin.tsv")
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"fast\tquick\n" * 99)[:-9])
    (tmp_path / "plain.tsv.gz").write_bytes(b"fast\tquick\n")
    for name in ("cut", "plain"):
        with pytest.raises(ValueError, match=rf"{name}\.tsv\.gz is truncated or no gzip file"):
            UserSynonyms(tmp_path / f"{name}.tsv.gz")


# PPDB and WordNet


def test_pairs_count_both_ways_often_listed_ones_first_without_antonyms(
    lists: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        source = PPDBSynonyms(lists)
    assert source.neighbours("Big", 9) == ["huge", "large"]
    assert source.neighbours("large", 9) == ["big"]
    assert source.neighbours("small", 9) == []
    assert "ppdb: 3 words with synonyms, 2 synonyms left out as antonyms" in caplog.text
    assert "1 pairs of a word with itself left out" in caplog.text


def test_antonym_lists_can_be_given_left_out_and_are_missed_aloud(
    lists: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = lists / "ppdb_synonyms.txt.gz"
    assert PPDBSynonyms(path, antonyms=()).neighbours("big", 9) == ["huge", "large", "small"]
    given = write(lists.parent / "opposites.txt", "huge big\n")
    assert PPDBSynonyms(path, antonyms=[given]).neighbours("big", 9) == ["large", "small"]
    (lists / "ppdb_antonyms.txt.gz").unlink()
    with caplog.at_level(logging.WARNING):
        assert PPDBSynonyms(path).neighbours("big", 9) == ["huge", "large", "small"]
    assert "antonyms may be swapped in" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"gone\.txt does not exist"):
        PPDBSynonyms(path, antonyms=[lists / "gone.txt"])


def test_a_pair_of_three_words_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ppdb_synonyms\.txt, line 2: 'a b c', expected two words"):
        PPDBSynonyms(write(tmp_path / "ppdb_synonyms.txt", "big huge\na b c\n"), antonyms=())


def test_wordnet_puts_first_what_shares_most_synonyms(lists: Path) -> None:
    source = WordNetSynonyms(lists)
    # big {bad, big, great, large}: great and large share three of four words, bad two of four.
    assert source.neighbours("big", 9) == ["great", "large", "bad"]
    assert source.parts == {"big": {"ADJ"}, "large": {"ADJ"}, "great": {"ADJ"}, "bad": {"NOUN"}}
    with pytest.raises(ValueError, match=r"wrong\.tsv, line 1: .* expected word<TAB>n, v, a or r<TAB>"):
        WordNetSynonyms(write(lists / "wrong.tsv", "big\tx\tlarge\n"))


@pytest.mark.parametrize("inside", [".", "src/yaml"])
def test_wordnet_is_read_from_its_own_yaml(tmp_path: Path, inside: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "noun.artifact.yaml", SYNSETS)
    write(folder / "entries-a.yaml", "not: [read")
    with caplog.at_level(logging.INFO):
        source = synonym_source(tmp_path)
    assert isinstance(source, WordNetSynonyms)
    assert source.neighbours("car", 9) == ["automobile", "carriage"]
    assert source.parts["big"] == {"ADJ"} and source.parts["carriage"] == {"NOUN"}
    assert "1 members of several words left out" in caplog.text
    write(folder / "verb.act.yaml", "00000009-v:\n  members: run\n  partOfSpeech: v\n")
    with pytest.raises(ValueError, match=r"verb\.act\.yaml, synset 00000009-v: expected members"):
        synonym_source(tmp_path)
    write(folder / "verb.act.yaml", "a: [")
    with pytest.raises(ValueError, match=r"verb\.act\.yaml is not valid YAML"):
        synonym_source(tmp_path)


# Vectors


def test_neighbours_of_vectors_are_those_of_the_largest_cosine(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 5)) * rng.uniform(0.1, 9, size=(40, 1))
    lines = [f"w{row} " + " ".join(f"{value:.6f}" for value in vector) for row, vector in enumerate(vectors)]
    source = WordVectors(write(tmp_path / "v.txt.gz", "\n".join(lines)))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in range(40):
        others = [f"w{other}" for other in np.argsort(-(unit @ unit[row])) if other != row]
        assert source.neighbours(f"W{row}", 3) == others[:3]
        assert source.neighbours(f"w{row}", 99) == others
        assert source.neighbours(f"w{row}", 4) == others[:4]
    assert source.cosine("w3", "W8") == pytest.approx(unit[3] @ unit[8], abs=1e-5)
    assert source.cosine("w3", "w3") == 1.0
    assert source.cosine("w3", "none") is None
    assert source.neighbours("none", 3) == source.neighbours("w3", 0) == []


def test_what_vectors_leave_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "5 2\nThe 1 0\nthe 0 1\na b 1 1\nzero 0 0\ncat 0.6 0.8\n"
    with caplog.at_level(logging.INFO):
        source = WordVectors(write(tmp_path / "v.txt", text))
    assert len(source) == 2 and source.cosine("the", "cat") == pytest.approx(0.6)
    assert "2 words of 2 dimensions; left out: 1 repeated, 1 of several words, 1 vectors of zeros" in caplog.text
    assert len(WordVectors(tmp_path / "v.txt", limit=1)) == 1
    with pytest.raises(ValueError, match="limit=0"):
        WordVectors(tmp_path / "v.txt", limit=0)


@pytest.mark.parametrize("line", ["dog 1", "dog 1 nan", "dog 1 x", "dog 1 inf", "dog"])
def test_a_wrong_vector_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match=r"v\.txt, line 2: .* expected a word and 2 finite numbers"):
        WordVectors(write(tmp_path / "v.txt", f"cat 1 2\n{line}\n"))


# Others


class Reader:
    name = "tiny"
    calls = 0

    def word_candidates(
        self, contexts: list[Any], method: str, max_candidates: int, min_prob: float
    ) -> list[list[str]]:
        self.calls += 1
        assert contexts == [("", "big", "")] and method == "bert-attack" and min_prob == 0.25
        return [["huge", "vast", "large"][:max_candidates]]


def test_a_masked_language_model_is_asked_once_for_a_word() -> None:
    reader: Any = Reader()
    source = MaskedLMSynonyms(reader, min_prob=0.25)
    assert source.neighbours("Big", 2) == source.neighbours("big", 2) == ["huge", "vast"]
    assert reader.calls == 1
    assert source.neighbours("big", 0) == []
    assert (source.name, source.cosine("a", "b")) == ("mlm:tiny", None)


def test_combined_sources_give_the_first_ones_words_first(tmp_path: Path) -> None:
    one = SynonymTable({"big": ["huge", "large"]}, "one")
    two = WordVectors(write(tmp_path / "v.txt", "big 1 0\nlarge 1 1\nvast 1 2\n"))
    both = CombinedSynonyms(one, two)
    assert both.neighbours("big", 9) == ["huge", "large", "vast"]
    assert both.neighbours("big", 1) == ["huge"]
    assert both.cosine("big", "vast") == pytest.approx(5**-0.5)
    assert both.name == "one+vectors:v.txt"
    with pytest.raises(ValueError, match="no sources"):
        CombinedSynonyms()


def nltk_stub(monkeypatch: pytest.MonkeyPatch, wordnet: object) -> None:
    corpus: Any = ModuleType("nltk.corpus")
    corpus.wordnet = wordnet
    monkeypatch.setitem(sys.modules, "nltk", ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)


def test_nltk_gives_single_lemmas_in_the_order_of_its_senses(monkeypatch: pytest.MonkeyPatch) -> None:
    senses = [["big", "Large"], ["bad", "big_time", "large"]]
    synsets = [SimpleNamespace(lemma_names=lambda names=names: names) for names in senses]
    nltk_stub(monkeypatch, SimpleNamespace(ensure_loaded=lambda: None, synsets=lambda word: synsets))
    assert NLTKWordNet().neighbours("Big", 9) == ["large", "bad"]
    assert synonym_source("nltk").neighbours("big", 1) == ["large"]


def test_missing_nltk_names_the_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise LookupError("Resource wordnet not found")

    nltk_stub(monkeypatch, SimpleNamespace(ensure_loaded=lost))
    with pytest.raises(FileNotFoundError, match=r"nltk\.download.*" + FIVE):
        synonym_source("nltk")
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(ImportError, match=r"pip install nltk.*" + FIVE):
        synonym_source("nltk")


# By name and path


def test_names_are_found_in_the_data_folder(lists: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (lists, lists.parent):
        source = synonym_source("ppdb+wordnet", folder)
        assert source.neighbours("big", 9) == ["huge", "large", "great", "bad"]
        assert source.name == "ppdb+wordnet"
    monkeypatch.setenv("ZOO_DATA", str(lists.parent))
    assert synonym_source("ppdb").neighbours("big", 1) == ["huge"]
    assert synonym_source("wordnet").neighbours("big", 1) == ["great"]


@pytest.mark.parametrize("spec", [None, "ppdb", "wordnet", "ppdb+wordnet", "thesaurus", "/nothing/here.tsv"])
def test_a_missing_source_is_an_error_that_names_five_options(
    spec: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=FIVE):
        synonym_source(spec, tmp_path)
    monkeypatch.delenv("ZOO_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=FIVE):
        synonym_source(spec)


def test_one_half_of_a_combination_is_not_enough(lists: Path) -> None:
    (lists / "wordnet_synonyms.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds wordnet: .*" + FIVE):
        synonym_source("ppdb+wordnet", lists)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("big\thuge large\n", UserSynonyms),
        ("big\tlarge\n", UserSynonyms),
        ("big\ta\tlarge\n", WordNetSynonyms),
        ("big huge\n", PPDBSynonyms),
        ("big 0.5 -1e-3\n", WordVectors),
        ("1 2\nbig 0.5 -1e-3\n", WordVectors),
    ],
)
def test_the_first_line_of_a_file_tells_its_format(tmp_path: Path, text: str, kind: type) -> None:
    assert type(synonym_source(write(tmp_path / "words.txt", text))) is kind


def test_a_file_of_no_known_format_or_a_folder_of_two_is_refused(lists: Path) -> None:
    with pytest.raises(ValueError, match=r"words\.txt, line 1: 'big huge vast', expected word<TAB>"):
        synonym_source(write(lists / "words.txt", "big huge vast\n"))
    with pytest.raises(FileNotFoundError, match="has both PPDB and WordNet"):
        synonym_source(lists)
    with pytest.raises(FileNotFoundError, match="has neither PPDB nor WordNet"):
        synonym_source(lists.parent)


@pytest.mark.real
def test_the_lists_at_hand_have_their_known_sizes_and_no_antonyms() -> None:
    ppdb, wordnet = synonym_source("ppdb"), synonym_source("wordnet")
    assert isinstance(ppdb, PPDBSynonyms) and isinstance(wordnet, WordNetSynonyms)
    assert (len(ppdb), len(wordnet)) == (15_584, 46_773)
    assert set(ppdb.neighbours("great", 50)) == {"super", "terrific", "fantastic", "awesome", "huge", "splendid"}
    assert wordnet.neighbours("turtle", 50) == ["polo-neck", "turtleneck", "capsize"]
    assert synonym_source("ppdb+wordnet").neighbours("controller", 2) == ["comptroller", "accountant"]
