from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from datamodules.sources import amazon2014, movielens_small
from datamodules.sources.interaction_sets import read_set

if TYPE_CHECKING:
    from pathlib import Path

    from datamodules.interaction_rows import InteractionTable

FILMS = 6


def film(number: int) -> dict[str, Any]:
    return {
        "item": number,
        "movie_id": 10 * number + 1,
        "title": f"Film {'Odd' if number % 2 else 'Even'} (199{number})",
        "year": 1990 + number,
        "genres": "Comedy|Drama" if number % 2 else "Drama",
        "director": "Ann Lee",
        "actors": f"Bo Li, Cy {number}",
        "writer": f"Di Wu (story, part {number}), Di Wu (screenplay), Ed {number} (book" if number else "",
        "country": "USA",
        "language": "N/A" if number % 2 else "English",
        "tags": "fun|dark" if number % 2 else "",
    }


def movielens(folder: Path) -> Path:
    folder.mkdir(parents=True)
    films = pd.DataFrame([film(number) for number in range(FILMS)])
    films.to_parquet(folder / "items.parquet")
    images = np.random.default_rng(0).integers(0, 256, (FILMS, 12, 12, 3), dtype=np.uint8)
    np.savez(folder / "posters.npz", images=images, movie_id=films["movie_id"].to_numpy())
    ratings = pd.DataFrame(
        {
            "user": np.array([0, 0, 0, 1, 1, 2], dtype=np.int32),
            "item": np.array([0, 1, 2, 3, 1, 5], dtype=np.int32),
            "rating": np.array([5, 3.5, 4, 4, 4.5, 1], dtype=np.float32),
            "timestamp": np.arange(6),
            "split": np.array([0, 1, 2, 0, 0, 0], dtype=np.int8),
        }
    )
    ratings.to_parquet(folder / "interactions.parquet")
    return folder


def pairs(path: Path, rows: list[tuple[int, int, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=["user", "item", "split"]).astype("int32").to_parquet(path)


def tiktok(root: Path) -> Path:
    pairs(root / "tiktok_mm" / "interactions.parquet", [(9307, 2, 0), (0, 0, 0), (0, 2, 1)])
    visual = np.full((4, 2), 6e4, dtype=np.float16)
    np.savez(root / "tiktok_mm" / "features.npz", visual=visual, acoustic=np.ones((4, 3), dtype=np.float16))
    return root


def mmrec(folder: Path, name: str = "baby") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.inter").write_text("userID\titemID\trating\ttimestamp\tx_label\n0\t1\t5\t9\t0\n1\t0\t5\t9\t2\n")
    np.save(folder / "image_feat.npy", np.ones((2, 3)))
    np.save(folder / "text_feat.npy", np.zeros((2, 2)))


def test_movielens_has_its_split_titles_posters_and_all_its_modalities(tmp_path: Path) -> None:
    movielens(tmp_path / "movielens_small_mm")
    data = read_set("movielens", str(tmp_path), ["genre", "facts", "text", "poster"])
    assert data.user_ids.tolist() == [0, 0, 0, 1, 1, 2] and data.item_ids.tolist() == [0, 1, 2, 3, 1, 5]
    assert data.split is not None and data.split.tolist() == [0, 1, 2, 0, 0, 0]
    assert data.item_names is not None and data.item_names[3] == "Film Odd (1993)"
    assert data.images is not None and data.images.shape == (FILMS, 12, 12, 3)
    assert data.name == "movielens" and (data.num_users, data.num_items) == (3, FILMS)
    assert set(data.features) == {"genre", "facts", "text", "poster"}
    assert all(len(array) == FILMS and array.dtype == np.float32 for array in data.features.values())
    # Odd films share genres, a year's bin, and words; even ones others.
    genre = data.features["genre"]
    assert genre.shape == (FILMS, 2 + 12)
    assert genre[:, :2].tolist() == [[number % 2, 1] for number in range(FILMS)]
    text = data.features["text"] @ data.features["text"].T
    assert text[1, 3] > text[1, 2]


def test_the_default_modalities_of_movielens_are_posters_and_text(tmp_path: Path) -> None:
    movielens(tmp_path / "movielens_small_mm")
    assert set(read_set("movielens", str(tmp_path)).features) == {"poster", "text"}
    # The folder of the set itself may be given as well.
    assert set(read_set("movielens", str(tmp_path / "movielens_small_mm"), ["text"]).features) == {"text"}


def test_facts_are_whole_names_and_documents_have_what_there_is() -> None:
    films = pd.DataFrame([film(0), film(1)])
    assert movielens_small.facts(films) == [
        ["director=Ann Lee", "actors=Bo Li", "actors=Cy 0", "country=USA", "language=English"],
        ["director=Ann Lee", "actors=Bo Li", "actors=Cy 1", "writer=Di Wu", "writer=Ed 1", "country=USA"],
    ]
    assert movielens_small.documents(films) == [
        "Film Even (1990). Drama. Ann Lee. Bo Li, Cy 0",
        "Film Odd (1991). Comedy, Drama. Ann Lee. Bo Li, Cy 1. fun, dark",
    ]


def test_min_rating_keeps_ratings_from_it_on_and_all_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    movielens(tmp_path / "movielens_small_mm")
    with caplog.at_level(logging.INFO):
        data = read_set("movielens", str(tmp_path), ["genre"], min_rating=4.0)
    assert data.user_ids.tolist() == [0, 0, 1, 1] and data.item_ids.tolist() == [0, 2, 3, 1]
    assert data.split is not None and data.split.tolist() == [0, 2, 0, 0]
    assert (data.num_users, data.num_items) == (3, FILMS)
    assert "min_rating=4.0 keeps 4 of 6 ratings; without any are 1 users and 2 items" in caplog.text
    with pytest.raises(ValueError, match=r"min_rating=5\.5 keeps none of 6 ratings"):
        read_set("movielens", str(tmp_path), ["genre"], min_rating=5.5)


def test_an_encoder_takes_the_place_of_words_or_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def encoded(kind: str, payload: Any, encoder: str, cache_dir: str | None) -> np.ndarray:
        calls.append((kind, len(payload), type(payload[0]), encoder, cache_dir))
        return np.full((len(payload), 2), len(calls), dtype=np.float32)

    monkeypatch.setattr(movielens_small, "encoded_features", encoded)
    movielens(tmp_path / "movielens_small_mm")
    names = ["poster", "text", "genre"]
    data = read_set("movielens", str(tmp_path), names, None, {"text": "bert", "poster": "clip"}, "kept")
    assert calls == [("image", FILMS, np.ndarray, "clip", "kept"), ("text", FILMS, str, "bert", "kept")]
    assert data.features["poster"][0, 0] == 1 and data.features["text"][0, 0] == 2
    read_set("movielens", str(tmp_path), names, None, {"text": "bert"})
    assert calls[2:] == [("text", FILMS, str, "bert", None)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "netflix"}, "source must be one of movielens, tiktok, baby, sports, clothing, got 'netflix'"),
        ({"modalities": ["audio"]}, "movielens has no 'audio'; it has facts, genre, poster, text"),
        ({"modalities": ["text", "text"]}, "expected each once"),
        ({"feature_encoders": {"audio": "x"}}, "'audio', expected some of .* raw content: poster, text"),
        ({"modalities": ["genre"], "feature_encoders": {"text": "x"}}, "'text', expected some .* content: none"),
        ({"source": "tiktok", "min_rating": 4}, "in tiktok every interaction counts, only movielens has ratings"),
        ({"source": "tiktok", "modalities": ["text"]}, "tiktok has no 'text'; it has acoustic, visual"),
        ({"source": "tiktok", "feature_encoders": {"visual": "x"}}, "feature_encoders: visual: .* published ones"),
        ({"source": "baby", "feature_encoders": {"text": "x"}}, "feature_encoders: text"),
        ({"source": "baby", "modalities": ["image"]}, r"baby has no 'image'; it has no features in .*meta_Baby\.json"),
        ({"source": "clothing", "modalities": ["audio"]}, "clothing has no 'audio'; it has image, text"),
    ],
    ids=["source", "modality", "twice", "encoder", "unused_encoder", "rating", "tiktok", "tiktok_encoder",
         "baby_encoder", "baby", "mmrec"],
)  # fmt: skip
def test_an_option_that_does_not_go_with_the_set_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    movielens(tiktok(tmp_path) / "movielens_small_mm")
    pairs(tmp_path / "amazon_baby_inter" / "interactions.parquet", [(0, 0, 0)])
    mmrec(tmp_path / "clothing", "clothing")
    with pytest.raises(ValueError, match=message):
        read_set(**{"source": "movielens", "data_dir": str(tmp_path), **options})


@pytest.mark.parametrize("name", ["interactions.parquet", "items.parquet", "posters.npz"])
def test_a_missing_file_of_movielens_is_named_with_its_folder(tmp_path: Path, name: str) -> None:
    (movielens(tmp_path / "movielens_small_mm") / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"movielens_small_mm/{name} is missing: put .*ZOO_DATA"):
        read_set("movielens", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"movielens_small_mm/{name} is missing: expected"):
        movielens_small.read_movielens(tmp_path / "movielens_small_mm")


def test_files_of_movielens_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    folder = movielens(tmp_path / "movielens_small_mm")
    images = np.zeros((FILMS, 4, 4, 3), dtype=np.uint8)
    for arrays, message in (
        ({"images": images, "movie_id": np.arange(FILMS)}, "movie_id is not that of items.parquet"),
        ({"images": images[..., 0], "movie_id": np.arange(FILMS)}, r"images are uint8 \(6, 4, 4\), expected"),
        ({"images": images}, "has no key 'movie_id', only 'images'"),
    ):
        np.savez(folder / "posters.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_set("movielens", str(tmp_path))
    films = pd.DataFrame([film(number) for number in range(FILMS)])
    films[::-1].to_parquet(folder / "items.parquet")
    with pytest.raises(ValueError, match=r"column 'item' is not 0, 1, \.\.\., 5"):
        read_set("movielens", str(tmp_path))
    films.drop(columns="tags").to_parquet(folder / "items.parquet")
    with pytest.raises(ValueError, match=r"items\.parquet has no column 'tags'"):
        read_set("movielens", str(tmp_path))
    films[:4].to_parquet(folder / "items.parquet")
    np.savez(folder / "posters.npz", images=images[:4], movie_id=films["movie_id"].to_numpy()[:4])
    with pytest.raises(ValueError, match=r"interactions\.parquet: expected users from 0 and items 0\.\.3"):
        read_set("movielens", str(tmp_path))


def test_tiktok_has_all_users_and_float32_features(tmp_path: Path) -> None:
    data = read_set("tiktok", str(tiktok(tmp_path)))
    assert (data.name, data.num_users, data.num_items) == ("tiktok", 9308, 4)
    assert data.user_ids.tolist() == [9307, 0, 0] and data.item_ids.tolist() == [2, 0, 2]
    assert data.split is not None and data.split.tolist() == [0, 0, 1]
    assert list(data.features) == ["acoustic", "visual"]
    assert data.features["visual"].dtype == np.float32
    assert data.features["visual"].sum() == 480_000  # infinite in float16
    assert list(read_set("tiktok", str(tmp_path), ["visual"]).features) == ["visual"]
    pairs(tmp_path / "tiktok_mm" / "interactions.parquet", [(9308, 2, 0)])
    with pytest.raises(ValueError, match=r"users run to 9308, expected 0\.\.9307"):
        read_set("tiktok", str(tmp_path))
    (tmp_path / "tiktok_mm" / "features.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiktok_mm/features\.npz is missing"):
        read_set("tiktok", str(tmp_path))


def test_baby_comes_from_the_fullest_files_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs(tmp_path / "amazon_baby_inter" / "interactions.parquet", [(0, 0, 0), (1, 1, 1)])
    data = read_set("baby", str(tmp_path))
    assert data.name == "baby" and data.features == {} and data.num_items == 2
    assert read_set("baby", str(tmp_path / "amazon_baby_inter")).num_items == 2

    mmrec(tmp_path / "baby")
    data = read_set("baby", str(tmp_path))
    assert list(data.features) == ["image", "text"] and data.name == "baby"
    assert data.split is not None and data.split.tolist() == [0, 2]
    assert list(read_set("baby", str(tmp_path / "baby"), ["text"]).features) == ["text"]

    calls: list[Any] = []

    def read_amazon(*arguments: Any) -> InteractionTable:
        calls.append(arguments)
        return data

    monkeypatch.setattr(amazon2014, "read_amazon", read_amazon)
    (tmp_path / "Baby").mkdir()
    (tmp_path / "Baby" / "reviews_Baby_5.json.gz").write_bytes(b"")
    assert read_set("baby", str(tmp_path), ["text"], None, {"text": "bert"}, "kept") is data
    assert calls == [("baby", tmp_path / "Baby", ["text"], {"text": "bert"}, "kept")]


def test_the_layout_of_lattice_is_found_for_an_amazon_set(tmp_path: Path) -> None:
    folder = tmp_path / "sports" / "5-core"
    folder.mkdir(parents=True)
    for number, part in enumerate(("train", "val", "test")):
        (folder / f"{part}.json").write_text(json.dumps({"0": [number]}))
    np.save(tmp_path / "sports" / "text_feat.npy", np.eye(3))
    data = read_set("sports", str(tmp_path))
    assert data.name == "sports" and data.item_ids.tolist() == [0, 1, 2] and list(data.features) == ["text"]


@pytest.mark.parametrize(("source", "name"), [("baby", "Baby"), ("sports", "Sports_and_Outdoors")])
def test_without_files_the_message_says_which_to_put_where(tmp_path: Path, source: str, name: str) -> None:
    # Another set's interactions beside its own files are not Baby's.
    movielens(tmp_path / "other")
    for root in (tmp_path, tmp_path / "other"):
        with pytest.raises(FileNotFoundError) as caught:
            read_set(source, str(root))
        message = str(caught.value)
        for part in (f"reviews_{name}_5.json.gz", f"meta_{name}.json.gz", f"image_features_{name}.b", f"{source}.inter",
                     "http://jmcauley.ucsd.edu/data/amazon/links.html", str(root / source)):  # fmt: skip
            assert part in message


@pytest.mark.real
@pytest.mark.parametrize(
    ("source", "users", "items", "parts", "sizes"),
    [
        ("movielens", 609, 2521, [47_945, 6_852, 6_852], {"facts": 128, "genre": 31, "poster": 128, "text": 128}),
        ("tiktok", 9_308, 6_710, [59_541, 3_051], {"acoustic": 128, "visual": 128}),
        ("baby", 19_445, 7_050, [118_551, 21_682], {}),
    ],
    ids=["movielens", "tiktok", "baby"],
)
def test_published_sets_have_the_published_counts(
    source: str, users: int, items: int, parts: list[int], sizes: dict[str, int]
) -> None:
    data = read_set(source, modalities=list(sizes))
    assert (data.num_users, data.num_items) == (users, items)
    assert data.split is not None and np.bincount(data.split).tolist() == parts
    assert data.user_ids.min() == data.item_ids.min() == 0
    assert data.user_ids.max() == users - 1 and data.item_ids.max() < items
    assert len(np.unique(data.user_ids * items + data.item_ids)) == sum(parts)
    assert {name: array.shape for name, array in data.features.items()} == {k: (items, v) for k, v in sizes.items()}
    for name, array in data.features.items():
        assert np.isfinite(array).all(), name
        assert (array.max(1) > array.min(1)).all(), name


@pytest.mark.real
def test_movielens_without_low_ratings_keeps_its_items_and_its_features() -> None:
    data = read_set("movielens", modalities=["genre"], min_rating=4)
    everything = read_set("movielens", modalities=["genre"])
    assert 0 < len(data.user_ids) < len(everything.user_ids)
    assert data.item_names == everything.item_names
    assert data.item_names is not None and data.item_names[0] == "Toy Story (1995)"
    np.testing.assert_array_equal(data.features["genre"], everything.features["genre"])
