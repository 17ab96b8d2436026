"""Dialogues as files have them: turns with emotions by name or by number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Emotion = str | int | None
"""A name, an id, or nothing where the emotion is not known."""

_SYNONYMS = {
    "no emotion": "neutral",
    "none": "neutral",
    "happy": "happiness",
    "happines": "happiness",
    "excited": "happiness",
    "sad": "sadness",
    "surprised": "surprise",
    "angry": "anger",
}


@dataclass
class Dialogues:
    """Turns of dialogues, dialogue after dialogue.

    Attributes:
        name: What messages call them: the file.
        last_only: Whether only the last turn of a dialogue is a reply; otherwise every turn but the first is.
        texts: The turns.
        primary: Emotion of each turn.
        secondary: Second emotion of each turn; 0 for none.
        places: Where each turn stands, such as `line 3 turn 2`.
        sizes: Turns of each dialogue.
        names: Names of the emotions by id, where the file itself fixes them.
    """

    name: str
    last_only: bool = False
    texts: list[str] = field(default_factory=list)
    primary: list[Emotion] = field(default_factory=list)
    secondary: list[Emotion] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    names: tuple[str, ...] = ()

    def turn(self, text: str, primary: Emotion, place: str, secondary: Emotion = 0) -> None:
        """Add a turn to the dialogue that `close` will end."""
        self.texts.append(text)
        self.primary.append(primary)
        self.secondary.append(secondary)
        self.places.append(place)

    def close(self, size: int) -> None:
        """End a dialogue of the last so many turns."""
        self.sizes.append(size)

    def __len__(self) -> int:
        """Number of dialogues."""
        return len(self.sizes)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """int64 `(dialogues + 1,)`; dialogue d has the turns `offsets[d] : offsets[d + 1]`."""
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])


def known_names(dialogues: Dialogues) -> list[str] | None:
    """Names of emotions that occur, a neutral one first and the others sorted; None if they are numbers."""
    found = {emotion for emotion in (*dialogues.primary, *dialogues.secondary) if isinstance(emotion, str)}
    if not found:
        return None
    first = sorted(found & {"neutral", "no emotion", "none", "other", "others"})
    return [*first, *sorted(found - set(first))]


def largest_id(dialogues: Dialogues) -> int:
    """Largest emotion id, -1 if there is none; a secondary 0 is none."""
    numbers = [value for value in dialogues.primary if isinstance(value, int)]
    numbers += [value for value in dialogues.secondary if isinstance(value, int) and value > 0]
    return max(numbers, default=-1)


def emotion_ids(
    dialogues: Dialogues, label_names: Sequence[str], fixed: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids of the emotions of all turns.

    Names are compared in lower case. One that is not known is looked up among misspellings and synonyms that published
    files have: happy, happines and excited for happiness, sad for sadness, surprised for surprise, angry for anger,
    no emotion and none for neutral.

    Args:
        dialogues: The turns.
        label_names: Names by id.
        fixed: Whether the names were given; otherwise they are those of the training file, which the message says.

    Returns:
        int64 `(turns,)` each: the primary emotion, -1 where unknown, and the secondary one, 0 for none.

    Raises:
        ValueError: With the row and the known names, if a name is unknown or an id too large.
    """
    ids = {name.lower(): index for index, name in enumerate(label_names)}
    if (largest := largest_id(dialogues)) >= len(label_names):
        place = next(
            where
            for where, *pair in zip(dialogues.places, dialogues.primary, dialogues.secondary, strict=True)
            if largest in pair
        )
        raise ValueError(
            f"{dialogues.name} {place}: emotion id {largest} is the largest, but num_emotions={len(label_names)} "
            f"({', '.join(label_names)}): expected 0..{len(label_names) - 1}; set num_emotions or label_names"
        )
    cache: dict[Emotion, int] = {None: -1}

    def look_up(emotion: Emotion, place: str) -> int:
        if isinstance(emotion, int):
            if emotion < 0:
                raise ValueError(f"{dialogues.name} {place}: emotion id {emotion} is negative, expected 0 or more")
            return emotion
        assert emotion is not None
        name = emotion.strip().lower()
        found = ids.get(name, ids.get(_SYNONYMS.get(name, ""), -1))
        if found < 0:
            origin = "" if fixed else " (those of the training file)"
            raise ValueError(
                f"{dialogues.name} {place}: unknown emotion {emotion!r}, expected one of {', '.join(label_names)}"
                f"{origin}"
            )
        return found

    columns = []
    for emotions in (dialogues.primary, dialogues.secondary):
        column = np.empty(len(emotions), dtype=np.int64)
        for row, emotion in enumerate(emotions):
            value = cache.get(emotion)
            if value is None:
                value = cache[emotion] = look_up(emotion, dialogues.places[row])
            column[row] = value
        columns.append(column)
    return columns[0], columns[1]
