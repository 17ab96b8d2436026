"""The published sets of user sequences with times, as processed by the authors of TiCoSeRec (AAAI 2023).

Amazon reviews 2014, 5-core (Beauty, Sports and Outdoors, Home and Kitchen), and the reviews of 2019 in two releases of
the Yelp Open Dataset. Their licences allow research use; no file is part of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.sources.download import RemoteFile, data_folder, fetch
from datamodules.sources.interactions import Interactions, take_users
from datamodules.sources.sequence_text import read_sequences, read_users

if TYPE_CHECKING:
    from pathlib import Path

_BASE_URL = "https://raw.githubusercontent.com/KingGugu/TiCoSeRec/302b2959f27bb16bb77acae5a471de82819bd1bd/data"
ORDERS = ("auto", "org", "var")


class PublishedSet(NamedTuple):
    """A set and its four files.

    Attributes:
        folder: Its folder in the publication.
        stem: What its file names begin with there.
        local: What they may begin with in a flat folder of several sets.
        checks: Size and SHA-256 of the plain files, by `item_org`, `item_var`, `time_org`, `time_var`; absent where
            not known.
    """

    folder: str
    stem: str
    local: str
    checks: dict[str, tuple[int, str | None]]


SETS: dict[str, PublishedSet] = {
    "beauty": PublishedSet(
        "Beauty",
        "Beauty",
        "Beauty",
        {
            "item_org": (1_141_495, "b95614189df525e1eb69dad579e84c6086468f2bb42dab894038949240307c4f"),
            "item_var": (1_141_495, "164b19ef3138f0ded51f751e98b424c4a811f8d59472781fcd1d7107233dac4d"),
            "time_org": (2_306_594, "4e6a6e30f9dba1985ad9adae79a891df6b403e2132f0422a6f6e88f67d1fcc75"),
            "time_var": (2_306_594, "a6bebbcac56a7827dfaa7a5c1a4f9fb85350a753ce2306488b03168ea8b6e987"),
        },
    ),
    "sports": PublishedSet(
        "Sports",
        "Sports",
        "Sports",
        {
            "item_org": (1_783_816, "f4891c83d23c7cdc2981098230d8831fdb1f45b3fc4ec24f3b199310287745e5"),
            "item_var": (1_783_816, "4bb97cce782709535849ca0491627bfa2a122e7acb91a2c949b7c330d68dca90"),
            "time_org": (3_462_189, "c442ed4744f1de95b00744861bbaa503fcc98380d8b7ec08d52231450356c3a2"),
            "time_var": (3_462_189, "2f0df77d4d4c9459c8b6c9262d7655f98df51e83a0d75d4db2d5316c00a4f927"),
        },
    ),
    "home": PublishedSet("Home", "Home", "Home", {"item_org": (3_440_439, None), "item_var": (3_440_439, None)}),
    "yelp_a": PublishedSet(
        "Yelp-A",
        "Yelp",
        "Yelp_A",
        {
            "item_org": (1_883_261, "c192f158659e118070bf0cd2dfe4c01c15295a09ef2ada1ccadf0bab06e4c19e"),
            "item_var": (1_883_261, "94267a14e817b68b571d43a26390ebdc019098a5d637baa520b2e6c17c1113aa"),
            "time_org": (3_651_374, "79b0f02a3dcbbc8799fe79725ccbba55735212e81247f7595385cb359fd95de0"),
            "time_var": (3_651_374, "e62754fbe27fed1f82e60977c36e887e1fa76a275fdc6d031f95f94914bf57e4"),
        },
    ),
    "yelp_b": PublishedSet(
        "Yelp-B",
        "Yelp",
        "Yelp_B",
        {
            "item_org": (1_185_851, None),
            "item_var": (1_185_851, None),
            "time_org": (2_385_519, None),
            "time_var": (2_385_519, None),
        },
    ),
}


def remote_files(source: str, order: str) -> list[RemoteFile]:
    """The item and the time file of a set in an order, "org" or "var"."""
    chosen = SETS[source]
    files = []
    for kind in ("item", "time"):
        name = f"{chosen.stem}_{kind}_{order}_rank.txt"
        size, sha256 = chosen.checks.get(f"{kind}_{order}", (None, None))
        files.append(RemoteFile(name, f"{_BASE_URL}/{chosen.folder}/{name}", size, sha256))
    return files


def _existing(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _places(source: str, root: Path) -> list[tuple[Path, str]]:
    """Folders that may hold the set, and what its file names begin with there."""
    chosen = SETS[source]
    named = [root / chosen.folder, root / "data" / chosen.folder, root / "ticoserec" / chosen.folder]
    flat = [root / "ticoserec", root]
    # `Yelp_item.txt` in a flat folder could be either release; only a folder of its own tells.
    stems = list(dict.fromkeys((chosen.local, chosen.stem)))
    own = root.name == chosen.folder or chosen.stem == chosen.local
    return [(f, s) for f in named for s in stems] + [(f, s) for f in flat for s in (stems if own else [chosen.local])]


def find_files(source: str, order: str, root: Path) -> tuple[Path, Path, Path | None] | None:
    """Files of a set under a folder.

    The names looked for are those of the publication (`Beauty_item_org_rank.txt`), those that its code reads
    (`Beauty_item.txt`), both also with `.gz`, in `root`, `root/ticoserec`, `root/<Name>` and `root/data/<Name>`.

    Args:
        source: Name of the set.
        order: "org", "var", or "auto" for what the published code would read, then "org", then "var".
        root: Where to look.

    Returns:
        Item file, time file, and a list of users that gives the order, if the files have another; None where nothing
        is found.

    Raises:
        FileNotFoundError: If only one of the two files is there.
    """
    suffixes = {"auto": ["", "_org_rank", "_var_rank"], "org": ["_org_rank"], "var": ["_var_rank"]}[order]
    places = _places(source, root)
    for suffix in suffixes:
        for folder, stem in places:
            names = [f"{stem}_{kind}{suffix}.txt" for kind in ("item", "time")]
            items, times = (_existing(folder / name) for name in names)
            if items and times:
                return items, times, None
            if items or times:
                lost, there = (names[1], items) if items else (names[0], times)
                raise FileNotFoundError(f"{folder / lost} (or .gz) is missing beside {there}: both files are needed")
    if order == "var":
        for folder, stem in places:
            users = _existing(folder / f"{stem}_var_rank_users.txt")
            found = find_files(source, "org", root) if users else None
            if users and found:
                return found[0], found[1], users
    return None


def read_set(source: str, order: str, data_dir: str | None) -> Interactions:
    """Read a published set; download it where it is not found.

    Args:
        source: Name of the set.
        order: Order of the users (see `find_files`); downloads are in "org" order unless "var" is asked for.
        data_dir: Where to look and where to put downloads: `$ZOO_DATA` by default, or else the user's cache.

    Raises:
        FileNotFoundError: If there is neither a copy nor a network.
        ValueError: If a file is malformed.
    """
    root = data_folder(data_dir)
    found = find_files(source, order, root)
    if found is None:
        fetch(remote_files(source, "var" if order == "var" else "org"), root / "ticoserec" / SETS[source].folder)
        found = find_files(source, order, root)
        if found is None:
            raise FileNotFoundError(f"the files of {source} are not where they were written, under {root}")
    item_path, time_path, user_path = found
    data = read_sequences(item_path, time_path, name=source)
    if user_path is None:
        return data
    users = read_users(user_path)
    rows = np.argsort(data.user_labels)
    places = np.searchsorted(data.user_labels[rows], users)
    if not np.array_equal(np.sort(users), data.user_labels[rows]):
        raise ValueError(f"{user_path} does not list the users of {item_path}, each once")
    return take_users(data, rows[places])
