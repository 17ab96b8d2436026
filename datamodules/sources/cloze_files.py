"""Cloze questions from a person's own files: JSON lines, delimited text, Parquet."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datamodules.cloze_rows import UNLABELLED, ClozeRows
from datamodules.cloze_text import PLACEHOLDER
from datamodules.sources.sequence_text import check_text, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

log = logging.getLogger(__name__)

_JSON = (".jsonl", ".json")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_EXPECTED = "one question per line"
_INTEGER = re.compile(r"[+-]?\d+(\.0*)?")  # what a table tool makes of an integer column with gaps ends in .0


@dataclass(frozen=True)
class ClozeColumns:
    """Which columns (or keys of JSON lines) hold what; the defaults are those of ReCAM.

    Attributes:
        article: Passages; None for questions without passages.
        question: Questions with one `@placeholder` each.
        options: A pattern such as `option_{}` for one column per option, numbered from 0, or the names of these
            columns, or the name of one column that holds lists of options.
        label: Index of the gold option, from 0.
        id: What identifies a question; where there is no such column, the number of its row from 0.

    Raises:
        ValueError: If a column is used twice, or the options are fewer than two columns.
    """

    article: str | None = "article"
    question: str = "question"
    options: str | tuple[str, ...] = "option_{}"
    label: str = "label"
    id: str = "id"

    def __post_init__(self) -> None:
        """Refuse columns that cannot be told apart."""
        if isinstance(self.options, str):
            if self.options.count("{}") > 1:
                raise ValueError(f"options {self.options!r}: expected one {{}}, for the number of the option")
        elif len(self.options) < 2:
            raise ValueError(f"options {self.options!r}: expected two columns or more, a pattern, or a list column")
        options = [self.options] if isinstance(self.options, str) else list(self.options)
        names = [name for name in (self.article, self.question, *options, self.label, self.id) if name is not None]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"column {name!r} is used twice among {', '.join(map(repr, names))}")

    @property
    def listed(self) -> bool:
        """Whether one column holds all options."""
        return isinstance(self.options, str) and "{}" not in self.options

    def option_names(self, present: Sequence[str], num_options: int | None) -> list[str]:
        """Names of the columns of the options.

        Args:
            present: Names of all columns.
            num_options: Number of options; by default as many as there are consecutive columns of the pattern.
        """
        if not isinstance(self.options, str):
            return list(self.options)
        if self.listed:
            return [self.options]
        count = num_options
        if count is None:
            count = 0
            while self.option_name(count) in present:
                count += 1
        # At least one name, so that a table without options is refused by that name.
        return [self.options.replace("{}", str(number)) for number in range(max(count, 1))]

    def option_name(self, number: int) -> str | None:
        """The column of an option by the pattern; None where there is no pattern."""
        if not isinstance(self.options, str) or self.listed:
            return None
        return self.options.replace("{}", str(number))


class Records(NamedTuple):
    """Rows of a file by column, where each stands, and what columns are called."""

    values: list[dict[str, Any]]
    places: list[str]
    unit: str


def read_cloze(
    path: str | Path, columns: ClozeColumns | None = None, num_options: int | None = None, part: str = "questions"
) -> ClozeRows:
    """Read questions from a file in the format that its name ends in.

    A byte order mark, Windows line ends and blank lines are accepted. A file has a label in every row or in none; a
    label that is missing, null, empty or -1 means none. Two equal options in a row are real data: they are counted in a
    warning.

    Args:
        path: `.jsonl` or `.json` (one object per line), `.csv` or `.tsv` with a header, each also with `.gz`, or
            `.parquet`.
        columns: Which columns hold what; those of ReCAM by default.
        num_options: Number of options of every question; by default that of the first one.
        part: What the questions are for, in messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file or a row is malformed; the message names the line and the column.
    """
    path = Path(path)
    columns = columns or ClozeColumns()
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".parquet" and path.suffix != ".gz":
        records = _parquet_records(path, columns)
    elif kind in _JSON:
        records = json_records(path)
    elif kind in _SEPARATORS:
        records = delimited_records(path, _SEPARATORS[kind])
    else:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, expected .jsonl, .json, .csv or .tsv (also with .gz), or .parquet"
        )
    return _rows(records, columns, num_options, f"{part} ({path})")


def json_records(path: Path) -> Records:
    """Objects of a file of JSON lines.

    Raises:
        ValueError: If the file or a line is malformed.
    """
    content = _text_of(path)
    values, places = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{place}: no JSON ({error}); expected one object per line, with no line break inside an object"
            ) from None
        if not isinstance(value, dict):
            more = "; write the entries of the list as one line each" if isinstance(value, list) else ""
            raise ValueError(f"{place}: a JSON {type(value).__name__}, expected an object{more}")
        values.append(value)
        places.append(place)
    return Records(values, places, "key")


def _text_of(path: Path) -> bytes:
    content = read_bytes(path, _EXPECTED).removeprefix(b"\xef\xbb\xbf")
    check_text(path, content)
    if not content.strip():
        raise ValueError(f"{path} is empty, expected {_EXPECTED}")
    return content


def delimited_records(path: Path, separator: str) -> Records:
    """Rows of a delimited text with a header.

    Raises:
        ValueError: If the file or a line is malformed.
    """
    reader = csv.reader(io.StringIO(_text_of(path).decode(), newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    values, places = [], []
    line = 1
    try:
        for cells in reader:
            place, line = f"{path}, line {line}", reader.line_num + 1
            if not cells or (len(cells) == 1 and not cells[0].strip()):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _check_header(header, place)
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{place}: {len(cells)} fields separated by {separator!r}, but the header has {len(header)}; put "
                    "texts that hold a separator into double quotes"
                )
            values.append(dict(zip(header, cells, strict=True)))
            places.append(place)
    except csv.Error as error:
        limit = f"; texts of more than {csv.field_size_limit():,} characters need .jsonl or .parquet"
        raise ValueError(
            f"{path}, line {line}: {error}; a double quote inside a quoted text is written twice"
            + (limit if "limit" in str(error) else "")
        ) from None
    return Records(values, places, "column")


def _check_header(header: list[str], place: str) -> None:
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{place}: column {name!r} is there twice")


def _parquet_records(path: Path, columns: ClozeColumns) -> Records:
    # pandas takes half a second that text files do not need.
    from datamodules.sources.sequence_tables import parquet_columns

    def choose(present: list[str]) -> list[str]:
        named = {columns.article, columns.question, columns.label, columns.id}
        if isinstance(columns.options, str):
            head, _, tail = columns.options.partition("{}")
            return [name for name in present if name in named or _numbered(name, head, tail, columns.listed)]
        return [name for name in present if name in named or name in columns.options]

    frame = parquet_columns(path, choose).astype(object)
    frame = frame.where(frame.notna(), None)
    values = [dict(zip(frame.columns, cells, strict=True)) for cells in frame.itertuples(index=False, name=None)]
    return Records(values, [f"{path}, row {row}" for row in range(len(values))], "column")


def _numbered(name: str, head: str, tail: str, whole: bool) -> bool:
    if whole:
        return name == head
    return name.startswith(head) and name.endswith(tail) and name[len(head) : len(name) - len(tail)].isdigit()


def _rows(records: Records, columns: ClozeColumns, num_options: int | None, name: str) -> ClozeRows:
    if not records.values:
        raise ValueError(f"{name} has no rows, expected {_EXPECTED}")
    count = num_options
    articles, questions, options, labels, ids = [], [], [], [], []
    for row, (record, place) in enumerate(zip(records.values, records.places, strict=True)):
        articles.append("" if columns.article is None else _text(record, columns.article, place, records.unit))
        questions.append(_question(record, columns.question, place, records.unit))
        options.append(_options(record, columns, count, place, records.unit, row > 0))
        count = len(options[0]) if count is None else count
        labels.append(_label(record.get(columns.label), columns.label, place, count))
        ids.append(_identity(record.get(columns.id), columns.id, place, row))
    _warn(options, ids, name)
    return ClozeRows(name, articles, questions, options, np.array(labels, dtype=np.int64), ids, records.places)


def _text(record: dict[str, Any], key: str, place: str, unit: str) -> str:
    if key not in record:
        raise ValueError(f"{place}: no {unit} {key!r}, only {', '.join(map(repr, record)) or 'an empty object'}")
    return _filled(record[key], key, place)


def _filled(value: Any, what: str, place: str) -> str:
    if value is None or value == "":
        raise ValueError(f"{place}: {what} is empty, expected a text")
    if not isinstance(value, str):
        raise ValueError(f"{place}: {what} is {str(value)[:40]!r} ({type(value).__name__}), expected a text")
    if not value.strip():
        raise ValueError(f"{place}: {what} is blank, expected a text")
    return value.strip()


def _question(record: dict[str, Any], key: str, place: str, unit: str) -> str:
    question = _text(record, key, place, unit)
    found = question.count(PLACEHOLDER)
    if found != 1:
        raise ValueError(
            f"{place}: {key} has {found} times {PLACEHOLDER}, expected it once, where the option belongs: "
            f"{question[:60]!r}"
        )
    return question


def _options(
    record: dict[str, Any], columns: ClozeColumns, count: int | None, place: str, unit: str, later: bool
) -> list[str]:
    names = columns.option_names(list(record), count)
    if columns.listed:
        texts = _listed(record, names[0], place, unit)
    else:
        texts = [_text(record, name, place, unit) for name in names]
        more = columns.option_name(len(names))
        # A column without a value is what a table of questions with fewer options may have.
        if more is not None and record.get(more) not in (None, ""):
            raise ValueError(f"{place}: {unit} {more!r} is one option too many, expected {len(names)}")
    if count is not None and len(texts) != count:
        raise ValueError(
            f"{place}: {len(texts)} options in {', '.join(names)}, expected {count}"
            + (", as in the first question" if later else "")
        )
    if len(texts) < 2:
        raise ValueError(f"{place}: {len(texts)} option in {', '.join(names)}, expected two or more")
    return texts


def _listed(record: dict[str, Any], key: str, place: str, unit: str) -> list[str]:
    if key not in record:
        _text(record, key, place, unit)
    value = record[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, (list, np.ndarray)):
        raise ValueError(
            f"{place}: {key} is {str(record[key])[:40]!r}, expected a list of options, in text files written as JSON: "
            '["a", "b"]'
        )
    return [_filled(option, f"{key}[{number}]", place) for number, option in enumerate(list(value))]


def _label(value: Any, key: str, place: str, count: int) -> int:
    if value is None or (isinstance(value, str) and not value.strip()):
        return UNLABELLED
    integer = None
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        integer = int(value)
    elif isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        integer = int(value.split(".")[0])
    elif isinstance(value, (float, np.floating)):
        if np.isnan(value):
            return UNLABELLED
        integer = int(value) if float(value).is_integer() else None
    if integer is None:
        raise ValueError(
            f"{place}: {key} {value!r} is not an integer, expected the index of the gold option, 0..{count - 1}"
        )
    if integer == -1:
        return UNLABELLED
    if not 0 <= integer < count:
        raise ValueError(f"{place}: {key} {integer} out of range 0..{count - 1} (are labels 1-based?)")
    return integer


def _identity(value: Any, key: str, place: str, row: int) -> str:
    if value is None:
        return str(row)
    if isinstance(value, bool) or not isinstance(value, (str, int, np.integer)) or not str(value).strip():
        raise ValueError(f"{place}: {key} {value!r}, expected a text or an integer")
    return str(value).strip()


def _warn(options: Iterable[list[str]], ids: list[str], name: str) -> None:
    equal = sum(len({text.casefold() for text in texts}) < len(texts) for texts in options)
    if equal:
        log.warning(
            "%s: %d of %d questions have two equal options (upper and lower case aside); only the one of the label "
            "counts as right, unless lenient_duplicates=True",
            name, equal, len(ids),
        )  # fmt: skip
    repeated = len(ids) - len(set(ids))
    if repeated:
        log.warning("%s: %d ids were there before; predictions keep the order of the rows", name, repeated)
