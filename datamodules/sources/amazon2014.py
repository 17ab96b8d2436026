"""Amazon 2014, 5-core: Baby, Sports and Clothing as multimodal recommenders use them, read from the published files.

Three files a set, public at https://jmcauley.ucsd.edu/data/amazon/links.html (`remote_files` has the addresses). Their
sizes and hashes are not known here, so a download of them is not checked. The image files hold all products of a
category, not only those with five reviews: they have many gigabytes.
"""

from __future__ import annotations

import ast
import gzip
import json
import logging
import re
import zlib
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from datamodules.interaction_rows import InteractionTable
from datamodules.sources.download import RemoteFile
from datamodules.sources.feature_encoders import encoded_features
from datamodules.sources.item_features import impute_mean, tfidf_svd

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

CATEGORIES = {"baby": "Baby", "sports": "Sports_and_Outdoors", "clothing": "Clothing_Shoes_and_Jewelry"}
TITLED = {"beauty": "Beauty", "toys": "Toys_and_Games", "sports": "Sports_and_Outdoors"}
MODALITIES = ("image", "text")
IMAGE_SIZE = 4_096
TEXT_SIZE = 384

_URL = "http://snap.stanford.edu/data/amazon/productGraph"
_ASIN = 10  # bytes
_RECORD = np.dtype([("asin", f"S{_ASIN}"), ("features", "<f4", (IMAGE_SIZE,))])
_RECORDS = 1_024  # read at a time
_ASIN_IN_LINE = re.compile(r"""['"]asin['"]\s*:\s*['"]([^'"]*)['"]""")


def remote_files(name: str) -> list[RemoteFile]:
    """The published files of a set: reviews, products and image features, of unknown size and hash.

    Args:
        name: "baby", "sports" or "clothing".

    Raises:
        ValueError: If there is no such set.
    """
    category = _category(name)
    folder = f"{_URL}/categoryFiles"
    images = f"image_features_{category}.b"
    return [
        *(
            RemoteFile(file, f"{folder}/{file}")
            for file in (f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz")
        ),
        RemoteFile(images, f"{_URL}/image_features/categoryFiles/{images}"),
    ]


def read_amazon(
    name: str,
    folder: Path,
    modalities: Sequence[str] | None = None,
    feature_encoders: dict[str, str] | None = None,
    cache_dir: str | None = None,
) -> InteractionTable:
    """A set of Amazon 2014, 5-core, with every review as an interaction.

    Users and items are numbered in the order of their labels, interactions are sorted by user and time: both are the
    same in every run. The set has no published split. The text of an item is its title, brand, categories and
    description; its image features are the published ones.

    Args:
        name: "baby", "sports" or "clothing".
        folder: Where the published files are; the first two may be unpacked.
        modalities: Among "image" and "text"; None for those that there are files of.
        feature_encoders: "text" to the encoder of texts, see `encoded_features`; without one the text features are
            `tfidf_svd` with 384 columns.
        cache_dir: Where encoded features are kept, see `encoded_features`.

    Raises:
        FileNotFoundError: If a file that is needed is missing.
        ValueError: If a file is malformed or an option is unknown.
    """
    category = _category(name)
    wanted = set(MODALITIES if modalities is None else modalities)
    encoders = feature_encoders or {}
    if unknown := sorted(wanted - set(MODALITIES)):
        raise ValueError(f"modalities: Amazon {name} has no {unknown[0]!r}: expected some of {', '.join(MODALITIES)}")
    if unknown := sorted(set(encoders) - {"text"}):
        raise ValueError(f"feature_encoders: {unknown[0]!r} cannot be encoded: Amazon publishes texts, but no images; "
                         "expected only 'text'")  # fmt: skip
    images = folder / f"image_features_{category}.b"
    if "image" in wanted and not images.is_file():
        if modalities is not None:
            raise FileNotFoundError(f"{images} is missing: put the file of {remote_files(name)[2].url} there, or leave "
                                    "'image' out of modalities")  # fmt: skip
        log.info("Amazon %s: %s is missing, so there is no modality 'image'", name, images)
        wanted.discard("image")
    # Products give texts and titles; where texts are not asked for, titles are not worth an error.
    reviews = _find(folder, f"reviews_{category}_5.json")
    products = _find(folder, f"meta_{category}.json") if "text" in wanted else None

    user_labels, item_labels, user_ids, item_ids = _read_reviews(reviews, name)
    asins = [str(label) for label in item_labels]
    features: dict[str, NDArray[np.float32]] = {}
    titles = None
    if products is not None:
        documents, titles = _read_products(products, asins, name)
        if "text" in encoders:
            features["text"] = encoded_features("text", documents, encoders["text"], cache_dir)
        else:
            features["text"] = tfidf_svd(documents, TEXT_SIZE)
    if "image" in wanted:
        features["image"] = read_image_features(images, asins)
    return InteractionTable(
        f"amazon {name}", user_labels, item_labels, user_ids, item_ids, None, features, None, titles
    )


def read_titles(
    name: str, folder: Path
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64], NDArray[np.int64], list[str]]:
    """A set of Amazon 2014, 5-core, with every review as an interaction and the titles of the items.

    Args:
        name: "beauty", "toys" or "sports".
        folder: Where the published files are; they may be unpacked.

    Returns:
        Labels of users; labels of items; the users and the items of the interactions, sorted by user and time; and the
        titles, empty where none is known.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed or there is no such set.
    """
    if name not in TITLED:
        raise ValueError(f"Amazon 2014 has no set {name!r}: expected one of {', '.join(TITLED)}")
    reviews = _find(folder, f"reviews_{TITLED[name]}_5.json")
    products = _find(folder, f"meta_{TITLED[name]}.json")
    user_labels, item_labels, user_ids, item_ids = _read_reviews(reviews, name)
    asins = [str(label) for label in item_labels]
    titles = _read_products(products, asins, name)[1]
    named = ["" if title == asin else title for title, asin in zip(titles, asins, strict=True)]
    return user_labels, item_labels, user_ids, item_ids, named


def read_image_features(path: Path, asins: Sequence[str]) -> NDArray[np.float32]:
    """Image features of some products, from a file such as `image_features_Baby.b`.

    The file is a row of records of 16,394 bytes: the product's ASIN in ten ASCII characters and 4,096 little-endian
    float32. It is read piece by piece; of records with the same ASIN the first counts. Products without a record get
    the mean of the others.

    Args:
        path: The file.
        asins: The products.

    Returns:
        float32 `(len(asins), 4096)`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated or of another kind, a number is not finite, or no product has a record.
    """
    rows: dict[bytes, list[int]] = {}
    for row, asin in enumerate(asins):
        rows.setdefault(asin.encode(), []).append(row)
    wanted = np.array([asin for asin in rows if len(asin) == _ASIN], dtype=f"S{_ASIN}")
    features = np.zeros((len(asins), IMAGE_SIZE), dtype=np.float32)
    missing = np.ones(len(asins), dtype=bool)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a file such as image_features_Baby.b")
    size = path.stat().st_size
    if rest := size % _RECORD.itemsize:
        raise ValueError(f"{path} is truncated or of another kind: the record at byte {size - rest} has {rest} of "
                         f"{_RECORD.itemsize} bytes; copy the file again")  # fmt: skip
    with path.open("rb") as file:
        offset = 0
        while block := file.read(_RECORDS * _RECORD.itemsize):
            records = _records(block, offset, path)
            for place in np.flatnonzero(np.isin(records["asin"], wanted)):
                asin, vector = records[place]
                own = [row for row in rows[asin] if missing[row]]
                if not np.isfinite(vector).all():
                    where = offset + place * _RECORD.itemsize
                    raise ValueError(f"{path}: the features of {asin.decode()}, in the record at byte {where}, are not "
                                     "finite: copy the file again")  # fmt: skip
                features[own], missing[own] = vector, False
            offset += len(block)
    if missing.all():
        raise ValueError(f"{path} has none of the {len(asins)} products: is it the file of another category?")
    if missing.any():
        log.info("%s: %d of %d products have no image, they get the mean", path, missing.sum(), len(missing))
    return impute_mean(features, missing)


def _category(name: str) -> str:
    if name not in CATEGORIES:
        raise ValueError(f"Amazon 2014 has no set {name!r}: expected one of {', '.join(CATEGORIES)}")
    return CATEGORIES[name]


def _find(folder: Path, file: str) -> Path:
    for path in (folder / f"{file}.gz", folder / file):
        if path.is_file():
            return path
    url = f"{_URL}/categoryFiles/{file}.gz"
    raise FileNotFoundError(f"{folder} has no {file}.gz: put the file of {url} there, or its unpacked {file}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    number = 0
    with cast("BinaryIO", gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")) as file:
        try:
            for number, line in enumerate(file, start=1):
                if text := line.decode("utf-8").strip():
                    yield number, text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number} is not UTF-8 ({error}): copy the file again") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is truncated or no gzip file, after line {number} ({error}): copy it again"
            ) from error


def _read_reviews(path: Path, name: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Labels of users and items, and one pair of ids for each user and item that meet."""
    users, items, times = [], [], []
    for number, line in _lines(path):
        try:
            review = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): expected one review a line") from error
        users.append(_label(review, "reviewerID", path, number))
        items.append(_label(review, "asin", path, number))
        time = review.get("unixReviewTime")
        if type(time) is not int:
            raise ValueError(f"{path}, line {number}: unixReviewTime is {time!r}, expected seconds as an integer")
        times.append(time)
    if not users:
        raise ValueError(f"{path} is empty: expected one review a line, in JSON")
    user_labels, user_ids = np.unique(np.array(users), return_inverse=True)
    item_labels, item_ids = np.unique(np.array(items), return_inverse=True)
    order = np.lexsort((item_ids, np.array(times, dtype=np.int64), user_ids))
    user_ids, item_ids = user_ids[order], item_ids[order]
    first = np.unique(user_ids * np.int64(len(item_labels)) + item_ids, return_index=True)[1]
    first.sort()
    if len(first) < len(order):
        log.info("Amazon %s: %d repeated reviews are dropped, the first counts", name, len(order) - len(first))
    log.info("Amazon %s: %d users, %d items, %d interactions", name, len(user_labels), len(item_labels), len(first))
    return user_labels, item_labels, user_ids[first].astype(np.int64), item_ids[first].astype(np.int64)


def _label(review: Any, key: str, path: Path, number: int) -> str:
    value = review.get(key) if isinstance(review, dict) else None
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path}, line {number}: {key} is {value!r}, expected a text; a line is a review as a JSON "
                         "object with reviewerID, asin and unixReviewTime")  # fmt: skip
    return value


def _read_products(path: Path, asins: list[str], name: str) -> tuple[list[str], list[str]]:
    """Text and title of each product; the text is empty, and the title its ASIN, where nothing is known."""
    rows = {asin: row for row, asin in enumerate(asins)}
    documents, titles, seen = [""] * len(asins), list(asins), set()
    for number, line in _lines(path):
        # Most products of a category have too few reviews, and a literal takes long to parse.
        named = _ASIN_IN_LINE.findall(line)
        if named and rows.keys().isdisjoint(named):
            continue
        try:
            product = ast.literal_eval(line)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no Python literal ({error}): expected one product a line, "
                             "{'asin': ..., 'title': ...}")  from error  # fmt: skip
        asin = product.get("asin") if isinstance(product, dict) else None
        if not isinstance(asin, str):
            raise ValueError(f"{path}, line {number}: asin is {asin!r}, expected a text; a line is a product as a "
                             "Python dict")  # fmt: skip
        if asin not in rows or asin in seen:
            continue
        seen.add(asin)
        title = _text(product.get("title"), "title", path, number)
        documents[rows[asin]] = _document(product, title, path, number)
        titles[rows[asin]] = title or asin
    absent, silent = len(asins) - len(seen), sum(not document for document in documents)
    if absent == len(asins):
        raise ValueError(f"{path} has none of the {absent} items reviewed: is it the file of another category?")
    if silent:
        log.info("Amazon %s: %d items have no text, %d of them are not in %s", name, silent, absent, path)
    return documents, titles


def _document(product: dict[str, Any], title: str, path: Path, number: int) -> str:
    """Title, brand, categories and description; a category that stands in several paths comes once."""
    brand = _text(product.get("brand"), "brand", path, number)
    description = _text(product.get("description"), "description", path, number)
    paths = product.get("categories") or []
    if not isinstance(paths, list) or not all(isinstance(one, list) for one in paths):
        raise ValueError(f"{path}, line {number}: categories is {paths!r}, expected a list of lists of names")
    categories = dict.fromkeys(str(category) for one in paths for category in one)
    return " ".join(part for part in (title, brand, *categories, description) if part)


def _text(value: Any, key: str, path: Path, number: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{path}, line {number}: {key} is {value!r}, expected a text")
    return " ".join(value.split())


def _records(block: bytes, offset: int, path: Path) -> NDArray[Any]:
    records = np.frombuffer(block, dtype=_RECORD)
    characters = records["asin"].copy().view(np.uint8).reshape(len(records), _ASIN)
    printable = ((characters > 32) & (characters < 127)).all(1)
    if not printable.all():
        place = int(np.flatnonzero(~printable)[0])
        raise ValueError(f"{path}: the record at byte {offset + place * _RECORD.itemsize} begins with "
                         f"{bytes(characters[place])!r}, expected an ASIN of {_ASIN} ASCII characters, then "
                         f"{IMAGE_SIZE} float32: the file is damaged or of another kind")  # fmt: skip
    return records
