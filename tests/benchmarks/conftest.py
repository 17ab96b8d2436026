"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def quick_collection() -> Iterator[None]:
    """Leave out of garbage collection what was there before: benchmarks collect before each run they time."""
    gc.freeze()
    yield
    gc.unfreeze()
