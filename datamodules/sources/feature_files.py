"""Item features from `.npy` and `.npz` files: one row an item, never unpickled."""

from __future__ import annotations

import zipfile
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

ARCHIVE = "features.npz"
SUFFIX = "_feat.npy"


def feature_paths(folder: Path, plain: bool = False) -> list[Path]:
    """Feature files of a folder, sorted.

    Args:
        folder: Where to look.
        plain: Whether `features.npz` and `<modality>.npy` count as well as `<modality>_feat.npy`.
    """
    paths = folder.glob("*.npy" if plain else f"?*{SUFFIX}")
    archive = folder / ARCHIVE
    return sorted(path for path in paths if path.is_file()) + ([archive] if plain and archive.is_file() else [])


def read_features(paths: list[Path]) -> dict[str, NDArray[np.float32]]:
    """Read feature files.

    Args:
        paths: `<modality>_feat.npy` or `<modality>.npy`, and archives of arrays named by modality.

    Returns:
        Modality to float32 `(num_items, size)`, sorted by modality.

    Raises:
        ValueError: If a file is truncated, pickled, or holds no table of numbers; if a modality is there twice; or if
            the numbers of rows differ.
    """
    found: dict[str, tuple[NDArray[np.float32], Path]] = {}
    for path in paths:
        for modality, array in _arrays(path).items():
            if modality in found:
                raise ValueError(f"modality {modality!r} is in {found[modality][1]} and in {path}: remove one of them")
            found[modality] = _checked(array, f"{path}: modality {modality!r}"), path
    sizes = {modality: len(array) for modality, (array, _) in found.items()}
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"{modality!r} has {size:,} ({found[modality][1]})" for modality, size in sizes.items())
        raise ValueError(f"modalities differ in their number of rows: {each}; expected one row an item in each")
    return {modality: found[modality][0] for modality in sorted(found)}


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if path.suffix == ".npz":
        return read_archive(path)
    modality = path.name.removesuffix(".npy").removesuffix("_feat")
    with path.open("rb") as file:
        array = _load(path, lambda: np.load(file, allow_pickle=False))
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path} is an archive by numpy.savez, expected one array by numpy.save")
    return {modality: array}


def read_archive(path: Path, keys: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of a `.npz` file.

    Args:
        path: The file.
        keys: Those to read; all by default.

    Raises:
        ValueError: If the file is truncated or none of numpy's, if an array is pickled, or if a key is missing.
    """
    # Opened here, for numpy leaves a file open that turns out to be damaged.
    with path.open("rb") as file:
        archive = _load(path, lambda: np.load(file, allow_pickle=False))
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{path} is one array by numpy.save, expected an archive by numpy.savez")
        for key in keys or []:
            if key not in archive.files:
                raise ValueError(f"{path} has no key {key!r}, only {', '.join(map(repr, archive.files))}")
        # Members are decoded only when they are asked for, so that each may fail.
        names = archive.files if keys is None else keys
        return {key: _load(path, partial(archive.__getitem__, key), f" key {key!r}") for key in names}


def _load(path: Path, load: Callable[[], Any], part: str = "") -> Any:
    """Call a loader of numpy, and tell what is wrong with the file if it fails."""
    try:
        return load()
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        # numpy takes for a pickle whatever begins like none of its own files.
        if "pickle" in str(error).lower():
            raise ValueError(
                f"{path}{part} is pickled (or no numpy file at all), and a pickle may run any code: it is not read. "
                "Convert it where you trust it: numpy.save(path, numpy.asarray(array, dtype='float32'))"
            ) from None
        raise ValueError(f"{path}{part} is truncated or no numpy file ({error}): copy it again") from error


def _checked(array: NDArray[Any], what: str) -> NDArray[np.float32]:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{what} has the type {array.dtype}, expected numbers")
    if array.ndim != 2:
        raise ValueError(f"{what} has the shape {array.shape}, expected two dimensions: (items, size)")
    if not array.size:
        raise ValueError(f"{what} has the shape {array.shape}, expected a row an item and a column or more")
    # What does not fit into 32 bits becomes infinite, and that is refused with its row when the data is checked.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)
