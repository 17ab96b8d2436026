"""Pairs of users and items from tables and from JSON lists, with the place of each row for messages."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datamodules.sources.sequence_text import check_text, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
_TABLES = (".csv", ".tsv", ".parquet")
ENDINGS = tuple(kind + gz for kind in _TABLES for gz in ("", ".gz") if kind + gz != ".parquet.gz")
_ROLES = {
    "user": ("user", "user_id", "userid"),
    "item": ("item", "item_id", "itemid"),
    "split": ("split", "x_label"),
    "title": ("title",),
}
_SPLITS = {"0": 0, "1": 1, "2": 2, "train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")  # 007 is a name, and 64 bits hold 18 digits


class Column(NamedTuple):
    """Ids of one kind.

    Attributes:
        codes: int64 `(rows,)`, place of the label of each row.
        labels: int64, or texts as objects `(labels,)`, ascending.
    """

    codes: Ints
    labels: NDArray[Any]

    @property
    def texts(self) -> bool:
        """Whether the labels are texts."""
        return self.labels.dtype == object


class Pairs(NamedTuple):
    """Rows of a file.

    Attributes:
        users: Who.
        items: What.
        split: int8 `(rows,)`, or None.
        name: What the file is called.
        where: Place of a row.
    """

    users: Column
    items: Column
    split: NDArray[np.int8] | None
    name: str
    where: Callable[[int], str]


def kind_of(path: Path) -> str:
    """What the name of a file ends in, without `.gz`."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def read_json(path: Path) -> Pairs:
    """Pairs of a file `{"user": [item, ...], ...}`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, no JSON in UTF-8, or holds something else.
    """
    content = read_bytes(path, 'an object {"user": [item, ...], ...}')
    check_text(path, content)

    def unique(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(entries)
        if len(values) < len(entries):
            twice = Counter(key for key, _ in entries).most_common(1)[0][0]
            raise ValueError(f"key {twice!r} is there twice, expected one list of items a user")
        return values

    try:
        lists = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno} column {error.colno}: no JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(lists, dict):
        raise ValueError(f"{path} holds a {type(lists).__name__}, expected an object {{'user': [item, ...], ...}}")
    for user, items in lists.items():
        if not isinstance(items, list):
            raise ValueError(f"{path} key {user!r}: {items!r} is not a list, expected the items of the user")
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int | str):
                raise ValueError(f"{path} key {user!r}: item {item!r} is not an integer or a text")
    users = np.array([user for user, items in lists.items() for _ in items], dtype=object)
    items = np.array([str(item) for items in lists.values() for item in items], dtype=object)
    if not len(users):
        raise ValueError(f"{path} has no item in any list, expected {{'user': [item, ...], ...}}")

    def where(row: int) -> str:
        return f"{path} key {users[row]!r}"

    return Pairs(encode(users, where, "user"), encode(items, where, "item"), None, str(path), where)


def _choose(path: Path, present: list[str], required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, str]:
    """Column of each role; names may have a type behind a colon, and capitals."""
    columns = {}
    for role in (*required, *optional):
        names = [name for name in present if name.partition(":")[0].strip().lower() in _ROLES[role]]
        if len(names) > 1:
            raise ValueError(f"{path} has {' and '.join(map(repr, names))}, expected one column for the {role}")
        if names:
            columns[role] = names[0]
        elif role in required:
            raise ValueError(
                f"{path} has no column {' or '.join(map(repr, _ROLES[role][:2]))}, only {', '.join(map(repr, present))}"
            )
    if not columns:
        wanted = " or ".join(repr(name) for role in optional for name in _ROLES[role][:2])
        raise ValueError(f"{path} has no column {wanted}, only {', '.join(map(repr, present))}")
    return columns


def read_columns(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...]
) -> tuple[pd.DataFrame, Callable[[int], str]]:
    """Read columns of a table by their roles: "user", "item", "split", "title".

    Args:
        path: `.inter`, `.csv`, `.tsv` (also with `.gz`) or `.parquet`.
        required: Roles that must have a column.
        optional: Roles that may have one.

    Returns:
        The table, its columns named by their roles, and a function that gives the place of a row.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is malformed or has no such column.
    """
    # pandas takes half a second that JSON files do not need.
    from datamodules.sources.sequence_tables import first_line, parquet_columns, read_csv

    kind = kind_of(path)
    if kind not in (*_SEPARATORS, ".parquet") or path.name.endswith(".parquet.gz"):
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .inter, {', '.join(ENDINGS)}")
    roles: dict[str, str] = {}

    def choose(present: list[str]) -> list[str]:
        roles.update(_choose(path, present, required, optional))
        return list(roles.values())

    if kind == ".parquet":
        frame, unit, first = parquet_columns(path, choose), "row", 0
    else:
        line, separator = first_line(path), _SEPARATORS[kind]
        if not line.strip():
            raise ValueError(f"{path} is empty, expected a header and one line per row")
        names = choose(next(csv.reader([line], delimiter=separator)))
        # Ids and titles stay texts there, the third column need not.
        frame = read_csv(path, separator, (names[0], names[min(1, len(names) - 1)], (*names, None, None)[2]))
        frame, unit, first = frame.loc[:, ~frame.columns.duplicated()], "line", 2
    if frame.empty:
        raise ValueError(f"{path} has no rows")
    frame = frame.rename(columns={name: role for role, name in roles.items()})
    return frame, lambda row: f"{path} {unit} {row + first}"


def read_table(path: Path) -> Pairs:
    """Pairs of a table with one row an interaction.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file, an id or a split is malformed.
    """
    frame, where = read_columns(path, ("user", "item"), ("split",))
    users, items = encode(frame["user"], where, "user"), encode(frame["item"], where, "item")
    split = _parts_of(frame["split"], where) if "split" in frame else None
    return Pairs(users, items, split, str(path), where)


def encode(values: pd.Series[Any] | NDArray[Any], where: Callable[[int], str], what: str) -> Column:
    """Codes and ascending labels: integers where all are integers, texts otherwise.

    Args:
        values: Ids.
        where: Gives the place of a row.
        what: What the ids are of, for messages.

    Raises:
        ValueError: If an id is missing or a negative number.
    """
    import pandas as pd

    codes, uniques = pd.factorize(values)
    if (codes < 0).any():
        raise ValueError(f"{where(int(np.argmax(codes < 0)))}: {what} is empty")
    # A column of integers with gaps becomes one of floats on its way through many tools.
    texts = [str(int(u)) if isinstance(u, float | np.floating) and u.is_integer() else str(u) for u in uniques]
    integers = all(map(INTEGER.fullmatch, texts))
    labels: NDArray[Any] = np.array(texts).astype(np.int64) if integers else np.array(texts, dtype=object)
    order = np.argsort(labels)
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    labels, codes = labels[order], ranks[codes]
    if labels.dtype != object and labels[0] < 0:
        row = int(np.argmax(labels[codes] < 0))
        raise ValueError(f"{where(row)}: {what} {labels[codes[row]]} is negative, expected ids from 0, or texts")
    return Column(codes, labels)


def _parts_of(values: pd.Series[Any], where: Callable[[int], str]) -> NDArray[np.int8]:
    import pandas as pd

    codes, uniques = pd.factorize(values)
    texts = [str(value).strip().lower().removesuffix(".0") for value in uniques]
    parts = np.array([_SPLITS.get(text, -1) for text in texts] + [-1], dtype=np.int8)[codes]
    if (parts < 0).any():
        row = int(np.argmax(parts < 0))
        raise ValueError(
            f"{where(row)}: split {values.iloc[row]!s}, expected 0, 1, 2 or {', '.join(list(_SPLITS)[3:])}"
        )
    return parts
