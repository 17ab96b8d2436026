"""Passages that training questions share with the questions of other parts."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from datamodules.cloze_rows import ClozeRows

log = logging.getLogger(__name__)

_NEITHER = re.compile(r"[\W_]+")


def article_key(text: str) -> str:
    """What is the same for two copies of a passage: its letters and digits, without case.

    The whole passage counts, as passages of one template begin alike. Empty where there is no letter or digit.
    """
    return _NEITHER.sub("", text).casefold()


def _keys(rows: ClozeRows) -> list[str]:
    # Several questions have one passage: each distinct text is looked at once.
    known = {text: article_key(text) for text in set(rows.articles)}
    return [known[text] for text in rows.articles]


def _shared(train: ClozeRows, others: tuple[ClozeRows, ...]) -> tuple[npt.NDArray[np.bool_], int]:
    held_out = {key for rows in others for key in _keys(rows)} - {""}
    keys = _keys(train)
    return np.array([key in held_out for key in keys], dtype=np.bool_), len(held_out.intersection(keys))


def _names(parts: tuple[ClozeRows, ...]) -> str:
    return " and ".join(dict.fromkeys(rows.name for rows in parts))


def shared_articles(train: ClozeRows, *others: ClozeRows) -> npt.NDArray[np.bool_]:
    """Which training questions are about a passage of other parts: bool `(rows of train,)`.

    Questions without a passage share none.
    """
    return _shared(train, others)[0]


def drop_overlap(train: ClozeRows, *others: ClozeRows) -> ClozeRows:
    """Training questions without those about a passage of other parts; how many went is logged.

    Raises:
        ValueError: If none is left.
    """
    shared, articles = _shared(train, others)
    if not shared.any():
        return train
    names = _names(others)
    if shared.all():
        raise ValueError(
            f"{train.name}: all {len(train)} questions are about passages of {names}; give other training files, or "
            "set drop_overlap=False"
        )
    log.info(
        "%s: %d of %d questions are left out, as their %d passages are in %s, too",
        train.name, int(shared.sum()), len(train), articles, names,
    )  # fmt: skip
    return train.select(~shared)


def warn_of_overlap(train: ClozeRows, *others: ClozeRows) -> None:
    """Warn of passages that training questions share with other parts."""
    shared, articles = _shared(train, others)
    if articles:
        log.warning(
            "%s shares %d passages (%d questions) with %s, so that results there may be too good; drop_overlap=True "
            "leaves these questions out",
            train.name, articles, int(shared.sum()), _names(others),
        )  # fmt: skip
