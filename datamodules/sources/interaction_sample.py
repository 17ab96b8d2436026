"""A generated set of users, items and two modalities with a known latent structure.

Each item has a topic, which its features show, and a style, which they do not: only who chose it together with what
tells the style. So content alone cannot rank well, nor can IDs of items that few users chose.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datamodules.interaction_rows import InteractionTable

NUM_TOPICS, NUM_STYLES = 12, 10
_TEXT_SIZE, _IMAGE_SIZE = 32, 48
_ITEMS_PER_USER = 2 / 3
_CHOICES = (5, 9)  # fewest items of a user, and one more than most
_TOPIC, _STYLE, _POPULARITY = 3.0, 2.0, 0.8  # in logits
_NOISE = 0.7  # of the features, whose groups differ by about sqrt(2)
_PAIRED = 2  # a modality shows pairs of topics only: text (0, 1), (2, 3) ..., image (1, 2), (3, 4) ...


class InteractionSample(NamedTuple):
    """The sample and what it was made from.

    Attributes:
        table: Users, items, interactions and the features "image" and "text".
        topics: int64 `(items,)`, what the features show, half of it in each modality.
        styles: int64 `(items,)`, what they do not.
        user_topics: int64 `(users, 2)`, the topics a user likes.
        user_styles: int64 `(users,)`, the style.
    """

    table: InteractionTable
    topics: np.ndarray
    styles: np.ndarray
    user_topics: np.ndarray
    user_styles: np.ndarray


def draw_sample(num_users: int, seed: int = 0) -> InteractionSample:
    """Generate the sample.

    A user likes two topics and one style, and chooses 5 to 8 items without replacement with probabilities that grow
    with each likeness and with the item's popularity, which has a long tail. There are two items to three users.

    Args:
        num_users: Users, at least 20.
        seed: Of the generator.

    Raises:
        ValueError: If there are fewer users.
    """
    if num_users < 20:
        raise ValueError(f"sample_users must be at least 20, got {num_users}")
    rng = np.random.default_rng(seed)
    num_items = max(40, int(_ITEMS_PER_USER * num_users))
    topics = rng.permutation(num_items) % NUM_TOPICS
    styles = rng.permutation(num_items) % NUM_STYLES
    user_topics = np.argsort(rng.random((num_users, NUM_TOPICS)), axis=1)[:, :2]
    user_styles = rng.integers(NUM_STYLES, size=num_users)
    popularity = _POPULARITY * rng.standard_normal(num_items)
    likes_topic = (user_topics[:, :, None] == topics).any(axis=1)
    likes_style = user_styles[:, None] == styles
    logits = popularity + _TOPIC * likes_topic + _STYLE * likes_style
    # The largest of logits + Gumbel noise are a draw without replacement.
    order = np.argsort(-(logits + rng.gumbel(size=logits.shape)), axis=1)
    counts = rng.integers(*_CHOICES, size=num_users)
    chosen = np.arange(num_items) < counts[:, None]
    user_ids, places = chosen.nonzero()
    features = {
        "image": _features(rng, (topics + 1) % NUM_TOPICS // _PAIRED, _IMAGE_SIZE),
        "text": _features(rng, topics // _PAIRED, _TEXT_SIZE),
    }
    names = [f"topic {topic}, style {style}" for topic, style in zip(topics, styles, strict=True)]
    table = InteractionTable(
        name="embedded",
        user_labels=np.array([f"u{user}" for user in range(num_users)]),
        item_labels=np.array([f"i{item}" for item in range(num_items)]),
        user_ids=user_ids.astype(np.int64),
        item_ids=order[user_ids, places].astype(np.int64),
        split=None,
        features=features,
        images=None,
        item_names=names,
    )
    return InteractionSample(table, topics, styles, user_topics, user_styles)


def _features(rng: np.random.Generator, groups: np.ndarray, size: int) -> np.ndarray:
    """Vectors float32 `(items, size)` that show the group of each item under noise."""
    centres = rng.standard_normal((int(groups.max()) + 1, size))
    return np.asarray(centres[groups] + _NOISE * rng.standard_normal((len(groups), size)), dtype=np.float32)


def interaction_sample(num_users: int, seed: int = 0) -> InteractionTable:
    """The table of `draw_sample` alone."""
    return draw_sample(num_users, seed).table
