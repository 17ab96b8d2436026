"""The small MovieLens set with posters and facts about the films; their features are computed here.

Ratings are those of the GroupLens edition of 2018 (research use), posters and facts those of the public set of
multi-label film genres. No file is part of this package.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.interaction_rows import InteractionTable
from datamodules.sources.feature_encoders import encoded_features
from datamodules.sources.feature_files import read_archive
from datamodules.sources.item_features import genre_year_features, pixel_features, term_svd, tfidf_svd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

FOLDER = "movielens_small_mm"
FILES = ("interactions.parquet", "items.parquet", "posters.npz")
MODALITIES = ("facts", "genre", "poster", "text")
DEFAULT_MODALITIES = ("poster", "text")
ENCODED = ("poster", "text")  # what an encoder can be put in front of
_FACTS = ("director", "actors", "writer", "country", "language")
_COLUMNS = ("item", "movie_id", "title", "year", "genres", "tags", *_FACTS)


def read_movielens(
    folder: Path,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
    min_rating: float | None = None,
    feature_encoders: dict[str, str] | None = None,
    cache_dir: str | None = None,
) -> InteractionTable:
    """Read the set in its published split.

    Args:
        folder: Where its three files are.
        modalities: "genre" (genres and six-year bins), "facts" (director, actors, writers, countries and languages that
            two films or more share), "text" (title, genres, director, actors and tags as one document), "poster".
        min_rating: Ratings below are left out; all count by default. Users and items keep their ids.
        feature_encoders: An encoder for "text" or "poster" in place of words and pixels.
        cache_dir: Where an encoder's features are kept.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If files are damaged or do not belong together, or if no rating is left.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: expected {', '.join(FILES)} in {folder}")
    items = _read_parquet(folder / FILES[1], _COLUMNS)
    if not np.array_equal(items["item"], np.arange(len(items))):
        raise ValueError(f"{folder / FILES[1]}: column 'item' is not 0, 1, ..., {len(items) - 1}, in this order")
    images = _read_posters(folder / FILES[2], items["movie_id"].to_numpy())
    ratings = _read_parquet(folder / FILES[0], ("user", "item", "rating", "split"))
    user_ids, item_ids = (ratings[name].to_numpy(dtype=np.int64) for name in ("user", "item"))
    if not len(ratings) or user_ids.min() < 0 or item_ids.min() < 0 or item_ids.max() >= len(items):
        raise ValueError(f"{folder / FILES[0]}: expected users from 0 and items 0..{len(items) - 1}")
    kept = np.ones(len(ratings), dtype=bool)
    if min_rating is not None:
        kept = ratings["rating"].to_numpy() >= min_rating
        if not kept.any():
            raise ValueError(f"min_rating={min_rating} keeps none of {len(kept)} ratings, expected at most 5")
        log.info(
            "movielens: min_rating=%s keeps %d of %d ratings; without any are %d users and %d items",
            min_rating, int(kept.sum()), len(kept), len(set(user_ids)) - len(set(user_ids[kept])),
            len(items) - len(set(item_ids[kept])),
        )  # fmt: skip
    return InteractionTable(
        name="movielens",
        user_labels=np.arange(user_ids.max() + 1),
        item_labels=np.arange(len(items)),
        user_ids=user_ids[kept],
        item_ids=item_ids[kept],
        split=ratings["split"].to_numpy(dtype=np.int8)[kept],
        features={name: _features(name, items, images, feature_encoders or {}, cache_dir) for name in modalities},
        images=images,
        item_names=items["title"].tolist(),
    )


def _read_parquet(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    from datamodules.sources.sequence_tables import parquet_columns

    def choose(present: list[str]) -> list[str]:
        for name in columns:
            if name not in present:
                raise ValueError(f"{path} has no column {name!r}, only {', '.join(map(repr, present))}")
        return list(columns)

    return parquet_columns(path, choose)


def _read_posters(path: Path, movie_ids: NDArray[Any]) -> NDArray[np.uint8]:
    images, owners = read_archive(path, ("images", "movie_id")).values()
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}, expected uint8 (items, height, width, 3)")
    if len(images) != len(owners) or not np.array_equal(owners, movie_ids):
        raise ValueError(f"{path}: movie_id is not that of items.parquet, row by row: the posters are of other items")
    return images


def _features(
    name: str, items: pd.DataFrame, images: NDArray[np.uint8], encoders: dict[str, str], cache_dir: str | None
) -> NDArray[np.float32]:
    if name in encoders:
        if name == "poster":
            return encoded_features("image", images, encoders[name], cache_dir)
        return encoded_features("text", documents(items), encoders[name], cache_dir)
    if name == "genre":
        return genre_year_features(items["genres"].tolist(), items["year"].tolist())
    if name == "facts":
        return term_svd(facts(items))
    return pixel_features(images) if name == "poster" else tfidf_svd(documents(items))


def facts(items: pd.DataFrame) -> list[list[str]]:
    """What a film shares with others, such as `director=John Lasseter`; a writer without the part in brackets.

    Args:
        items: Columns `director`, `actors`, `writer`, `country` and `language`, each names separated by commas.
    """
    found: list[list[str]] = [[] for _ in range(len(items))]
    for column in _FACTS:
        for terms, text in zip(found, items[column], strict=True):
            # Brackets go first, for there are commas in some.
            names = (name.strip() for name in re.sub(r"\([^)]*\)?", "", text).split(","))
            # A writer is named once for the story and once for the screenplay.
            terms.extend(f"{column}={name}" for name in dict.fromkeys(names) if name and name != "N/A")
    return found


def documents(items: pd.DataFrame) -> list[str]:
    """One text a film: title, genres, director, actors and tags.

    Args:
        items: These columns, genres and tags separated by bars.
    """
    columns = [items[name].str.replace("|", ", ") for name in ("title", "genres", "director", "actors", "tags")]
    return [". ".join(part for part in row if part) for row in zip(*columns, strict=True)]
