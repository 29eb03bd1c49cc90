"""Fixtures for every test: where the real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, or a skip that says what is missing."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CELLPAIR_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}: set CELLPAIR_SHARED_DATA")
    return folder
