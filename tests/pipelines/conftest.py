"""The modules beside these tests can be imported, and registered cards are forgotten behind each module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ldm.catalog.lookup import REGISTERED  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)
