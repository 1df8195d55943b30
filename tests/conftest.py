"""Fixtures that tests share."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from llmtrain import logs
from tests.world import DEEPSPEED, DEEPSPEED_ENVIRONMENT, RankPool

if TYPE_CHECKING:
    from tests.distributed.figures import Suite
    from tests.slurm_cluster import SlurmCluster

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


@pytest.fixture(scope="session")
def deepspeed_ranks() -> Iterator[RankPool]:
    """Live ranks that have imported DeepSpeed."""
    with RankPool(DEEPSPEED, DEEPSPEED_ENVIRONMENT) as pool:
        yield pool


@pytest.fixture(scope="session")
def live_cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[SlurmCluster]":
    """Two nodes of Slurm, started once."""
    from tests.slurm_cluster import SlurmCluster

    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as live:
        yield live


@pytest.fixture
def cluster(live_cluster: "SlurmCluster", monkeypatch: pytest.MonkeyPatch) -> "SlurmCluster":
    """Two nodes of Slurm, which commands of this process find."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, live_cluster.environment[name])
    return live_cluster


@pytest.fixture(scope="session")
def suite(ranks: RankPool, deepspeed_ranks: RankPool) -> "Suite":
    """Runs layouts of both engines and keeps what one process gives."""
    from tests.distributed.figures import Suite

    return Suite({"native": ranks, "deepspeed": deepspeed_ranks})
