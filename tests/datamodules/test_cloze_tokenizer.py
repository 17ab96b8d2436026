import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from datamodules.cloze_tokenizer import MAX_CHARACTERS, check_tokenizer, load_tokenizer, tokenizer_fingerprint
from tests.datamodules.cloze_examples import FAMILIES, corpus, tokenizer_of

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def not_called() -> list[str]:
    raise AssertionError("a tokenizer that exists needs no text")


@pytest.mark.parametrize("name", ["train", "words"])
def test_trained_tokenizer_has_its_special_tokens_first_and_a_pair_template(name: str) -> None:
    tokenizer = load_tokenizer(name, corpus, 180)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert [token for token, _ in vocabulary[:5]] == SPECIALS
    assert [index for _, index in vocabulary] == list(range(len(vocabulary)))
    assert len(vocabulary) <= 180
    first = tokenizer("The FOX", "the board")
    tokens = ["[CLS]", "the", "fox", "[SEP]", "the", "board", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(first["input_ids"]) == tokens
    assert first["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.convert_ids_to_tokens(tokenizer("fox")["input_ids"]) == ["[CLS]", "fox", "[SEP]"]
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id] == [0, 1, 4]
    assert tokenizer.tokenize("a [MASK] ☃") == ["a", "[MASK]", "[UNK]"]


def test_words_are_the_most_frequent_ones_and_ties_are_alphabetic() -> None:
    texts = ["b b b a, a A. @placeholder", "d c e e Ünder"]
    tokenizer = load_tokenizer("words", lambda: texts, 11)
    expected = [*SPECIALS, "a", "b", "e", ",", ".", "c"]
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == expected  # type: ignore[arg-type]
    assert tokenizer.tokenize("A e under") == ["a", "e", "[UNK]"]


def test_placeholder_is_never_learned() -> None:
    texts = ["he @placeholder it", "@placeholder is @placeholder"] * 50
    for name in ("train", "words"):
        vocabulary = load_tokenizer(name, lambda: texts, 100).get_vocab()
        assert {"he", "it", "is"} <= vocabulary.keys()
        assert not {token for token in vocabulary if "place" in token or "##la" in token or "@" in token}


def test_vocabulary_is_the_same_in_every_process() -> None:
    code = """
from datamodules.cloze_tokenizer import load_tokenizer, tokenizer_fingerprint
words = [chr(97 + i * j % 26) * 2 + chr(97 + (i + j) % 26) + chr(97 + i * i % 26) for i in range(40) for j in range(9)]
for name in ("train", "words"):
    print(tokenizer_fingerprint(load_tokenizer(name, lambda: [" ".join(words)], 400)))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": str(seed)},
                         stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        for seed in (1, 2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert len(set(outputs[0].split())) == 2
    assert len(set(outputs)) == 1


def test_rare_characters_beyond_the_limit_become_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_CHARACTERS == 1_000
    monkeypatch.setattr("datamodules.cloze_tokenizer.MAX_CHARACTERS", 3)
    texts = ["aab aab bab bca dd z"] * 3
    vocabulary = load_tokenizer("train", lambda: texts, 30).get_vocab()
    characters = Counter("aabaabbabbcaddz").most_common(3)
    assert {character for character, _ in characters} == {"a", "b", "d"}
    assert {"a", "b", "d"} <= vocabulary.keys() and not {"c", "z", "##c"} & vocabulary.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_tokenizer_comes_back_with_the_same_fingerprint(family: str, tmp_path: Path) -> None:
    for marks in (False, True):
        tokenizer = tokenizer_of(family, marks)
        folder = tmp_path / str(marks)
        tokenizer.save_pretrained(folder)
        again = load_tokenizer(str(folder), not_called, marks=marks)
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
        for texts in (("A fox", "it's"), ("a",)):
            one, other = (t(*texts, return_token_type_ids=True) for t in (tokenizer, again))
            assert one["input_ids"] == other["input_ids"]
            assert one["token_type_ids"] == other["token_type_ids"]
        assert again.tokenize(f"a {again.mask_token} b") == tokenizer.tokenize(f"a {again.mask_token} b")


def test_fingerprint_ignores_the_last_call_and_sees_the_vocabulary() -> None:
    tokenizer = load_tokenizer("words", corpus, 40)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("a fox", padding="max_length", truncation=True, max_length=7)
    assert tokenizer_fingerprint(tokenizer) == before
    others = [load_tokenizer("words", corpus, 41), load_tokenizer("words", corpus, 40, marks=True)]
    others.append(load_tokenizer("words", lambda: [*corpus(), "zzz " * 90], 40))
    assert before not in map(tokenizer_fingerprint, others)


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_are_two_more_tokens_that_swallow_the_space_before(family: str) -> None:
    plain, marked = tokenizer_of(family), tokenizer_of(family, marks=True)
    assert len(marked) == len(plain) + 2
    tokens = marked.convert_ids_to_tokens(
        marked("the [OPTION] fox [/OPTION] 's", add_special_tokens=False)["input_ids"]
    )
    inner = plain.tokenize("the fox 's")
    marks = [token for token in tokens if "OPTION" in token]
    assert marks == ["[OPTION]", "[/OPTION]"]
    assert [token for token in tokens if "OPTION" not in token] == inner


def test_marks_are_added_once() -> None:
    tokenizer = load_tokenizer("words", corpus, 40, marks=True)
    assert len(tokenizer) == 42
    ids = tokenizer("[OPTION] The [/OPTION]", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[OPTION]", "the", "[/OPTION]"]


def test_texts_without_a_word_and_too_small_a_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="no word to train"):
        load_tokenizer("train", lambda: ["", " ", "@placeholder"])
    with pytest.raises(ValueError, match=r"vocab_size=9 is too small: the characters of the texts alone take 10"):
        load_tokenizer("train", lambda: ["abc"], 9)
    assert len(load_tokenizer("train", lambda: ["abc"], 10)) == 10
    with pytest.raises(ValueError, match="vocab_size must be at least 6, got 5"):
        load_tokenizer("words", lambda: ["abc"], 5)


def test_missing_folder_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; give a folder with tokenizer.json"):
        load_tokenizer(str(tmp_path / "nowhere"), not_called)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: put tokenizer.json"):
        load_tokenizer(str(tmp_path), not_called)


def test_damaged_folder_is_named(tmp_path: Path) -> None:
    tokenizer_of("bert").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"the tokenizer in the folder {tmp_path} cannot be read"):
        load_tokenizer(str(tmp_path), not_called)


def test_hub_id_without_network_names_the_local_way() -> None:
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is no local folder, .* train one here"):
        load_tokenizer("nobody/nothing", not_called)


def test_tokenizer_without_padding_token_is_refused(tmp_path: Path) -> None:
    backend = tokenizer_of("bert").backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no padding token"):
        load_tokenizer(str(tmp_path), not_called)


def test_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the tokenizer mine .* gives no offsets"):
        check_tokenizer(SimpleNamespace(is_fast=False, pad_token_id=0), "mine")


def test_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-method-zoo\[hub\]'"):
        load_tokenizer("train", corpus)


def test_truncation_stored_in_a_folder_does_not_cut_texts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("words", corpus, 40)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    state["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(state), encoding="utf-8")
    from datamodules.token_table import tokenize

    table = tokenize(load_tokenizer(str(tmp_path), not_called), ["the board the board the board"])
    assert len(table.ids) == 6
