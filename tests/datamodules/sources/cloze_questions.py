"""Small questions for tests of files and parts."""

from __future__ import annotations

import numpy as np

from datamodules.cloze_rows import UNLABELLED, ClozeRows


def questions(articles, options=None, labels=None, name="questions"):
    """Rows about articles, each with the options `a`, `b` unless others are given."""
    count = len(articles)
    return ClozeRows(
        name,
        list(articles),
        ["what @placeholder is"] * count,
        options or [["a", "b"]] * count,
        np.array([UNLABELLED] * count if labels is None else labels, dtype=np.int64),
        [str(row) for row in range(count)],
        [f"{name}, line {row + 1}" for row in range(count)],
    )
