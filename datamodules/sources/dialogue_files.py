"""Files of dialogues: JSON, JSON lines, CSV and TSV as published, told apart by their name and their first entry."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

from datamodules.sources.dialogue_turns import Dialogues, Emotion
from datamodules.sources.sequence_text import check_text, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EACM_NAMES = ("other", "like", "sad", "disgust", "angry", "happy")
"""Emotions of the official EACM files by id."""
_EXPECTED = "dialogues (see DialogueData)"
_MELD = ("Utterance", "Emotion", "Dialogue_ID", "Utterance_ID")
_EMPATHETIC = ("conv_id", "utterance_idx", "context", "utterance")
# Some published files hold Windows-1252 punctuation as control characters.
_PUNCTUATION = str.maketrans({place: bytes([place]).decode("cp1252") for place in (0x85, *range(0x91, 0x98))})


def read_text(path: Path) -> str:
    """The text of a file, unpacked if its name ends in `.gz`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, truncated, or not UTF-8.
    """
    content = read_bytes(path, _EXPECTED)
    check_text(path, content)
    return content.decode("utf-8-sig")


def read_file(path: Path) -> Dialogues:
    """Read a file of dialogues.

    Formats: `.json` of EACM (a list of pairs of posts and replies, each `[text, id, id]`) or of RECCON (an object of
    dialogues); `.jsonl` with `turns` that are objects of `text` and `emotion`, or three strings with a `label` for the
    last; `.csv` of MELD or EmpatheticDialogues; any other name is tab-separated: EmoContext with its header, or
    `post<TAB>reply[<TAB>post emotion<TAB>reply emotion]` with ids or names, an empty field for an unknown one. All of
    them also with `.gz`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is malformed; the message names the line or entry.
    """
    name = path.name.removesuffix(".gz").lower()
    text = read_text(path)
    read: Callable[[str, str], Dialogues] = _read_tsv
    for suffix, reader in ((".json", _read_json), (".jsonl", _read_lines), (".csv", _read_csv)):
        if name.endswith(suffix):
            read = reader
    found = read(str(path), text)
    if not len(found):
        raise ValueError(f"{path} holds no dialogue, expected {_EXPECTED}")
    return found


def read_posts(path: Path) -> Dialogues:
    """Posts to answer, one a line; each is a dialogue whose reply is empty.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty or not UTF-8.
    """
    found = Dialogues(str(path), last_only=True)
    for number, line in enumerate(read_text(path).rstrip("\r\n").split("\n"), start=1):
        found.turn(line.rstrip("\r"), None, f"line {number}")
        found.turn("", None, f"line {number}")
        found.close(2)
    return found


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): copy it again") from error


def _string(entry: dict[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {value!r}, expected a text")
    return value


def _read_lines(name: str, text: str) -> Dialogues:
    found = Dialogues(name)
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        where = f"line {number}"
        entry = _parsed(line, f"{name} {where}")
        turns = entry.get("turns") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{name} {where} is {line[:80]!r}, expected an object with a list of turns")
        if isinstance(turns[0], str):
            found.last_only = True
            if not all(isinstance(turn, str) for turn in turns):
                raise ValueError(f"{name} {where}: turns are {str(turns)[:80]}, expected texts")
            label = _string(entry, "label", f"{name} {where}")
            for place, turn in enumerate(turns, start=1):
                found.turn(turn, label if place == len(turns) else None, f"{where} turn {place}")
        else:
            for place, turn in enumerate(turns, start=1):
                spot = f"{where} turn {place}"
                if not isinstance(turn, dict):
                    raise ValueError(f"{name} {spot} is {str(turn)[:80]!r}, expected an object with text and emotion")
                emotion = _string(turn, "emotion", f"{name} {spot}")
                found.turn(_string(turn, "text", f"{name} {spot}"), emotion, spot)
        found.close(len(turns))
    return found


def _read_json(name: str, text: str) -> Dialogues:
    content = _parsed(text, name)
    if isinstance(content, dict):
        return _reccon(name, content)
    if not isinstance(content, list):
        raise ValueError(f"{name} holds {str(content)[:80]}, expected a list of pairs (EACM) or an object (RECCON)")
    found = Dialogues(name, names=EACM_NAMES)
    for number, pair in enumerate(content):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{name} pair {number} is {str(pair)[:80]}, expected [post, reply]")
        for side, what in zip(pair, ("post", "reply"), strict=True):
            right = isinstance(side, list) and len(side) == 3 and isinstance(side[0], str)
            if not right or not all(type(value) is int for value in side[1:]):
                raise ValueError(f"{name} pair {number}: the {what} is {str(side)[:80]}, expected [text, id, id]")
            found.turn(side[0], side[1], f"pair {number} {what}", side[2])
        found.close(2)
    return found


def _reccon(name: str, content: dict[str, Any]) -> Dialogues:
    found = Dialogues(name)
    for key, entry in content.items():
        # RECCON wraps the turns of a dialogue in one more list.
        turns = entry[0] if isinstance(entry, list) and len(entry) == 1 and isinstance(entry[0], list) else entry
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{name} dialogue {key!r} is {str(entry)[:80]}, expected a list of turns")
        for place, turn in enumerate(turns, start=1):
            spot = f"dialogue {key!r} turn {place}"
            emotion = _string(turn, "emotion", f"{name} {spot}")
            found.turn(_string(turn, "utterance", f"{name} {spot}"), emotion, spot)
        found.close(len(turns))
    return found


def _number(text: str, column: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: {column} is {text!r}, expected an integer") from None


def _read_csv(name: str, text: str) -> Dialogues:
    header = next(csv.reader([text.split("\n", 1)[0].rstrip("\r")]))
    columns = next((columns for columns in (_MELD, _EMPATHETIC) if set(columns) <= set(header)), None)
    if columns is None:
        raise ValueError(
            f"{name} has the columns {', '.join(header)[:200]}; expected those of MELD ({', '.join(_MELD)}) or of "
            f"EmpatheticDialogues ({', '.join(_EMPATHETIC)})"
        )
    places = [header.index(column) for column in columns]
    # Turns of a dialogue by their number: dialogues in the order of the file.
    dialogues: dict[str, list[tuple[int, str, str, str]]] = {}
    # EmpatheticDialogues writes commas as words and quotes nothing: its quotation marks are text.
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines) if columns is _MELD else csv.reader(lines, quoting=csv.QUOTE_NONE)
    next(reader)
    for row in reader:
        where = f"line {reader.line_num}"
        if not row:
            continue
        if len(row) < len(header):
            raise ValueError(f"{name} {where} has {len(row)} fields, expected {len(header)}")
        if columns is _MELD:
            utterance, emotion, key, number = (row[place] for place in places)
            utterance = utterance.translate(_PUNCTUATION)
        else:
            key, number, emotion, utterance = (row[place] for place in places)
            utterance = utterance.replace("_comma_", ",")
        turn = (_number(number, columns[3 if columns is _MELD else 1], f"{name} {where}"), utterance, emotion, where)
        dialogues.setdefault(key, []).append(turn)
    found = Dialogues(name)
    for turns in dialogues.values():
        turns.sort(key=lambda turn: turn[0])
        for _, utterance, emotion, where in turns:
            found.turn(utterance, emotion, where)
        found.close(len(turns))
    return found


def _read_tsv(name: str, text: str) -> Dialogues:
    lines = [line.rstrip("\r") for line in text.rstrip("\r\n").split("\n")]
    if lines[0].lower().split("\t") == ["id", "turn1", "turn2", "turn3", "label"]:
        return _emocontext(name, lines)
    found = Dialogues(name)
    fields = len(lines[0].split("\t"))
    if fields not in (2, 4):
        raise ValueError(
            f"{name} line 1 has {fields} fields separated by tabs, expected post and reply, or post, reply, post "
            "emotion and reply emotion"
        )
    for number, line in enumerate(lines, start=1):
        row = line.split("\t")
        where = f"line {number}"
        if len(row) != fields:
            raise ValueError(f"{name} {where} has {len(row)} fields separated by tabs, line 1 has {fields}")
        emotions = [_emotion(value) for value in row[2:]] or [None, None]
        found.turn(row[0], emotions[0], f"{where} post")
        found.turn(row[1], emotions[1], f"{where} reply")
        found.close(2)
    return found


def _emotion(value: str) -> Emotion:
    value = value.strip()
    if not value:
        return None
    return int(value) if value.isascii() and value.lstrip("-").isdigit() else value


def _emocontext(name: str, lines: list[str]) -> Dialogues:
    found = Dialogues(name, last_only=True)
    for number, line in enumerate(lines[1:], start=2):
        row = line.split("\t")
        if len(row) != 5:
            raise ValueError(f"{name} line {number} has {len(row)} fields separated by tabs, expected 5")
        for place, turn in enumerate(row[1:4], start=1):
            found.turn(turn, row[4] if place == 3 else None, f"line {number} turn {place}")
        found.close(3)
    return found
