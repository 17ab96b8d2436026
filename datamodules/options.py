"""Checks of a data module's options."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


def one_of(*options: tuple[str, object, Collection[object]]) -> None:
    """Check options that have a list of values.

    Args:
        *options: Name, value and allowed values of each.

    Raises:
        ValueError: If a value is none of those allowed.
    """
    for name, value, allowed in options:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def at_least(*options: tuple[str, float | None, float]) -> None:
    """Check numbers that have a lower bound.

    Args:
        *options: Name, value and bound of each; None is no value, and fine.

    Raises:
        ValueError: If a value is below its bound.
    """
    for name, value, least in options:
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
