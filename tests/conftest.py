"""Fixtures that tests share."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from llmtrain import logs
from tests.world import RankPool

# Shared machines are slow at times; the same examples everywhere make failures repeatable.
settings.register_profile("here", deadline=None, derandomize=True)
settings.load_profile("here")


@pytest.fixture(autouse=True)
def console() -> Iterator[None]:
    """Take down what a command of the test has set up to log."""
    yield
    logs.close()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Live ranks for the tests of parallel layouts; see tests/world.py."""
    with RankPool() as pool:
        yield pool
