"""A submission comes back as it was written, and a wrong line is named."""

from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.summary_mrc.submission import read_submission, write_submission


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_lines_are_row_and_option_without_a_header(kind: type, tmp_path: Path) -> None:
    path = write_submission(kind([3, 0, 4]), tmp_path / "new" / "subtask1.csv")
    assert path.read_bytes() == b"0,3\n1,0\n2,4\n"
    assert read_submission(path) == [3, 0, 4]


def test_a_later_file_replaces_an_earlier_one(tmp_path: Path) -> None:
    write_submission([1] * 30, tmp_path / "a.csv")
    write_submission([2], str(tmp_path / "a.csv"))
    assert read_submission(str(tmp_path / "a.csv")) == [2]


def test_a_mark_windows_line_ends_blanks_and_spaces_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf0,3\r\n\r\n1 , 2\r\n 2,0")
    assert read_submission(path) == [3, 2, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"row_index,predicted_index\n0,1\n", "line 1: got 'row_index,predicted_index', .* without a header"),
        (b"0,1\n1,2.0\n", "line 2: got '1,2.0'"),
        (b"0,1\n1\n", "line 2: got '1'"),
        (b"0,1\n1,2,3\n", "line 2: got '1,2,3'"),
        (b"0,-1\n", "line 1: got '0,-1'"),
        ("0,\u0661\n".encode(), "line 1"),
        (b"0,1\n\n2,1\n", "line 3: got row 2 where row 1 was expected"),
        (b"0,1\n0,1\n", "line 2: got row 0 where row 1 was expected"),
        (b"1,1\n2,1\n", "line 1: got row 1 where row 0 was expected"),
        (b"0,4\n1,5\n", r"line 2: predicted index 5 out of range 0..4 \(are they counted from 1"),
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"0,1\n1,\xff\n", r"not UTF-8 text \(byte 6\)"),
    ],
)
def test_wrong_content_is_refused_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        read_submission(path)
    assert str(info.value).startswith(str(path))


def test_range_follows_the_number_of_options(tmp_path: Path) -> None:
    path = write_submission([0, 3], tmp_path / "a.csv")
    assert read_submission(path, num_options=4) == [0, 3]
    with pytest.raises(ValueError, match=r"line 2: predicted index 3 out of range 0\.\.2"):
        read_submission(path, num_options=3)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: .*row_index,predicted_index"):
        read_submission(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([], "no prediction"),
        ([1, 2, -100], "row 2 is -100"),
        ([1.0, 2.0], "float32"),
        ([True, False], "bool"),
        (torch.zeros(2, 5).long(), r"\(2, 5\)"),
    ],
    ids=["none", "negative", "fractions", "bools", "scores"],
)
def test_predictions_that_are_no_indices_are_refused_before_a_file_is_made(
    predictions: list[int] | torch.Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_submission(predictions, tmp_path / "a.csv")
    assert not list(tmp_path.iterdir())
