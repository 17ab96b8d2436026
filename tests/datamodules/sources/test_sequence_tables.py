from __future__ import annotations

import gzip
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from datamodules import SequenceData
from datamodules.sources.sequence_tables import read_delimited

if TYPE_CHECKING:
    from pathlib import Path

CSV = """user_id,item_id,timestamp,rating
bob,B01,300,5
al,007,20,1
bob,A9,100,2
al,NA,10,3
bob,007,200,4
al,B01,30,1
al,A9,40,5
bob,NA,400,1
"""


def csv(folder: Path, text: str | bytes = CSV, name: str = "log.csv") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def external(data: SequenceData) -> dict[str, list[str]]:
    table = data.sequences
    labels = [data.item_labels[i] for i in table.item_ids.tolist()]
    bounds = table.offsets.tolist()
    return {user: labels[bounds[k] : bounds[k + 1]] for k, user in enumerate(data.user_labels)}


EXPECTED = {"al": ["NA", "007", "B01", "A9"], "bob": ["A9", "007", "B01", "NA"]}


def test_a_table_is_sorted_by_user_and_time_and_ids_stay_text(tmp_path: Path) -> None:
    data = SequenceData(path=csv(tmp_path))
    assert data.source == "files"
    assert external(data) == EXPECTED
    assert data.sequences.timestamps.tolist() == [10, 20, 30, 40, 100, 200, 300, 400]
    assert data.item_labels == ["", "007", "A9", "B01", "NA"]


@pytest.mark.parametrize("kind", ["tsv", "csv.gz", "parquet", "windows", "bom", "frame", "dates", "renamed"])
def test_every_way_in_gives_the_same_sequences(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame([row.split(",") for row in CSV.split()[1:]], columns=CSV.split()[0].split(","))
    frame["timestamp"] = frame["timestamp"].astype(int)
    options: dict[str, Any] = {}
    if kind == "tsv":
        options["path"] = csv(tmp_path, CSV.replace(",", "\t"), "log.tsv")
    elif kind == "csv.gz":
        options["path"] = csv(tmp_path, gzip.compress(CSV.encode()), "log.csv.gz")
    elif kind == "parquet":
        options["path"] = str(tmp_path / "log.parquet")
        frame.to_parquet(options["path"])
    elif kind == "windows":
        options["path"] = csv(tmp_path, CSV.replace("\n", "\r\n") + "\r\n")
    elif kind == "bom":
        options["path"] = csv(tmp_path, b"\xef\xbb\xbf" + CSV.encode())
    elif kind == "dates":
        frame["timestamp"] = pd.to_datetime(frame["timestamp"], unit="s", utc=True)
        options["path"] = csv(tmp_path, frame.to_csv(index=False))
    elif kind == "renamed":
        renamed = CSV.replace("user_id,item_id,timestamp", "who,what,when")
        options |= {"path": csv(tmp_path, renamed), "user_column": "who", "item_column": "what", "time_column": "when"}
    data = SequenceData.from_dataframe(frame) if kind == "frame" else SequenceData(**options)
    assert external(data) == EXPECTED
    assert data.sequences.timestamps.tolist() == [10, 20, 30, 40, 100, 200, 300, 400]


def test_a_table_without_times_keeps_the_order_of_its_rows(tmp_path: Path) -> None:
    data = SequenceData(path=csv(tmp_path), time_column=None)
    assert data.sequences.timestamps is None
    assert external(data) == {"al": ["007", "NA", "B01", "A9"], "bob": ["B01", "A9", "007", "NA"]}


def test_integer_ids_sort_as_numbers() -> None:
    frame = pd.DataFrame({"user_id": [10] * 4 + [9] * 4, "item_id": [100, 20, 3, 4] * 2, "timestamp": range(8)})
    data = SequenceData.from_dataframe(frame)
    assert data.user_labels == ["9", "10"]
    assert data.item_labels == ["", "3", "4", "20", "100"]
    with pytest.raises(ValueError, match="from_dataframe reads df: remove path="):
        SequenceData.from_dataframe(frame, path="x.csv")


BAD_CSV: list[tuple[str | bytes, str]] = [
    ("", r"log\.csv is empty"),
    ("user_id,item_id,timestamp\n", r"log\.csv has no rows"),
    ("user,item_id,timestamp\na,b,1\n", r"no column 'user_id', only 'user', 'item_id', 'timestamp': set user_column"),
    ("user_id,item_id\na,b\n", r"no column 'timestamp'.*set time_column, or time_column=None"),
    ("user_id,item_id,timestamp\na,b,1\n\na,c,2\n", r"log\.csv line 3: user_id is empty"),
    ("user_id,item_id,timestamp\na,b,1\na,,2\n", r"log\.csv line 3: item_id is empty"),
    ("user_id,item_id,timestamp\na,b,1\na,c\n", r"log\.csv line 3: timestamp is empty"),
    ("user_id,item_id,timestamp\na,b,1\na,c,2,9,9\n", r"log\.csv: .*line 3.*as many fields as the header"),
    ("user_id,item_id,timestamp\na,b,1\na,c,soon\n", r"line 3: timestamp 'soon' is neither Unix seconds nor a date"),
    ("user_id,item_id,timestamp\na,b,1\na,c,2.5\n", r"line 3: timestamp 2\.5 is not an integer"),
    ("user_id,item_id,timestamp\na,b,1\na,c,-2\n", r"line 3: timestamp -2 is negative"),
    ("user_id,item_id,timestamp\na,b,1\na,c,1400000000000\n", r"line 3: timestamp 1400000000000 looks like milli"),
    ("user_id,item_id,timestamp\na,b,1\na,c,2\na,b,1\n", r"line 4: user a, item b, time 1 was there before \(1 such"),
    ("user_id,item_id,timestamp\na,b,1,9\na,c,2,9\n", r"log\.csv: every line has more fields than the header"),
    ("user_id,item_id,timestamp\na,b,1\na,c,2020-01-31\n", r"line 2: timestamp '1' is neither"),
    (b"user_id,item_id,timestamp\na,b,1\na,\xff,2\n", r"log\.csv line 3: byte 0xff is not UTF-8"),
]


@pytest.mark.parametrize(("text", "message"), BAD_CSV, ids=range(len(BAD_CSV)))
def test_a_bad_table_is_refused_with_line_and_value(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceData(path=csv(tmp_path, text)).setup("fit")


def test_damaged_or_unknown_files_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"user_id": ["a"] * 4, "item_id": list("wxyz"), "timestamp": range(4)})
    path = tmp_path / "log.parquet"
    frame.to_parquet(path)
    with pytest.raises(ValueError, match=r"log\.parquet has no column 'who', only 'user_id'"):
        SequenceData(path=str(path), user_column="who").setup("fit")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"log\.parquet is truncated or no Parquet file"):
        SequenceData(path=str(path)).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet does not exist"):
        SequenceData(path=str(tmp_path / "gone.parquet")).setup("fit")
    with pytest.raises(ValueError, match=r"log\.xls ends in '\.xls', expected \.txt, \.csv"):
        SequenceData(path=csv(tmp_path, name="log.xls")).setup("fit")
    with pytest.raises(ValueError, match=r"time_path=t\.txt belongs to a \.txt item file"):
        SequenceData(path=csv(tmp_path), time_path="t.txt").setup("fit")


def test_broken_numbers_in_a_frame_are_refused() -> None:
    frame = pd.DataFrame({"user_id": [1.0, 1.0, 1.5, 1.0], "item_id": list("wxyz"), "timestamp": range(4)})
    with pytest.raises(ValueError, match=r"dataframe row 2: user_id 1\.5 is not an integer or a text"):
        SequenceData.from_dataframe(frame).setup("fit")
    whole = frame.assign(user_id=[1.0] * 4, timestamp=np.array([1.0, 2.0, 3.0, 4.0]))
    assert SequenceData.from_dataframe(whole).user_labels == ["1"]


def test_repeated_rows_are_dropped_on_request_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = CSV + "al,NA,10,3\nal,NA,11,3\n"
    with caplog.at_level(logging.INFO):
        data = SequenceData(path=csv(tmp_path, text), drop_duplicates=True)
        assert external(data)["al"] == ["NA", "NA", "007", "B01", "A9"]
    assert "dropped 1 of 10 rows that repeat another" in caplog.text


def test_texts_of_digits_stay_apart_in_a_delimited_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("code,value\n010,1\n10,2\n1e1,3\n")
    frame, first = read_delimited(tmp_path / "rows.csv", ",", lambda header: header, ["code"])
    assert frame["code"].tolist() == ["010", "10", "1e1"] and first == 2
    assert frame["code"].dtype == "category" and frame["value"].tolist() == [1, 2, 3]
