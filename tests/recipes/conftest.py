"""What a short run would spend most of its time on, left out of the tests of runs."""

from __future__ import annotations

import pytest

from elle_fast.recipes import plot, result


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """To draw a picture takes longer than a short run. Fixtures of a wider scope come first: their runs have one."""
    monkeypatch.setattr(result, "plot_curves", lambda *args, **options: None)


@pytest.fixture
def pictures(no_pictures, monkeypatch):
    monkeypatch.setattr(result, "plot_curves", plot.plot_curves)
