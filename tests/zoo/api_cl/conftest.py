"""What keeps tests of whole streams quick."""

from __future__ import annotations

import pytest

from zoo.api_cl import APIStreamCL


@pytest.fixture
def pictures() -> None:
    """For tests that look at the pictures that a fit leaves."""


@pytest.fixture
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures at the end of a fit, which take longer than the fit; but for tests that ask for `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(APIStreamCL, "on_fit_end", lambda self: None)
