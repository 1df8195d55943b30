"""What Ray is asked for; that tasks run on it is tested with a real cluster in end_to_end."""

from typing import Any

import pytest

from data_pipeline.config.execute import RayConfig
from llmtrain.errors import ConfigError

ray = pytest.importorskip("ray", reason="pip install 'llmtrain[ray]'")

from data_pipeline.execute.on_ray import RayExecutor  # noqa: E402


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A cluster of one machine with 1 GiB and the cores it was started with."""
    started: dict[str, Any] = {}

    def nodes() -> list[dict[str, Any]]:
        cores = started.get("num_cpus", 2)
        return [{"Alive": True, "Resources": {"CPU": float(cores), "memory": float(2**30)}}]

    monkeypatch.setattr(ray, "init", lambda *_, **options: started.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: started.update(left=True))
    monkeypatch.setattr(ray, "nodes", nodes)
    return started


@pytest.mark.parametrize(("cpus", "workers", "cores"), [(1.0, 3, 3), (1.4, 1, 2), (0.25, 2, 1)])
def test_a_cluster_started_here_has_room_for_every_worker(
    asked: dict[str, Any], cpus: float, workers: int, cores: int
) -> None:
    with RayExecutor(RayConfig(cpus_per_task=cpus), workers):
        assert asked["num_cpus"] == cores


def test_a_task_that_no_machine_has_room_for_is_refused(
    asked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"ray\.memory_gib=2\.0; the largest has .* 1\.0 GiB"):
        RayExecutor(RayConfig(memory_gib=2.0), 1).__enter__()
    assert asked["left"]
    with RayExecutor(RayConfig(address="auto", memory_gib=2.0), 1):  # it may grow
        assert "tasks wait until one joins" in caplog.text
