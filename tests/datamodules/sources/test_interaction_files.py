from __future__ import annotations

import gzip
import json
import logging
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from datamodules.sources.interaction_files import read_files, read_pairs

if TYPE_CHECKING:
    from pathlib import Path

# Item 3 has no interaction; user 4 comes before user 0.
ROWS = [(4, 2, 0), (4, 0, 1), (0, 1, 0), (0, 2, 0), (2, 0, 0), (2, 1, 2)]
IMAGE = np.arange(12, dtype=np.float64).reshape(4, 3)
TEXT = np.arange(8, dtype=np.float16).reshape(4, 2) - 3
MMREC = "userID\titemID\trating\ttimestamp\tx_label\n"


def mmrec(folder: Path, header: str = MMREC, features: bool = True) -> Path:
    lines = [f"{user}\t{item}\t5.0\t100\t{part}" for user, item, part in ROWS]
    (folder / "baby.inter").write_text(header + "\n".join(lines) + "\n")
    if features:
        arrays(folder)
    return folder


def arrays(folder: Path) -> None:
    np.save(folder / "image_feat.npy", IMAGE)
    np.save(folder / "text_feat.npy", TEXT)


def lattice(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(("train", "val", "test")):
        lists: dict[str, list[int]] = {"0": [], "2": [], "4": []}
        for user, item, label in ROWS:
            if label == number:
                lists[str(user)].append(item)
        (folder / f"{part}.json").write_text(json.dumps(lists))
    return folder


def table(folder: Path, text: str | bytes | None = None, name: str = "interactions.csv") -> Path:
    rows = [f"{user},{item},{part}\n" for user, item, part in ROWS]
    text = "user,item,split\n" + "".join(rows) if text is None else text
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def make(kind: str, folder: Path) -> Path:
    if kind == "mmrec":
        return mmrec(folder)
    if kind == "mmrec_file":
        return mmrec(folder) / "baby.inter"
    if kind == "recbole":
        return mmrec(folder, "user_id:token\titem_id:token\trating:float\ttimestamp:float\tx_label:float\n")
    if kind.startswith("lattice"):
        arrays(folder)
        root = lattice(folder / "5-core" if kind != "lattice_flat" else folder)
        return root if kind == "lattice_inside" else folder
    if kind == "table_npz":
        np.savez(folder / "features.npz", text=TEXT, image=IMAGE)
        return table(folder)
    if kind == "table_npy":
        np.save(folder / "image.npy", IMAGE)
        np.save(folder / "text_feat.npy", TEXT)
        return table(folder)
    arrays(folder)
    frame = pd.DataFrame(ROWS, columns=["user_id", "item_id", "split"])
    if kind == "table_words":
        frame["split"] = frame["split"].map({0: "train", 1: "valid", 2: "TEST"})
        frame.to_csv(folder / "interactions.tsv", sep="\t", index=False)
    elif kind == "table_gz":
        (folder / "interactions.csv.gz").write_bytes(gzip.compress(frame.to_csv(index=False).encode("utf-8-sig")))
    else:
        frame.astype({"item_id": "float64"}).to_parquet(folder / "interactions.parquet")
    return folder


KINDS = ["mmrec", "mmrec_file", "recbole", "lattice", "lattice_flat", "lattice_inside", "table_npz", "table_npy",
         "table_words", "table_gz", "table_parquet"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_interactions_and_rows_of_features(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = read_files(make(kind, tmp_path))
    assert data.split is not None and data.split.dtype == np.int8
    assert data.user_labels.tolist() == [0, 2, 4] and data.item_labels.tolist() == [0, 1, 2, 3]
    users = data.user_labels[data.user_ids].tolist()
    assert sorted(zip(users, data.item_ids.tolist(), data.split.tolist(), strict=True)) == sorted(ROWS)
    assert data.user_ids.dtype == data.item_ids.dtype == np.int64
    assert list(data.features) == ["image", "text"]
    assert all(array.dtype == np.float32 for array in data.features.values())
    np.testing.assert_array_equal(data.features["image"], IMAGE)
    np.testing.assert_array_equal(data.features["text"], TEXT)
    assert "1 of 4 items have no interaction" in caplog.text
    assert data.images is None and data.item_names is None


def test_without_a_split_column_there_is_no_split(tmp_path: Path) -> None:
    (tmp_path / "ml.inter").write_text("user_id:token\titem_id:token\n1\t7\n3\t9\n")
    data = read_files(tmp_path, "mmrec")
    assert data.split is None and data.features == {}
    assert data.item_labels.tolist() == [7, 9] and data.item_ids.tolist() == [0, 1]


def test_ids_without_features_are_sorted_as_numbers_or_as_texts(tmp_path: Path) -> None:
    data = read_files(table(tmp_path, "user_id,item_id\nbob,10\nal,9\nbob,100\n"))
    assert data.user_labels.tolist() == ["al", "bob"] and data.user_ids.tolist() == [1, 0, 1]
    assert data.item_labels.tolist() == [9, 10, 100] and data.item_ids.tolist() == [1, 0, 2]
    data = read_files(table(tmp_path, "user_id,item_id\nNA,010\nal,9\n"))
    assert data.item_labels.tolist() == ["010", "9"] and data.user_labels.tolist() == ["NA", "al"]


def test_a_list_of_items_gives_text_ids_their_rows_and_titles(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", IMAGE)
    table(tmp_path, "user,item\nu,b\nu,a\nv,d\n")
    (tmp_path / "items.csv").write_text("title,item\nDee,d\nAy,a\n,c\n007,b\n")
    data = read_files(tmp_path)
    assert data.item_labels.tolist() == ["d", "a", "c", "b"] and data.item_ids.tolist() == [3, 1, 0]
    assert data.item_names == ["Dee", "Ay", "", "007"]
    np.testing.assert_array_equal(data.features["image"], IMAGE)


@pytest.mark.parametrize(
    ("items", "labels", "names", "item_ids"),
    [
        ("item,title\n2,C\n0,A\n1,B\n", [0, 1, 2], ["A", "B", "C"], [1, 2]),
        ("title\nA\nB\nC\n", [0, 1, 2], ["A", "B", "C"], [1, 2]),
        ("item\n2\n9\n1\n", [2, 9, 1], None, [2, 0]),
        ("item\n2\nx\n1\n", ["2", "x", "1"], None, [2, 0]),
    ],
    ids=["numbers", "titles alone", "gaps", "texts"],
)
def test_a_list_of_items_is_the_catalogue(
    tmp_path: Path, items: str, labels: list[Any], names: list[str] | None, item_ids: list[int]
) -> None:
    table(tmp_path, "user,item\nu,1\nu,2\n")
    (tmp_path / "items.csv").write_text(items)
    data = read_files(tmp_path)
    assert data.item_labels.tolist() == labels and data.item_names == names
    assert data.item_ids.tolist() == item_ids


def test_a_table_alone_is_read_without_its_neighbours_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrays(tmp_path)
    with caplog.at_level(logging.INFO):
        data = read_files(table(tmp_path, name="mine.csv") / "mine.csv")
    assert data.features == {} and data.num_items == 3
    assert "without image_feat.npy, text_feat.npy beside it" in caplog.text


def pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def raw_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def truncated(path: Path) -> None:
    np.save(path, np.zeros((4, 9)))
    path.write_bytes(path.read_bytes()[:-20])


def archive_as_npy(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    path.with_suffix(".npz").rename(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled, r"text_feat\.npy is pickled.*Convert it"),
        (raw_pickle, r"text_feat\.npy is pickled.*Convert it"),
        (truncated, r"text_feat\.npy is truncated or no numpy file"),
        (lambda path: path.write_bytes(b""), r"text_feat\.npy is truncated or no numpy file"),
        (archive_as_npy, r"text_feat\.npy is an archive by numpy\.savez, expected"),
        (
            lambda path: np.save(path, np.zeros(4)),
            r"text_feat\.npy: modality 'text' has the shape \(4,\), expected two",
        ),
        (lambda path: np.save(path, np.zeros((4, 0))), r"modality 'text' has the shape \(4, 0\)"),
        (lambda path: np.save(path, np.full((4, 2), "x")), r"modality 'text' has the type <U1, expected numbers"),
        (lambda path: np.save(path, np.zeros((3, 2))), r"'image' has 4 .*'text' has 3 .*expected one row an item"),
    ],
    ids=["pickled", "pickle", "truncated", "empty", "archive", "one_dimension", "no_column", "words", "rows"],
)
def test_a_wrong_feature_file_is_one_clear_error(tmp_path: Path, spoil: Any, message: str) -> None:
    mmrec(tmp_path)
    spoil(tmp_path / "text_feat.npy")
    with pytest.raises(ValueError, match=message):
        read_files(tmp_path)


def test_a_wrong_archive_is_one_clear_error(tmp_path: Path) -> None:
    path = table(tmp_path) / "features.npz"
    np.savez(path, text=TEXT, image=np.array([None] * 4))
    with pytest.raises(ValueError, match=r"features\.npz key 'image' is pickled.*Convert it"):
        read_files(tmp_path)
    np.savez(path, text=TEXT)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"features\.npz is truncated or no numpy file .*copy it again"):
        read_files(tmp_path)
    with path.open("wb") as file:
        np.save(file, TEXT)
    with pytest.raises(ValueError, match=r"features\.npz is one array by numpy\.save, expected"):
        read_files(tmp_path)
    np.savez(path, text=TEXT)
    np.save(tmp_path / "text.npy", TEXT)
    with pytest.raises(ValueError, match=r"modality 'text' is in .*text\.npy and in .*features\.npz: remove one"):
        read_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user,item\nu,1\nu,\n", r"interactions\.csv line 3: item is empty"),
        ("user,item\n-1,1\n2,1\n", r"line 2: user -1 is negative"),
        ("user,item\n1,0\n2,-7\n", r"line 3: item -7 is negative"),
        ("user,movie\nu,1\n", r"no column 'item' or 'item_id', only 'user', 'movie'"),
        ("user,user_id,item\nu,u,1\n", r"has 'user' and 'user_id', expected one column for the user"),
        ("user,item,split\nu,1,0\nu,2,3\n", r"line 3: split 3, expected .*validation"),
        ("user,item,split\nu,1,0\nu,2,\n", r"line 3: split nan, expected"),
        ("", r"interactions\.csv is empty"),
        ("user,item\n", r"has no rows"),
        ("user,item\nu,1\nu,2,3\n", r"line 3.*as many fields as the header"),
        ("user,item\nu,1\n\nv,2\n", r"line 3: user is empty"),
        ("user,item\nu,1\nu\n", r"line 3: item is empty"),
        (b"user,item\nu,1\n\xff,2\n", r"line 3: byte 0xff is not UTF-8"),
    ],
    ids=["missing", "negative_user", "negative_item", "column", "two_columns", "split", "no_split", "empty", "header",
         "long", "blank", "fields", "utf8"],
)  # fmt: skip
def test_a_wrong_table_is_one_clear_error(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_files(table(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"0": [1, 2', r"val\.json line 1 column \d+: no JSON"),
        (b"", r"val\.json is empty, expected an object"),
        (b"[[1]]", r"val\.json holds a list, expected an object"),
        (b'{"0": 3}', r"val\.json key '0': 3 is not a list"),
        (b'{"0": [1, 2.5]}', r"val\.json key '0': item 2\.5 is not an integer"),
        (b'{"0": [true]}', r"val\.json key '0': item True is not an integer"),
        (b'{"0": [1], "0": [2]}', r"val\.json: key '0' is there twice"),
        (b'{"0": [1],\n "2": [-4]}', r"val\.json key '2': item -4 is negative"),
        (b'{"0": []}', r"val\.json has no item in any list"),
        (b'{"\xff": [1]}', r"val\.json line 1: byte 0xff is not UTF-8"),
        (b'{"0": [1], "2": [44]}', r"val\.json key '2': item 44 is none of the 4 of the features"),
    ],
    ids=["cut", "empty", "list", "scalar", "float", "bool", "twice", "negative", "nothing", "utf8", "range"],
)
def test_a_wrong_json_file_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    arrays(tmp_path)
    lattice(tmp_path)
    (tmp_path / "val.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_files(tmp_path)


def test_ids_beyond_the_features_are_an_error_with_their_range_and_number(tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", TEXT)
    table(tmp_path, "user,item\nu,3\nu,4\nu,6\n")
    message = r"line 3: item 4 is none of the 4 of the features.*2 of the 3 items of the file, which run from 3 to 6"
    with pytest.raises(ValueError, match=message):
        read_files(tmp_path)


def test_text_ids_with_features_need_a_list_of_items(tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", TEXT)
    table(tmp_path, "user,item\nu,1\nu,b7\n")
    with pytest.raises(ValueError, match=r"item 'b7' is a text.*which row is whose.*items\.csv"):
        read_files(tmp_path)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("item\n1\n2\n1\n3\n", r"items\.csv line 4: item 1 is there before"),
        ("item\n0\n1\n2\n", r"items\.csv lists 3 items and the features \('text'\) have 4 rows"),
        ("item\n0\n1\n2\n4\n", r"interactions\.csv line 2: item 3 is none of the 4 of .*items\.csv"),
        ("name\nA\n", r"items\.csv has no column 'item' or 'item_id' or 'title', only 'name'"),
    ],
    ids=["twice", "rows", "unlisted", "column"],
)
def test_a_wrong_list_of_items_is_one_clear_error(tmp_path: Path, items: str, message: str) -> None:
    np.save(tmp_path / "text.npy", TEXT)
    table(tmp_path, "user,item\nu,3\nu,0\n")
    (tmp_path / "items.csv").write_text(items)
    with pytest.raises(ValueError, match=message):
        read_files(tmp_path)


def test_a_text_among_listed_numbers_is_the_one_named(tmp_path: Path) -> None:
    table(tmp_path, "user,item\nu,10\nu,2\nu,x\n")
    (tmp_path / "items.csv").write_text("item\n1\n2\n10\n")
    with pytest.raises(ValueError, match=r"line 4: item x is none of the 3 of .*items\.csv; neither are 1 of the 3"):
        read_files(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_files(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds none of \*\.inter .*train\.json.*interactions"):
        read_files(tmp_path)
    for layout, wanted in (("mmrec", r"\*\.inter"), ("lattice", r"train\.json"), ("table", "interactions")):
        with pytest.raises(FileNotFoundError, match=f"holds no {wanted}"):
            read_files(tmp_path, layout)
    lattice(tmp_path)
    (tmp_path / "test.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.json is missing"):
        read_files(tmp_path)


def test_a_choice_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout must be one of auto, mmrec, lattice, table, got 'csv'"):
        read_files(tmp_path, "csv")
    mmrec(tmp_path)
    table(tmp_path, "user,item\nu,1\n")
    with pytest.raises(ValueError, match="layouts mmrec and table: set layout"):
        read_files(tmp_path)
    assert len(read_files(tmp_path, "mmrec").user_ids) == len(ROWS)
    table(tmp_path, name="interactions.tsv")
    with pytest.raises(ValueError, match=r"interactions\.csv, interactions\.tsv, expected one"):
        read_files(tmp_path, "table")
    (tmp_path / "sports.inter").write_text(MMREC)
    with pytest.raises(ValueError, match=r"baby\.inter, sports\.inter, expected one"):
        read_files(tmp_path, "mmrec")
    (tmp_path / "x.txt").write_text("1 2")
    with pytest.raises(ValueError, match=r"ends in '\.txt', expected \.inter, \.csv"):
        read_files(tmp_path / "x.txt")
    with pytest.raises(ValueError, match=r"name the folder that holds train\.json"):
        read_files(lattice(tmp_path) / "train.json")


@pytest.mark.parametrize("kind", ["inter", "csv", "tsv", "parquet", "json"])
def test_pairs_to_test_on_are_texts_of_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame({"user_id": [7, 7, 3], "item_id": [1, 20, 1]})
    path = tmp_path / f"new.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "json":
        path.write_text('{"7": [1, 20], "3": [1], "5": []}')
    else:
        frame.to_csv(path, sep="," if kind == "csv" else "\t", index=False)
    users, items = read_pairs(path)
    assert users.tolist() == ["7", "7", "3"] and items.tolist() == ["1", "20", "1"]
    assert users.dtype.kind == items.dtype.kind == "U"


def test_pairs_of_a_file_with_a_split_are_its_test_rows(tmp_path: Path) -> None:
    users, items = read_pairs(mmrec(tmp_path) / "baby.inter")
    assert users.tolist() == ["2"] and items.tolist() == ["1"]
    table(tmp_path, "user,item,split\n1,2,train\n", "none.csv")
    with pytest.raises(ValueError, match=r"none\.csv: no row of 1 is of the split 2"):
        read_pairs(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match=r"lost\.csv does not exist"):
        read_pairs(tmp_path / "lost.csv")
