"""The published sets of interactions with item features: MovieLens, TikTok, and Amazon Baby, Sports and Clothing.

Their licences allow research use; no file is part of this package, and none can be downloaded without a person's doing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from datamodules.options import one_of
from datamodules.sources import movielens_small
from datamodules.sources.download import data_folder
from datamodules.sources.interaction_files import read_files

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from datamodules.interaction_rows import InteractionTable

log = logging.getLogger(__name__)

SOURCES = ("movielens", "tiktok", "baby", "sports", "clothing")
AMAZON = {"baby": "Baby", "sports": "Sports_and_Outdoors", "clothing": "Clothing_Shoes_and_Jewelry"}
_TIKTOK = "tiktok_mm"
_TIKTOK_FILES = ("interactions.parquet", "features.npz")
_TIKTOK_USERS = 9308  # five of them are in the test part only, which is not published here
_BABY = "amazon_baby_inter"
_LINKS = "http://jmcauley.ucsd.edu/data/amazon/links.html"


def read_set(
    source: str,
    data_dir: str | None = None,
    modalities: Sequence[str] | None = None,
    min_rating: float | None = None,
    feature_encoders: dict[str, str] | None = None,
    cache_dir: str | None = None,
) -> InteractionTable:
    """Read a published set.

    - `movielens`: small MovieLens with posters and facts, from `movielens_small_mm`; see `movielens_small`.
    - `tiktok`: `visual` and `acoustic`, from `tiktok_mm`; training and validation only.
    - `baby`, `sports`, `clothing`: Amazon 2014, 5-core. From the published files (`reviews_Baby_5.json.gz` ...) where
      they are, else from those of MMRec (`baby.inter`, `image_feat.npy`, `text_feat.npy`) or of LATTICE
      (`5-core/train.json` ...); for `baby` also the interactions alone of `amazon_baby_inter`, training and validation
      only. Looked for in the folder given, in `<source>`, `<Name>` and `amazon_<source>` below it.

    Args:
        source: Name of the set.
        data_dir: Where to look: `$ZOO_DATA` by default, or else the user's cache.
        modalities: Which features to take; by default all, of `movielens` the posters and the text.
        min_rating: Ratings below are left out (`movielens` only).
        feature_encoders: Modality to an encoder of its raw content, for `movielens` and the published files of Amazon.
        cache_dir: Where an encoder's features are kept.

    Raises:
        FileNotFoundError: If files are missing; the message says which to put where.
        ValueError: If a file is malformed, a modality is unknown, or an option does not go with the set.
    """
    one_of(("source", source, SOURCES))
    root = data_folder(data_dir)
    if modalities is not None and len(set(modalities)) < len(modalities):
        raise ValueError(f"modalities {list(modalities)}: expected each once")
    if source == "movielens":
        return _read_movielens(root, modalities, min_rating, feature_encoders, cache_dir)
    if min_rating is not None:
        raise ValueError(f"min_rating={min_rating}: in {source} every interaction counts, only movielens has ratings")
    if source == "tiktok":
        _refuse_encoders(source, feature_encoders)
        folder = _folder(root, _TIKTOK, _TIKTOK_FILES)
        table = read_files(folder, "table")
        if table.user_labels.dtype == object or table.user_labels[-1] >= _TIKTOK_USERS:
            raise ValueError(f"{folder}: users run to {table.user_labels[-1]!s}, expected 0..{_TIKTOK_USERS - 1}")
        table = table._replace(
            user_ids=table.user_labels[table.user_ids], user_labels=np.arange(_TIKTOK_USERS, dtype=np.int64)
        )
        return _chosen(table, source, modalities)
    return _read_amazon(source, root, modalities, feature_encoders, cache_dir)


def _folder(root: Path, name: str, files: Sequence[str]) -> Path:
    """The folder of a set, below the root or the root itself; all files are there."""
    folder = root / name
    if not folder.is_dir() and all((root / file).is_file() for file in files):
        return root
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder / file} is missing: put {', '.join(files)} into {folder}, or name the folder above it in "
                "data_dir or ZOO_DATA"
            )
    return folder


def _check_modalities(source: str, names: Sequence[str], available: Collection[str], hint: str = "") -> None:
    unknown = [name for name in names if name not in available]
    if unknown:
        has = f"it has {', '.join(sorted(available))}" if available else "it has no features"
        raise ValueError(f"modalities: {source} has no {unknown[0]!r}; {has}{hint}")


def _refuse_encoders(source: str, encoders: dict[str, str] | None) -> None:
    if encoders:
        raise ValueError(
            f"feature_encoders: {', '.join(encoders)}: the features of {source} are published ones, without the raw "
            "content that an encoder takes; leave it out"
        )


def _read_movielens(
    root: Path,
    modalities: Sequence[str] | None,
    min_rating: float | None,
    encoders: dict[str, str] | None,
    cache_dir: str | None,
) -> InteractionTable:
    names = movielens_small.DEFAULT_MODALITIES if modalities is None else modalities
    _check_modalities("movielens", names, movielens_small.MODALITIES)
    for name in encoders or {}:
        if name not in movielens_small.ENCODED or name not in names:
            able = ", ".join(sorted(set(movielens_small.ENCODED) & set(names))) or "none"
            raise ValueError(f"feature_encoders: {name!r}, expected some of the modalities with raw content: {able}")
    folder = _folder(root, movielens_small.FOLDER, movielens_small.FILES)
    return movielens_small.read_movielens(folder, names, min_rating, encoders, cache_dir)


def _chosen(table: InteractionTable, source: str, modalities: Sequence[str] | None, hint: str = "") -> InteractionTable:
    """The table with some of its features, under the name of the set."""
    names = sorted(table.features) if modalities is None else modalities
    _check_modalities(source, names, table.features, hint)
    return table._replace(name=source, features={name: table.features[name] for name in names})


def _read_amazon(
    source: str,
    root: Path,
    modalities: Sequence[str] | None,
    encoders: dict[str, str] | None,
    cache_dir: str | None,
) -> InteractionTable:
    name = AMAZON[source]
    places = [root, root / source, root / name, root / f"amazon_{source}"]
    reviews = f"reviews_{name}_5.json"
    for folder in places:
        if (folder / f"{reviews}.gz").is_file() or (folder / reviews).is_file():
            # Features of raw content need scikit-learn or transformers.
            from datamodules.sources.amazon2014 import read_amazon

            return read_amazon(source, folder, modalities, encoders, cache_dir)
    for folder in places:
        published = folder / f"{source}.inter"
        if published.is_file():
            log.info("%s: reading %s, which MMRec publishes", source, published)
            _refuse_encoders(source, encoders)
            return _chosen(read_files(published, "mmrec"), source, modalities)
        if (folder / "5-core" / "train.json").is_file():
            log.info("%s: reading %s, in the layout of LATTICE", source, folder / "5-core")
            _refuse_encoders(source, encoders)
            return _chosen(read_files(folder, "lattice"), source, modalities)
    wanted = (
        f"{reviews}.gz, meta_{name}.json.gz and image_features_{name}.b (from {_LINKS}), or {source}.inter, "
        f"image_feat.npy and text_feat.npy (of MMRec), into {root / source}, or name their folder in data_dir or "
        "ZOO_DATA"
    )
    if source == "baby":
        file = next((p for p in (root / _BABY, root) if (p / "interactions.parquet").is_file()), None)
        # A folder of another set has a file of that name, too.
        if file is not None and not (file / "features.npz").exists() and not (file / "items.parquet").exists():
            _refuse_encoders(source, encoders)
            table = read_files(file / "interactions.parquet", "table")
            return _chosen(table, source, modalities, f" in {file}: for features put {wanted}")
    raise FileNotFoundError(f"{source} is not under {root}: put {wanted}")
