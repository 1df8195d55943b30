"""Fixtures that tests share."""

import sys
from collections.abc import Iterator
from pathlib import Path
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


SHARED: dict[str, tuple[str, ...]] = {
    "ranks": (
        "distributed/", "property/test_layouts", "end_to_end/test_engines",
        "unit/train/test_host_waits", "unit/train/test_watch",
    ),
    "slurm": (
        "end_to_end/test_sweeps_slurm", "end_to_end/test_launch_slurm", "end_to_end/test_executors",
    ),
    "report": ("unit/data_pipeline/report/",),
    "peers": ("golden/test_peft", "golden/test_sft", "golden/test_trl"),
}  # fmt: skip
"""Tests that share what is costly to start, and so a worker; any other file can go to any."""


def group(nodeid: str) -> str:
    """The name of the tests that go to one worker together: their file, or what they share."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return next((name for name, paths in SHARED.items() if file.startswith(paths)), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that the workers of ``make test`` end together."""
    groups = {item: group(item.nodeid) for item in items}
    first = ["ranks", "slurm", "peers"]
    first += sorted({name for name in groups.values() if name.startswith("end_to_end/")})
    items.sort(key=lambda item: first.index(groups[item]) if groups[item] in first else len(first))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Deal groups, not tests: the plugin's own groups get lost between it and pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group
    return scheduler


@pytest.fixture(autouse=True)
def console() -> Iterator[None]:
    """Take down what a command of the test has set up to log."""
    yield
    logs.close()


@pytest.fixture(autouse=True)
def service() -> Iterator[None]:
    """End the service of W&B that a command of the test has started: later runs would find it."""
    yield
    setup = getattr(sys.modules.get("wandb.sdk.wandb_setup"), "_singleton", None)
    if setup is not None and setup._connection is not None:
        sys.modules["wandb"].teardown()


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
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter for launched runs that has imported torch; see tests/warm_python.py."""
    from tests.warm_python import warm_python

    return warm_python(tmp_path_factory.mktemp("warm"))


@pytest.fixture(scope="session")
def suite(ranks: RankPool, deepspeed_ranks: RankPool) -> "Suite":
    """Runs layouts of both engines and keeps what one process gives."""
    from tests.distributed.figures import Suite

    return Suite({"native": ranks, "deepspeed": deepspeed_ranks})
