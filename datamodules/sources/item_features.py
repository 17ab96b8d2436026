"""Feature vectors of items made without a pre-trained network: from genres, years, words, facts and pictures.

Everything here is deterministic: the same items give the same vectors in every run, up to rounding.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

YEAR_BINS = 12
YEARS_PER_BIN = 6
NO_GENRE = "(no genres listed)"
_TOLERANCE = 1e-6  # a component whose singular value is below this part of the largest is rounding error
_LEVELS = 4  # of each colour in the histogram
_CHUNK = 256  # pictures at a time


def genre_year_features(genres: Sequence[str], years: Sequence[int]) -> NDArray[np.float32]:
    """Genres and the time of publication as zeros and ones.

    Args:
        genres: Genres of each item, separated by bars ("Comedy|Drama"); "(no genres listed)" is a genre like any other,
            and an empty text means it.
        years: Year of each item; 0 or below where it is not known.

    Returns:
        `(items, genres + 12)`: a column a genre, in alphabetic order; then 12 bins of six years, oldest first. The last
        bin ends with the newest year of all, the first is open below. An item of an unknown year is in no bin.

    Raises:
        ValueError: If there are no items, or another number of years.
    """
    if not len(genres) or len(genres) != len(years):
        raise ValueError(f"{len(genres)} genres and {len(years)} years: expected one of each for every item")
    named = [[name.strip() for name in text.split("|") if name.strip()] or [NO_GENRE] for text in genres]
    columns = {name: column for column, name in enumerate(sorted({name for names in named for name in names}))}
    features = np.zeros((len(genres), len(columns) + YEAR_BINS), dtype=np.float32)
    for row, names in enumerate(named):
        features[row, [columns[name] for name in names]] = 1
    published = np.asarray(years, dtype=np.int64)
    rows = np.flatnonzero(published > 0)
    if len(rows):
        age = (published[rows].max() - published[rows]) // YEARS_PER_BIN
        features[rows, len(columns) + YEAR_BINS - 1 - np.minimum(age, YEAR_BINS - 1)] = 1
    return features


def tfidf_svd(
    documents: Sequence[str], dimensions: int = 128, min_documents: int = 2, seed: int = 0
) -> NDArray[np.float32]:
    """Latent semantic analysis: TF-IDF of words, reduced by a truncated singular value decomposition.

    Words are in lower case and without accents, their counts enter by 1 + log, rows have unit length before the
    decomposition. A document without a word that counts (an empty one, say) gets the mean of all others.

    Args:
        documents: One text an item.
        dimensions: Largest number of columns; there are fewer where the rank is lower.
        min_documents: A word counts if so many documents have it.
        seed: Of the random start of the decomposition, which hardly matters.

    Returns:
        `(items, at most dimensions)`, columns by falling singular value.

    Raises:
        ValueError: If there is no document or no word that counts.
    """
    weights, missing = _tfidf(documents, "word", min_documents, sublinear_tf=True, strip_accents="unicode")
    return _named_mean(_truncated_svd(weights, dimensions, seed), missing, "documents have no word")


def term_svd(
    terms: Sequence[Sequence[str]], dimensions: int = 128, min_documents: int = 2, seed: int = 0
) -> NDArray[np.float32]:
    """Facts about items (actors, tags, links of a knowledge graph), reduced by a singular value decomposition.

    A term counts as a whole and once an item, weighted by its inverse document frequency. An item without a term that
    counts gets the mean of all others.

    Args:
        terms: The terms of each item.
        dimensions: Largest number of columns; there are fewer where the rank is lower.
        min_documents: A term counts if so many items have it.
        seed: Of the random start of the decomposition, which hardly matters.

    Returns:
        `(items, at most dimensions)`, columns by falling singular value.

    Raises:
        ValueError: If there is no item or no term that counts.
    """
    weights, missing = _tfidf(terms, "term", min_documents, analyzer=_as_they_are, binary=True)
    return _named_mean(_truncated_svd(weights, dimensions, seed), missing, "items have no term")


def pixel_features(images: NDArray[np.uint8], size: int = 12, dimensions: int = 128) -> NDArray[np.float32]:
    """Pictures as colours in places: thumbnails and a colour histogram, reduced by principal components.

    A thumbnail is the mean colour of `size` times `size` equal areas; the histogram has four levels of each colour and
    enters by the square roots of its shares. Their columns are standardised.

    Args:
        images: uint8 `(items, height, width, 3)`.
        size: Rows and columns of a thumbnail.
        dimensions: Largest number of columns; there are fewer where the rank is lower.

    Returns:
        `(items, at most dimensions)`, columns by falling variance.

    Raises:
        ValueError: If these are no such images, or all are the same.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
        raise ValueError(f"images are {images.dtype} {images.shape}: expected uint8 (items, height, width, 3)")
    _check_positive(size=size, dimensions=dimensions)
    rows, columns = _areas(images.shape[1], size), _areas(images.shape[2], size)
    parts = []
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        thumbnails = np.einsum("sh,ihwc,tw->istc", rows, chunk, columns, optimize=True)
        parts.append(np.concatenate([thumbnails.reshape(len(chunk), -1), np.sqrt(_histogram(chunk))], axis=1))
    features = np.concatenate(parts)
    features -= features.mean(0)
    deviation = features.std(0)
    features = features[:, deviation > _TOLERANCE] / deviation[deviation > _TOLERANCE]
    if not features.size:
        raise ValueError(f"all {len(images)} images are the same: there is nothing that tells items apart")
    variances, directions = np.linalg.eigh(features.T @ features)
    values, directions = np.sqrt(np.maximum(variances[::-1], 0)), directions[:, ::-1]
    kept = directions[:, : min(dimensions, _rank(values))]
    return np.asarray(features @ (kept * _signs(kept)), dtype=np.float32)


def impute_mean(features: NDArray[Any], missing: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Features in which items without any have the mean of the others.

    Args:
        features: `(items, size)`; rows of missing items may hold anything.
        missing: bool `(items,)`.

    Returns:
        float32 `(items, size)`, a copy.

    Raises:
        ValueError: If all are missing, or the numbers of rows differ.
    """
    if missing.shape != features.shape[:1] or missing.dtype != np.bool_:
        raise ValueError(f"missing is {missing.dtype} {missing.shape}: expected bool ({len(features)},)")
    if missing.all():
        raise ValueError(f"all {len(features)} items lack features: there is no mean to take")
    filled: NDArray[np.float32] = features.astype(np.float32)
    if missing.any():
        filled[missing] = features[~missing].mean(0, dtype=np.float64)
    return filled


def _as_they_are(terms: Sequence[str]) -> Sequence[str]:
    return terms


def _tfidf(
    documents: Sequence[Any], what: str, min_documents: int, **options: bool | str | Callable[[Any], Any]
) -> tuple[Any, NDArray[np.bool_]]:
    """A sparse matrix with rows of unit length, and which rows are empty."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    _check_positive(min_documents=min_documents)
    try:
        weights = TfidfVectorizer(min_df=min_documents, **options).fit_transform(documents)
    except ValueError as error:
        raise ValueError(
            f"no {what} is in at least {min_documents} of {len(documents)} items: give texts that share some, or lower "
            f"min_documents ({error})"
        ) from error
    return weights, np.diff(weights.indptr) == 0


def _truncated_svd(weights: Any, dimensions: int, seed: int) -> NDArray[np.float64]:
    from sklearn.utils.extmath import randomized_svd

    _check_positive(dimensions=dimensions)
    left, values, right = randomized_svd(
        weights,
        n_components=min(dimensions, *weights.shape),
        n_oversamples=20,
        n_iter=7,
        power_iteration_normalizer="QR",
        flip_sign=False,
        random_state=seed,
    )
    rank = _rank(values)
    signs = _signs(right[:rank].T)
    return np.asarray(left[:, :rank] * values[:rank] * signs, dtype=np.float64)


def _rank(values: NDArray[np.float64]) -> int:
    return int((values > _TOLERANCE * values[0]).sum())


def _signs(directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signs, one a column, that make the largest entry of each column positive."""
    size = np.abs(directions)
    # Where entries are equally large up to rounding, the first of them decides, not the rounding.
    largest = (size > 0.999 * size.max(0)).argmax(0)
    return np.asarray(np.sign(directions[largest, np.arange(directions.shape[1])]), dtype=np.float64)


def _named_mean(features: NDArray[np.float64], missing: NDArray[np.bool_], what: str) -> NDArray[np.float32]:
    if missing.any():
        log.info("%d of %d %s that counts: they get the mean of the others", missing.sum(), len(missing), what)
    return impute_mean(features, missing)


def _areas(length: int, size: int) -> NDArray[np.float64]:
    """The part that each pixel has in each of `size` equal areas: `(size, length)`, rows sum to 1."""
    edges = np.linspace(0, length, size + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.maximum(overlap, 0) * (size / length), dtype=np.float64)


def _histogram(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The share of each of 64 colours: `(items, 64)`."""
    levels = images.astype(np.int64) * _LEVELS // 256
    colours = (levels[..., 0] * _LEVELS + levels[..., 1]) * _LEVELS + levels[..., 2]
    bins = _LEVELS**3
    flat = colours.reshape(len(images), -1)
    places = flat + np.arange(len(images))[:, None] * bins
    counts = np.bincount(places.ravel(), minlength=len(images) * bins)
    return counts.reshape(len(images), bins) / flat.shape[1]


def _check_positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
