"""What keeps tests of whole streams quick."""

from __future__ import annotations

import pytest

from zoo.api_cl import APIStreamCL


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures at the end of a fit, which take longer than the fit."""
    monkeypatch.setattr(APIStreamCL, "on_fit_end", lambda self: None)
