"""Fixtures that tests share."""

from collections.abc import Iterator

import pytest

from tests.world import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Live ranks for the tests of parallel layouts; see tests/world.py."""
    with RankPool() as pool:
        yield pool
