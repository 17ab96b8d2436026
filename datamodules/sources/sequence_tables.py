"""Reading of CSV and Parquet tables, and sequences from those with one row per interaction."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import numpy as np
import pandas as pd

from datamodules.sources.interactions import Interactions, Ints, offsets_of
from datamodules.sources.sequence_text import MILLISECONDS, check_text, line_of, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

Columns = tuple[str, str, "str | None"]
_BLOCK = 1 << 24  # bytes


def _check_columns(path: str, present: list[str], columns: Columns) -> None:
    for role, name in zip(("user_column", "item_column", "time_column"), columns, strict=True):
        if name is not None and name not in present:
            more = ", or time_column=None for data without times" if role == "time_column" else ""
            raise ValueError(f"{path} has no column {name!r}, only {', '.join(map(repr, present))}: set {role}{more}")


def read_csv(path: Path, separator: str, columns: Columns) -> pd.DataFrame:
    """Read a text table with a header, plain or gzip; ids stay the texts that they are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is malformed or a column is missing.
    """
    content = read_bytes(path).rstrip()
    check_text(path, content)
    # Ids are text: 007 must not become 7, nor NA a missing value. A blank line must show, hence no skipping.
    ids: dict[Any, Any] = {columns[0]: "str", columns[1]: "str"}
    read: dict[str, Any] = {"sep": separator, "encoding": "utf-8-sig", "keep_default_na": False, "na_values": [""]}
    try:
        header = pd.read_csv(io.BytesIO(content), nrows=0, **read)
        _check_columns(str(path), [str(name) for name in header.columns], columns)
        # All columns: with a choice of them pandas does not see that a line has too many fields.
        frame = pd.read_csv(io.BytesIO(content), dtype=ids, skip_blank_lines=False, **read)
    except pd.errors.ParserError as error:
        detail = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise ValueError(f"{path}: {detail}; every line needs as many fields as the header") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError(f"{path}: every line has more fields than the header, expected as many")
    wanted: pd.DataFrame = frame[[name for name in columns if name is not None]]
    return wanted


def read_parquet(path: Path, columns: Columns) -> pd.DataFrame:
    """Read a Parquet table.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or a column is missing.
    """

    def choose(present: list[str]) -> list[str]:
        _check_columns(str(path), present, columns)
        return [name for name in columns if name is not None]

    return parquet_columns(path, choose)


def parquet_columns(path: Path, choose: Callable[[list[str]], list[str]]) -> pd.DataFrame:
    """Read some columns of a Parquet table.

    Args:
        path: The file.
        choose: Takes the names of all columns and returns those to read, or refuses.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with pq.ParquetFile(path) as file:
            columns = choose(file.schema_arrow.names)
            frame: pd.DataFrame = file.read(columns=columns).to_pandas()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is truncated or no Parquet file ({error}): copy it again") from error
    return frame


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines of a file, some megabytes at a time.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated or no gzip file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    rest = b""
    try:
        with _open(path) as file:
            while chunk := file.read(_BLOCK):
                head, newline, tail = chunk.rpartition(b"\n")
                if newline:
                    yield rest + head + newline
                    rest = tail
                else:
                    rest += chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or no gzip file ({error}): copy it again") from error
    if rest:
        yield rest + b"\n"


def first_line(path: Path) -> str:
    """The first line of a text file, or an empty text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated.
    """
    block = next(_blocks(path), b"").removeprefix(b"\xef\xbb\xbf")
    return block[: block.find(b"\n")].rstrip(b"\r").decode(errors="replace") if block else ""


def _check_lines(path: Path, separator: str, fields: int, skip: int) -> int:
    """Number of lines after the first `skip`; each has that many fields, two or more, and empty ones are last."""
    total, rows, blank, quoted = 0, 0, 0, False

    def check(line: int, found: int) -> None:
        if blank:
            raise ValueError(f"{path} line {blank} is blank; remove it")
        if found != fields:
            raise ValueError(f"{path} line {line} has {found} fields separated by {separator!r}, expected {fields}")

    for block in _blocks(path):
        try:
            block.decode()
        except UnicodeDecodeError as error:
            line, byte = total + line_of(block, error.start), block[error.start]
            raise ValueError(
                f"{path} line {line}: byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8"
            ) from None
        quoted = quoted or b'"' in block
        symbols = np.frombuffer(block, dtype=np.uint8)
        ends = np.flatnonzero(symbols == 10)
        found = np.diff(np.searchsorted(np.flatnonzero(symbols == ord(separator)), ends), prepend=0) + 1
        lines = total + 1 + np.arange(len(ends))
        total += len(ends)
        if quoted:  # a field may hold a separator or an end of line: then the slower way below
            continue
        filled = lines > skip
        for place in np.flatnonzero(filled & (found != fields)).tolist():
            filled[place] = bool(block[ends[place - 1] + 1 if place else 0 : ends[place]].strip())
            if filled[place]:
                check(int(lines[place]), int(found[place]))
            blank = blank or int(lines[place])
        if (filled & (lines > blank)).any():
            check(total, fields)
        rows += int(filled.sum())
    if not quoted:
        return rows
    rows = blank = 0
    with _open(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=separator)
        try:
            for row in reader:
                if reader.line_num <= skip:
                    continue
                if len(row) > 1 or "".join(row).strip():
                    check(reader.line_num, len(row))
                    rows += 1
                else:
                    blank = blank or reader.line_num
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: {error}") from error
    return rows


def read_delimited(
    path: Path,
    separator: str,
    choose: Callable[[list[str]], list[str]],
    texts: Iterable[str],
    *,
    names: Sequence[str] | None = None,
    skip: int = 0,
    spaced: bool = False,
    missing: Sequence[str] = ("",),
) -> tuple[pd.DataFrame, int]:
    """Read a delimited text file, plain or gzip, whatever its size.

    Args:
        path: The file.
        separator: Between fields.
        choose: Takes the names of all columns and returns those to read, or refuses.
        texts: Columns whose cells stay texts.
        names: Names of the columns of a file without a header.
        skip: Lines before the data of a file without a header, or one that `names` stand for.
        spaced: Whether blanks follow a separator.
        missing: Cells that stand for no value.

    Returns:
        The table, and the number of its first line in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, truncated, no UTF-8, or a line has another number of fields.
    """
    line = first_line(path)
    if not line.strip():
        raise ValueError(f"{path} is empty, expected {'a header and ' if names is None else ''}one line per row")
    header = next(csv.reader([line], delimiter=separator)) if names is None else list(names)
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"{path} line 1: column {twice!r} is there twice")
    wanted = choose(header)
    before = skip + (names is None)
    rows = _check_lines(path, separator, len(header), before)
    if not rows:
        raise ValueError(f"{path} has no rows, only a header")
    kept = [name for name in texts if name in wanted]
    frame = pd.read_csv(
        path,
        sep=separator,
        header=None,
        names=header,
        usecols=wanted,
        skiprows=before,
        nrows=rows,
        dtype=dict.fromkeys(kept, "str"),
        encoding="utf-8-sig",
        keep_default_na=False,
        na_values=list(missing),
        skipinitialspace=spaced,
        low_memory=False,
    )
    # Read as categories at once, 010 and 10 would become one number.
    return frame.astype(dict.fromkeys(kept, "category")), before + 1


def from_frame(
    frame: pd.DataFrame,
    columns: Columns,
    drop_duplicates: bool,
    name: str,
    unit: str = "row",
    first: int = 0,
) -> Interactions:
    """Sequences of a table with one row per interaction; users and items get ids in the order of their labels.

    Args:
        frame: The table, in any order; without times, the order of the rows is that of the interactions.
        columns: Names of the columns of users, items and times (None: no times).
        drop_duplicates: Whether rows that repeat user, item and time are dropped instead of refused.
        name: What the table is called in messages.
        unit: What a row is called in messages.
        first: Number of the first row in messages.

    Raises:
        ValueError: If a column or a value is missing, of the wrong type, or repeated.
    """
    _check_columns(name, [str(column) for column in frame.columns], columns)
    if frame.empty:
        raise ValueError(f"{name} has no rows, expected one per interaction")

    def where(row: int) -> str:
        return f"{name} {unit} {row + first}"

    for column in columns:
        if column is not None and (absent := frame[column].isna().to_numpy()).any():
            raise ValueError(f"{where(int(np.argmax(absent)))}: {column} is empty")
    user_codes, user_labels = _encode(frame[columns[0]], where)
    item_codes, item_labels = _encode(frame[columns[1]], where)
    times = None if columns[2] is None else _seconds(frame[columns[2]], where)
    if times is not None:
        repeated = pd.DataFrame({"user": user_codes, "item": item_codes, "time": times}).duplicated().to_numpy()
        if repeated.any() and not drop_duplicates:
            row = int(np.argmax(repeated))
            raise ValueError(
                f"{where(row)}: user {user_labels[user_codes[row]]}, item {item_labels[item_codes[row]]}, time "
                f"{times[row]} was there before ({int(repeated.sum())} such rows); drop_duplicates=True drops them"
            )
        if repeated.any():
            log.info("%s: dropped %d of %d rows that repeat another", name, int(repeated.sum()), len(repeated))
            user_codes, item_codes, times = user_codes[~repeated], item_codes[~repeated], times[~repeated]
    order = np.argsort(user_codes, kind="stable") if times is None else np.lexsort((times, user_codes))
    return Interactions(
        (item_codes[order] + 1).astype(np.int32),
        None if times is None else times[order],
        offsets_of(np.bincount(user_codes, minlength=len(user_labels))),
        item_labels,
        user_labels,
        name,
    )


def _encode(column: pd.Series[Any], where: Callable[[int], str]) -> tuple[Ints, NDArray[Any]]:
    """Codes from 0 in the order of the labels, and the labels: integers, or else strings."""
    if pd.api.types.is_float_dtype(column.dtype):
        values = column.to_numpy(dtype=np.float64)
        if (broken := values != np.floor(values)).any():
            row = int(np.argmax(broken))
            raise ValueError(f"{where(row)}: {column.name} {values[row]} is not an integer or a text")
        column = column.astype(np.int64)
    if pd.api.types.is_integer_dtype(column.dtype):
        labels, codes = np.unique(column.to_numpy(dtype=np.int64), return_inverse=True)
        return codes, labels
    codes, uniques = pd.factorize(column.astype(str), sort=True)
    return codes.astype(np.int64), np.asarray(uniques, dtype=object)


def _seconds(column: pd.Series[Any], where: Callable[[int], str]) -> Ints:
    """Unix seconds of a column of numbers, dates or texts of either."""
    if not pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_datetime64_any_dtype(column.dtype):
        parsed = numbers = pd.to_numeric(column, errors="coerce")
        if numbers.isna().any():
            parsed = pd.to_datetime(column, errors="coerce", utc=True, format="ISO8601")
        if parsed.isna().any():
            # Numbers among dates are named only if nothing is neither.
            neither = (parsed.isna() & numbers.isna()).to_numpy()
            broken = neither if neither.any() else parsed.isna().to_numpy()
            row = int(np.argmax(broken))
            raise ValueError(
                f"{where(row)}: {column.name} {column.iloc[row]!r} is neither Unix seconds nor a date like 2020-01-31"
            )
        column = parsed
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        if getattr(column.dtype, "tz", None) is not None:
            column = column.dt.tz_convert("UTC").dt.tz_localize(None)
        return column.to_numpy().astype("datetime64[s]").astype(np.int64)
    values = column.to_numpy()
    for broken, what in (
        (values != np.floor(values), "is not an integer, expected Unix seconds"),
        (values < 0, "is negative, expected Unix seconds"),
        (values > MILLISECONDS, "looks like milliseconds, expected Unix seconds: divide by 1000"),
    ):
        if broken.any():
            row = int(np.argmax(broken))
            raise ValueError(f"{where(row)}: {column.name} {values[row]} {what}")
    return values.astype(np.int64)


class MappedSequences(NamedTuple):
    """Sequences of other data in the ids of the training data.

    Attributes:
        item_ids: int32 `(interactions,)`, known items only.
        starts: int64 `(rows,)`, where each sequence begins.
        lengths: int64 `(rows,)`, its items without the last one, which is the target.
        users: int64 `(rows,)`, row of the user in the training data, or -1.
    """

    item_ids: NDArray[np.int32]
    starts: Ints
    lengths: Ints
    users: Ints


def map_to(other: Interactions, train: Interactions) -> MappedSequences:
    """Give sequences the ids of the training data.

    Items that are unknown there are left out of the histories. A user whose last item is unknown, or who has no known
    item before it, cannot be ranked and is left out. All of it is counted in the log.

    Raises:
        ValueError: If no user is left.
    """
    new_ids = pd.Index(train.item_labels.astype(str)).get_indexer(pd.Index(other.item_labels.astype(str))) + 1
    item_ids = new_ids[other.item_ids - 1]
    known = item_ids > 0
    target_known = known[other.offsets[1:] - 1]
    known_before = np.add.reduceat(known.astype(np.int64), other.offsets[:-1]) - target_known
    kept = target_known & (known_before > 0)
    users = pd.Index(train.user_labels.astype(str)).get_indexer(pd.Index(other.user_labels.astype(str)))
    if not kept.any():
        raise ValueError(
            f"{other.name}: none of {len(kept)} users can be tested: a user needs a last item and one before it that "
            f"{train.name} knows ({int((new_ids == 0).sum())} of {len(new_ids)} items are unknown)"
        )
    log.info(
        "%s: %d users to test; unknown to the training data are %d of %d items (%d interactions left out) and %d of %d "
        "users; left out are %d users whose last item is unknown and %d without a known item before it",
        other.name, int(kept.sum()), int((new_ids == 0).sum()), len(new_ids), int((~known).sum()),
        int((users < 0).sum()), len(users), int((~target_known).sum()), int((target_known & ~kept).sum()),
    )  # fmt: skip
    lengths = (known_before + 1)[kept]
    taken = known & np.repeat(kept, other.lengths)
    return MappedSequences(
        item_ids[taken].astype(np.int32), offsets_of(lengths)[:-1], lengths - 1, users[kept].astype(np.int64)
    )
