"""Lines of text files, plain or compressed."""

from __future__ import annotations

import gzip
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_lines(path: Path, expected: str) -> Iterator[tuple[int, str]]:
    """The lines of a text that are not blank, with their numbers from 1.

    Args:
        path: A UTF-8 text, unpacked if its name ends in `.gz`.
        expected: What the file should hold, for errors.

    Yields:
        Line number, and the line without its end.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, damaged, or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is not a file' if path.exists() else 'does not exist'}, expected {expected}")
    number, empty = 0, True
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    empty = False
                    yield number, text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}), expected {expected}") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is truncated or no gzip file ({error}): copy it again") from error
    if empty:
        raise ValueError(f"{path} is empty, expected {expected}")
