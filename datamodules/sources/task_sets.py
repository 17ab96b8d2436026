"""Known tables with several tasks: census records, crime rates, bike rentals, and short-video platforms.

Adult, Census-Income, Communities and Crime, and Bike Sharing are of the UCI Machine Learning Repository (CC BY 4.0).
The data of the two video challenges is for research and must be asked for. No file is part of this package.
"""

from __future__ import annotations

import logging
import os
import zipfile
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from filelock import FileLock

from datamodules.sources.download import RemoteFile, data_folder, fetch
from datamodules.sources.sequence_tables import first_line, parquet_columns, read_delimited
from datamodules.sources.task_tables import Table, TaskColumns, text_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases"

ADULT = (
    "age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship", "race",
    "sex", "capital_gain", "capital_loss", "hours", "native_country", "income",
)  # fmt: skip
"""Columns of `adult.data`; `hours` is hours-per-week."""

CRIME_RATES = ("murders", "rapes", "robberies", "assaults", "burglaries", "larcenies", "auto_thefts", "arsons")
CRIME_INPUTS = tuple(f"attribute_{k}" for k in range(1, 125))
CRIME = (
    *("community", "state", "county_code", "community_code", "fold"),
    *CRIME_INPUTS,
    *(name for rate in CRIME_RATES for name in (f"{rate}_count", rate)),
    *("violent", "non_violent"),
)
"""Columns of `CommViolPredUnnormalizedData.txt`: inputs by their place, crimes by count and for 100,000 people."""

CENSUS = (
    "age", "worker_class", "industry_code", "occupation_code", "education", "wage_per_hour", "enrolled",
    "never_married", "industry", "occupation", "race", "hispanic_origin", "sex", "union_member",
    "unemployment_reason", "employment_status", "capital_gains", "capital_losses", "dividends", "tax_filer",
    "previous_region", "previous_state", "household_detail", "household_summary", "instance_weight", "migration_msa",
    "migration_region", "migration_within_region", "same_house", "migration_sunbelt", "num_persons_employer",
    "family_under_18", "father_country", "mother_country", "self_country", "citizenship", "own_business",
    "veteran_form", "veteran_benefits", "weeks_worked", "year", "income",
)  # fmt: skip
"""Columns of `census-income.data`; `never_married` is made of the marital status, `instance_weight` is no input."""
_CENSUS_NUMBERS = (
    *("age", "wage_per_hour", "capital_gains", "capital_losses", "dividends"),
    *("num_persons_employer", "weeks_worked"),
)

TIKTOK = (
    "uid", "user_city", "item_id", "author_id", "item_city", "channel", "finish", "like", "music_id", "device", "time",
    "duration",
)  # fmt: skip
"""Columns of `final_track1_train.txt`."""


@dataclass(frozen=True)
class KnownSet:
    """A set, where it is, and how its columns are used.

    Attributes:
        folder: Its folder under the root of all data, where a download goes.
        files: Names that its table may have.
        read: Reads columns of a file of the set.
        kinds: Kind of each task that it offers.
        categorical: Inputs that are categories.
        numeric: Inputs that are numbers.
        tasks: Tasks taken by default; all where there are none.
        remote: What can be downloaded; None where the data must be asked for.
        origin: Whom to ask.
        user: Column of users.
        log: Numbers of which log(1 + x) is taken.
        clip: Largest absolute value of a standardised number.
        max_missing: Numeric columns are taken only with a smaller share of empty cells.
        sizes: Rows of train, validation and test; the table has their sum.
        fractions: Shares of validation and test, where there are no sizes.
        min_category_count: Rarer categories are taken for unknown.
    """

    folder: str
    files: tuple[str, ...]
    read: Callable[[Path, TaskColumns], Table]
    kinds: dict[str, str]
    categorical: tuple[str, ...]
    numeric: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    remote: RemoteFile | None = None
    origin: str = ""
    user: str | None = None
    log: frozenset[str] = field(default_factory=frozenset)
    clip: float | None = None
    max_missing: float | None = None
    sizes: tuple[int, int, int] | None = None
    fractions: tuple[float, float] = (0.1, 0.1)
    min_category_count: int = 1


def _existing(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _as_binary(table: Table, column: str, positive: str, negative: str | None) -> None:
    """Put 1 for a text and 0 for another, or for all others if `negative` is None; a last full stop does not count."""
    if column not in table.frame:
        return
    codes, labels = text_codes(table.frame[column])
    plain = np.array([label.strip().removesuffix(".") for label in labels], dtype=object)
    if negative is not None and (wrong := ~np.isin(plain, [positive, negative])[codes]).any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{table.where(row)}: {column} {labels[codes[row]]!r}, expected {positive!r} or {negative!r}")
    table.frame[column] = (plain == positive)[codes].astype(np.int64)


def _read_text(
    path: Path,
    columns: TaskColumns,
    names: Sequence[str] | None,
    separator: str = ",",
    skip: int = 0,
    missing: Sequence[str] = ("",),
) -> Table:
    frame, first = read_delimited(
        path,
        separator,
        columns.choose(str(path)),
        columns.texts,
        names=names,
        skip=skip,
        spaced=separator == ",",
        missing=missing,
    )
    return Table(frame, str(path), "line", first)


def _read_adult(path: Path, columns: TaskColumns) -> Table:
    """Read `adult.data`, `adult.test` (with a remark in its first line), or a Parquet table of the same columns."""
    if path.suffix == ".parquet":
        published = {"hours_per_week": "hours"}

        def choose(present: list[str]) -> list[str]:
            wanted = columns.choose(str(path))([published.get(name, name) for name in present])
            return [name for name in present if published.get(name, name) in wanted]

        table = Table(parquet_columns(path, choose).rename(columns=published), str(path))
    else:
        table = _read_text(path, columns, ADULT, skip=int(first_line(path).startswith("|")))
    _as_binary(table, "income", ">50K", "<=50K")
    return table


def _read_crime(path: Path, columns: TaskColumns) -> Table:
    """Read the file of UCI, which has no header, or a copy with one."""
    header = first_line(path).split(",")[4:5] == ["fold"]
    return _read_text(path, columns, CRIME, skip=int(header), missing=("", "?"))


def _read_bike(path: Path, columns: TaskColumns) -> Table:
    return _read_text(path, columns, None)


def _read_census(path: Path, columns: TaskColumns) -> Table:
    table = _read_text(path, columns, CENSUS)
    _as_binary(table, "income", "50000+", "- 50000")
    _as_binary(table, "never_married", "Never married", None)
    return table


def _read_tiktok(path: Path, columns: TaskColumns) -> Table:
    return _read_text(path, columns, TIKTOK, "\t")


def _read_wechat(path: Path, columns: TaskColumns) -> Table:
    """Read a table of actions, and of `feed_info.csv` beside it what only that file has."""
    feed_path = path.with_name("feed_info.csv")
    names = list(dict.fromkeys(["feedid", *columns.names]))
    texts = [*columns.texts, "feedid"]
    own: list[str] = []  # columns of the actions

    def of_actions(present: list[str]) -> list[str]:
        if "feedid" not in present:
            raise ValueError(f"{path} has no column 'feedid', only {', '.join(map(repr, present))}")
        own.extend(name for name in names if name in present)
        return own

    def of_feeds(present: list[str]) -> list[str]:
        wanted = ["feedid", *(name for name in names if name not in own)]
        lost = next((name for name in wanted if name not in present), None)
        if lost is not None:
            raise ValueError(f"neither {path} nor {feed_path.name} has a column {lost!r}")
        return wanted

    frame, first = read_delimited(path, ",", of_actions, texts)
    found = _existing(feed_path)
    if found is None:
        raise FileNotFoundError(f"{feed_path} (or .gz) is missing beside {path}: both files are needed")
    feeds, feed_first = read_delimited(found, ",", of_feeds, texts)
    ids = pd.Index(feeds["feedid"].astype(str))
    if not ids.is_unique:
        row = int(np.argmax(ids.duplicated()))
        raise ValueError(f"{found} line {row + feed_first}: feedid {ids[row]} was there before, expected each once")
    table = Table(frame, str(path), "line", first)
    codes, labels = text_codes(frame["feedid"])
    places = ids.get_indexer(pd.Index(labels))[codes]
    if (places < 0).any():
        row = int(np.argmax(places < 0))
        raise ValueError(f"{table.where(row)}: feedid {labels[codes[row]]} is not in {found}")
    joined = feeds.drop(columns="feedid").iloc[places].reset_index(drop=True)
    return table._replace(frame=pd.concat([frame, joined], axis=1))


SETS: dict[str, KnownSet] = {
    "adult": KnownSet(
        folder="adult_census",
        files=("adult.data", "train.parquet"),
        read=_read_adult,
        kinds={"income": "binary", "hours": "regression", "age": "regression"},
        categorical=("workclass", "education", "occupation", "race", "sex", "native_country", "relationship"),
        numeric=("education_num", "capital_gain", "capital_loss"),
        remote=RemoteFile("adult.data", f"{_UCI}/adult/adult.data"),
        log=frozenset({"capital_gain", "capital_loss"}),
        sizes=(20_000, 5_000, 7_561),
    ),
    "crime": KnownSet(
        folder="communities_crime",
        files=("CommViolPredUnnormalizedData.txt",),
        read=_read_crime,
        kinds=dict.fromkeys(CRIME_RATES, "regression"),
        categorical=(),
        numeric=CRIME_INPUTS,
        remote=RemoteFile("CommViolPredUnnormalizedData.txt", f"{_UCI}/00211/CommViolPredUnnormalizedData.txt"),
        clip=5.0,
        max_missing=0.05,
        sizes=(1_400, 350, 465),
    ),
    "bike": KnownSet(
        folder="bike_sharing",
        files=("hour.csv",),
        read=_read_bike,
        kinds={"casual": "regression", "registered": "regression"},
        categorical=("season", "mnth", "hr", "holiday", "weekday", "workingday", "weathersit"),
        numeric=("temp", "atemp", "hum", "windspeed"),
        remote=RemoteFile("Bike-Sharing-Dataset.zip", f"{_UCI}/00275/Bike-Sharing-Dataset.zip"),
        sizes=(12_000, 2_000, 3_379),
    ),
    "census_income": KnownSet(
        folder="census_income",
        files=("census-income.data",),
        read=_read_census,
        kinds={"income": "binary", "never_married": "binary"},
        categorical=tuple(
            name for name in CENSUS if name not in (*_CENSUS_NUMBERS, "instance_weight", "never_married", "income")
        ),
        numeric=_CENSUS_NUMBERS,
        remote=RemoteFile("census-income.data.gz", f"{_UCI}/census-income-mld/census-income.data.gz"),
    ),
    "tiktok": KnownSet(
        folder="tiktok",
        files=("final_track1_train.txt",),
        read=_read_tiktok,
        kinds={"finish": "binary", "like": "binary"},
        categorical=("uid", "item_id", "author_id", "item_city", "channel", "music_id", "device", "duration"),
        numeric=(),
        origin="the organisers of the ICME 2019 Short Video Understanding Challenge (track 1)",
        user="uid",
        fractions=(0.09, 0.1),
        min_category_count=10,
    ),
    "wechat": KnownSet(
        folder="wechat",
        files=("user_action.csv",),
        read=_read_wechat,
        kinds=dict.fromkeys(
            ("read_comment", "like", "click_avatar", "forward", "favorite", "follow", "comment"), "binary"
        ),
        categorical=("userid", "feedid", "device", "authorid", "bgm_song_id", "bgm_singer_id"),
        numeric=("videoplayseconds",),
        tasks=("read_comment", "like", "click_avatar", "forward"),
        origin="the organisers of the WeChat Big Data Challenge 2021 (with feed_info.csv)",
        user="userid",
        log=frozenset({"videoplayseconds"}),
        fractions=(0.09, 0.1),
        min_category_count=10,
    ),
}


def set_columns(
    source: str,
    tasks: Sequence[str] | None = None,
    categorical: Sequence[str] | None = None,
    numeric: Sequence[str] | None = None,
) -> TaskColumns:
    """Columns of a known set.

    Args:
        source: Name of the set.
        tasks: Its tasks to take, in this order; by default those that the set names.
        categorical: Other inputs that are categories.
        numeric: Other inputs that are numbers.
    """
    known = SETS[source]
    return TaskColumns(
        known.categorical if categorical is None else tuple(categorical),
        known.numeric if numeric is None else tuple(numeric),
        tuple((name, known.kinds[name]) for name in tasks or known.tasks or known.kinds),
        known.user,
        log=known.log,
        clip=known.clip,
    )


def find_set(source: str, root: Path) -> Path | None:
    """The table of a set in its folder under `root`, or in `root` itself; None where it is in neither."""
    known = SETS[source]
    # `train.parquet` is anybody's name: only in the set's own folder does it mean this set.
    named = [(folder, name) for folder in (root / known.folder, root) for name in known.files]
    return next(
        (
            found
            for folder, name in named
            if (folder.name == known.folder or not name.endswith(".parquet")) and (found := _existing(folder / name))
        ),
        None,
    )


def _unpack(archive: Path, name: str) -> None:
    """Write one file of an archive beside it; no other path of the archive is used."""
    target = archive.with_name(name)
    partial = archive.with_name(f".{name}.{os.getpid()}.part")
    with FileLock(archive.with_name(".download.lock")):
        if target.is_file():
            return
        try:
            with zipfile.ZipFile(archive) as content:
                partial.write_bytes(content.read(name))
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(
                f"{archive} is damaged or holds no {name} ({error}): delete it, it is fetched again"
            ) from error
        os.replace(partial, target)


def read_set(source: str, columns: TaskColumns, data_dir: str | None) -> tuple[Table, TaskColumns]:
    """Read a known set; download it where it is not found and can be.

    Args:
        source: Name of the set.
        columns: What to read.
        data_dir: Where to look and where to put downloads: `$ZOO_DATA` by default, or else the user's cache.

    Returns:
        The table, and the columns without the inputs that too many rows lack.

    Raises:
        FileNotFoundError: If there is no copy, and no network or nothing to download.
        ValueError: If the file is malformed or incomplete.
    """
    known, root = SETS[source], data_folder(data_dir)
    path = find_set(source, root)
    if path is None:
        folder = root / known.folder
        if known.remote is None:
            raise FileNotFoundError(
                f"source={source!r} cannot be downloaded: ask {known.origin}, and put {known.files[0]} (plain or .gz) "
                f"into {folder}, or name its folder in data_dir or ZOO_DATA"
            )
        fetch([known.remote], folder)
        if known.remote.name.endswith(".zip"):
            _unpack(folder / known.remote.name, known.files[0])
        path = find_set(source, root)
        if path is None:
            raise FileNotFoundError(f"the table of {source} is not where it was written, under {root}")
    table = known.read(path, columns)
    rows = len(table.frame)
    if known.sizes is not None and rows != sum(known.sizes):
        raise ValueError(f"{path} has {rows} rows, expected {sum(known.sizes)}: the file is incomplete or another one")
    if known.max_missing is not None and columns.numeric == known.numeric:
        kept = [name for name in columns.numeric if table.frame[name].isna().mean() < known.max_missing]
        log.info(
            "%s: %d of %d numeric columns lack %.0f %% of their cells or more and are left out",
            path, len(columns.numeric) - len(kept), len(columns.numeric), 100 * known.max_missing,
        )  # fmt: skip
        columns = replace(columns, numeric=tuple(kept))
    return table, columns
