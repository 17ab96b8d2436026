"""The published sets of dialogues with emotions: which files they are, where they lie, and their emotions.

Their licences allow research use; no file is part of this package.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from datamodules.sources.dialogue_files import read_file
from datamodules.sources.dialogue_turns import Dialogues
from datamodules.sources.download import data_folder
from datamodules.sources.sequence_text import check_text

SEVEN = ("neutral", "anger", "disgust", "fear", "happiness", "sadness", "surprise")
"""Emotions of DailyDialog, and of RECCON's copy of it, by id."""
_SITUATIONS = (
    "afraid", "angry", "annoyed", "anticipating", "anxious", "apprehensive", "ashamed", "caring", "confident",
    "content", "devastated", "disappointed", "disgusted", "embarrassed", "excited", "faithful", "furious",
    "grateful", "guilty", "hopeful", "impressed", "jealous", "joyful", "lonely", "nostalgic", "prepared",
    "proud", "sad", "sentimental", "surprised", "terrified", "trusting",
)  # fmt: skip


class SetFiles(NamedTuple):
    """A published set.

    Attributes:
        folder: Its folder in `$ZOO_DATA`.
        train: Names of the training file, any of which will do; also with `.gz`.
        held: Names of validation and of test, in this order.
        label_names: Its emotions by id.
    """

    folder: str
    train: tuple[str, ...]
    held: tuple[tuple[str, ...], tuple[str, ...]]
    label_names: tuple[str, ...]


SETS = {
    "dailydialog": SetFiles("dailydialog", ("train.jsonl",), (("validation.jsonl",), ("test.jsonl",)), SEVEN),
    "emocontext": SetFiles(
        "emocontext",
        ("train.jsonl", "train.txt"),
        (("valid.jsonl", "valid.txt"), ("test.jsonl", "test.txt")),
        ("others", "happy", "sad", "angry"),
    ),
    "meld": SetFiles(
        "meld",
        ("train_sent_emo.csv", "train.jsonl"),
        (("dev_sent_emo.csv", "dev.jsonl"), ("test_sent_emo.csv", "test.jsonl")),
        ("neutral", "anger", "disgust", "fear", "joy", "sadness", "surprise"),
    ),
    "reccon": SetFiles(
        "reccon",
        ("dailydialog_train.json",),
        (("dailydialog_valid.json",), ("dailydialog_test.json",)),
        SEVEN,
    ),
    "empathetic": SetFiles(
        "empathetic",
        ("train.csv",),
        (("valid.csv",), ("test.csv",)),
        _SITUATIONS,
    ),
}
"""The sets by their name."""


class Parts(NamedTuple):
    """The files of a set.

    Attributes:
        train: For training.
        val: For validation; None where there is no file for it.
        test: For test; None where there is no file for it.
    """

    train: Dialogues
    val: Dialogues | None = None
    test: Dialogues | None = None


def read_set(source: str, path: str | None, data_dir: str | None) -> Parts:
    """Read a published set. Where one of two held-out files is missing, the other is for test.

    Args:
        source: One of `SETS`.
        path: Its folder, or its training file; by default it is looked for in `data_dir`.
        data_dir: Where to look: `$ZOO_DATA` by default, or else the user's cache.

    Raises:
        FileNotFoundError: If there is no training file; the message says which files to put where.
        ValueError: If a file is malformed.
    """
    files = SETS[source]
    if path and not Path(path).is_dir():
        return Parts(read_file(Path(path)))
    folder = Path(path) if path else data_folder(data_dir) / files.folder
    if not folder.is_dir() and _found(folder.parent, files.train):
        folder = folder.parent
    train = _found(folder, files.train)
    if train is None:
        wanted = ", ".join(names[0] for names in (files.train, *files.held))
        raise FileNotFoundError(
            f"{folder / files.train[0]} is missing: put {wanted} (plain or .gz; the last two may be missing) into "
            f"{folder}, or name their folder in path, or the folder above it in data_dir or ZOO_DATA"
        )
    held = [read_file(place) for names in files.held if (place := _found(folder, names))]
    return Parts(read_file(train), held[0] if len(held) == 2 else None, held[-1] if held else None)


def _found(folder: Path, names: tuple[str, ...]) -> Path | None:
    places = (folder / (name + ending) for name in names for ending in ("", ".gz"))
    return next((place for place in places if place.is_file()), None)


def read_dailydialog(path: Path) -> Parts:
    """The original DailyDialog: a zip file or a folder.

    Taken are `dialogues_train.txt`, `dialogues_validation.txt` and `dialogues_test.txt` with their
    `dialogues_emotion_*.txt`, also in zip files within; or else all dialogues in `dialogues_text.txt` with
    `dialogues_emotion.txt`, for training. Line k of both files is the same dialogue: turns that end with `__eou__`, and
    an emotion id for each.

    Raises:
        FileNotFoundError: If there are no such files.
        ValueError: If text and emotions do not fit, with both counts and the first such dialogue.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, expected DailyDialog's zip file or folder")
    members = _folder(path) if path.is_dir() else _archive(path.read_bytes(), str(path))
    found = {
        part: _dialogues(members, text, emotions, str(path))
        for part, text, emotions in (
            ("train", "dialogues_train.txt", "dialogues_emotion_train.txt"),
            ("val", "dialogues_validation.txt", "dialogues_emotion_validation.txt"),
            ("test", "dialogues_test.txt", "dialogues_emotion_test.txt"),
            ("all", "dialogues_text.txt", "dialogues_emotion.txt"),
        )
        if text in members and emotions in members
    }
    if "train" in found:
        return Parts(found["train"], found.get("val"), found.get("test"))
    if "all" not in found:
        raise FileNotFoundError(
            f"{path} has neither dialogues_train.txt and dialogues_emotion_train.txt nor dialogues_text.txt and "
            f"dialogues_emotion.txt, but {', '.join(sorted(members))[:200] or 'nothing'}"
        )
    return Parts(found["all"])


def _folder(path: Path) -> dict[str, bytes]:
    files = sorted(place for place in path.rglob("*") if place.is_file())
    members: dict[str, bytes] = {}
    for place in files:
        if place.suffix == ".zip":
            members |= _archive(place.read_bytes(), str(place))
        elif place.name.startswith("dialogues_"):
            members[place.name] = place.read_bytes()
    return members


def _archive(content: bytes, name: str) -> dict[str, bytes]:
    """Files of a zip file and of those within, by their name without folders."""
    members: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for info in archive.infolist():
                member = PurePosixPath(info.filename)
                # What a Mac adds has the name of the file that it belongs to, after "._".
                if info.is_dir() or member.name.startswith("._"):
                    continue
                if member.suffix == ".zip":
                    members |= _archive(archive.read(info), f"{name}: {info.filename}")
                elif member.name.startswith("dialogues_"):
                    members[member.name] = archive.read(info)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{name} is truncated or no zip file ({error}): copy it again") from error
    return members


def _dialogues(members: dict[str, bytes], text: str, emotions: str, where: str) -> Dialogues:
    lines = []
    for name in (text, emotions):
        check_text(Path(where) / name, members[name])
        lines.append(members[name].decode("utf-8-sig").rstrip().split("\n"))
    turns = [[turn.strip() for turn in line.strip().removesuffix("__eou__").split("__eou__")] for line in lines[0]]
    labels = [line.split() for line in lines[1]]
    first_bad = next(
        (row for row, (said, felt) in enumerate(zip(turns, labels, strict=False)) if len(said) != len(felt)), None
    )
    detail = ""
    if first_bad is not None:
        detail = (
            f"dialogue {first_bad + 1} (line {first_bad + 1}) has {len(turns[first_bad])} turns and "
            f"{len(labels[first_bad])} emotions"
        )
    if len(turns) != len(labels):
        unmatched = min(len(turns), len(labels)) + 1
        detail = detail or f"dialogue {unmatched} (line {unmatched}) is the first without its other half"
        raise ValueError(
            f"{where}: {text} has {len(turns)} dialogues, {emotions} has {len(labels)}, expected as many; {detail}"
        )
    if detail:
        raise ValueError(f"{where}: {text} and {emotions} do not fit: {detail}, expected as many")
    found = Dialogues(f"{where} {text}", names=SEVEN)
    for row, (said, felt) in enumerate(zip(turns, labels, strict=True), start=1):
        for place, (turn, emotion) in enumerate(zip(said, felt, strict=True), start=1):
            spot = f"line {row} turn {place}"
            if not emotion.isdigit():
                raise ValueError(f"{where} {emotions} {spot}: emotion is {emotion!r}, expected an id from 0 to 6")
            found.turn(turn, int(emotion), spot)
        found.close(len(said))
    return found
