"""What keeps tests of whole modules quick."""

from __future__ import annotations

import pytest

from zoo.merging import AdaMerging, RepresentationSurgery, row_cache


@pytest.fixture
def figures() -> None:
    """For tests that look at the pictures that a run leaves."""


@pytest.fixture
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, which take longer than the runs, and no search of a large heap for small experts."""
    monkeypatch.setattr(row_cache.gc, "collect", lambda: 0)
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(AdaMerging, "on_fit_end", lambda self: None)
        monkeypatch.setattr(RepresentationSurgery, "_draw", lambda self, values: None)
