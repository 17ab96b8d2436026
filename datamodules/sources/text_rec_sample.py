"""A generated catalogue with known truth: its titles say what an item is, and users choose by that."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datamodules.sources.interactions import Ints, offsets_of
from datamodules.text_rec_rows import TextCorpus

GENRES: dict[str, tuple[str, ...]] = {
    "racing": ("Turbo", "Drift", "Asphalt", "Rally", "Circuit", "Throttle"),
    "fantasy": ("Dragon", "Sorcerer", "Kingdom", "Quest", "Realm", "Blade"),
    "puzzle": ("Blocks", "Riddle", "Tiles", "Marbles", "Logic", "Jewels"),
    "shooter": ("Sniper", "Battalion", "Warfare", "Commando", "Siege", "Recon"),
    "sports": ("League", "Soccer", "Hockey", "Champion", "Stadium", "Tennis"),
    "music": ("Rhythm", "Guitar", "Karaoke", "Drums", "Melody", "Dance"),
}
"""What a title of each genre is made of."""
PLATFORMS = ("Playdeck", "Nimbus", "Vectra", "Handy")
"""Where an item runs: at the end of its title."""
_FRANCHISES = ("Solaris", "Ironwood", "Mirage", "Tempest", "Zenith", "Harbor", "Falcon", "Ember", "Quartz", "Willow")
_BRANDS = ("Oakline", "Brightway", "Koro", "Pixelworks", "Tandem")
_NOISE = ("The", "New", "Complete", "Special", "Edition", "Pack", "Collection", "of the", "with Case", "Original")


class TextRecTruth(NamedTuple):
    """What the generator knows.

    Attributes:
        item_genres: int64 `(items,)`, place in `GENRES`.
        item_platforms: int64 `(items,)`, place in `PLATFORMS`.
        user_genres: int64 `(users, 2)`, the genres that a user prefers; equal where it is one.
        user_platforms: int64 `(users,)`, the platform of a user.
    """

    item_genres: Ints
    item_platforms: Ints
    user_genres: Ints
    user_platforms: Ints


def text_rec_sample(num_items: int = 300, num_users: int = 600, seed: int = 0) -> tuple[TextCorpus, TextRecTruth]:
    """Generate titles and sequences without ratings.

    A title is a franchise of its genre, one or two of the genre's words, now and then a number, a brand or words that
    mean nothing, and the platform: `Solaris Dragon Quest 2 - Nimbus`. Some are in capitals, some have an HTML entity,
    no two are equal. A user has one platform and one or two genres. 85 % of the choices are of these genres, and 80 %
    of them for that platform, by popularity (Zipf over a random order of the items); the rest is of any kind. Nobody
    takes an item twice. Lengths are 5 to 12.

    So an item's neighbours can be read off its title, and a model of titles beats popularity.

    Args:
        num_items: Items, at least 20.
        num_users: Users.
        seed: Of numpy's generator.

    Returns:
        The catalogue with its sequences, and what is true of them.

    Raises:
        ValueError: If there are fewer items than a sequence needs.
    """
    if num_items < 20:
        raise ValueError(f"sample_items must be at least 20, got {num_items}: nobody takes an item twice")
    rng = np.random.default_rng(seed)
    item_genres = rng.integers(0, len(GENRES), num_items)
    item_platforms = rng.integers(0, len(PLATFORMS), num_items)
    titles = _titles(rng, item_genres, item_platforms)
    popularity = 1.0 / (1.0 + rng.permutation(num_items)) ** 0.7
    user_genres = rng.integers(0, len(GENRES), (num_users, 2))
    single = rng.random(num_users) < 0.5
    user_genres[single, 1] = user_genres[single, 0]
    user_platforms = rng.integers(0, len(PLATFORMS), num_users)
    lengths = rng.integers(5, 13, num_users)
    chosen = []
    for user, length in enumerate(lengths):
        liked = np.isin(item_genres, user_genres[user])
        own = item_platforms == user_platforms[user]
        # Shares of the whole: 0.85 for the genres and 0.8 for the platform, each spread over the items it holds for.
        weights = popularity * np.where(liked, 0.85, 0.15 * liked.mean()) * np.where(own, 0.8, 0.2 / 3)
        # The largest keys of Gumbel noise are a draw without repetition, in the order of the draw.
        keys = np.log(weights + 1e-12) + rng.gumbel(size=num_items)
        chosen.append(np.argsort(-keys)[:length])
    corpus = TextCorpus(
        "embedded",
        titles,
        [f"item-{item}" for item in range(num_items)],
        [f"user-{user}" for user in range(num_users)],
        np.concatenate(chosen).astype(np.int64),
        offsets_of(lengths),
    )
    return corpus, TextRecTruth(item_genres, item_platforms, user_genres, user_platforms)


def _titles(rng: np.random.Generator, genres: Ints, platforms: Ints) -> list[str]:
    words = list(GENRES.values())
    titles: dict[str, None] = {}
    for genre, platform in zip(genres.tolist(), platforms.tolist(), strict=True):
        while True:
            title = _title(rng, words[genre], genre, PLATFORMS[platform])
            if title not in titles:
                break
        titles[title] = None
    return list(titles)


def _title(rng: np.random.Generator, words: tuple[str, ...], genre: int, platform: str) -> str:
    # Each genre has five franchises of the ten, its neighbours share some: no single word gives all away.
    franchise = _FRANCHISES[(2 * genre + int(rng.integers(0, 5))) % len(_FRANCHISES)]
    own = [words[place] for place in rng.permutation(len(words))[: int(rng.integers(1, 3))]]
    joint = " &amp; " if len(own) == 2 and rng.random() < 0.2 else " "
    title = f"{franchise} {joint.join(own)}"
    if rng.random() < 0.35:
        title += f" {int(rng.integers(2, 10))}"
    if rng.random() < 0.3:
        title += f": {_NOISE[int(rng.integers(0, len(_NOISE)))]} {_NOISE[int(rng.integers(0, len(_NOISE)))]}"
    if rng.random() < 0.3:
        title += f" by {_BRANDS[int(rng.integers(0, len(_BRANDS)))]}"
    if rng.random() < 0.05:
        title = title.replace(" ", "&#39;s ", 1)
    title += f" - {platform}"
    # An entity in capitals is none.
    return title.upper() if rng.random() < 0.08 and "&" not in title else title
