from __future__ import annotations

import pytest

from datamodules import TextRecData

pytestmark = pytest.mark.real


def test_games_have_the_published_counts() -> None:
    data = TextRecData(source="amazon_games")
    assert (data.num_users, data.num_items, len(data.corpus.item_ids)) == (45_546, 16_859, 396_893)
    assert (data.corpus.lengths.min(), data.corpus.lengths.max()) == (5, 50)
    assert len(data.whole("test").labels) == 45_546
    assert sum(len(title.split()) for title in data.titles) / 16_859 == pytest.approx(7.3, abs=0.05)
    assert not any("&amp;" in title for title in data.titles)


def test_the_subset_of_games_of_the_proof_has_three_thousand_users_of_the_thousand_most_popular_items() -> None:
    data = TextRecData(source="amazon_games", keep_items=1_000, min_interactions=5, keep_users=3_000)
    assert (data.num_users, data.num_items) == (3_000, 1_000)
    assert data.corpus.lengths.min() >= 5
    assert len(data.train_pairs) == len(data.corpus.item_ids) - 6_000 == 16_644
    assert len(data.whole("train").labels) == 13_644
    assert len(data.target_ids) == 10
    full = TextRecData(source="amazon_games", keep_items=1_000, min_interactions=5)
    assert full.num_users == 10_492
    assert data.titles == full.titles


def test_books_are_questions_as_published() -> None:
    data = TextRecData(source="tallrec_books", mode="yesno")
    parts = {part: data.whole(part) for part in ("train", "val", "test")}
    assert [len(batch.labels) for batch in parts.values()] == [2_185, 242, 1_200]
    assert parts["train"].labels.sum() + parts["val"].labels.sum() == 1_011
    assert parts["test"].labels.sum() == 534
    lengths = sum(int((batch.history >= 0).sum()) for batch in parts.values())
    assert lengths / 3_627 == pytest.approx(7.2, abs=0.1)


def test_films_are_split_as_published() -> None:
    data = TextRecData(source="movielens_small", mode="yesno")
    assert (data.num_users, data.num_items) == (609, 2_521)
    assert int(data.item_counts.sum()) == 47_945
    assert [len(data.whole(part).labels) for part in ("val", "test")] == [6_852, 6_852]
    assert data.titles[0] == "Toy Story (1995)"
    assert len(data.train_pairs) == 28_809
    liked = TextRecData(source="movielens_small")
    assert len(liked.corpus.item_ids) == 36_971
