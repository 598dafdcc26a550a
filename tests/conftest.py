"""Fixtures shared by the whole suite."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data sets that may lie beside the checkout; tests that want it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data sets beside this checkout")
    return folder
