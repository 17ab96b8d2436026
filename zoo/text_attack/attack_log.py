"""A file of attack results that several processes write and that an interrupted run goes on with."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.text_attack.attack import AttackResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_log = logging.getLogger(__name__)


class AttackLog:
    """Results as lines of JSON, below a first line `{"settings": {...}}`.

    Each process appends to a part of its own (`attacks.part0.jsonl` beside `attacks.jsonl`) and each result is there
    as soon as its target is done. `merge` makes the file of the parts. A run that was stopped reads what is there with
    `completed` and goes on; its file equals, byte for byte, that of a run never stopped, for any number of processes.

    Args:
        path: The file; its folder is created at the first result.
        settings: What the results depend on, plain values: attack, goal, victim, targets. A file with other settings is
            not gone on with.
        rank: Number of this process.

    Raises:
        ValueError: If the settings are no JSON.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.path, self.rank = Path(path), rank
        try:
            self._first_line = json.dumps({"settings": dict(settings)}, ensure_ascii=False, sort_keys=True)
        except TypeError as error:
            raise ValueError(f"the settings of {path} must be plain values: {error}") from error
        # As they will be read: tuples are lists in JSON.
        self._settings: dict[str, Any] = json.loads(self._first_line)["settings"]
        self._started = False

    @property
    def part(self) -> Path:
        """The file that this process appends to."""
        return self.path.with_name(f"{self.path.stem}.part{self.rank}{self.path.suffix}")

    def completed(self) -> dict[int, AttackResult]:
        """The results that are there, by item: those of the file, then those of the parts of all processes.

        A last line that was cut off is left out, with a warning. Let all processes read before any of them appends.

        Raises:
            ValueError: If a file was made with other settings, with the keys that differ, or another line of one is not
                a result.
        """
        results: dict[int, AttackResult] = {}
        for path in (self.path, *self._parts()):
            if path.is_file():
                for result in self._read(path)[0]:
                    results.setdefault(result.item_id, result)
        return results

    def append(self, result: AttackResult) -> None:
        """Write one result at the end of this process's part, at once.

        Raises:
            ValueError: If the part that is there was made with other settings.
        """
        if not self._started:
            self._start()
        with self.part.open("a", encoding="utf-8", newline="\n") as file:
            file.write(result.to_json() + "\n")
            file.flush()

    def merge(self, order: Sequence[int]) -> list[AttackResult]:
        """Write the file, its results in a given order, and remove the parts; the first process's task.

        All processes must have appended all of their results. Results of items that are not in the order come after
        the others, in the order of their ids.

        Args:
            order: The item of each target.

        Returns:
            The results in that order.

        Raises:
            ValueError: If a target has no result.
        """
        results = self.completed()
        missing = [item for item in order if item not in results]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(order)} targets have no result in {self.path} or its parts, the first is item "
                f"{missing[0]}"
            )
        chosen = [results[item] for item in order]
        others = [results[item] for item in sorted(set(results) - set(order))]
        lines = [self._first_line, *(result.to_json() for result in (*chosen, *others))]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        for part in self._parts():
            part.unlink()
        self._started = False
        return chosen

    def _parts(self) -> list[Path]:
        name = re.compile(rf"{re.escape(self.path.stem)}\.part(\d+){re.escape(self.path.suffix)}")
        if not self.path.parent.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.path.parent.iterdir() if (match := name.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def _start(self) -> None:
        """Make the part end with a whole line, and begin with the settings."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._read(self.part)[1] if self.part.is_file() else 0
        with self.part.open("ab") as file:
            file.truncate(kept)
            if not kept:
                file.write((self._first_line + "\n").encode())
        self._started = True

    def _read(self, path: Path) -> tuple[list[AttackResult], int]:
        """The results of a file, and how many of its bytes are whole lines."""
        content = path.read_bytes()
        lines = content.split(b"\n")
        # What follows the last line break is a line that was cut off, or nothing.
        torn = lines.pop()
        if torn:
            _log.warning("%s: the last line was cut off and is left out; its target is attacked again", path)
        if not lines:
            return [], 0
        try:
            settings = json.loads(lines[0])["settings"]
            results = [AttackResult.from_json(line.decode()) for line in lines[1:]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of attack results: {error}; delete it to start anew") from error
        self._check(path, settings)
        return results, len(content) - len(torn)

    def _check(self, path: Path, settings: Any) -> None:
        if settings == self._settings:
            return
        theirs = settings if isinstance(settings, dict) else {}
        differing = [
            f"{key}: {theirs.get(key)!r} there, {self._settings.get(key)!r} now"
            for key in sorted(set(theirs) | set(self._settings))
            if theirs.get(key) != self._settings.get(key) or (key in theirs) != (key in self._settings)
        ]
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(differing)}): delete it, or give another file"
        )
