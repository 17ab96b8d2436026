"""The generated set has the structure that it claims."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.sources.interaction_sample import draw_sample, interaction_sample


def same_group_gap(vectors: np.ndarray, groups: np.ndarray) -> float:
    """Mean cosine of items of one group minus that of others."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine, same = unit @ unit.T, groups[:, None] == groups
    pairs = ~np.eye(len(groups), dtype=bool)
    return float(cosine[same & pairs].mean() - cosine[~same].mean())


def test_the_sample_is_a_function_of_its_seed() -> None:
    first, again, other = (interaction_sample(50, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.item_ids, again.item_ids) and np.array_equal(first.user_ids, again.user_ids)
    assert all(np.array_equal(first.features[name], again.features[name]) for name in ("image", "text"))
    assert not np.array_equal(first.features["text"], other.features["text"])


def test_features_show_topics_and_not_styles() -> None:
    sample = draw_sample(600)
    for values in sample.table.features.values():
        assert values.dtype == np.float32
        assert same_group_gap(values, sample.topics) > 0.3
        assert abs(same_group_gap(values, sample.styles)) < 0.02


def test_the_two_modalities_together_show_more_of_the_topic_than_one() -> None:
    sample = draw_sample(600)
    text, image = (sample.table.features[name] for name in ("text", "image"))
    topics = sample.topics
    merged = [same_group_gap(part, topics) for part in (text, image)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (text, image)]
    both = np.concatenate(unit, axis=1)

    def mixed(vectors: np.ndarray) -> float:
        """Cosine of items whose topics are neighbours, which one modality takes for one."""
        scaled = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        neighbours = np.abs(topics[:, None] - topics) == 1
        return float((scaled @ scaled.T)[neighbours].mean())

    def apart(vectors: np.ndarray) -> float:
        scaled = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        same = (topics[:, None] == topics) & ~np.eye(len(topics), dtype=bool)
        return float((scaled @ scaled.T)[same].mean()) - mixed(vectors)

    assert min(merged) > 0
    assert apart(both) > 0.2


def test_users_choose_what_they_like_each_item_once() -> None:
    sample = draw_sample(600)
    table = sample.table
    pairs = table.user_ids * len(table.item_labels) + table.item_ids
    assert len(np.unique(pairs)) == len(pairs)
    counts = np.bincount(table.user_ids)
    assert counts.min() == 5 and counts.max() == 8
    likes_topic = (sample.topics[table.item_ids][:, None] == sample.user_topics[table.user_ids]).any(1)
    likes_style = sample.styles[table.item_ids] == sample.user_styles[table.user_ids]
    # By chance 2 of 12 topics, and 1 of 10 styles.
    assert likes_topic.mean() > 0.6
    assert likes_style.mean() > 0.25


def test_too_few_users_are_refused() -> None:
    with pytest.raises(ValueError, match="sample_users must be at least 20, got 5"):
        interaction_sample(5)
