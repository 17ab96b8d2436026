"""Interactions and item features from a person's own files: MMRec, LATTICE, and plain tables.

Every interaction counts as a positive one: ratings and times are not read.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datamodules.interaction_rows import InteractionTable
from datamodules.options import one_of
from datamodules.sources.feature_files import ARCHIVE, feature_paths, read_features
from datamodules.sources.interaction_pairs import (
    ENDINGS,
    INTEGER,
    Pairs,
    encode,
    kind_of,
    read_columns,
    read_json,
    read_table,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

LAYOUTS = ("auto", "mmrec", "lattice", "table")
_PARTS = ("train", "val", "test")


class _Catalogue(NamedTuple):
    """The items that there are: those of a list of items, of the features, or of the interactions."""

    labels: NDArray[Any]
    names: list[str] | None
    source: str


def read_files(path: Path, layout: str = "auto") -> InteractionTable:
    """Read interactions, and item features where there are any.

    - `mmrec`: a folder with one `*.inter` (tab separated: `userID`, `itemID`, `x_label` 0, 1, 2; or typed names of
      RecBole such as `user_id:token`) and `<modality>_feat.npy`; or the `.inter` file.
    - `lattice`: a folder with `train.json`, `val.json`, `test.json` (`{"user": [item, ...]}`), or with a `5-core` that
      holds them, and `<modality>_feat.npy` there or one level up.
    - `table`: `interactions.csv`, `.tsv` (also with `.gz`) or `.parquet` in a folder, with columns `user` or
      `user_id`, `item` or `item_id`, and perhaps `split`; perhaps `features.npz`, `<modality>.npy` or
      `<modality>_feat.npy`; perhaps `items.csv` (`.tsv`, `.parquet`) with `item` and `title`. Or such a table alone,
      whatever its name.

    Features and integer ids 0..I-1 belong together by number. Other ids take the order of the list of items, or
    without features that of their labels.

    Args:
        path: The folder or the file.
        layout: "mmrec", "lattice", "table", or "auto" for what the path holds.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed, or if ids and features do not fit together.
    """
    one_of(("layout", layout, LAYOUTS))
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    chosen = _layout_of(path) if layout == "auto" else layout
    if chosen == "lattice":
        return _read_lattice(path)
    if path.is_dir():
        file = _only(sorted(path.glob("*.inter")), path) if chosen == "mmrec" else _named(path, "interactions")
        if file is None:
            wanted = "*.inter" if chosen == "mmrec" else f"interactions{{{','.join(ENDINGS)}}}"
            raise FileNotFoundError(f"{path} holds no {wanted}, expected by layout {chosen!r}")
        folder: Path | None = path
    else:
        file, folder = path, path.parent if chosen == "mmrec" else None
    if chosen == "mmrec":
        features = feature_paths(file.parent)
        return _assemble(read_table(file), features, None)
    if folder is None:
        beside = [p.name for p in (*feature_paths(path.parent), path.parent / ARCHIVE) if p.is_file()]
        if beside:
            log.info(
                "%s is read alone, without %s beside it; to take features, name the folder, with the table as "
                "interactions%s",
                path, ", ".join(beside), kind_of(path),
            )  # fmt: skip
        return _assemble(read_table(file), [], None)
    return _assemble(read_table(file), feature_paths(folder, plain=True), _named(folder, "items"))


def read_pairs(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """User and item labels of interactions to test on.

    Args:
        path: `.inter`, `.csv`, `.tsv` (also with `.gz`), `.parquet`, or `.json` as in LATTICE. Where the file has a
            column `split` or `x_label`, its test rows are meant.

    Returns:
        Texts `(rows,)` each.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is malformed or has no test rows.
    """
    path = Path(path).expanduser()
    pairs = read_json(path) if kind_of(path) == ".json" else read_table(path)
    chosen = np.ones(len(pairs.users.codes), dtype=bool)
    if pairs.split is not None:
        chosen = pairs.split == 2
        if not chosen.any():
            raise ValueError(f"{path}: no row of {len(chosen)} is of the split 2 (test), expected rows to test on")
        log.info("%s: %d of %d rows are of the split test", path, int(chosen.sum()), len(chosen))
    users, items = (column.labels.astype(str)[column.codes[chosen]] for column in (pairs.users, pairs.items))
    return users, items


def _layout_of(path: Path) -> str:
    if path.is_file():
        if kind_of(path) == ".json":
            raise ValueError(f"{path}: name the folder that holds {', '.join(f'{part}.json' for part in _PARTS)}")
        return "mmrec" if kind_of(path) == ".inter" else "table"
    found = {
        "mmrec": any(path.glob("*.inter")),
        "lattice": _split_folder(path) is not None,
        "table": _named(path, "interactions") is not None,
    }
    layouts = [layout for layout, there in found.items() if there]
    if not layouts:
        raise FileNotFoundError(
            f"{path} holds none of *.inter (layout mmrec), train.json or 5-core/train.json (lattice), "
            f"interactions{{{','.join(ENDINGS)}}} (table)"
        )
    if len(layouts) > 1:
        raise ValueError(f"{path} holds files of the layouts {' and '.join(layouts)}: set layout to one of them")
    return layouts[0]


def _only(files: list[Path], folder: Path) -> Path | None:
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} holds {names}, expected one file of interactions: name the one to read")
    return files[0] if files else None


def _named(folder: Path, stem: str) -> Path | None:
    """The table of that name in the folder, if there is one."""
    return _only([path for end in ENDINGS if (path := folder / (stem + end)).is_file()], folder)


def _split_folder(path: Path) -> Path | None:
    return next((p for p in (path / "5-core", path) if any((p / f"{part}.json").is_file() for part in _PARTS)), None)


def _read_lattice(path: Path) -> InteractionTable:
    folder = _split_folder(path) if path.is_dir() else None
    if folder is None:
        raise FileNotFoundError(f"{path} holds no train.json or 5-core/train.json, expected by layout 'lattice'")
    for part in _PARTS:
        if not (folder / f"{part}.json").is_file():
            raise FileNotFoundError(f"{folder / part}.json is missing beside the others of layout 'lattice'")
    parts = [read_json(folder / f"{part}.json") for part in _PARTS]
    sizes = [len(part.users.codes) for part in parts]
    ends = np.cumsum(sizes)

    def where(row: int) -> str:
        part = int(np.searchsorted(ends, row, side="right"))
        return parts[part].where(row - int(ends[part]) + sizes[part])

    users, items = (
        encode(np.concatenate([c.labels.astype(str)[c.codes] for c in columns]), where, what)
        for columns, what in (([p.users for p in parts], "user"), ([p.items for p in parts], "item"))
    )
    split = np.repeat(np.arange(len(parts), dtype=np.int8), sizes)
    pairs = Pairs(users, items, split, str(folder), where)
    return _assemble(pairs, feature_paths(folder) or feature_paths(folder.parent), None)


def _assemble(pairs: Pairs, paths: list[Path], items_path: Path | None) -> InteractionTable:
    """Give users and items their ids."""
    features = read_features(paths)
    rows = len(next(iter(features.values()))) if features else None
    catalogue = _catalogue(pairs, features, rows, items_path)
    labels = pairs.items.labels
    order = np.argsort(catalogue.labels)
    ascending = catalogue.labels[order]
    if (ascending.dtype == object) != pairs.items.texts:
        ascending, labels = ascending.astype(str), labels.astype(str)
        order = order[np.argsort(ascending)]
        ascending = np.sort(ascending)
    places = np.minimum(np.searchsorted(ascending, labels), len(ascending) - 1)
    known = ascending[places] == labels
    if not known.all():
        row = int(np.argmax(~known[pairs.items.codes]))
        raise ValueError(
            f"{pairs.where(row)}: item {labels[pairs.items.codes[row]]!s} is none of the {len(ascending):,} of "
            f"{catalogue.source}; neither are {int((~known).sum()):,} of the {len(labels):,} items of the file, which "
            f"run from {labels[0]!s} to {labels[-1]!s}"
        )
    without = len(ascending) - len(labels)
    if without:
        log.info("%s: %d of %d items have no interaction", pairs.name, without, len(ascending))
    return InteractionTable(
        pairs.name, pairs.users.labels, catalogue.labels, pairs.users.codes, order[places][pairs.items.codes],
        pairs.split, features, None, catalogue.names,
    )  # fmt: skip


def _catalogue(
    pairs: Pairs, features: dict[str, NDArray[np.float32]], rows: int | None, items_path: Path | None
) -> _Catalogue:
    source = f"the features ({', '.join(map(repr, features))})"
    if items_path is not None:
        catalogue = _read_items(items_path)
        if rows is not None and len(catalogue.labels) != rows:
            raise ValueError(
                f"{items_path} lists {len(catalogue.labels):,} items and {source} have {rows:,} rows, expected one row "
                "an item"
            )
        return catalogue
    if rows is None:
        return _Catalogue(pairs.items.labels, None, pairs.name)
    if pairs.items.texts:
        first = next(label for label in pairs.items.labels if not INTEGER.fullmatch(label))
        raise ValueError(
            f"{pairs.name}: item {first!r} is a text, and features are there ({', '.join(features)}): which row is "
            f"whose cannot be known. Use ids 0..{rows - 1}, or (layout table) put a file items.csv beside, with a "
            "column `item` in the order of the rows"
        )
    return _Catalogue(np.arange(rows), None, f"{source}: row k is of item k")


def _read_items(path: Path) -> _Catalogue:
    """The list of items, in its order; where its ids are 0..n-1, in theirs."""
    import pandas as pd

    frame, where = read_columns(path, (), ("item", "title"))
    if "item" not in frame:
        labels = np.arange(len(frame))
    else:
        column = encode(frame["item"], where, "item")
        if len(column.labels) < len(frame):
            row = int(np.argmax(pd.Series(column.codes).duplicated()))
            raise ValueError(f"{where(row)}: item {column.labels[column.codes[row]]!s} is there before, expected once")
        labels = column.labels[column.codes]
        if not column.texts and np.array_equal(column.labels, np.arange(len(frame))):
            frame, labels = frame.iloc[np.argsort(labels)], column.labels
    names = frame["title"].astype(object).fillna("").astype(str).tolist() if "title" in frame else None
    return _Catalogue(labels, names, str(path))
