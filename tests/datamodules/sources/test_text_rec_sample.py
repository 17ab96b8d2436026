from __future__ import annotations

import numpy as np
import pytest

from datamodules.sources.text_rec_sample import GENRES, PLATFORMS, text_rec_sample


def test_the_sample_is_a_function_of_its_seed() -> None:
    corpus, _ = text_rec_sample(seed=1)
    again, _ = text_rec_sample(seed=1)
    assert corpus.titles == again.titles and np.array_equal(corpus.item_ids, again.item_ids)
    assert corpus.titles != text_rec_sample(seed=2)[0].titles


def test_titles_differ_and_say_the_genre_and_the_platform() -> None:
    corpus, truth = text_rec_sample()
    assert len(set(corpus.titles)) == corpus.num_items == 300
    words = list(GENRES.values())
    for title, genre, platform in zip(corpus.titles, truth.item_genres, truth.item_platforms, strict=True):
        lower = title.lower()
        assert lower.endswith(PLATFORMS[platform].lower())
        named = [k for k, own in enumerate(words) if any(word.lower() in lower for word in own)]
        assert named == [genre]
    assert any("&amp;" in title for title in corpus.titles) and any("&#39;" in title for title in corpus.titles)
    assert any(title.isupper() for title in corpus.titles) and any(any(map(str.isdigit, t)) for t in corpus.titles)


def test_sequences_are_short_and_have_no_item_twice() -> None:
    corpus, _ = text_rec_sample()
    assert corpus.num_users == 600
    assert (corpus.lengths.min(), corpus.lengths.max()) == (5, 12)
    for own in np.split(corpus.item_ids, corpus.offsets[1:-1]):
        assert len(set(own.tolist())) == len(own)
    assert corpus.item_ids.min() >= 0 and corpus.item_ids.max() < 300


def test_users_choose_by_genre_and_platform_and_some_items_are_popular() -> None:
    corpus, truth = text_rec_sample()
    users = np.repeat(np.arange(600), corpus.lengths)
    liked = (truth.item_genres[corpus.item_ids, None] == truth.user_genres[users]).any(1)
    # Users have 1.4 genres of 6 on average: by chance it would be 0.24.
    assert liked.mean() > 0.65
    own = truth.item_platforms[corpus.item_ids] == truth.user_platforms[users]
    assert own.mean() > 0.6
    counts = np.sort(np.bincount(corpus.item_ids, minlength=300))[::-1]
    assert counts[:30].sum() > 0.2 * counts.sum()


def test_too_few_items_are_refused() -> None:
    with pytest.raises(ValueError, match="sample_items must be at least 20, got 19"):
        text_rec_sample(num_items=19)
