"""The user's own titles and sequences: tables, and the JSON folders of RecFormer."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datamodules.sources.interactions import offsets_of
from datamodules.sources.sequence_tables import from_frame, parquet_columns, read_delimited
from datamodules.sources.sequence_text import check_text, read_bytes
from datamodules.text_rec_rows import TextCorpus

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_ROW = "row of the table"  # a column of our own, in words that no table uses


class TextColumns(NamedTuple):
    """Names of the columns of a table.

    Attributes:
        user: Of users.
        item: Of items.
        title: Of titles.
        time: Of Unix seconds or dates; None for a table in the order of the interactions.
        rating: Of numbers; None for data without ratings.
    """

    user: str
    item: str
    title: str
    time: str | None
    rating: str | None


class TableRows(NamedTuple):
    """Interactions of a table, user after user and oldest first.

    Attributes:
        users: External ids of the users.
        offsets: int64 `(users + 1,)`.
        items: External id of the item of each interaction.
        ratings: float64 `(interactions,)`, or None.
        titles: Title of the item of each interaction, empty where there is none; or None.
        first_seen: External ids of all items, in the order in which the file names them.
    """

    users: list[str]
    offsets: NDArray[np.int64]
    items: NDArray[Any]
    ratings: NDArray[np.float64] | None
    titles: NDArray[Any] | None
    first_seen: list[str]

    def liked_only(self, like_threshold: float) -> TableRows:
        """The interactions with a rating above the threshold; users without any are left out.

        Raises:
            ValueError: If none is left.
        """
        assert self.ratings is not None
        kept = self.ratings > like_threshold
        if not kept.any():
            raise ValueError(f"like_threshold={like_threshold}: none of {len(kept)} ratings is above it")
        lengths = np.diff(self.offsets)
        counts = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[kept], minlength=len(lengths))
        users = [user for user, count in zip(self.users, counts, strict=True) if count]
        titles = None if self.titles is None else self.titles[kept]
        return TableRows(
            users, offsets_of(counts[counts > 0]), self.items[kept], self.ratings[kept], titles, self.first_seen
        )


def read_table(path: Path, columns: TextColumns, titled: bool) -> TableRows:
    """Read a table with one row per interaction: CSV or TSV (also `.gz`) or Parquet.

    Args:
        path: The file.
        columns: Names of its columns.
        titled: Whether to read titles.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is malformed, or a column or value is missing, repeated or of the wrong type.
    """
    roles = {"user_column": columns.user, "item_column": columns.item}
    roles |= {"title_column": columns.title} if titled else {}
    roles |= {"time_column": columns.time} if columns.time is not None else {}
    roles |= {"rating_column": columns.rating} if columns.rating is not None else {}
    frame, unit, first = _read(path, roles, [columns.user, columns.item, columns.title])
    _refuse_empty(frame, columns.item, path, unit, first)
    _refuse_repeated(frame, columns, path, unit, first)
    ratings = None if columns.rating is None else _numbers(frame[columns.rating], path, unit, first)
    # With the numbers of the rows for items, the sequences say where each row went.
    frame = frame.assign(**{_ROW: np.arange(len(frame))})
    sorted_rows = from_frame(frame, (columns.user, _ROW, columns.time), False, str(path), unit, first)
    order = sorted_rows.item_ids.astype(np.int64) - 1
    items = frame[columns.item].astype(str).to_numpy(dtype=object)
    titles = None
    if titled:
        titles = frame[columns.title].astype(object).fillna("").astype(str).to_numpy(dtype=object)
        _refuse_two_titles(items, titles, path, unit, first)
    return TableRows(
        [str(label) for label in sorted_rows.user_labels.tolist()],
        sorted_rows.offsets,
        items[order],
        None if ratings is None else ratings[order],
        None if titles is None else titles[order],
        list(dict.fromkeys(items.tolist())),
    )


def read_csv_corpus(
    path: Path, items_path: Path | None, columns: TextColumns, like_threshold: float | None
) -> TextCorpus:
    """The user's own interactions and titles.

    Items are numbered as the files name them first, those of `items_path` that nobody took after the others.

    Args:
        path: Table of interactions.
        items_path: Table of items and titles; by default the titles are a column of `path`.
        columns: Names of the columns.
        like_threshold: A rating above it is a like; without a column of ratings there are no likes.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed, or no item has a title.
    """
    table = read_table(path, columns, titled=items_path is None)
    named = _titles_of(table) if items_path is None else _read_items(items_path, columns)
    labels = list(dict.fromkeys([*table.first_seen, *named]))
    ids = {label: item for item, label in enumerate(labels)}
    titles = [named.get(label, "") for label in labels]
    untitled = sum(not title.strip() for title in titles)
    where = path if items_path is None else items_path
    if untitled == len(titles):
        raise ValueError(f"{where}: none of the {len(titles)} items has a title in column {columns.title!r}")
    if untitled:
        log.warning("%s: %d of %d items have no title, theirs is empty", where, untitled, len(titles))
    return TextCorpus(
        path.name,
        titles,
        labels,
        table.users,
        np.array([ids[label] for label in table.items.tolist()], dtype=np.int64),
        table.offsets,
        None if table.ratings is None or like_threshold is None else table.ratings > like_threshold,
    )


def _titles_of(table: TableRows) -> dict[str, str]:
    assert table.titles is not None
    pairs = zip(table.items.tolist(), table.titles.tolist(), strict=True)
    return {item: title for item, title in pairs if title}


def _read_items(path: Path, columns: TextColumns) -> dict[str, str]:
    roles = {"item_column": columns.item, "title_column": columns.title}
    frame, unit, first = _read(path, roles, [columns.item, columns.title])
    _refuse_empty(frame, columns.item, path, unit, first)
    items = frame[columns.item].astype(str)
    again = items.duplicated().to_numpy()
    if again.any():
        row = int(np.argmax(again))
        raise ValueError(f"{path} {unit} {row + first}: item {items.iloc[row]!r} was there before, expected each once")
    return dict(zip(items, frame[columns.title].astype(object).fillna("").astype(str), strict=True))


def _read(path: Path, roles: dict[str, str], texts: Sequence[str]) -> tuple[pd.DataFrame, str, int]:
    """A table, what its rows are called, and the number of the first."""

    def choose(present: list[str]) -> list[str]:
        for role, name in roles.items():
            if name not in present:
                more = ", or give titles in items_path" if role == "title_column" else ""
                raise ValueError(
                    f"{path} has no column {name!r}, only {', '.join(map(repr, present))}: set {role}{more}"
                )
        return list(roles.values())

    if path.suffix == ".parquet":
        return parquet_columns(path, choose), "row", 0
    separator = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    frame, first = read_delimited(path, separator, choose, texts)
    return frame, "line", first


def _refuse_empty(frame: pd.DataFrame, column: str, path: Path, unit: str, first: int) -> None:
    if (absent := frame[column].isna().to_numpy()).any():
        raise ValueError(f"{path} {unit} {int(np.argmax(absent)) + first}: {column} is empty")


def _refuse_repeated(frame: pd.DataFrame, columns: TextColumns, path: Path, unit: str, first: int) -> None:
    # Without times the same item twice is a user who took it twice.
    if columns.time is None and columns.rating is None:
        return
    key = [name for name in (columns.user, columns.item, columns.time) if name is not None]
    if (again := frame.duplicated(key).to_numpy()).any():
        row = int(np.argmax(again))
        values = ", ".join(f"{name} {frame[name].iloc[row]}" for name in key)
        raise ValueError(
            f"{path} {unit} {row + first}: {values} was there before ({int(again.sum())} such rows), expected each once"
        )


def _refuse_two_titles(items: NDArray[Any], titles: NDArray[Any], path: Path, unit: str, first: int) -> None:
    known: dict[str, str] = {}
    for row, (item, title) in enumerate(zip(items.tolist(), titles.tolist(), strict=True)):
        if title and known.setdefault(item, title) != title:
            raise ValueError(
                f"{path} {unit} {row + first}: item {item!r} has the title {title!r}, before it was {known[item]!r}"
            )


def _numbers(column: pd.Series[Any], path: Path, unit: str, first: int) -> NDArray[np.float64]:
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        found = "empty" if pd.isna(column.iloc[row]) else repr(str(column.iloc[row]))
        raise ValueError(f"{path} {unit} {row + first}: {column.name} is {found}, expected a number")
    return values


def read_recformer(folder: Path) -> TextCorpus:
    """The JSON files of RecFormer: `meta_data.json`, `smap.json`, `umap.json`, `train.json`, `val.json`, `test.json`.

    A user's items in training, validation and test, in this order, are the sequence.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed, or files do not belong together.
    """
    meta = _json(folder, "meta_data.json")
    item_labels = _by_id(_json(folder, "smap.json"), folder / "smap.json")
    user_labels = _by_id(_json(folder, "umap.json"), folder / "umap.json")
    train = _json(folder, "train.json")
    val = _json(folder, "val.json" if (folder / "val.json").is_file() or not (folder / "valid.json").is_file() else
                "valid.json")  # fmt: skip
    test = _json(folder, "test.json")
    titles = []
    for label in item_labels:
        entry = meta.get(label, {})
        title = entry.get("title", "") if isinstance(entry, dict) else None
        if not isinstance(title, str):
            raise ValueError(
                f"{folder / 'meta_data.json'}: {label} is {str(entry)[:80]!r}, expected an object with a title"
            )
        titles.append(title)
    if untitled := sum(not title.strip() for title in titles):
        log.warning("%s: %d of %d items have no title, theirs is empty", folder, untitled, len(titles))
    items: list[int] = []
    lengths = []
    for user in range(len(user_labels)):
        own = [_items(part, user, len(item_labels), folder / name)
               for part, name in ((train, "train.json"), (val, "val.json"), (test, "test.json"))]  # fmt: skip
        held = (len(own[1]), len(own[2]))
        if held not in ((1, 1), (0, 0)) or (held == (0, 0)) != (len(own[0]) + sum(held) < 3):
            raise ValueError(
                f"{folder}: user {user} has {len(own[0])}, {held[0]} and {held[1]} items in training, validation and "
                "test; expected one in each of the last two, or fewer than three in training and nothing else"
            )
        sequence = [item for part in own for item in part]
        items += sequence
        lengths.append(len(sequence))
    unknown = sorted(set(train) | set(val) | set(test), key=str)
    for key in unknown:
        if not key.isdigit() or int(key) >= len(user_labels):
            raise ValueError(f"{folder}: user {key!r} is not in umap.json, expected 0..{len(user_labels) - 1}")
    return TextCorpus(
        folder.name, titles, item_labels, user_labels, np.array(items, dtype=np.int64), offsets_of(np.array(lengths))
    )


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    content = read_bytes(path, "a JSON object")
    check_text(path, content)
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path} holds {str(value)[:80]}, expected a JSON object with entries")
    return value


def _by_id(ids: dict[str, Any], path: Path) -> list[str]:
    labels: dict[int, str] = {}
    for label, number in ids.items():
        if type(number) is not int or not 0 <= number < len(ids) or number in labels:
            raise ValueError(f"{path}: {label!r} has the id {number!r}, expected 0..{len(ids) - 1}, each once")
        labels[number] = label
    return [labels[number] for number in range(len(ids))]


def _items(part: dict[str, Any], user: int, num_items: int, path: Path) -> list[int]:
    found = part.get(str(user), [])
    if not isinstance(found, list):
        raise ValueError(f"{path}: user {user} has {found!r}, expected a list of item ids")
    for item in found:
        if type(item) is not int or not 0 <= item < num_items:
            raise ValueError(f"{path}: user {user} has the item {item!r}, expected 0..{num_items - 1}")
    return found
