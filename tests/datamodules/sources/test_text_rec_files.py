from __future__ import annotations

import gzip
import json
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from datamodules.sources.text_rec_files import TextColumns, read_csv_corpus, read_recformer, read_table

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = TextColumns("user", "item", "title", "time", "stars")
LINES = ["user,item,title,time,stars", "v,b,B b,5,1", "u,a,A a,2,5", "u,b,B b,1,3.5", "v,007,Seven,4,4"]


def write(path: Path, lines: list[str]) -> Path:
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.tsv", "x.parquet"])
def test_a_table_is_read_from_any_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.parquet":
        pd.DataFrame([line.split(",") for line in LINES[1:]], columns=LINES[0].split(",")).to_parquet(path)
    else:
        write(path, [line.replace(",", "\t") if ".tsv" in name else line for line in LINES])
    corpus = read_csv_corpus(path, None, COLUMNS, 3.0)
    assert corpus.item_labels == ["b", "a", "007"]
    assert corpus.titles == ["B b", "A a", "Seven"]
    assert corpus.user_labels == ["u", "v"]
    assert corpus.item_ids.tolist() == [0, 1, 2, 0]
    assert corpus.liked is not None and corpus.liked.tolist() == [True, True, True, False]
    assert corpus.offsets.tolist() == [0, 2, 4]


def test_without_times_the_order_is_that_of_the_rows_and_an_item_may_come_again(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ["user,item,title", "u,b,B", "v,a,A", "u,a,A", "u,b,B"])
    corpus = read_csv_corpus(path, None, COLUMNS._replace(time=None, rating=None), None)
    assert corpus.item_ids.tolist() == [0, 1, 0, 1]
    assert corpus.liked is None


def test_titles_of_a_second_table_name_all_items_also_those_that_nobody_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x.csv", ["user,item", "u,b", "u,a", "v,c"])
    items = write(tmp_path / "items.csv", ["item,title", 'z,"Z, the last"', "a,A", "b,"])
    with caplog.at_level(logging.WARNING):
        corpus = read_csv_corpus(path, items, COLUMNS._replace(time=None, rating=None), None)
    assert corpus.item_labels == ["b", "a", "c", "z"]
    assert corpus.titles == ["", "A", "", "Z, the last"]
    assert "items.csv: 2 of 4 items have no title" in caplog.text


def test_an_item_whose_first_row_has_no_title_gets_that_of_a_later_one(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ["user,item,title", "u,a,", "u,b,B", "v,a,A"])
    assert read_csv_corpus(path, None, COLUMNS._replace(time=None, rating=None), None).titles == ["A", "B"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["user,item,name,time,stars", "u,a,A,1,2"], "has no column 'title', only .*: set title_column, or give"),
        (["user,thing,title,time,stars", "u,a,A,1,2"], "has no column 'item', only .*: set item_column"),
        ([LINES[0]], "has no rows, only a header"),
        ([*LINES, "u,,X,9,1"], "line 6: item is empty"),
        ([*LINES, ",a,A a,9,1"], "line 6: user is empty"),
        ([*LINES, "u,a,A a,2,1"], r"line 6: user u, item a, time 2 was there before \(1 such rows\)"),
        ([*LINES, "u,a,Another,9,1"], "line 6: item 'a' has the title 'Another', before it was 'A a'"),
        ([*LINES, "u,c,C,9,good"], "line 6: stars is 'good', expected a number"),
        ([*LINES, "u,c,C,9,"], "line 6: stars is empty, expected a number"),
        ([*LINES, "u,c,C,soon,1"], "line 6: time 'soon' is neither Unix seconds nor a date"),
        ([*LINES, "u,c,C,9"], "line 6 has 4 fields"),
        (["user,item,title,time,stars", "u,a,,1,2", "u,b,,2,2"], "none of the 2 items has a title in column 'title'"),
    ],
    ids=[
        "no-title", "no-item-column", "no-rows", "no-item", "no-user", "repeated", "two-titles", "rating", "no-rating",
        "time", "fields", "no-titles",
    ],
)  # fmt: skip
def test_a_table_that_is_malformed_is_refused_with_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.csv.*{message}"):
        read_csv_corpus(write(tmp_path / "x.csv", lines), None, COLUMNS, 3.0)


def test_files_that_are_not_there_empty_or_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.csv does not exist"):
        read_table(tmp_path / "x.csv", COLUMNS, True)
    (tmp_path / "x.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.csv is empty"):
        read_table(tmp_path / "x.csv", COLUMNS, True)
    (tmp_path / "x.csv").write_bytes("\n".join(LINES).encode() + b"\nu,c,\xff,9,1\n")
    with pytest.raises(ValueError, match=r"x\.csv line 6: byte 0xff is not UTF-8"):
        read_table(tmp_path / "x.csv", COLUMNS, True)
    packed = gzip.compress("\n".join(LINES * 99).encode())
    (tmp_path / "x.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"x\.csv\.gz is truncated"):
        read_table(tmp_path / "x.csv.gz", COLUMNS, True)
    with pytest.raises(ValueError, match=r"items\.csv line 3: item 'a' was there before"):
        read_csv_corpus(write(tmp_path / "y.csv", LINES), write(tmp_path / "items.csv", ["item,title", "a,A", "a,B"]),
                        COLUMNS, 3.0)  # fmt: skip


META = {"B1": {"title": "One", "brand": "x", "category": "y"}, "B2": {"brand": "x"}, "B3": {"title": "Three"}}
FILES: dict[str, Any] = {
    "meta_data": META,
    "smap": {"B3": 0, "B1": 1, "B2": 2},
    "umap": {"U0": 0, "U1": 1},
    "train": {"0": [1, 2], "1": [0]},
    "val": {"0": [0], "1": []},
    "test": {"0": [1]},
}


def folder(path: Path, **changed: Any) -> Path:
    for name, value in {**FILES, **changed}.items():
        if value is not None:
            (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_recformer_files_are_one_sequence_a_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        corpus = read_recformer(folder(tmp_path))
    assert corpus.item_labels == ["B3", "B1", "B2"]
    assert corpus.titles == ["Three", "One", ""]
    assert corpus.user_labels == ["U0", "U1"]
    assert [own.tolist() for own in np.split(corpus.item_ids, corpus.offsets[1:-1])] == [[1, 2, 0, 1], [0]]
    assert "1 of 3 items have no title" in caplog.text


def test_validation_may_be_called_valid_as_the_readme_does(tmp_path: Path) -> None:
    folder(tmp_path, val=None, valid=FILES["val"])
    assert read_recformer(tmp_path).item_ids.tolist() == [1, 2, 0, 1, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"smap": {"B3": 0, "B1": 1, "B2": 3}}, r"smap\.json: 'B2' has the id 3, expected 0\.\.2"),
        ({"umap": {"U0": 0, "U1": 0}}, r"umap\.json: 'U1' has the id 0"),
        ({"train": {"0": [1, 9], "1": [0]}}, r"train\.json: user 0 has the item 9, expected 0\.\.2"),
        ({"test": {"0": 1}}, r"test\.json: user 0 has 1, expected a list"),
        ({"test": {"1": [1]}}, "user 0 has 2, 1 and 0 items in training, validation and test"),
        ({"train": {"0": [1, 2], "7": [0]}}, "user '7' is not in umap"),
        ({"meta_data": {**META, "B1": "One"}}, r"meta_data\.json: B1 is .*One.*, expected an object with a title"),
        ({"test": []}, r"test\.json holds \[\], expected a JSON object"),
    ],
    ids=["smap", "umap", "item", "list", "held-out", "user", "meta", "object"],
)
def test_recformer_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_recformer(folder(tmp_path, **changed))


def test_a_missing_or_broken_recformer_file_is_named(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "test.json").write_text('{"0": [1')
    with pytest.raises(ValueError, match=r"test\.json is not JSON"):
        read_recformer(tmp_path)
    (tmp_path / "val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.json does not exist"):
        read_recformer(tmp_path)
