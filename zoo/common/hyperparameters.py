"""What of a module's arguments its checkpoints can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain_hyperparameters(values: Mapping[str, Any]) -> list[str]:
    """Names of arguments that are not plain values, for `save_hyperparameters(ignore=...)`."""

    def plain(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
        if isinstance(value, (list, tuple)):
            return all(plain(inner) for inner in value)
        return value is None or isinstance(value, (str, int, float, bool))

    return [name for name, value in values.items() if not plain(value)]
