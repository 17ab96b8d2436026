"""Tables with one row per example and declared columns: inputs, targets of several tasks, users, parts.

Reading checks the file, parsing checks the values, and an encoding, fitted on the training rows, makes tensors of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from datamodules.sources.sequence_tables import parquet_columns, read_delimited

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]
    Labels = NDArray[np.object_]

log = logging.getLogger(__name__)

KINDS = ("binary", "multiclass", "regression")
PARTS = ("train", "validation", "test")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class TaskColumns:
    """What the columns of a table are for.

    Attributes:
        categorical: Inputs that are categories.
        numeric: Inputs that are numbers.
        targets: Name and kind ("binary", "multiclass", "regression") of each target, in the order of the tasks.
        user: Groups of rows; may be an input as well.
        split: Part of each row: "train", "validation" or "test".
        log: Numeric inputs of which log(1 + x) is taken.
        clip: Largest absolute value of a standardised number.

    Raises:
        ValueError: If a column is used twice.
    """

    categorical: tuple[str, ...]
    numeric: tuple[str, ...]
    targets: tuple[tuple[str, str], ...]
    user: str | None = None
    split: str | None = None
    log: frozenset[str] = field(default_factory=frozenset)
    clip: float | None = None

    def __post_init__(self) -> None:
        """Refuse a column with two roles."""
        roles: dict[str, str] = {}
        for role, name in [
            *(("categorical_columns", name) for name in self.categorical),
            *(("numeric_columns", name) for name in self.numeric),
            *((f"{kind}_targets", name) for name, kind in self.targets),
            *([("split_column", self.split)] if self.split is not None else []),
        ]:
            if name in roles:
                raise ValueError(f"column {name!r} is used twice: in {roles[name]} and in {role}")
            roles[name] = role
        if self.user is not None and roles.get(self.user, "_columns").endswith(("targets", "split_column")):
            raise ValueError(f"column {self.user!r} is used twice: as user_column and in {roles[self.user]}")

    @property
    def names(self) -> list[str]:
        """All columns, each once."""
        others = [name for name in (self.user, self.split) if name is not None]
        return list(dict.fromkeys([*self.categorical, *self.numeric, *(name for name, _ in self.targets), *others]))

    @property
    def texts(self) -> list[str]:
        """Columns whose cells stay the texts that they are: 007 is not 7, and NA is not a missing value."""
        return [*self.categorical, *(name for name in (self.user, self.split) if name is not None)]

    def choose(self, source: str) -> Callable[[list[str]], list[str]]:
        """A function that returns all names, or refuses a table without one of them."""

        def chosen(present: list[str]) -> list[str]:
            for name in self.names:
                if name not in present:
                    shown = ", ".join(map(repr, present[:40])) + (", ..." if len(present) > 40 else "")
                    raise ValueError(f"{source} has no column {name!r}, only {shown}")
            return self.names

        return chosen


class Table(NamedTuple):
    """A table and how messages call it.

    Attributes:
        frame: Its columns.
        name: Its file.
        unit: What a row is called.
        first: Number of the first row.
    """

    frame: pd.DataFrame
    name: str
    unit: str = "row"
    first: int = 0

    def where(self, row: int) -> str:
        """Place of a row."""
        return f"{self.name} {self.unit} {row + self.first}"


def read_table(path: Path, columns: TaskColumns) -> Table:
    """Read the declared columns of a file in the format that its name ends in.

    Args:
        path: `.csv` or `.tsv` with a header (also `.gz`), or `.parquet`.
        columns: What to read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is malformed or lacks a column.
    """
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".parquet" and path.suffix != ".gz":
        return Table(parquet_columns(path, columns.choose(str(path))), str(path))
    if kind not in _SEPARATORS:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .csv or .tsv (also with .gz), or .parquet")
    frame, first = read_delimited(path, _SEPARATORS[kind], columns.choose(str(path)), columns.texts)
    return Table(frame, str(path), "line", first)


class Parsed(NamedTuple):
    """The values of a table, checked.

    Attributes:
        categories: By categorical column: codes `(rows,)` and the texts that they stand for.
        numbers: float64 `(rows, numeric columns)`, nan for an empty cell.
        targets: By task: float64 `(rows,)`, nan where there is no label.
        users: int64 `(rows,)`, or None.
        parts: int64 `(rows,)`, index into `PARTS`, or None.
        name: What the table is called.
    """

    categories: list[tuple[Ints, Labels]]
    numbers: Floats
    targets: dict[str, Floats]
    users: Ints | None
    parts: Ints | None
    name: str


def parse(table: Table, columns: TaskColumns, num_classes: dict[str, int] | None = None) -> Parsed:
    """Check and convert the values of a table.

    Args:
        table: What was read.
        columns: What its columns are for.
        num_classes: Number of classes of each multiclass task; by default the table's own.

    Raises:
        ValueError: If a value is not what its column is declared to hold; the message names its place.
    """
    columns.choose(table.name)([str(name) for name in table.frame.columns])
    if (twice := table.frame.columns.duplicated()).any():
        raise ValueError(f"{table.name}: column {str(table.frame.columns[twice][0])!r} is there twice")
    if table.frame.empty:
        raise ValueError(f"{table.name} has no rows")
    targets = {}
    for name, kind in columns.targets:
        targets[name] = values = numbers_of(table, name)
        if kind == "binary":
            _refuse(table, name, values, (values != 0) & (values != 1), "expected 0 or 1")
        elif kind == "multiclass":
            _refuse(table, name, values, (values < 0) | (values != np.floor(values)), "expected a class from 0")
            _check_classes(table, name, values, None if num_classes is None else num_classes[name])
    numbers = np.empty((len(table.frame), len(columns.numeric)))
    for k, name in enumerate(columns.numeric):
        numbers[:, k] = values = numbers_of(table, name)
        if name in columns.log:
            _refuse(table, name, values, values < 0, "expected 0 or more, as its logarithm is taken")
    return Parsed(
        [text_codes(table.frame[name]) for name in columns.categorical],
        numbers,
        targets,
        None if columns.user is None else _full(table, columns.user)[0],
        None if columns.split is None else _parts(table, columns.split),
        table.name,
    )


def _refuse(table: Table, column: str, values: Floats, wrong: NDArray[np.bool_], expected: str) -> None:
    wrong = wrong & ~np.isnan(values)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{table.where(row)}: {column} {values[row]:g}, {expected} (or an empty cell: no value)")


def _check_classes(table: Table, column: str, values: Floats, num_classes: int | None) -> None:
    if num_classes is not None:
        _refuse(table, column, values, values >= num_classes, f"expected a class below {num_classes}, as in training")
        return
    present = np.unique(values[~np.isnan(values)])
    gaps = present != np.arange(len(present))
    if gaps.any():
        lost, largest = int(np.argmax(gaps)), present[-1]
        row = int(np.argmax(values == largest))
        raise ValueError(
            f"{table.where(row)}: {column} {largest:g}, but no row has class {lost}: classes must be 0..C-1"
        )


def numbers_of(table: Table, column: str) -> Floats:
    """A column as numbers, nan for an empty cell.

    Raises:
        ValueError: If a cell is no finite number.
    """
    series = table.frame[column]
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    if pd.api.types.is_datetime64_any_dtype(series.dtype) or pd.api.types.is_timedelta64_dtype(series.dtype):
        raise ValueError(f"{table.where(0)}: {column} {series.iloc[0]} is a time, expected a number")
    if not pd.api.types.is_numeric_dtype(series.dtype):
        converted = pd.to_numeric(series, errors="coerce")
        wrong = (converted.isna() & series.notna() & (series != "")).to_numpy(dtype=bool)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"{table.where(row)}: {column} {series.iloc[row]!r} is not a number (an empty cell means no value)"
            )
        series = converted
    values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    if np.isinf(values).any():
        row = int(np.argmax(np.isinf(values)))
        raise ValueError(f"{table.where(row)}: {column} {values[row]} is not a finite number")
    return values


def text_codes(series: pd.Series[Any]) -> tuple[Ints, Labels]:
    """Codes `(rows,)` of the distinct texts of a column, and these texts; an empty cell is the text ""."""
    if isinstance(series.dtype, pd.CategoricalDtype):
        codes, values = series.cat.codes.to_numpy(), series.cat.categories.to_numpy()
    else:
        codes, distinct = pd.factorize(series)
        values = np.asarray(distinct)
    # 7 of an integer column is the 7.0 of one with empty cells, and the "7" of a text file.
    texts = [
        str(int(value)) if isinstance(value, (float, np.floating)) and float(value).is_integer() else str(value)
        for value in values
    ]
    merged, labels = pd.factorize(np.array([*texts, ""], dtype=object))
    return merged[codes].astype(np.int64), np.asarray(labels, dtype=object)


def _full(table: Table, column: str) -> tuple[Ints, Labels]:
    codes, labels = text_codes(table.frame[column])
    absent = labels[codes] == ""
    if absent.any():
        raise ValueError(f"{table.where(int(np.argmax(absent)))}: {column} is empty")
    return codes, labels


def _parts(table: Table, column: str) -> Ints:
    codes, labels = _full(table, column)
    parts = np.array([PARTS.index(label) if label in PARTS else -1 for label in labels])[codes]
    if (parts < 0).any():
        row = int(np.argmax(parts < 0))
        raise ValueError(f"{table.where(row)}: {column} {labels[codes[row]]!r}, expected one of {', '.join(PARTS)}")
    return parts


@dataclass(frozen=True)
class Encoding:
    """How values become tensors, as the training rows say.

    Attributes:
        columns: What the columns are for.
        vocabularies: By categorical column, the texts of the codes 1, 2, ...; 0 stands for all others.
        medians: float64 `(numeric columns,)`, what an empty cell becomes (after the logarithm, where one is taken).
        means: float64 `(numeric columns,)`.
        stds: float64 `(numeric columns,)`, 1 for a constant column.
    """

    columns: TaskColumns
    vocabularies: tuple[Labels, ...]
    medians: Floats
    means: Floats
    stds: Floats

    @classmethod
    def fit(cls, parsed: Parsed, columns: TaskColumns, rows: Ints, min_count: int = 1) -> Encoding:
        """Learn vocabularies and statistics.

        Args:
            parsed: The table.
            columns: What its columns are for.
            rows: int64, the training rows.
            min_count: Rarer categories get the code 0.

        Raises:
            ValueError: If a numeric column has no number in the training rows.
        """
        vocabularies = []
        for codes, labels in parsed.categories:
            counts = np.bincount(codes[rows], minlength=len(labels))
            vocabularies.append(np.sort(labels[counts >= max(min_count, 1)]))
        numbers = cls._logged(parsed.numbers[rows], columns)
        for k, name in enumerate(columns.numeric):
            if np.isnan(numbers[:, k]).all():
                raise ValueError(f"{parsed.name}: {name} has no number in any of the {len(rows)} training rows")
        if not columns.numeric:
            return cls(columns, tuple(vocabularies), np.zeros(0), np.zeros(0), np.ones(0))
        medians = np.nanmedian(numbers, axis=0)
        numbers = np.where(np.isnan(numbers), medians, numbers)
        constant = (numbers == numbers[0]).all(axis=0)  # rounding can give these a tiny deviation
        stds = np.where(constant, 1.0, numbers.std(axis=0))
        return cls(columns, tuple(vocabularies), medians, numbers.mean(axis=0), stds)

    @staticmethod
    def _logged(numbers: Floats, columns: TaskColumns) -> Floats:
        logged = [name in columns.log for name in columns.numeric]
        numbers = numbers.copy()
        numbers[:, logged] = np.log1p(numbers[:, logged])
        return numbers

    def categories(self, parsed: Parsed) -> NDArray[np.int32]:
        """Codes `(rows, categorical columns)`; those of unknown and of rare values are 0, and counted in the log."""
        found = np.zeros((len(parsed.numbers), len(self.vocabularies)), dtype=np.int32)
        for k, (codes, labels) in enumerate(parsed.categories):
            found[:, k] = (pd.Index(self.vocabularies[k]).get_indexer(pd.Index(labels)) + 1)[codes]
        self._count(parsed, found == 0, self.columns.categorical, "unknown to training, or rare there, get code 0")
        return found

    def numbers(self, parsed: Parsed) -> NDArray[np.float32]:
        """Standardised numbers `(rows, numeric columns)`; empty cells are filled, and counted in the log."""
        numbers = self._logged(parsed.numbers, self.columns)
        empty = np.isnan(numbers)
        self._count(parsed, empty, self.columns.numeric, "empty, get the training median")
        numbers = (np.where(empty, self.medians, numbers) - self.means) / self.stds
        if self.columns.clip is not None:
            numbers = numbers.clip(-self.columns.clip, self.columns.clip)
        return numbers.astype(np.float32)

    @staticmethod
    def _count(parsed: Parsed, cells: NDArray[np.bool_], columns: tuple[str, ...], what: str) -> None:
        counts = cells.sum(axis=0)
        if counts.any():
            each = [f"{name} {count}" for name, count in zip(columns, counts, strict=True) if count]
            shown = ", ".join(each[:10]) + (", ..." if len(each) > 10 else "")
            log.info("%s: %d of %d cells are %s (%s)", parsed.name, counts.sum(), cells.size, what, shown)
