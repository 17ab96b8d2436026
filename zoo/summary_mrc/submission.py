"""The shared task's submission file: a line `row_index,predicted_index` for each question, without a header."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

_LINE = re.compile(r"\s*([0-9]+)\s*,\s*([0-9]+)\s*", re.ASCII)
_FORM = "'row_index,predicted_index' in whole numbers from 0, without a header"


def write_submission(predictions: Sequence[int] | Tensor, path: str | Path) -> Path:
    """Write a submission file; folders are made where they are missing.

    Args:
        predictions: int64 `(questions,)`, the option chosen for each question from 0, in the order of the test file.
        path: The file, replaced if it is there.

    Returns:
        The path.

    Raises:
        ValueError: If there is no prediction, or if one is no whole number from 0.
    """
    if len(predictions) == 0:
        raise ValueError("there is no prediction to write; expected one for each question")
    choices = torch.as_tensor(predictions).detach().cpu()
    if choices.ndim != 1 or choices.dtype == torch.bool or choices.is_floating_point() or choices.is_complex():
        raise ValueError(
            f"predictions must be whole numbers of shape (questions,), got {choices.dtype} {tuple(choices.shape)}"
        )
    for row, choice in enumerate(choices.tolist()):
        if choice < 0:
            raise ValueError(f"the prediction of row {row} is {choice}; expected the index of an option, from 0")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{row},{choice}\n" for row, choice in enumerate(choices.tolist()))
    path.write_text(text, encoding="utf-8", newline="")
    return path


def read_submission(path: str | Path, num_options: int = 5) -> list[int]:
    """The option chosen for each question, in the order of the rows.

    A byte order mark, Windows line ends and blank lines are accepted.

    Args:
        path: A submission file.
        num_options: Options of each question.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty or no UTF-8 text, or if a line has another form, is out of order, or names an
            option that does not exist; the text names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such submission file; each of its lines is {_FORM}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); each line is {_FORM}") from error
    choices: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path}, line {number}: got {line[:80]!r}, expected {_FORM}")
        row, choice = int(match[1]), int(match[2])
        if row != len(choices):
            raise ValueError(
                f"{path}, line {number}: got row {row} where row {len(choices)} was expected; "
                "each row must stand there once, in order from 0"
            )
        if choice >= num_options:
            raise ValueError(
                f"{path}, line {number}: predicted index {choice} out of range 0..{num_options - 1} "
                "(are they counted from 1?)"
            )
        choices.append(choice)
    if not choices:
        raise ValueError(f"{path}: the file is empty; each line is {_FORM}")
    return choices
