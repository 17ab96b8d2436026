from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.sources import amazon2014
from datamodules.sources.amazon2014 import read_amazon, read_image_features, remote_files
from datamodules.sources.item_features import tfidf_svd

# Users and items in another order than sorted; A2 reviews B000000002 twice, the earlier review comes later in the file.
REVIEWS = [
    ("A3", "B000000003", 300),
    ("A2", "B000000002", 250),
    ("A1", "B000000001", 110),
    ("A2", "B000000002", 200),
    ("A2", "B000000001", 220),
    ("A1", "B000000004", 100),
    ("A3", "B000000001", 310),
]
PRODUCTS: list[dict[str, Any]] = [
    {
        "asin": "B000000002",
        "title": "Blue cup",
        "brand": "Acme",
        "categories": [["Baby", "Cups"], ["Baby", "Blue"]],
        "description": "It's\n a cup & more",
        "related": {"also_bought": ["B000000001", "B00000000X"]},
    },
    {"asin": "B00000000X", "title": "Not reviewed"},
    {"asin": "B000000001", "title": "Red cup", "categories": [["Baby", "Cups"]]},
    {"asin": "B000000003", "description": "A red chair", "price": 3.5},
]
RECORD = 10 + 4 * 4096


def pack(path: Path, lines: list[str]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    return path


def review(user: str, item: str, time: int) -> str:
    return json.dumps({"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": time})


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).random(4096, dtype=np.float32)


def images(path: Path, records: list[tuple[str, int]]) -> Path:
    path.write_bytes(b"".join(asin.encode() + vector(number).astype("<f4").tobytes() for asin, number in records))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pack(tmp_path / "reviews_Baby_5.json.gz", [review(*row) for row in REVIEWS])
    pack(tmp_path / "meta_Baby.json.gz", [repr(product) for product in PRODUCTS])
    images(tmp_path / "image_features_Baby.b", [("B00000000X", 9), ("B000000004", 4), ("B000000002", 2)])
    return tmp_path


def test_ids_are_the_places_of_sorted_labels_and_interactions_are_sorted_by_user_and_time(folder: Path) -> None:
    table = read_amazon("baby", folder, ["text"])
    assert table.name == "amazon baby"
    assert table.user_labels.tolist() == ["A1", "A2", "A3"]
    assert table.item_labels.tolist() == ["B000000001", "B000000002", "B000000003", "B000000004"]
    assert table.user_ids.dtype == table.item_ids.dtype == np.int64
    assert table.user_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert table.item_ids.tolist() == [3, 0, 1, 0, 2, 0]
    assert table.split is None and table.images is None


def test_repeated_reviews_are_counted_and_the_first_in_time_is_kept(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        table = read_amazon("baby", folder, [])
    # The later of both reviews would come after item 0.
    assert table.item_ids[table.user_ids == 1].tolist() == [1, 0]
    assert "1 repeated reviews are dropped" in caplog.text
    assert "3 users, 4 items, 6 interactions" in caplog.text


def test_table_is_the_same_in_every_process(folder: Path) -> None:
    code = (
        "from datamodules.sources.amazon2014 import read_amazon; from pathlib import Path; import sys\n"
        "t = read_amazon('baby', Path(sys.argv[1]))\n"
        "print(t.item_labels, t.user_ids, t.item_ids, [f.tobytes().hex() for f in t.features.values()])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], env={**os.environ, "PYTHONHASHSEED": str(seed)},
                         stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        for seed in (1, 2)
    ]  # fmt: skip
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert len(outputs) == 1 and "B000000004" in outputs.pop()


def test_text_is_title_brand_categories_and_description_of_each_item(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def encode(*arguments: Any) -> np.ndarray:
        calls.append(arguments)
        return np.ones((4, 3), dtype=np.float32)

    monkeypatch.setattr(amazon2014, "encoded_features", encode)
    table = read_amazon("baby", folder, ["text"], {"text": "some/encoder"}, "cache")
    documents = ["Red cup Baby Cups", "Blue cup Acme Baby Cups Blue It's a cup & more", "A red chair", ""]
    assert calls == [("text", documents, "some/encoder", "cache")]
    assert table.features["text"].tolist() == [[1, 1, 1]] * 4
    assert table.item_names == ["Red cup", "Blue cup", "B000000003", "B000000004"]


def test_text_without_an_encoder_is_tfidf(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        features = read_amazon("baby", folder, ["text"]).features
    documents = ["Red cup Baby Cups", "Blue cup Acme Baby Cups Blue It's a cup & more", "A red chair", ""]
    assert list(features) == ["text"]
    assert np.allclose(features["text"], tfidf_svd(documents, 384))
    assert "1 items have no text, 1 of them are not in" in caplog.text


def test_image_features_stand_in_the_rows_of_their_items_and_missing_ones_are_the_mean(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        features = read_amazon("baby", folder, ["image"]).features["image"]
    assert features.shape == (4, 4096) and features.dtype == np.float32
    assert (features[3] == vector(4)).all() and (features[1] == vector(2)).all()
    mean = (vector(4) + vector(2)) / 2
    assert np.allclose(features[0], mean, atol=1e-6) and np.allclose(features[2], mean, atol=1e-6)
    assert "2 of 4 products have no image" in caplog.text


def test_all_modalities_are_read_by_default_and_an_absent_image_file_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sorted(read_amazon("baby", folder).features) == ["image", "text"]
    (folder / "image_features_Baby.b").unlink()
    with caplog.at_level(logging.INFO):
        assert list(read_amazon("baby", folder).features) == ["text"]
    assert "there is no modality 'image'" in caplog.text


def test_products_are_needed_for_texts_only(folder: Path) -> None:
    (folder / "meta_Baby.json.gz").unlink()
    table = read_amazon("baby", folder, ["image"])
    assert table.item_names is None and list(table.features) == ["image"]
    with pytest.raises(FileNotFoundError, match=r"no meta_Baby\.json\.gz: put the file of http://snap\.stanford\.edu"):
        read_amazon("baby", folder)


def test_unpacked_files_are_read_too(folder: Path) -> None:
    expected = read_amazon("baby", folder)
    for file in ("reviews_Baby_5.json", "meta_Baby.json"):
        (folder / file).write_bytes(gzip.decompress((folder / f"{file}.gz").read_bytes()))
        (folder / f"{file}.gz").unlink()
    table = read_amazon("baby", folder)
    assert (table.item_ids == expected.item_ids).all() and table.item_names == expected.item_names


def test_files_of_each_set_have_their_published_addresses() -> None:
    base = "http://snap.stanford.edu/data/amazon/productGraph"
    files = remote_files("baby")
    assert [file.url for file in files] == [
        f"{base}/categoryFiles/reviews_Baby_5.json.gz",
        f"{base}/categoryFiles/meta_Baby.json.gz",
        f"{base}/image_features/categoryFiles/image_features_Baby.b",
    ]
    assert all(file.url.endswith("/" + file.name) and file.size is None and file.sha256 is None for file in files)
    assert remote_files("sports")[0].name == "reviews_Sports_and_Outdoors_5.json.gz"
    assert remote_files("clothing")[2].name == "image_features_Clothing_Shoes_and_Jewelry.b"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "books"}, ValueError, "no set 'books': expected one of baby, sports, clothing"),
        ({"modalities": ["audio"]}, ValueError, "has no 'audio': expected some of image, text"),
        ({"feature_encoders": {"image": "x"}}, ValueError, "'image' cannot be encoded.*expected only 'text'"),
        ({"name": "sports"}, FileNotFoundError, "no reviews_Sports_and_Outdoors_5.json.gz: put the file of http"),
        ({"modalities": ["image"], "name": "sports"}, FileNotFoundError, r"image_features_Sports_and_Outdoors\.b is m"),
    ],
    ids=["name", "modality", "encoder", "reviews", "image"],
)
def test_options_and_files_that_are_not_there_are_named(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_amazon(**{"name": "baby", "folder": folder, **options})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'reviewerID': 'A1'}", "line 8 is not JSON"),
        ('["A1"]', "line 8: reviewerID is None, expected a text"),
        ('{"reviewerID": "A1", "asin": 7, "unixReviewTime": 1}', "line 8: asin is 7, expected a text"),
        ('{"reviewerID": "", "asin": "B", "unixReviewTime": 1}', "line 8: reviewerID is ''"),
        ('{"reviewerID": "A1", "asin": "B"}', "line 8: unixReviewTime is None, expected seconds"),
        ('{"reviewerID": "A1", "asin": "B", "unixReviewTime": "1"}', "line 8: unixReviewTime is '1'"),
    ],
    ids=["literal", "list", "asin", "empty", "no time", "time"],
)
def test_malformed_reviews_are_named_by_file_and_line(folder: Path, line: str, message: str) -> None:
    pack(folder / "reviews_Baby_5.json.gz", [*(review(*row) for row in REVIEWS), line])
    with pytest.raises(ValueError, match=rf"reviews_Baby_5\.json\.gz, {message}"):
        read_amazon("baby", folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'asin': 'B000000004', 'title': }", "line 5 is no Python literal"),
        ("{'asin': 'B000000004', 'title': print('x')}", "line 5 is no Python literal"),
        ("nonsense", "line 5 is no Python literal"),
        ("['B000000004']", "line 5: asin is None, expected a text"),
        ("{'title': 'x'}", "line 5: asin is None, expected a text"),
        ("{'asin': 'B000000004', 'title': 3}", "line 5: title is 3, expected a text"),
        ("{'asin': 'B000000004', 'brand': ['x']}", r"line 5: brand is \['x'\], expected a text"),
        ("{'asin': 'B000000004', 'categories': ['x']}", "line 5: categories is .*expected a list of lists"),
    ],
    ids=["syntax", "call", "nonsense", "list", "no asin", "title", "brand", "categories"],
)
def test_malformed_products_are_named_by_file_and_line(folder: Path, line: str, message: str) -> None:
    pack(folder / "meta_Baby.json.gz", [*(repr(product) for product in PRODUCTS), line])
    with pytest.raises(ValueError, match=rf"meta_Baby\.json\.gz, {message}"):
        read_amazon("baby", folder)


def test_products_that_nobody_reviewed_are_not_parsed(folder: Path) -> None:
    expected = read_amazon("baby", folder, ["text"])
    lines = [*(repr(product) for product in PRODUCTS), "{'asin': 'B00000000Y', 'title': }"]
    lines.append(repr({"description": "'asin': 'B00000000Y'", "asin": "B000000004", "title": "Quoted"}))
    lines.append(repr({"asin": "B000000004", "title": "The first counts"}))
    pack(folder / "meta_Baby.json.gz", lines)
    names = read_amazon("baby", folder, ["text"]).item_names
    assert expected.item_names is not None
    assert names == [*expected.item_names[:3], "Quoted"]


def test_products_of_another_category_are_refused(folder: Path) -> None:
    pack(folder / "meta_Baby.json.gz", [repr(PRODUCTS[1])])
    with pytest.raises(ValueError, match="none of the 4 items reviewed: is it the file of another category"):
        read_amazon("baby", folder)


@pytest.mark.parametrize("file", ["reviews_Baby_5.json.gz", "meta_Baby.json.gz"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-20], "is truncated or no gzip file"),
        (gzip.decompress, "is truncated or no gzip file"),
        (lambda content: gzip.compress(b"\n\xff\xfe{}\n"), "line 2 is not UTF-8"),
    ],
    ids=["truncated", "plain", "encoding"],
)
def test_damaged_files_are_refused(folder: Path, file: str, change: Any, message: str) -> None:
    path = folder / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        read_amazon("baby", folder)


def test_empty_reviews_are_refused(folder: Path) -> None:
    pack(folder / "reviews_Baby_5.json.gz", [""])
    with pytest.raises(ValueError, match=r"reviews_Baby_5\.json\.gz is empty"):
        read_amazon("baby", folder)


@pytest.mark.parametrize("at_a_time", [1, 2, 256])
def test_image_features_do_not_depend_on_the_pieces_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    records = [(f"B00000000{number}", number) for number in range(6)]
    path = images(tmp_path / "x.b", [*records, ("B000000003", 33)])
    monkeypatch.setattr(amazon2014, "_RECORDS", at_a_time)
    features = read_image_features(path, ["B000000005", "B000000003", "B000000000", "B000000005", "B0000000012"])
    for row, number in enumerate((5, 3, 0, 5)):
        assert (features[row] == vector(number)).all()
    assert np.allclose(features[4], features[:4].mean(0, dtype=np.float64), atol=1e-6)


def test_truncated_image_features_are_refused_with_the_place(tmp_path: Path) -> None:
    path = images(tmp_path / "x.b", [("B000000001", 1), ("B000000002", 2)])
    path.write_bytes(path.read_bytes()[: RECORD + 500])
    with pytest.raises(ValueError, match=rf"x\.b is truncated.*at byte {RECORD} has 500 of {RECORD} bytes"):
        read_image_features(path, ["B000000001"])


@pytest.mark.parametrize("at_a_time", [2, 256])
def test_image_features_of_another_kind_are_refused_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setattr(amazon2014, "_RECORDS", at_a_time)
    path = images(tmp_path / "x.b", [("B000000001", 1), ("B000000002", 2), ("B\x00\x010000000", 3)])
    with pytest.raises(ValueError, match=rf"at byte {2 * RECORD} begins with b'B.x00.x010000000', expected an ASIN"):
        read_image_features(path, ["B000000001"])


def test_image_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = images(tmp_path / "x.b", [("B000000001", 1), ("B000000002", 2)])
    content = bytearray(path.read_bytes())
    content[RECORD + 10 : RECORD + 14] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"features of B000000002, in the record at byte {RECORD}, are not finite"):
        read_image_features(path, ["B000000001", "B000000002"])
    assert (read_image_features(path, ["B000000001"])[0] == vector(1)).all()


def test_image_features_without_any_of_the_products_are_refused(tmp_path: Path) -> None:
    path = images(tmp_path / "x.b", [("B000000001", 1)])
    with pytest.raises(ValueError, match="none of the 1 products"):
        read_image_features(path, ["B000000002"])
    with pytest.raises(FileNotFoundError, match=r"y\.b is missing"):
        read_image_features(tmp_path / "y.b", ["B000000002"])
