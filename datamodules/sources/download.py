"""Fetching of published files: complete and checked, or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

log = logging.getLogger(__name__)

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20


class RemoteFile(NamedTuple):
    """A published file.

    Attributes:
        name: Its name on disk.
        url: Where it is published.
        size: Bytes; None where it is not known.
        sha256: Hash of its content; None where it is not known: then only the size is checked, if there is one.
    """

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None


def default_folder() -> Path:
    """Where downloads go without a folder of the user's own: the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "lightning-method-zoo"


def data_folder(data_dir: str | None) -> Path:
    """The folder given, or else `$ZOO_DATA`, or else the cache.

    Raises:
        FileNotFoundError: If the folder given, or `$ZOO_DATA`, is not there.
    """
    for what, value in (("data_dir", data_dir), ("ZOO_DATA", os.environ.get("ZOO_DATA"))):
        if value:
            folder = Path(value).expanduser()
            if not folder.is_dir():
                raise FileNotFoundError(f"{what}={value} is not a folder")
            return folder
    return default_folder()


def fetch(files: list[RemoteFile], folder: Path) -> None:
    """Download files that are not in the folder yet.

    Each is written under a temporary name, checked, and renamed, under a lock that other processes respect. A file
    that is already there is taken as it is.

    Args:
        files: What to fetch.
        folder: Where to; made if missing.

    Raises:
        FileNotFoundError: If a file cannot be had; the message says which files to put where.
        ValueError: If a file has another size or hash than published.
    """
    missing = [file for file in files if not (folder / file.name).is_file()]
    if not missing:
        return
    wanted = ", ".join(file.name for file in files)
    way_out = f"put {wanted} (plain or .gz) into {folder}, or name their folder in data_dir or ZOO_DATA"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            for file in missing:
                if not (folder / file.name).is_file():
                    _fetch_one(file, folder / file.name, way_out)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and way_out in str(error):
            raise
        raise FileNotFoundError(f"{folder}: cannot write the download ({error}); {way_out}") from error


def _fetch_one(file: RemoteFile, target: Path, way_out: str) -> None:
    log.info("downloading %s", file.url)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    digest, size = hashlib.sha256(), 0
    try:
        try:
            with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as response, partial.open("wb") as out:
                while chunk := response.read(_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    out.write(chunk)
        except urllib.error.HTTPError as error:
            raise FileNotFoundError(f"{file.url} answers {error.code} {error.reason}; {way_out}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise FileNotFoundError(f"no network, or {file.url} cannot be reached ({reason}); {way_out}") from error
        if file.size is not None and size != file.size:
            raise ValueError(f"{file.url} has {size} bytes, expected {file.size}: try again, or {way_out}")
        if file.sha256 is not None and digest.hexdigest() != file.sha256:
            raise ValueError(
                f"{file.url} has the SHA-256 {digest.hexdigest()}, expected {file.sha256}: the published file has "
                f"changed; {way_out}"
            )
        os.replace(partial, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
