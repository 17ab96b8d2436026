from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datamodules.sources.item_features import (
    genre_year_features,
    impute_mean,
    pixel_features,
    term_svd,
    tfidf_svd,
)

WORDS = ["red", "green", "blue", "soft", "hard", "toy", "bottle", "spoon", "chair", "cover", "light", "cup"]


def documents(items: int = 30, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 6)) for _ in range(items)]


def pictures(items: int = 20, height: int = 24, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (items, height, width, 3), dtype=np.uint8)


def cosine(features: np.ndarray) -> np.ndarray:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit @ unit.T


def test_genres_come_in_alphabetic_order_and_years_in_bins_of_six() -> None:
    genres = ["War|Action", "Comedy", "(no genres listed)", "Action", ""]
    features = genre_year_features(genres, [1998, 1992, 1993, 1900, 0])
    assert features.dtype == np.float32
    assert features[:, :4].tolist() == [[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    bins = [np.flatnonzero(row).tolist() for row in features[:, 4:]]
    assert features.shape == (5, 4 + 12)
    assert bins == [[11], [10], [11], [0], []]


def test_oldest_bin_is_open_below_and_holds_six_years_or_more() -> None:
    features = genre_year_features(["a"] * 4, [2018, 2018 - 65, 2018 - 66, 2018 - 200])
    assert np.argmax(features[:, 1:], axis=1).tolist() == [11, 1, 0, 0]


def test_years_that_are_all_unknown_leave_the_shape_as_it_is() -> None:
    assert genre_year_features(["a", "b"], [0, -1]).tolist() == [[1, 0, *[0] * 12], [0, 1, *[0] * 12]]


@pytest.mark.parametrize(("genres", "years"), [([], []), (["a"], [1, 2])], ids=["none", "lengths"])
def test_genres_and_years_that_do_not_fit_are_refused(genres: list[str], years: list[int]) -> None:
    with pytest.raises(ValueError, match="expected one of each for every item"):
        genre_year_features(genres, years)


def test_text_features_keep_the_similarities_of_tfidf() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = documents()
    features = tfidf_svd(texts, 128)
    weights = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    assert features.dtype == np.float32
    assert features.shape == (30, 12)
    assert np.allclose(features @ features.T, (weights @ weights.T).toarray(), atol=1e-5)
    norms = np.linalg.norm(features, axis=0)
    assert (np.diff(norms) < 0).all()


def test_fewer_dimensions_are_the_first_of_more() -> None:
    texts = documents(60)
    few, many = tfidf_svd(texts, 4), tfidf_svd(texts, 9)
    assert few.shape == (60, 4)
    assert np.allclose(few, many[:, :4], atol=1e-4)


def test_dimensions_are_cut_to_the_rank() -> None:
    assert tfidf_svd(["red toy", "red toy", "blue cup", "blue cup", "blue cup"], 10).shape == (5, 2)
    assert term_svd([["a"], ["a"], ["b"], ["b"], ["a", "b"]], 10).shape == (5, 2)
    assert pixel_features(pictures(6), 4).shape == (6, 5)


def test_signs_do_not_depend_on_the_start_of_the_decomposition() -> None:
    for make in (lambda seed: tfidf_svd(documents(), 8, seed=seed), lambda seed: term_svd(named(), 8, seed=seed)):
        first = make(0)
        for seed in (1, 2, 3):
            assert np.allclose(first, make(seed), atol=1e-4)


def named() -> list[list[str]]:
    return [text.split() for text in documents(40, seed=3)]


def test_text_features_are_the_same_in_every_process() -> None:
    code = (
        "from tests.datamodules.sources.test_item_features import documents, named, tfidf_svd, term_svd, "
        "genre_year_features as g\n"
        "print(tfidf_svd(documents(), 5).tobytes().hex(), term_svd(named(), 5).tobytes().hex(), "
        "g([t.replace(' ', '|') for t in documents()], [1990] * 30).tobytes().hex())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": str(seed)},
                         stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        for seed in (1, 2)
    ]  # fmt: skip
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert len(outputs) == 1 and len(outputs.pop()) > 3_000


def test_words_of_a_single_document_do_not_count() -> None:
    texts = [*documents(), "red unicorn", "red"]
    features = tfidf_svd(texts)
    assert np.allclose(features[-1], features[-2], atol=1e-6)
    assert not np.allclose(*tfidf_svd(texts, min_documents=1)[-2:], atol=1e-2)


def test_documents_without_a_word_get_the_mean_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        features = tfidf_svd([*documents(), "", "unheard"], 6)
    assert np.allclose(features[30:], features[:30].mean(0), atol=1e-6) and np.abs(features[30]).max() > 0.01
    assert "2 of 32 documents have no word that counts" in caplog.text


def test_terms_count_as_a_whole_and_once() -> None:
    terms = [["New York", "x"], ["New York", "y"], ["New Delhi", "x"], ["New Delhi", "y"]]
    similar = cosine(term_svd(terms))
    assert similar[0, 3] == pytest.approx(0, abs=1e-6) and similar[0, 1] > 0.4
    repeated = [terms[0] + ["x"] * 5, *terms[1:]]
    assert np.allclose(cosine(term_svd(repeated)), similar, atol=1e-5)
    capital = [["New York", "x"], ["new york", "x"], ["New York"], ["new york"]]
    assert cosine(term_svd(capital))[2, 3] == pytest.approx(0, abs=1e-6)


def test_rare_terms_weigh_more() -> None:
    terms = [["a", "b"], ["a"], ["b"], *[["a", "c"]] * 4]
    similar = cosine(term_svd(terms))
    assert similar[0, 2] > similar[0, 1] + 0.1


def test_items_without_a_term_get_the_mean() -> None:
    features = term_svd([["a"], ["a", "b"], ["b"], []])
    assert np.allclose(features[3], features[:3].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tfidf_svd([]),
        lambda: tfidf_svd(["", ""]),
        lambda: tfidf_svd(["red", "blue"]),
        lambda: term_svd([["a"], []]),
        lambda: term_svd([["a"]], min_documents=2),
    ],
    ids=["nothing", "empty", "nothing shared", "a term alone", "an item alone"],
)
def test_texts_that_share_nothing_are_refused_with_a_way_out(make: object) -> None:
    with pytest.raises(ValueError, match=r"is in at least 2 of \d items.*lower min_documents"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: tfidf_svd(documents(), 0), "dimensions"),
        (lambda: term_svd(named(), min_documents=0), "min_documents"),
        (lambda: pixel_features(pictures(), 0), "size"),
        (lambda: pixel_features(pictures(), dimensions=0), "dimensions"),
    ],
    ids=["tfidf", "terms", "size", "pixels"],
)
def test_options_below_one_are_refused(make: object, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        make()  # type: ignore[operator]


def test_pixel_features_are_centred_uncorrelated_and_sorted_by_variance() -> None:
    features = pixel_features(pictures(50), 4, 10)
    assert features.dtype == np.float32 and features.shape == (50, 10)
    assert np.allclose(features.mean(0), 0, atol=1e-4)
    covariance = np.cov(features.T)
    assert np.allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    assert (np.diff(np.diag(covariance)) < 0).all()


def test_pixel_features_keep_the_distances_of_thumbnails_and_histograms() -> None:
    images = pictures(12, 8, 8)
    thumbnails = images.reshape(12, 4, 2, 4, 2, 3).mean((2, 4)).reshape(12, -1)
    levels = images // 64
    codes = (levels[..., 0] * 16 + levels[..., 1] * 4 + levels[..., 2]).reshape(12, -1)
    histograms = np.sqrt([np.bincount(row, minlength=64) / 64 for row in codes])
    raw = np.concatenate([thumbnails, histograms], axis=1)
    raw = raw[:, raw.std(0) > 0]
    raw = (raw - raw.mean(0)) / raw.std(0)
    features = pixel_features(images, 4)
    assert np.allclose(features @ features.T, raw @ raw.T, atol=1e-3)


def test_areas_need_not_be_whole_pixels() -> None:
    images = np.zeros((3, 3, 3, 3), dtype=np.uint8)
    images[0, 0], images[1, 1] = 240, 240
    features = pixel_features(images, 2)
    mirrored = pixel_features(images[:, ::-1], 2)
    assert np.allclose(np.abs(features @ features.T), np.abs(mirrored @ mirrored.T), atol=1e-3)
    larger = np.repeat(np.repeat(images, 4, axis=1), 4, axis=2)
    assert np.allclose(pixel_features(larger, 2), features, atol=1e-4)


def test_number_of_pictures_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pixel_features(pictures(), 5)
    monkeypatch.setattr("datamodules.sources.item_features._CHUNK", 7)
    assert np.allclose(pixel_features(pictures(), 5), expected, atol=1e-4)


@pytest.mark.parametrize(
    "images",
    [pictures()[0], pictures()[..., :1], pictures().astype(np.float32), pictures()[:0]],
    ids=["one", "grey", "float", "none"],
)
def test_arrays_that_are_no_pictures_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(items, height, width, 3\)"):
        pixel_features(images)


def test_pictures_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="all 4 images are the same"):
        pixel_features(np.repeat(pictures(1), 4, axis=0))


def test_missing_rows_get_the_mean_of_the_others_whatever_they_hold() -> None:
    features = np.array([[1, 2], [np.nan, np.inf], [3, 6]], dtype=np.float64)
    filled = impute_mean(features, np.array([False, True, False]))
    assert filled.dtype == np.float32
    assert filled.tolist() == [[1, 2], [2, 4], [3, 6]]
    assert np.isnan(features[1, 0])


def test_half_precision_does_not_overflow_in_the_mean() -> None:
    features = np.full((3, 1), 60_000, dtype=np.float16)
    assert impute_mean(features, np.array([False, False, True]))[2, 0] == np.float32(np.float16(60_000))


@pytest.mark.parametrize(
    ("missing", "message"),
    [([True, True], "all 2 items lack features"), ([True], r"expected bool \(2,\)"), ([0, 1], "missing is int64")],
    ids=["all", "length", "dtype"],
)
def test_masks_that_do_not_fit_are_refused(missing: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        impute_mean(np.ones((2, 3)), np.array(missing))
