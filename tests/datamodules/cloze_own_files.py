"""Files of cloze questions as a person, or ReCAM's folder, has them."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

from datamodules.sources.slot_cloze import FUNCTION_WORDS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


WORDS = ("justice", "peace", "debt", "silence", "victory", "delay", "comfort", "doubt")
PEOPLE = ("Anna", "Boris", "Clara", "David", "Emma", "Felix")


def records(count: int, seed: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """Questions with the keys of ReCAM, two in a row about one passage, other passages for each seed."""
    found = []
    for row in range(count):
        first, second = PEOPLE[row % 6], PEOPLE[(row + 1 + seed) % 6]
        passage = f"{first} met {second} in room {seed} of house {row // 2}. "
        record = {"article": passage * (1 + row // 2 % 3), "question": f"{first} wants @placeholder , not {second} ."}
        record |= {f"option_{place}": WORDS[(row + place) % 8] for place in range(5)}
        record["article"] = found[-1]["article"] if row % 2 else record["article"]
        found.append(record | {"label": (row + seed) % 5, "id": f"{seed}-{row}"} | changes)
    return found


def unlabelled(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "label"} for row in rows]


def write(path: Path, rows: Iterable[Any]) -> str:
    """JSON lines; returns the path as text, as a command line has it."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


RECAM = {
    "task1_trial": 10,
    "task1_test_a": 12,
    "task1_test_b_unlabelled": 14,
    "task1_dev": 16,
    "task2_trial": 18,
    "task2_dev": 20,
    "intersection_trial": 22,
}
"""Files of a small ReCAM, and how many questions each has."""


def write_recam(folder: Path, without: Iterable[str] = ()) -> str:
    """A folder like ReCAM's, whose ids begin with the number of questions of their file."""
    for name, count in RECAM.items():
        if name not in without:
            rows = records(count, seed=count)
            write(folder / f"{name}.jsonl.gz", unlabelled(rows) if "unlabelled" in name else rows)
    return str(folder)


def write_prose(folder: Path) -> str:
    """A folder like ReCAM's, in whose passages all function words of the slot cloze occur."""
    for name, count in {"task1_trial": 40, "task1_dev": 20}.items():
        rows = records(count, seed=count)
        for number, row in enumerate(rows):
            sentences = [
                f"Nobody {word} there thought about number {place} {name.split('_')[1]} {number}."
                for place, word in enumerate(FUNCTION_WORDS)
            ]
            row["article"] = " ".join(sentences)
        write(folder / f"{name}.jsonl.gz", rows)
    return str(folder)
