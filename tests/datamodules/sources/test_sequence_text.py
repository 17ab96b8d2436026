from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import numpy as np
import pytest

from datamodules import SequenceData
from datamodules.sources.sequence_files import read_path
from datamodules.sources.sequence_text import read_lines, read_sequences

if TYPE_CHECKING:
    from pathlib import Path

ITEMS = "7 1 2 3 4\n9 4 3 2 1 5\n"
TIMES = "7 10 20 30 40\n9 5 5 6 7 8\n"


def pair(folder: Path, items: str | bytes = ITEMS, times: str | bytes = TIMES) -> tuple[Path, Path]:
    paths = folder / "x_item.txt", folder / "x_time.txt"
    for path, content in zip(paths, (items, times), strict=True):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return paths


def test_reads_the_two_files_line_by_line(tmp_path: Path) -> None:
    data = read_sequences(*pair(tmp_path))
    assert data.item_ids.tolist() == [1, 2, 3, 4, 4, 3, 2, 1, 5]
    assert data.item_ids.dtype == np.int32
    assert data.timestamps is not None
    assert data.timestamps.tolist() == [10, 20, 30, 40, 5, 5, 6, 7, 8]
    assert data.offsets.tolist() == [0, 4, 9]
    assert data.user_labels.tolist() == [7, 9]
    assert data.item_labels.tolist() == [1, 2, 3, 4, 5]


def test_equals_a_plain_reader_on_random_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [[user, *rng.integers(1, 10**9, rng.integers(1, 9)).tolist()] for user in rng.permutation(50).tolist()]
    blanks = [" ", "  ", "\t"]
    text = "".join(blanks[rng.integers(3)].join(map(str, row)) + [" ", ""][rng.integers(2)] + "\n" for row in rows)
    (tmp_path / "a.txt").write_text(text)
    lines = read_lines(tmp_path / "a.txt")
    assert lines.heads.tolist() == [row[0] for row in rows]
    assert lines.values.tolist() == [value for row in rows for value in row[1:]]
    assert np.diff(lines.offsets).tolist() == [len(row) - 1 for row in rows]


@pytest.mark.parametrize(
    "content",
    [
        ITEMS.replace("\n", "\r\n").encode(),
        ITEMS.replace("\n", " \n").encode(),
        ITEMS.rstrip().encode(),
        (ITEMS + "\n  \n").encode(),
        b"\xef\xbb\xbf" + ITEMS.encode(),
        ITEMS.replace(" ", "\t").encode(),
    ],
    ids=["windows", "blanks at line ends", "no last newline", "empty lines at the end", "byte order mark", "tabs"],
)
def test_harmless_variations_are_accepted(tmp_path: Path, content: bytes) -> None:
    data = read_sequences(*pair(tmp_path, content))
    assert data.item_ids.tolist() == [1, 2, 3, 4, 4, 3, 2, 1, 5]
    assert data.user_labels.tolist() == [7, 9]


def test_gzip_is_read_and_a_truncated_one_refused(tmp_path: Path) -> None:
    packed = gzip.compress((ITEMS * 1).encode())
    path = tmp_path / "a.txt.gz"
    path.write_bytes(packed)
    assert read_lines(path).heads.tolist() == [7, 9]
    path.write_bytes(packed[:-9])
    with pytest.raises(ValueError, match=r"a\.txt\.gz is truncated or no gzip file"):
        read_lines(path)
    path.write_bytes(ITEMS.encode())
    with pytest.raises(ValueError, match=r"a\.txt\.gz is truncated or no gzip file"):
        read_lines(path)


BAD_ITEMS = [
    (b"", r"x_item\.txt is empty, expected one line per user"),
    (b" \n\n", r"x_item\.txt is empty"),
    (b"7 1 2 3 4\n\n9 4 3 2 1 5\n", r"x_item\.txt line 2 is blank"),
    (b"7 1 2 3 4\n9\n", r"x_item\.txt line 2 has user 9 and nothing after it"),
    (b"user items\n7 1 2 3 4\n", r"x_item\.txt line 1: 'user' is not an integer.*without a header"),
    (b"7 1 2 3 4\n9 4 3 2.5 1 5\n", r"x_item\.txt line 2: '2\.5' is not an integer"),
    (b"7 1 2 3 4\n9 4 3 2-1 5\n", r"x_item\.txt line 2: '2-1' is not an integer"),
    (b"7 1 2 3 4\n9 4 3 - 1 5\n", r"x_item\.txt line 2: '-' is not an integer"),
    (b"7 1 2 3 4\n9 4 caf\xe9 1 5\n", r"x_item\.txt line 2: byte 0xe9 is not UTF-8 text; save the file as UTF-8"),
    ("7 1 2 3 4\n9 4 \u00e9 1 5\n".encode(), r"x_item\.txt line 2: '\u00e9' is not an integer"),
    (b"7 1 2 3 4\n9 4 3 12345678901234567890 1\n", r"line 2: '12345678901234567890' has more than 18 digits"),
    (b"7 1 2 3 4\n9 4 3 2 1 5\n7 1 2 3 4\n", r"x_item\.txt line 3: user 7 is already in line 1"),
    (b"7 1 2 3 4\n9 4 3 0 1 5\n", r"line 2 \(user 9\), value 3: item id 0; ids must be 1\.\.V; 0 is padding.*reindex"),
    (b"7 1 2 3 4\n9 4 -3 2 1 5\n", r"line 2 \(user 9\), value 2: item id -3; ids must be 1\.\.V"),
    (b"7 1 2 3 4\n9 4 3 2 1 8\n", r"line 2 \(user 9\), value 5: item id 8, .* only 5 items \(5 is missing\).*reindex"),
]


@pytest.mark.parametrize(("content", "message"), BAD_ITEMS, ids=range(len(BAD_ITEMS)))
def test_a_bad_item_file_is_refused_with_line_and_value(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sequences(pair(tmp_path, content)[0], None)


BAD_TIMES = [
    (
        "7 10 20 30 40\n8 5 5 6 7 8\n",
        r"x_item\.txt and x_time\.txt differ in line 2: user 9 vs 8; .*org_rank",
    ),
    ("9 5 5 6 7 8\n7 10 20 30 40\n", r"differ in line 1: user 7 vs 9"),
    ("7 10 20 30 40\n9 5 5 6 7\n", r"differ in line 2 \(user 9\): 5 items vs 4 times"),
    ("7 10 20 30 40\n", r"x_item\.txt has 2 lines and x_time\.txt 1"),
    ("7 10 20 30 40\n9 5 5 6 7 3\n", r"x_time\.txt line 2 \(user 9\), value 5: time 3 comes after 7.*sort=True"),
    ("7 -10 20 30 40\n9 5 5 6 7 8\n", r"x_time\.txt line 1 \(user 7\), value 1: time -10 is negative"),
    (
        "7 10 20 30 40\n9 5 5 6 7 1400000000000\n",
        r"x_time\.txt line 2 \(user 9\), value 5: time 1400000000000 looks like milliseconds.*divide by 1000",
    ),
    ("7 10 20 30 40\n9 5 5 6 7 8.5\n", r"x_time\.txt line 2: '8\.5' is not an integer"),
]


@pytest.mark.parametrize(("content", "message"), BAD_TIMES, ids=range(len(BAD_TIMES)))
def test_a_bad_time_file_is_refused_with_line_and_value(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sequences(*pair(tmp_path, ITEMS, content))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        SequenceData(path=str(tmp_path / "nowhere.txt")).setup("fit")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_lines(tmp_path)
    items, _ = pair(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lost\.txt does not exist"):
        SequenceData(path=str(items), time_path=str(tmp_path / "lost.txt")).setup("fit")


def test_reindex_keeps_the_old_ids_as_labels(tmp_path: Path) -> None:
    items, _ = pair(tmp_path, "7 100 0 30 4\n9 4 30 100 5\n")
    data = SequenceData(path=str(items), time_path=None, reindex=True)
    (items.parent / "x_time.txt").unlink()
    assert data.item_labels == ["", "0", "4", "5", "30", "100"]
    assert data.sequences.item_ids.tolist() == [5, 1, 4, 2, 2, 4, 5, 3]


def test_sort_orders_items_with_their_times_and_keeps_ties(tmp_path: Path) -> None:
    items, _ = pair(tmp_path, "7 1 2 3 4\n9 4 3 2 1 5\n", "7 40 30 30 10\n9 5 5 6 7 8\n")
    data = SequenceData(path=str(items), sort=True)
    assert data.sequences.item_ids.tolist() == [4, 2, 3, 1, 4, 3, 2, 1, 5]
    assert data.sequences.timestamps.tolist() == [10, 30, 30, 40, 5, 5, 6, 7, 8]


def test_the_time_file_beside_is_found_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items, times = pair(tmp_path)
    columns = ("user_id", "item_id", "timestamp")
    assert read_path(items, None, columns, False, False, False).timestamps is not None
    (tmp_path / "x_time.txt.gz").write_bytes(gzip.compress(times.read_bytes()))
    times.unlink()
    assert read_path(items, None, columns, False, False, False).timestamps is not None
    (tmp_path / "x_time.txt.gz").unlink()
    assert read_path(items, None, columns, False, False, False).timestamps is None
    assert "no time file" in caplog.text
