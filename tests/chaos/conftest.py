"""Whatever a test of this folder has started is killed at its end, however it ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chaos.searches import kill_searches


@pytest.fixture(autouse=True)
def _no_search_left() -> Iterator[None]:
    yield
    kill_searches()
