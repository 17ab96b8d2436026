"""The two-file format of sequential recommenders: one line per user, `user_id a_1 a_2 ... a_m`.

The item file holds item ids, oldest first, the time file Unix seconds; line k of both is the same user. Plain text or
gzip.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.sources.interactions import Interactions, Ints, offsets_of

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

MILLISECONDS = 100_000_000_000  # 1e11 seconds is the year 5138
_DIGITS = 18  # what surely fits into 64 bits

_SPACE = np.zeros(256, dtype=bool)
_SPACE[[9, 10, 13, 32]] = True
_DIGIT = np.zeros(256, dtype=bool)
_DIGIT[48:58] = True


class Lines(NamedTuple):
    """The numbers of a file.

    Attributes:
        heads: int64 `(lines,)`, first number of each line.
        values: int64 `(values,)`, all others, line after line.
        offsets: int64 `(lines + 1,)`.
        path: The file.
    """

    heads: Ints
    values: Ints
    offsets: Ints
    path: Path


def read_bytes(path: Path, expected: str = "one line per user: user_id a_1 a_2 ... a_m") -> bytes:
    """The content of a file, unpacked if its name ends in `.gz`.

    Args:
        path: The file.
        expected: What a file that is empty should have held.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, truncated or no gzip file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is truncated or no gzip file ({error}): copy it again") from error
    if not content.strip():
        raise ValueError(f"{path} is empty, expected {expected}")
    return content


def line_of(content: bytes, position: int) -> int:
    """Line number, from 1, of a byte."""
    return content.count(b"\n", 0, position) + 1


def check_text(path: Path, content: bytes) -> None:
    """Refuse what is no UTF-8.

    Raises:
        ValueError: With the line of the first wrong byte.
    """
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} line {line_of(content, error.start)}: byte 0x{content[error.start]:02x} is not UTF-8 text; "
            "save the file as UTF-8"
        ) from None


def _token_at(content: bytes, position: int) -> str:
    start, end = position, position
    while start > 0 and content[start - 1 : start].strip():
        start -= 1
    while end < len(content) and content[end : end + 1].strip():
        end += 1
    return content[start:end][:40].decode(errors="replace")


def _check_numbers(path: Path, content: bytes, symbols: NDArray[np.uint8]) -> None:
    space, digit = _SPACE[symbols], _DIGIT[symbols]
    minus = symbols == 45
    wrong = ~(space | digit | minus)
    if minus.any():
        # A minus stands before a digit and after a blank.
        wrong[1:] |= minus[1:] & ~space[:-1]
        wrong[:-1] |= minus[:-1] & ~digit[1:]
        wrong[-1] |= minus[-1]
    if wrong.any():
        position = int(np.argmax(wrong))
        check_text(path, content)
        raise ValueError(
            f"{path} line {line_of(content, position)}: {_token_at(content, position)!r} is not an integer; expected "
            "user_id a_1 a_2 ... a_m, integers separated by blanks, without a header"
        )


def _numbers(path: Path, content: bytes, symbols: NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """All numbers of a file and where each begins."""
    _check_numbers(path, content, symbols)
    filled = ~_SPACE[symbols]
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    if (too_long := ends - starts > _DIGITS).any():
        position = int(starts[np.argmax(too_long)])
        raise ValueError(
            f"{path} line {line_of(content, position)}: {_token_at(content, position)!r} has more than {_DIGITS} digits"
        )
    return np.fromstring(content, dtype=np.int64, sep=" "), starts


def read_users(path: Path) -> Ints:
    """Read a list of user ids, one per line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else than integers.
    """
    content = read_bytes(path)
    return _numbers(path, content, np.frombuffer(content, dtype=np.uint8))[0]


def read_lines(path: Path) -> Lines:
    """Read a file of integers, one line per user.

    Windows line ends, blanks at line ends and empty lines at the end of the file are accepted.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty or truncated, or if a line is blank, has a user id only, repeats a user, or
            holds something else than integers.
    """
    content = read_bytes(path).removeprefix(b"\xef\xbb\xbf").rstrip() + b"\n"
    symbols = np.frombuffer(content, dtype=np.uint8)
    numbers, starts = _numbers(path, content, symbols)
    firsts = np.searchsorted(starts, np.flatnonzero(symbols == 10))
    counts = np.diff(firsts, prepend=0)
    if (counts < 2).any():
        line = int(np.argmax(counts < 2))
        what = "is blank" if counts[line] == 0 else f"has user {numbers[firsts[line] - 1]} and nothing after it"
        raise ValueError(f"{path} line {line + 1} {what}, expected user_id a_1 a_2 ... a_m; remove the line")
    head_places = firsts - counts
    heads = numbers[head_places]
    _check_unique(path, heads)
    return Lines(heads, np.delete(numbers, head_places), offsets_of(counts - 1), path)


def _check_unique(path: Path, heads: Ints) -> None:
    order = np.argsort(heads, kind="stable")
    again = heads[order[1:]] == heads[order[:-1]]
    if again.any():
        second = order[1:][again].min()
        first = int(np.argmax(heads == heads[second]))
        raise ValueError(
            f"{path} line {second + 1}: user {heads[second]} is already in line {first + 1}; a user has one line"
        )


def _where(lines: Lines, place: int) -> str:
    line = int(np.searchsorted(lines.offsets, place, side="right"))
    return f"{lines.path} line {line} (user {lines.heads[line - 1]}), value {place - lines.offsets[line - 1] + 1}"


def _check_pair(items: Lines, times: Lines) -> None:
    common = min(len(items.heads), len(times.heads))
    differ = items.heads[:common] != times.heads[:common]
    if differ.any():
        line = int(np.argmax(differ))
        raise ValueError(
            f"{items.path.name} and {times.path.name} differ in line {line + 1}: user {items.heads[line]} vs "
            f"{times.heads[line]}; take both files in the same order (org_rank or var_rank)"
        )
    if len(items.heads) != len(times.heads):
        raise ValueError(
            f"{items.path.name} has {len(items.heads)} lines and {times.path.name} {len(times.heads)}, expected a line "
            "for the same user in both; one of them is incomplete"
        )
    differ = np.diff(items.offsets) != np.diff(times.offsets)
    if differ.any():
        line = int(np.argmax(differ))
        raise ValueError(
            f"{items.path.name} and {times.path.name} differ in line {line + 1} (user {items.heads[line]}): "
            f"{items.offsets[line + 1] - items.offsets[line]} items vs "
            f"{times.offsets[line + 1] - times.offsets[line]} times; every item needs one time"
        )


def _check_times(times: Lines, sort: bool) -> None:
    values = times.values
    if (negative := values < 0).any():
        place = int(np.argmax(negative))
        raise ValueError(f"{_where(times, place)}: time {values[place]} is negative, expected Unix seconds")
    if (large := values > MILLISECONDS).any():
        place = int(np.argmax(large))
        raise ValueError(
            f"{_where(times, place)}: time {values[place]} looks like milliseconds, expected Unix seconds: divide "
            "by 1000"
        )
    back = np.diff(values) < 0
    back[times.offsets[1:-1] - 1] = False  # from one user to the next
    if back.any() and not sort:
        place = int(np.argmax(back)) + 1
        raise ValueError(
            f"{_where(times, place)}: time {values[place]} comes after {values[place - 1]}, expected times that do not "
            "decrease; set sort=True to sort every user by time"
        )


def _catalogue(items: Lines, reindex: bool) -> tuple[NDArray[np.int32], Ints]:
    values = items.values
    if not reindex and (wrong := values < 1).any():
        place = int(np.argmax(wrong))
        raise ValueError(
            f"{_where(items, place)}: item id {values[place]}; ids must be 1..V; 0 is padding. Set reindex=True to "
            "give new ids"
        )
    largest = int(values.max())
    if not reindex and largest <= len(values):
        distinct = int(np.count_nonzero(np.bincount(values)))
        if distinct == largest:
            return values.astype(np.int32), np.arange(1, largest + 1)
    labels, codes = np.unique(values, return_inverse=True)
    if not reindex:
        place = int(np.argmax(values == largest))
        missing = int(np.argmax(labels != np.arange(1, len(labels) + 1))) + 1
        raise ValueError(
            f"{_where(items, place)}: item id {largest}, but the file has only {len(labels)} items ({missing} is "
            "missing); ids must be 1..V; 0 is padding. Set reindex=True to give new ids"
        )
    return (codes + 1).astype(np.int32), labels


def read_sequences(
    item_path: Path, time_path: Path | None, *, reindex: bool = False, sort: bool = False, name: str | None = None
) -> Interactions:
    """Read the item file and the time file.

    Args:
        item_path: Item ids.
        time_path: Unix seconds; None for data without times.
        reindex: Whether ids that are not 1..V get new ones in ascending order, and keep the old ones as labels.
        sort: Whether times that decrease within a line are allowed; the caller sorts.
        name: What the data is called in messages.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed or the two do not fit together.
    """
    items = read_lines(item_path)
    times = None
    if time_path is not None:
        times = read_lines(time_path)
        _check_pair(items, times)
        _check_times(times, sort)
    item_ids, labels = _catalogue(items, reindex)
    return Interactions(
        item_ids,
        None if times is None else times.values,
        items.offsets,
        labels,
        items.heads,
        name or str(item_path),
    )
