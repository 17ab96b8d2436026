"""Word vectors of a file, and likeness by them."""

from __future__ import annotations

import gzip
import logging
from typing import TYPE_CHECKING

import pytest
import torch

from zoo.eacm.word_vectors import coverage, embedding_similarities, read_word_vectors

if TYPE_CHECKING:
    from pathlib import Path

LINES = "the 1 2 3\nCat 4 5 6\ncat 7 8 9\nDog 1 0 0\ndog's 2 2 2\n. . . 3 x 3 3\n"


@pytest.mark.parametrize("header", ["", "6 3\n"], ids=["bare", "header"])
@pytest.mark.parametrize("name", ["v.txt", "v.txt.gz"], ids=["plain", "gzip"])
def test_words_take_the_vector_of_their_spelling_or_else_of_a_lower_cased_one(
    tmp_path: Path, header: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    content = (header + LINES).encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with caplog.at_level(logging.INFO, logger="zoo.eacm.word_vectors"):
        vectors, known = read_word_vectors(path, ["[PAD]", "cat", "dog", "the", "bird", "cat"], 3)
    assert known.tolist() == [False, True, True, True, False, True]
    assert vectors.tolist() == [[0, 0, 0], [7, 8, 9], [1, 0, 0], [1, 2, 3], [0, 0, 0], [7, 8, 9]]
    assert coverage(known) == pytest.approx(4 / 6)
    assert "4 of 6 words (coverage 0.667)" in caplog.text and "1 of several words" in caplog.text


def test_a_file_without_any_of_the_words_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "v.txt"
    path.write_text(LINES)
    vectors, known = read_word_vectors(path, ["bird"], 3)
    assert not known.any() and not vectors.any() and coverage(known) == 0 and coverage(known[:0]) == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("content", ["2 4\na 1 2 3 4\n", "a 1 2 3 4\n"], ids=["header", "first line"])
def test_another_dimension_is_an_error_with_both(tmp_path: Path, content: str) -> None:
    path = tmp_path / "v.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"v\.txt has vectors of 4 dimensions, expected 3"):
        read_word_vectors(path, ["a"], 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a 1 2 3\nb 1 2\n", "line 2: 2 numbers after 'b', expected 3"),
        ("a 1 2 3\nb 1 2 3 4\n", "line 2: 4 numbers after 'b', expected 3"),
        ("a 1 2 3\nb 1 x 3\n", "line 2: could not convert"),
        ("a 1 2 3\nb 1 nan 3\n", "line 2: nan of 'b' is not a finite"),
        ("a 1 2 3\nb 1 2 1e39\n", "line 2: 1e39 of 'b' is not a finite"),
        ("\n", "is empty"),
        (b"a 1 2 3\n\xff 1 2 3\n", "line 2: not UTF-8"),
    ],
    ids=["short", "long", "no number", "nan", "overflow", "empty", "latin"],
)
def test_a_bad_file_is_an_error_that_names_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "v.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_word_vectors(path, ["a", "b"], 3)


def test_a_missing_or_truncated_file_and_a_size_of_zero_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_word_vectors(tmp_path / "none.txt", ["a"], 3)
    path = tmp_path / "v.txt.gz"
    path.write_bytes(gzip.compress(LINES.encode())[:-12])
    with pytest.raises(ValueError, match="truncated"):
        read_word_vectors(path, ["zebra"], 3)
    with pytest.raises(ValueError, match="at least 1"):
        read_word_vectors(path, ["a"], 0)


def test_similarities_equal_loops_over_pairs_of_tokens_and_do_not_depend_on_padding() -> None:
    draw = torch.Generator().manual_seed(0)
    replies, references = torch.randn(6, 5, 4, generator=draw), torch.randn(6, 7, 4, generator=draw)
    ours, theirs = torch.rand(6, 5, generator=draw) > 0.4, torch.rand(6, 7, generator=draw) > 0.4
    ours[4], theirs[5] = False, False
    found = embedding_similarities(replies, ours, references, theirs)
    for row in range(6):
        a, b = replies[row][ours[row]].double(), references[row][theirs[row]].double()
        expected = dict.fromkeys(found, 0.0)
        if len(a) and len(b):
            cosine = [[float(torch.cosine_similarity(x, y, 0)) for y in b] for x in a]
            forth = sum(max(values) for values in cosine) / len(a)
            back = sum(max(cosine[i][j] for i in range(len(a))) for j in range(len(b))) / len(b)
            ends = [torch.stack([max(column, key=abs) for column in part.T]) for part in (a, b)]
            expected = {
                "average": float(torch.cosine_similarity(a.mean(0), b.mean(0), 0)),
                "greedy": (forth + back) / 2,
                "extrema": float(torch.cosine_similarity(*ends, 0)),
            }
        assert {name: float(values[row]) for name, values in found.items()} == pytest.approx(expected)
    wider = embedding_similarities(
        torch.cat((replies, torch.full((6, 2, 4), 9.0)), 1), torch.cat((ours, torch.zeros(6, 2).bool()), 1),
        references, theirs,
    )  # fmt: skip
    assert all(torch.allclose(found[name], wider[name]) for name in found)
    none = embedding_similarities(replies[:, :0], ours[:, :0], references, theirs)
    assert all(values.tolist() == [0.0] * 6 for values in none.values())
