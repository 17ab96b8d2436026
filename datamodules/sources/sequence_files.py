"""Sequences from a person's own files, read in the format that a file's name ends in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.sources.sequence_text import read_sequences

if TYPE_CHECKING:
    from datamodules.sources.interactions import Interactions
    from datamodules.sources.sequence_tables import Columns

log = logging.getLogger(__name__)

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_path(
    path: Path, time_path: str | None, columns: Columns, reindex: bool, sort: bool, drop_duplicates: bool
) -> Interactions:
    """Read a file in the format that its name ends in.

    Args:
        path: `.txt` (two-file format), `.csv`, `.tsv`, each also with `.gz`, or `.parquet`.
        time_path: Time file of the two-file format.
        columns: Names of the columns of users, items and times (None: no times) of a table.
        reindex: Whether item ids of the two-file format that are not 1..V get new ones.
        sort: Whether decreasing times are allowed in the two-file format.
        drop_duplicates: Whether repeated rows of a table are dropped.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed.
    """
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".txt":
        partner = _time_partner(path) if time_path is None else Path(time_path)
        return read_sequences(path, partner, reindex=reindex, sort=sort)
    if kind not in (*_SEPARATORS, ".parquet"):
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .txt, .csv or .tsv (also with .gz), or .parquet")
    if time_path is not None:
        raise ValueError(f"time_path={time_path} belongs to a .txt item file; in {path} times are a column")
    # pandas takes half a second and memory that the two-file format does not need.
    from datamodules.sources.sequence_tables import from_frame, read_csv, read_parquet

    if kind == ".parquet":
        return from_frame(read_parquet(path, columns), columns, drop_duplicates, str(path))
    return from_frame(read_csv(path, _SEPARATORS[kind], columns), columns, drop_duplicates, str(path), "line", 2)


def _time_partner(path: Path) -> Path | None:
    """The time file beside an item file, by its name."""
    if "_item" not in path.name:
        return None
    head, _, tail = path.name.rpartition("_item")
    for name in (f"{head}_time{tail}", f"{head}_time{tail}.gz", f"{head}_time{tail}".removesuffix(".gz")):
        if (path.parent / name).is_file():
            return path.parent / name
    log.warning("%s: no time file %s_time%s beside it, the data has no times; name it in time_path", path, head, tail)
    return None
