from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from datamodules import TextRecData
from datamodules.sources.text_rec_sets import read_set

if TYPE_CHECKING:
    from pathlib import Path


def pack(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


def games(root: Path, items: list[str] | None = None, sequences: list[str] | None = None) -> str:
    pack(root / "amazon_games_text" / "items.tsv.gz", *(items or ["item_id\ttitle", "0\tZero", "1\tOne &amp; a half"]))
    pack(root / "amazon_games_text" / "sequences.txt.gz", *(sequences or ["7 0 1 0", "9 1"]))
    return str(root)


def test_games_keep_item_0_and_their_order(tmp_path: Path) -> None:
    corpus = read_set("amazon_games", "beauty", games(tmp_path), 3.0)
    assert corpus.titles == ["Zero", "One &amp; a half"]
    assert (corpus.user_labels, corpus.item_labels) == (["7", "9"], ["0", "1"])
    assert (corpus.item_ids.tolist(), corpus.offsets.tolist()) == ([0, 1, 0, 1], [0, 3, 4])
    assert corpus.liked is None


@pytest.mark.parametrize(
    ("items", "sequences", "message"),
    [
        (["id\ttitle", "0\tZero"], None, r"items\.tsv\.gz line 1 is .* expected the header"),
        (["item_id\ttitle", "0\tZero", "2\tTwo"], None, r"items\.tsv\.gz line 3 is '2.*', expected item 1"),
        (["item_id\ttitle", "0 Zero"], None, r"line 2 is '0 Zero', expected item 0, a tab"),
        (None, ["7 0 1", "9 2"], r"sequences\.txt\.gz line 2: item 2 is not in items\.tsv\.gz, expected 0\.\.1"),
        (None, ["7 0 1", "7 1"], "user 7 is already in line 1"),
        (None, ["7 0 x"], "'x' is not an integer"),
    ],
    ids=["header", "gap", "tab", "unknown", "twice", "text"],
)
def test_games_that_are_malformed_are_refused(
    tmp_path: Path, items: list[str] | None, sequences: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_set("amazon_games", "beauty", games(tmp_path, items, sequences), 3.0)


@pytest.mark.parametrize("source", ["amazon_games", "tallrec_books", "movielens_small"])
def test_missing_files_are_named_with_where_to_put_them(tmp_path: Path, source: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"is missing: put .* into .*data_dir or ZOO_DATA"):
        read_set(source, "beauty", str(tmp_path), 3.0)


def question(**changed: Any) -> str:
    return json.dumps({"liked": ["A"], "disliked": ["B"], "target": "C", "label": 1, **changed})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (question(label=2), "label is 2, expected 0 or 1"),
        (question(label="yes"), "label is 'yes', expected 0 or 1"),
        (question(liked="A"), "liked is 'A', expected a list of titles"),
        (question(disliked=[""]), r"disliked is \[''\]"),
        (question(target=None), "target is None, expected a title"),
        ("[1]", "expected an object with liked, disliked, target and label"),
        ("{", "is not JSON"),
    ],
    ids=["label-2", "label-yes", "liked", "disliked", "target", "list", "json"],
)
def test_questions_that_are_malformed_are_refused_with_the_line(tmp_path: Path, line: str, message: str) -> None:
    pack(tmp_path / "tallrec_books" / "train.jsonl.gz", question(), line)
    pack(tmp_path / "tallrec_books" / "test.jsonl.gz", question())
    with pytest.raises(ValueError, match=rf"train\.jsonl\.gz line 2.*{message}"):
        read_set("tallrec_books", "beauty", str(tmp_path), 3.0)


def films(root: Path, **changed: Any) -> str:
    folder = root / "movielens_small_mm"
    folder.mkdir()
    pd.DataFrame({"item": [0, 1, 2, 3], "title": list("abcd")}).to_parquet(folder / "items.parquet")
    columns = {
        "user": [1, 0, 0, 0, 0, 1],
        "item": [0, 3, 1, 0, 2, 1],
        "rating": [4.0, 3.5, 3.0, 5.0, 1.0, 0.5],
        "timestamp": [5, 30, 10, 20, 40, 1],
        "split": [2, 0, 0, 1, 0, 0],
    }
    pd.DataFrame({**columns, **changed}).to_parquet(folder / "interactions.parquet")
    return str(root)


def test_films_are_split_as_published_with_the_training_items_as_histories(tmp_path: Path) -> None:
    data = TextRecData(source="movielens_small", mode="yesno", data_dir=films(tmp_path))
    train, val, test = (data.whole(part) for part in ("train", "val", "test"))
    assert train.user_ids.tolist() == [0, 0]
    assert train.history.tolist() == [[1, -1], [3, 1]]
    assert train.liked.tolist() == [[False, False], [True, False]]
    assert (train.item_ids.tolist(), train.labels.tolist()) == ([3, 2], [1, 0])
    assert (val.user_ids.tolist(), val.item_ids.tolist(), val.labels.tolist()) == ([0], [0], [1])
    assert val.history.tolist() == [[2, 3, 1]]
    assert (test.user_ids.tolist(), test.history.tolist(), test.labels.tolist()) == ([1], [[1]], [1])
    assert data.item_counts.tolist() == [0, 2, 1, 1]
    assert data.train_pairs.tolist() == [[0, 3]]


def test_films_as_sequences_are_the_liked_ones_by_time(tmp_path: Path) -> None:
    corpus = TextRecData(source="movielens_small", data_dir=films(tmp_path)).corpus
    assert [own.tolist() for own in np.split(corpus.item_ids, corpus.offsets[1:-1])] == [[0, 3], [0]]
    assert corpus.liked is None and corpus.split is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"item": [0, 1, 2, 3, 4, 0]}, r"items 0\.\.3"), ({"split": [0, 0, 0, 0, 0, 3]}, r"split has \[0, 3\]")],
    ids=["item", "split"],
)
def test_films_that_are_malformed_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_set("movielens_small", "beauty", films(tmp_path, **changed), 3.0)


def test_amazon_reviews_of_2014_are_sequences_by_time_with_titles_of_python_literals(tmp_path: Path) -> None:
    def review(user: str, item: str, time: int) -> str:
        return json.dumps({"reviewerID": user, "asin": item, "unixReviewTime": time})

    reviews = [("U2", "B", 5), ("U1", "C", 2), ("U1", "A", 1), ("U1", "A", 9), ("U2", "A", 4)]
    pack(tmp_path / "reviews_Toys_and_Games_5.json.gz", *(review(*row) for row in reviews))
    meta = ["{'asin': 'B', 'title': \"Bob's &amp; co\"}", "{'asin': 'A', 'price': 1.5}", "{'asin': 'X', 'title': 'No'}",
            "{'asin': 'C', 'title': 'Cee'}"]  # fmt: skip
    pack(tmp_path / "meta_Toys_and_Games.json.gz", *meta)
    corpus = read_set("amazon2014", "toys", str(tmp_path), 3.0)
    assert (corpus.item_labels, corpus.titles) == (["A", "B", "C"], ["", "Bob's &amp; co", "Cee"])
    assert corpus.user_labels == ["U1", "U2"]
    assert (corpus.item_ids.tolist(), corpus.offsets.tolist()) == ([0, 2, 0, 1], [0, 2, 4])
    pack(tmp_path / "meta_Toys_and_Games.json.gz", "{'asin': 'A', 'title': __import__('os').getcwd()}")
    with pytest.raises(ValueError, match="line 1 is no Python literal"):
        read_set("amazon2014", "toys", str(tmp_path), 3.0)
    with pytest.raises(FileNotFoundError, match=r"reviews_Beauty_5\.json\.gz: put the file of http"):
        read_set("amazon2014", "beauty", str(tmp_path), 3.0)
