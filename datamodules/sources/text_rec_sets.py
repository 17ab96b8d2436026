"""The published sets of titles with what users did: games, books and films.

Their licences allow research use; no file is part of this package.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datamodules.sources.amazon2014 import read_titles
from datamodules.sources.download import data_folder
from datamodules.sources.interactions import offsets_of
from datamodules.sources.sequence_tables import parquet_columns
from datamodules.sources.sequence_text import check_text, read_bytes, read_lines
from datamodules.text_rec_rows import Questions, TextCorpus

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

SETS = ("amazon_games", "tallrec_books", "movielens_small", "amazon2014")
CATEGORIES = ("beauty", "toys", "sports")
"""Of `amazon2014`."""
_FOLDERS = {
    "amazon_games": ("amazon_games_text", ("items.tsv.gz", "sequences.txt.gz")),
    "tallrec_books": ("tallrec_books", ("train.jsonl.gz", "test.jsonl.gz")),
    "movielens_small": ("movielens_small_mm", ("interactions.parquet", "items.parquet")),
}
_VALIDATION_SHARE = 0.1


class Question(NamedTuple):
    """A question of yes or no.

    Attributes:
        liked: Titles that the user liked.
        disliked: Titles that the user did not.
        target: The title asked about.
        label: Whether the user likes it.
    """

    liked: list[str]
    disliked: list[str]
    target: str
    label: bool


def read_set(source: str, category: str, data_dir: str | None, like_threshold: float) -> TextCorpus:
    """Read a published set.

    Args:
        source: One of `SETS`.
        category: Category of `amazon2014`.
        data_dir: Where to look: `$ZOO_DATA` by default, or else the user's cache.
        like_threshold: A rating above it is a like (`movielens_small`).

    Raises:
        FileNotFoundError: If files are missing; the message says which to put where.
        ValueError: If a file is malformed.
    """
    root = data_folder(data_dir)
    if source == "amazon2014":
        return _read_amazon2014(category, root)
    name, files = _FOLDERS[source]
    folder = root / name
    if not folder.is_dir() and all((root / file).is_file() for file in files):
        folder = root
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder / file} is missing: put {', '.join(files)} into {folder}, or name the folder above it in "
                "data_dir or ZOO_DATA"
            )
    paths = [folder / file for file in files]
    if source == "amazon_games":
        return _read_games(*paths)
    if source == "tallrec_books":
        return _read_books(*paths)
    return _read_movielens(paths[0], paths[1], like_threshold)


def _read_amazon2014(category: str, root: Path) -> TextCorpus:
    folder = root / "amazon2014" if (root / "amazon2014").is_dir() else root
    user_labels, item_labels, user_ids, item_ids, titles = read_titles(category, folder)
    counts = np.bincount(user_ids, minlength=len(user_labels))
    labels = [str(label) for label in item_labels]
    return TextCorpus(
        f"amazon2014 {category}", titles, labels, [str(label) for label in user_labels], item_ids, offsets_of(counts)
    )


def _read_games(items: Path, sequences: Path) -> TextCorpus:
    content = read_bytes(items, "a header and one line per item: item_id<TAB>title")
    check_text(items, content)
    lines = content.decode("utf-8-sig").rstrip("\r\n").split("\n")
    if lines[0].rstrip("\r") != "item_id\ttitle":
        raise ValueError(f"{items} line 1 is {lines[0][:80]!r}, expected the header 'item_id<TAB>title'")
    titles = []
    for number, text in enumerate(lines[1:], start=2):
        item, tab, title = text.rstrip("\r").partition("\t")
        if not tab or item != str(number - 2):
            raise ValueError(f"{items} line {number} is {text[:80]!r}, expected item {number - 2}, a tab and its title")
        titles.append(title)
    read = read_lines(sequences)
    outside = (read.values < 0) | (read.values >= len(titles))
    if outside.any():
        place = int(np.argmax(outside))
        line = int(np.searchsorted(read.offsets, place, side="right"))
        raise ValueError(
            f"{sequences} line {line}: item {read.values[place]} is not in {items.name}, expected 0..{len(titles) - 1}"
        )
    return TextCorpus(
        "amazon_games",
        titles,
        [str(item) for item in range(len(titles))],
        [str(user) for user in read.heads],
        read.values,
        read.offsets,
    )


def read_questions(path: Path) -> list[Question]:
    """Read yes/no questions: gzipped or plain JSON lines of `liked`, `disliked`, `target` and `label`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is malformed.
    """
    content = read_bytes(path, "one question a line, in JSON")
    check_text(path, content)
    questions = []
    for number, line in enumerate(content.decode("utf-8-sig").rstrip().split("\n"), start=1):
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}): expected one question a line") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {line[:80]!r}, expected an object with liked, disliked, target and label")
        liked, disliked = (_texts(value, key, where) for key in ("liked", "disliked"))
        target, label = value.get("target"), value.get("label")
        if not isinstance(target, str) or not target:
            raise ValueError(f"{where}: target is {target!r}, expected a title")
        if type(label) not in (int, bool) or label not in (0, 1):
            raise ValueError(f"{where}: label is {label!r}, expected 0 or 1")
        questions.append(Question(liked, disliked, target, bool(label)))
    return questions


def _texts(value: dict[str, Any], key: str, where: str) -> list[str]:
    found = value.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"{where}: {key} is {found!r}, expected a list of titles")
    return found


def histories(
    questions: Sequence[Question], ids: dict[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64], int]:
    """The known titles of the histories.

    The lists are taken as oldest first. How liked and disliked books alternated is not known: the liked ones count as
    the newer, so that a cut to the newest leaves them.

    Args:
        questions: The questions.
        ids: Item of each title.

    Returns:
        Items, whether they are liked, and offsets of the questions; and how many titles were unknown.
    """
    items: list[int] = []
    liked: list[bool] = []
    lengths, unknown = [], 0
    for likes, dislikes, _, _ in questions:
        before = len(items)
        for titles, flag in ((dislikes, False), (likes, True)):
            known = [ids[title] for title in titles if title in ids]
            unknown += len(titles) - len(known)
            items += known
            liked += [flag] * len(known)
        lengths.append(len(items) - before)
    return np.array(items, dtype=np.int64), np.array(liked, dtype=bool), offsets_of(np.array(lengths)), unknown


def _read_books(train: Path, test: Path) -> TextCorpus:
    parts = [read_questions(train), read_questions(test)]
    questions = [*parts[0], *parts[1]]
    ids: dict[str, int] = {}
    for likes, dislikes, target, _ in questions:
        for title in (*likes, *dislikes, target):
            ids.setdefault(title, len(ids))
    items, liked, offsets, _ = histories(questions, ids)
    # The set has no validation part: a tenth of the training questions, the same in every run.
    part = np.zeros(len(questions), dtype=np.int8)
    part[len(parts[0]) :] = 2
    held = max(1, int(_VALIDATION_SHARE * len(parts[0])))
    part[np.random.default_rng(0).permutation(len(parts[0]))[:held]] = 1
    log.info("tallrec_books: %d of %d training questions are the validation part", held, len(parts[0]))
    labels = [f"{name}-{row}" for name, rows in zip(("train", "test"), parts, strict=True) for row in range(len(rows))]
    return TextCorpus(
        "tallrec_books",
        list(ids),
        list(ids),
        labels,
        items,
        offsets,
        liked,
        questions=Questions(
            np.array([ids[question.target] for question in questions], dtype=np.int64),
            np.array([question.label for question in questions], dtype=bool),
            part,
        ),
    )


def _read_movielens(interactions: Path, items: Path, like_threshold: float) -> TextCorpus:
    films = _columns(items, ("item", "title"))
    if not np.array_equal(films["item"], np.arange(len(films))):
        raise ValueError(f"{items}: column 'item' is not 0, 1, ..., {len(films) - 1}, in this order")
    ratings = _columns(interactions, ("user", "item", "rating", "timestamp", "split"))
    user_ids, item_ids, times = (ratings[name].to_numpy(dtype=np.int64) for name in ("user", "item", "timestamp"))
    if not len(ratings) or user_ids.min() < 0 or item_ids.min() < 0 or item_ids.max() >= len(films):
        raise ValueError(f"{interactions}: expected users from 0 and items 0..{len(films) - 1}")
    split = ratings["split"].to_numpy(dtype=np.int8)
    if not np.isin(split, (0, 1, 2)).all():
        raise ValueError(f"{interactions}: split has {sorted(set(split.tolist()))}, expected 0, 1 and 2")
    order = np.lexsort((item_ids, times, user_ids))
    counts = np.bincount(user_ids)
    return TextCorpus(
        "movielens_small",
        [str(title) for title in films["title"]],
        [str(item) for item in range(len(films))],
        [str(user) for user in range(len(counts))],
        item_ids[order],
        offsets_of(counts),
        (ratings["rating"].to_numpy(dtype=np.float64) > like_threshold)[order],
        split[order],
    )


def _columns(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    def choose(present: list[str]) -> list[str]:
        for name in columns:
            if name not in present:
                raise ValueError(f"{path} has no column {name!r}, only {', '.join(map(repr, present))}")
        return list(columns)

    return parquet_columns(path, choose)
