"""The record of a run: what was computed, with which settings and code, on which machine, at what cost."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import zoo

if TYPE_CHECKING:
    from collections.abc import Mapping

# What a run writes, and what is rebuilt from that, does not change what a run computes.
_NOT_CODE = (":(exclude)results", ":(exclude)*.md")


def write_result(
    path: str | Path,
    *,
    config: Mapping[str, Any],
    seed: int,
    metrics: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Write the record of a finished run as JSON, completely or not at all.

    Args:
        path: File to write; its folder is created.
        config: Settings of the run, plain values.
        seed: Its seed.
        metrics: Its metrics; a number that is not finite is written as null.
        seconds: Wall-clock time of its parts, such as "fit" and "test".

    Returns:
        The record: the arguments, and what `environment` and `peak_memory` tell.
    """
    record = {
        "metrics": {name: _finite(float(value)) for name, value in metrics.items()},
        "seconds": {name: round(float(value), 3) for name, value in seconds.items()},
        "seed": int(seed),
        **peak_memory(),
        **environment(),
        "config": dict(config),
    }
    write_json(path, record)
    return record


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON to a temporary file beside `path` and rename it: a reader never meets half a file."""
    path = Path(path)
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Code and machine: versions, commit, whether the tree was clean, cores, threads, device, date.

    `commit` and `clean` are None outside a git checkout of this project. Files below `results/` and Markdown do not
    make a tree dirty.
    """
    commit, clean = _commit()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": torch.cuda.get_device_name() if _used_cuda() else "cpu",
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": version("lightning"),
            "zoo": zoo.__version__,
        },
        "commit": commit,
        "clean": clean,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def peak_memory() -> dict[str, int]:
    """Largest memory so far in bytes: `peak_rss_bytes` of this process, `peak_cuda_bytes` where CUDA was used."""
    if sys.platform == "win32":
        import psutil

        peak = int(psutil.Process().memory_info().peak_wset)
    else:
        import resource

        # Kilobytes, but bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    used = {"peak_rss_bytes": peak}
    if _used_cuda():
        used["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return used


def _used_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _commit() -> tuple[str | None, bool | None]:
    root = Path(zoo.__file__).resolve().parent.parent
    # An installed copy may lie in somebody else's checkout, as an environment folder does: then it is not tracked.
    if _git(root, "ls-files", "--error-unmatch", "zoo/__init__.py") is None:
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", ".", *_NOT_CODE)
    return commit, None if commit is None or changes is None else not changes


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
