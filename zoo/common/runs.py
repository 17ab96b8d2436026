"""Finding earlier runs by their configuration.

A run is a folder `ROOT/<model>/version_N` with `config.yaml`, `metrics.csv`, `best.ckpt`, `last.ckpt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

TRAINER_KEYS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""The Trainer's settings that change what a step computes; limits, devices and loggers do not make another run."""


TESTING_KEYS = tuple(f"data.init_args.{name}" for name in ("test_path", "eval_batch_size", "num_workers", "pin_memory"))
"""Settings that decide what is tested on, and how data is loaded, and not what is trained."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what is trained, flat: `{"model.init_args.lr": 0.001, ...}`."""
    trainer = config.get("trainer") or {}
    kept = {key: config.get(key) for key in ("model", "data", "seed_everything")}
    kept["trainer"] = {key: trainer.get(key) for key in TRAINER_KEYS}
    return {key: value for key, value in flatten(kept) if key not in TESTING_KEYS}


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries with dotted names."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old value, now new value` for what differs between two flat mappings."""
    return [
        f"{key.replace('.init_args', '')}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that a run saved, or `None` where there is none that can be read."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None


def find_checkpoint(root: Path, model: str, word: str, config: Mapping[str, Any]) -> Path:
    """The newest `last.ckpt` or `best.ckpt` of the runs with the same configuration.

    Args:
        root: The folder of all runs.
        model: Name of the model's class.
        word: `"last"` or `"best"`.
        config: The present configuration.

    Returns:
        The checkpoint's path.

    Raises:
        FileNotFoundError: There is none; the text names the closest one and how it differs.
    """
    wanted = identity(config)
    closest: tuple[int, float, Path, list[str]] | None = None
    candidates = [(path.stat().st_mtime, path) for path in (root / model).glob(f"*/{word}.ckpt")]
    for modified, path in sorted(candidates, reverse=True):
        saved = read_config(path.parent)
        if saved is None:
            continue
        found = differences(identity(saved), wanted)
        if not found:
            return path
        if closest is None or len(found) < closest[0]:
            closest = (len(found), modified, path, found)
    message = f"--ckpt_path {word}: no run under {root / model} has a {word}.ckpt and this configuration."
    if closest is not None:
        shown = "; ".join(closest[3][:6]) + ("; ..." if len(closest[3]) > 6 else "")
        message += f" The closest, {closest[2]}, differs in {shown}."
    raise FileNotFoundError(f"{message} Name a file, or leave --ckpt_path out to start anew.")


def same_run(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `folder` is a run with the same configuration."""
    saved = read_config(folder)
    return saved is not None and not differences(identity(saved), identity(config))
