"""A table that names clips and their sounds."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from datamodules.sources.video_files import VIDEO_SUFFIXES
from datamodules.video_audio_rows import count_duplicates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

COLUMNS = ("video", "audio")
OPTIONAL = ("label", "pair_id", "split", "fps")
SPLITS = ("train", "validation", "test")
DEFAULT_FPS = 25.0

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        video: Folder of frames, or video file.
        audio: Sound file, or the video file itself.
        label: As in the table; empty where there is none, or -1.
        pair_id: As in the table; empty where there is none.
        split: One of `SPLITS`; empty where the table has no such column.
        fps: Frames a second of a frame folder.
        line: Number of the line, from 1.
    """

    video: Path
    audio: Path
    label: str
    pair_id: str
    split: str
    fps: float
    line: int


def read_rows(path: Path) -> list[Row]:
    """Read and check a table; every file it names must be there.

    Args:
        path: CSV in UTF-8 with a header; see `VideoAudioData` for its columns, others are left alone.

    Raises:
        FileNotFoundError: If the table or a file is missing.
        ValueError: If a column is missing, or a line is not as described.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a CSV file with the columns {', '.join(COLUMNS)}")
    rows: list[Row] = []
    without_fps = 0
    seen: dict[tuple[Path, Path], int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            for cells in reader:
                if not cells:
                    continue
                row, guessed = _read_row(path, reader.line_num, header, cells)
                without_fps += guessed
                first = seen.setdefault((row.video, row.audio), row.line)
                if first != row.line:
                    raise ValueError(
                        f"{path}:{row.line}: the pair video={row.video}, audio={row.audio} is there since line {first}"
                    )
                rows.append(row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from error
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows, only a header")
    if without_fps:
        log.info("%s: %d of %d rows are frame folders without fps: taken as %g", path, without_fps, len(rows),
                 DEFAULT_FPS)  # fmt: skip
    return rows


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise ValueError(f"{path} is empty: expected a header with the columns {', '.join(COLUMNS)}")
    for name in COLUMNS:
        if name not in header:
            raise ValueError(f"{path}:1: no column {name!r}, only {', '.join(map(repr, header))}")
    for name in (*COLUMNS, *OPTIONAL):
        if header.count(name) > 1:
            raise ValueError(f"{path}:1: {header.count(name)} columns are called {name!r}")


def _read_row(path: Path, line: int, header: list[str], cells: list[str]) -> tuple[Row, bool]:
    """A row, and whether its fps are the default."""
    if len(cells) != len(header):
        raise ValueError(f"{path}:{line}: {len(cells)} fields, but the header has {len(header)} columns")
    given = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    if not given["video"]:
        raise ValueError(f"{path}:{line}: video is empty, expected a folder of frames or a video file")
    video = path.parent / Path(given["video"]).expanduser()
    is_folder = video.is_dir()
    if not is_folder and not video.is_file():
        raise FileNotFoundError(f"{path}:{line}: video {video} is missing")
    if not is_folder and video.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(
            f"{path}:{line}: video {video} is neither a folder of frames nor a file of {', '.join(VIDEO_SUFFIXES)}"
        )
    if not given["audio"] and is_folder:
        raise ValueError(f"{path}:{line}: audio is empty, and the folder of frames {video} has no sound")
    audio = path.parent / Path(given["audio"]).expanduser() if given["audio"] else video
    if not audio.is_file():
        raise FileNotFoundError(f"{path}:{line}: audio {audio} is missing")
    split = given.get("split", "")
    if "split" in given and split not in SPLITS:
        raise ValueError(f"{path}:{line}: split is {split!r}, expected {', '.join(SPLITS)}")
    text, fps = given.get("fps", ""), DEFAULT_FPS
    if text:
        try:
            fps = float(text)
        except ValueError:
            fps = math.nan
        if not 0 < fps < math.inf:
            raise ValueError(f"{path}:{line}: fps is {text!r}, expected a number above 0")
    # As a name, -1 would make names of all whole numbers, and number them anew.
    label = "" if given.get("label") == "-1" else given.get("label", "")
    row = Row(video, audio, label, given.get("pair_id", ""), split, fps, line)
    return row, is_folder and not text


def _whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def encode_labels(texts: Sequence[str]) -> tuple[Tensor, list[str] | None]:
    """Labels as numbers: whole numbers stay what they are, others are numbered in the order of their names.

    Args:
        texts: One for each row; empty for none.

    Returns:
        int64 `(rows,)`, -1 for none; and the names, None where labels are numbers.
    """
    names = sorted({text for text in texts if text})
    if all(_whole(name) for name in names):
        return torch.tensor([int(text) if text else -1 for text in texts]), None
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers.get(text, -1) for text in texts]), names


def encode_pairs(path: Path, rows: list[Row]) -> Tensor:
    """Numbers of the pairs, int64 `(rows,)`; rows without a pair_id are pairs of their own."""
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(row.pair_id or f"\n{row.line}", len(numbers)) for row in rows]
    pair_ids = torch.tensor(found)
    count_duplicates(str(path), pair_ids)
    return pair_ids
