from __future__ import annotations

import gzip
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from datamodules.sources import sequence_tables
from datamodules.sources.task_tables import Encoding, Table, TaskColumns, parse, read_table, text_codes

if TYPE_CHECKING:
    from pathlib import Path

CSV = '''city,code,height,click,stars,spent,who,part
Rome,007,1.5,1,0,10,u1,train
Oslo,NA,,0,2,-3.5,u2,train
Rome,7,2.5,,1,,u1,validation
"Bonn, ""B""",,4,1,2,1e3,u3,test
,007,-1,0,0,0,u2,train
'''

COLUMNS = TaskColumns(
    ("city", "code"),
    ("height",),
    (("click", "binary"), ("stars", "multiclass"), ("spent", "regression")),
    "who",
    "part",
)


def write(folder: Path, text: str | bytes = CSV, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def check(table: Table) -> None:
    parsed = parse(table, COLUMNS)
    city, code = ([str(labels[k]) for k in codes] for codes, labels in parsed.categories)
    assert city == ["Rome", "Oslo", "Rome", 'Bonn, "B"', ""]
    assert code == ["007", "NA", "7", "", "007"]
    np.testing.assert_equal(parsed.numbers[:, 0], [1.5, np.nan, 2.5, 4, -1])
    np.testing.assert_equal(parsed.targets["click"], [1, 0, np.nan, 1, 0])
    np.testing.assert_equal(parsed.targets["stars"], [0, 2, 1, 2, 0])
    np.testing.assert_equal(parsed.targets["spent"], [10, -3.5, np.nan, 1e3, 0])
    assert parsed.users is not None and parsed.parts is not None
    assert parsed.users[0] == parsed.users[2] != parsed.users[1] == parsed.users[4]
    assert parsed.parts.tolist() == [0, 0, 1, 2, 0]


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "windows", "bom", "no end", "blank end", "parquet", "frame"])
def test_every_way_in_gives_the_same_values(tmp_path: Path, kind: str) -> None:
    texts = ["city", "code", "who", "part"]
    read: dict[str, Any] = {"dtype": dict.fromkeys(texts, "str"), "keep_default_na": False, "na_values": [""]}
    frame = pd.read_csv(write(tmp_path), **read)
    if kind == "frame":
        frame.index = pd.Index([5, 5, 1, 2, 9])  # what a selection leaves behind
        return check(Table(frame, "frame"))
    if kind == "parquet":
        path = tmp_path / "t.parquet"
        frame.to_parquet(path)
    elif kind == "tsv":
        path = write(tmp_path, frame.to_csv(index=False, sep="\t"), "t.tsv")
    elif kind == "csv.gz":
        path = write(tmp_path, gzip.compress(CSV.encode()), "t.csv.gz")
    else:
        path = write(
            tmp_path,
            {
                "csv": CSV.encode(),
                "windows": CSV.replace("\n", "\r\n").encode(),
                "bom": b"\xef\xbb\xbf" + CSV.encode(),
                "no end": CSV.rstrip().encode(),
                "blank end": CSV.encode() + b"\n  \r\n\n",
            }[kind],
        )
    return check(read_table(path, COLUMNS))


@pytest.mark.parametrize("block", [1, 5, 64, 1 << 24])
@pytest.mark.parametrize("quoted", [False, True])
def test_lines_are_counted_right_wherever_a_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, quoted: bool
) -> None:
    monkeypatch.setattr(sequence_tables, "_BLOCK", block)
    text = CSV if quoted else CSV.replace('"Bonn, ""B"""', "Bonn")
    assert len(read_table(write(tmp_path, text + "\n\n"), COLUMNS).frame) == 5
    for broken, message in (
        (text + "a,b,1\n", r"t\.csv line 7 has 3 fields separated by ',', expected 8"),
        (text + "a,b,1,1,1,1,u,test,9\n", r"t\.csv line 7 has 9 fields"),
        (text + "\n" + text.splitlines()[1] + "\n", r"t\.csv line 7 is blank"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(write(tmp_path, broken), COLUMNS)
    with pytest.raises(ValueError, match=r"t\.csv line 3: byte 0xff is not UTF-8"):
        read_table(write(tmp_path, text.encode().replace(b"Oslo", b"\xff")), COLUMNS)


def row(**cells: str) -> str:
    names = CSV.splitlines()[0].split(",")
    given = dict(zip(names, ["Rome", "1", "1", "1", "1", "1", "u", "train"], strict=True)) | cells
    return CSV + ",".join(given.values()) + "\n"


BAD: list[tuple[str | bytes, str]] = [
    ("", r"t\.csv is empty, expected a header"),
    ("\n\n", r"t\.csv is empty"),
    (CSV.splitlines()[0] + "\n", r"t\.csv has no rows, only a header"),
    (CSV.replace("height", "width", 1), r"t\.csv has no column 'height', only 'city', 'code', 'width'"),
    (CSV.replace("city,code", "city,city", 1), r"t\.csv line 1: column 'city' is there twice"),
    (row(click="2"), r"t\.csv line 7: click 2, expected 0 or 1"),
    (row(click="0.5"), r"t\.csv line 7: click 0\.5, expected 0 or 1"),
    (row(click="yes"), r"t\.csv line 7: click 'yes' is not a number"),
    (row(stars="-1"), r"t\.csv line 7: stars -1, expected a class from 0"),
    (row(stars="1.5"), r"t\.csv line 7: stars 1\.5, expected a class"),
    (row(stars="4"), r"t\.csv line 7: stars 4, but no row has class 3"),
    (row(height="tall"), r"t\.csv line 7: height 'tall' is not a number"),
    (row(height="NA"), r"t\.csv line 7: height 'NA' is not a number"),
    (row(height="inf"), r"t\.csv line 7: height inf is not a finite number"),
    (row(spent="1e999"), r"t\.csv line 7: spent inf is not a finite number"),
    (row(who=""), r"t\.csv line 7: who is empty"),
    (row(part="dev"), r"t\.csv line 7: part 'dev', expected one of train, validation, test"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_table_is_refused_with_line_and_value(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(read_table(write(tmp_path, text), COLUMNS), COLUMNS)


def test_damaged_or_unknown_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pd.read_csv(write(tmp_path)).to_parquet(path)
    other = TaskColumns(("town",), (), (("click", "binary"),))
    with pytest.raises(ValueError, match=r"t\.parquet has no column 'town', only 'city'"):
        read_table(path, other)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.parquet is truncated or no Parquet file"):
        read_table(path, COLUMNS)
    with pytest.raises(ValueError, match=r"t\.csv\.gz is truncated or no gzip file"):
        read_table(write(tmp_path, gzip.compress(CSV.encode() * 50)[:-9], "t.csv.gz"), COLUMNS)
    with pytest.raises(ValueError, match=r"u\.csv\.gz is truncated or no gzip file"):
        read_table(write(tmp_path, CSV, "u.csv.gz"), COLUMNS)
    with pytest.raises(FileNotFoundError, match=r"gone\.csv does not exist"):
        read_table(tmp_path / "gone.csv", COLUMNS)
    with pytest.raises(ValueError, match=r"t\.xls ends in '\.xls', expected \.csv"):
        read_table(write(tmp_path, CSV, "t.xls"), COLUMNS)


def test_a_frame_with_times_or_a_repeated_column_is_refused() -> None:
    columns = TaskColumns((), ("x",), (("y", "binary"),))
    frame = pd.DataFrame({"x": pd.to_datetime(["2020-01-01"]), "y": [1]})
    with pytest.raises(ValueError, match="frame row 0: x 2020-01-01 00:00:00 is a time, expected a number"):
        parse(Table(frame, "frame"), columns)
    with pytest.raises(ValueError, match="frame: column 'x' is there twice"):
        parse(Table(pd.DataFrame([[1, 2, 1]], columns=["x", "x", "y"]), "frame"), columns)
    with pytest.raises(ValueError, match="frame has no rows"):
        parse(Table(pd.DataFrame({"x": [], "y": []}), "frame"), columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((("a",), ("a",), (("y", "binary"),)), "'a' is used twice: in categorical_columns and in numeric_columns"),
        ((("a", "a"), (), (("y", "binary"),)), "'a' is used twice: in categorical_columns and in categorical_columns"),
        ((("a",), (), (("a", "binary"),)), "'a' is used twice: in categorical_columns and in binary_targets"),
        ((("a",), (), (("y", "binary"), ("y", "regression"))), "'y' is used twice: in binary_targets and in regr"),
        ((("a",), (), (("y", "binary"),), "y"), "'y' is used twice: as user_column and in binary_targets"),
        ((("a",), (), (("y", "binary"),), None, "a"), "'a' is used twice: in categorical_columns and in split_column"),
        ((("a",), (), (("y", "binary"),), "s", "s"), "'s' is used twice: as user_column and in split_column"),
    ],
)
def test_a_column_with_two_roles_is_refused(columns: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskColumns(*columns)


def test_users_may_be_an_input_too() -> None:
    assert TaskColumns(("u",), (), (("y", "binary"),), "u").names == ["u", "y"]


def test_numbers_and_texts_of_the_same_value_are_one_category() -> None:
    for series in (
        pd.Series([7, 12, 7]),
        pd.Series([7.0, 12.0, 7.0]),
        pd.Series(["7", "12", "7"]),
        pd.Series(["7", "12", "7"], dtype="category"),
        pd.Series([7, "12", 7.0], dtype=object),
        pd.array([7, 12, 7], dtype="Int64").to_numpy(dtype=object, na_value=None),
    ):
        codes, labels = text_codes(pd.Series(series))
        assert [labels[k] for k in codes] == ["7", "12", "7"]
    codes, labels = text_codes(pd.Series([7.0, np.nan, 1.5]))
    assert [labels[k] for k in codes] == ["7", "", "1.5"]


def test_encoding_equals_a_plain_loop_over_the_training_rows(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    size = 400
    frame = pd.DataFrame(
        {
            "a": rng.choice(list("abcdefgh"), size, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.03, 0.01, 0.01]),
            "b": rng.integers(0, 90, size),
            "x": rng.normal(3, 5, size),
            "z": rng.integers(0, 1000, size).astype(float) ** 2,
            "y": rng.integers(0, 2, size),
        }
    )
    frame.loc[rng.choice(size, 60, replace=False), ["x", "z"]] = np.nan
    columns = TaskColumns(("a", "b"), ("x", "z"), (("y", "binary"),), log=frozenset({"z"}), clip=1.5)
    parsed = parse(Table(frame, "frame"), columns)
    train = np.sort(rng.choice(size, 250, replace=False))
    encoding = Encoding.fit(parsed, columns, train, min_count=3)
    with caplog.at_level(logging.INFO):
        categories, numbers = encoding.categories(parsed), encoding.numbers(parsed)
    assert categories.dtype == np.int32 and numbers.dtype == np.float32
    zeros = 0
    for k, name in enumerate(("a", "b")):
        seen = [str(frame[name][i]) for i in train]
        vocabulary = sorted({value for value in seen if seen.count(value) >= 3})
        for i in range(size):
            value = str(frame[name][i])
            expected = vocabulary.index(value) + 1 if value in vocabulary else 0
            zeros += expected == 0
            assert categories[i, k] == expected
    assert f"frame: {zeros} of 800 cells are unknown to training, or rare there, get code 0" in caplog.text
    assert "frame: 120 of 800 cells are empty, get the training median (x 60, z 60)" in caplog.text
    for k, name in enumerate(("x", "z")):
        values = [float(np.log(1 + v)) if name == "z" else float(v) for v in frame[name]]
        known = sorted(values[i] for i in train if not np.isnan(values[i]))
        middle = len(known) // 2
        median = known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2
        filled = [median if np.isnan(v) else v for v in values]
        mean = sum(filled[i] for i in train) / len(train)
        std = (sum((filled[i] - mean) ** 2 for i in train) / len(train)) ** 0.5
        expected_column = [max(-1.5, min(1.5, (v - mean) / std)) for v in filled]
        assert max(map(abs, expected_column)) == 1.5
        np.testing.assert_allclose(numbers[:, k], expected_column, atol=1e-6)


def test_a_constant_column_is_zero_and_an_empty_one_is_refused() -> None:
    columns = TaskColumns((), ("x",), (("y", "binary"),))
    parsed = parse(Table(pd.DataFrame({"x": [0.1, 0.1, 0.1, 7], "y": [0, 1, 0, 1]}), "frame"), columns)
    numbers = Encoding.fit(parsed, columns, np.arange(3)).numbers(parsed)
    np.testing.assert_allclose(numbers[:, 0], [0, 0, 0, 6.9], atol=1e-6)
    empty = parse(Table(pd.DataFrame({"x": [np.nan, np.nan, 1], "y": [0, 1, 0]}), "frame"), columns)
    with pytest.raises(ValueError, match="frame: x has no number in any of the 2 training rows"):
        Encoding.fit(empty, columns, np.arange(2))


def test_a_logarithm_of_negative_numbers_is_refused() -> None:
    columns = TaskColumns((), ("x",), (("y", "binary"),), log=frozenset({"x"}))
    with pytest.raises(ValueError, match="frame row 1: x -2, expected 0 or more"):
        parse(Table(pd.DataFrame({"x": [0, -2], "y": [0, 1]}), "frame"), columns)


def test_truth_values_are_labels_and_numbers() -> None:
    columns = TaskColumns((), ("x",), (("y", "binary"),))
    frame = pd.DataFrame({"x": [True, False], "y": np.array([True, None], dtype=object)})
    parsed = parse(Table(frame, "frame"), columns)
    assert parsed.numbers[:, 0].tolist() == [1, 0]
    np.testing.assert_equal(parsed.targets["y"], [1, np.nan])
