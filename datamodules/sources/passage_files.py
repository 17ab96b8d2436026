"""Passages from a person's own files: text, JSON lines, delimited text, Parquet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.sources.cloze_files import delimited_records, json_records
from datamodules.sources.sequence_text import check_text, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

_EXPECTED = "one passage per line"
_JSON = (".jsonl", ".json")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_passages(path: str | Path, text_column: str = "text", paragraphs: bool = False) -> list[str]:
    """Read passages from a file in the format that its name ends in.

    A byte order mark, Windows line ends and blank lines are accepted. Passages that are there several times are kept
    once, and counted in the log.

    Args:
        path: `.txt`, `.jsonl` or `.json` (one object per line), `.csv` or `.tsv` with a header, each also with `.gz`,
            or `.parquet`.
        text_column: Column or key of the passages; `.txt` has none.
        paragraphs: Whether a passage of a `.txt` file ends at a blank line only, instead of at each line's end.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file or a row is malformed; the message names the line and the column.
    """
    path = Path(path)
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".txt":
        passages = _text_passages(path, paragraphs)
    elif paragraphs:
        raise ValueError(f"paragraphs=True is for .txt files, but {path} has a passage per row: leave it out")
    else:
        passages = _column(path, kind, text_column)
    distinct = list(dict.fromkeys(passages))
    if len(distinct) < len(passages):
        log.info("%s: %d of %d passages are there before, and left out", path, len(passages) - len(distinct),
                 len(passages))  # fmt: skip
    return distinct


def _text_passages(path: Path, paragraphs: bool) -> list[str]:
    content = read_bytes(path, _EXPECTED).removeprefix(b"\xef\xbb\xbf")
    check_text(path, content)
    lines = [line.strip() for line in content.decode().splitlines()]
    found = "\n".join(lines).split("\n\n") if paragraphs else lines
    passages = [passage for block in found if (passage := " ".join(block.split()))]
    if not passages:
        raise ValueError(f"{path} is empty, expected {_EXPECTED}")
    return passages


def _column(path: Path, kind: str, text_column: str) -> list[str]:
    passages = []
    for place, values in _rows(path, kind, text_column):
        if text_column not in values:
            present = ", ".join(map(repr, values)) or "an empty object"
            raise ValueError(
                f"{place}: no {text_column!r}, only {present}; name the column of the passages in text_column"
            )
        passage = values[text_column]
        if not isinstance(passage, str) or not passage.strip():
            raise ValueError(f"{place}: {text_column} is {repr(passage)[:40]}, expected a text that is not blank")
        passages.append(passage.strip())
    if not passages:
        raise ValueError(f"{path} has no rows, expected {_EXPECTED}")
    return passages


def _rows(path: Path, kind: str, text_column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and its values."""
    if kind in _SEPARATORS:
        records = delimited_records(path, _SEPARATORS[kind])
    elif kind in _JSON:
        records = json_records(path)
    elif kind == ".parquet" and path.suffix != ".gz":
        # pandas takes half a second that text files do not need.
        from datamodules.sources.sequence_tables import parquet_columns

        present: list[str] = []

        def choose(names: list[str]) -> list[str]:
            present.extend(names)
            return [name for name in names if name == text_column]

        frame = parquet_columns(path, choose)
        if text_column not in present:
            yield f"{path}", dict.fromkeys(present)
        for row, value in enumerate(frame.get(text_column, ())):
            yield f"{path}, row {row}", {text_column: value}
        return
    else:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, expected .txt, .jsonl, .json, .csv or .tsv (also with .gz), or .parquet"
        )
    yield from zip(records.places, records.values, strict=True)
