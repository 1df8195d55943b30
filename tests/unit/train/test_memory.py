"""A failed allocation ends a run with its numbers, what to change, and status 1."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain import build
from llmtrain.config.load import load
from llmtrain.config.run import RunConfig
from llmtrain.errors import ConfigError, OutOfMemoryError
from llmtrain.logs import run_command
from llmtrain.parallel import local as local_model
from llmtrain.train.memory import Shortage, explained, record_history
from tests.end_to_end.commands import TINY, make_store

CPU = torch.device("cpu")
GIB = 2**30
LARGER = ("training.micro_batch_size=6", "training.global_batch_tokens=384")


def overrides(folder: Path, *more: str) -> tuple[str, ...]:
    store = make_store(folder / "store", 0)
    return (
        *TINY, f"runs_dir={folder}", "name=tight", "engine.device=cpu", f"data.sources.a={store}",
        "monitor.progress_bar=false", *more,
    )  # fmt: skip


def failing(error: Callable[[], Any]) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        return error()

    return run


def out_of_cuda_memory() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8.00 GiB"
    )


@pytest.mark.parametrize(
    ("fail", "asked"),
    [(lambda: torch.empty(2**50, dtype=torch.int8), "1,048,576.00"), (out_of_cuda_memory, "1.50")],
)
def test_a_run_that_has_no_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fail: Callable[[], Any],
    asked: str,
) -> None:
    config = load("train", overrides(tmp_path, *LARGER), RunConfig)
    monkeypatch.setattr(local_model.LocalModel, "run", failing(fail))
    assert run_command(lambda: build.train(config)) == 4
    said = capsys.readouterr().err
    assert f"out of memory on rank 0 after 0 steps: asked for {asked} GiB, held " in said
    assert "use training.micro_batch_size=3 (now 6), parallel.recompute=full (now none) or" in said
    assert "Traceback" not in said
    status = json.loads((tmp_path / "tight/status.json").read_text())
    assert status == {"code": 4, "reason": "out_of_memory", "step": 0}
    assert "Traceback" in (tmp_path / "tight/logs/rank0.log").read_text()


def advice(folder: Path, *more: str) -> str:
    config = load("train", overrides(folder, *more), RunConfig)
    world: Any = SimpleNamespace(
        rank=3, world_size=1, device=torch.device("cuda", 0), axes=SimpleNamespace(dp_shard=1)
    )
    progress: Any = SimpleNamespace(step=7)
    with pytest.raises(OutOfMemoryError) as found, explained(config, world, folder, progress):
        torch.empty(2**50, dtype=torch.int8)
    return str(found.value)


def test_advice_is_what_the_run_can_take(tmp_path: Path) -> None:
    """Larger changes are left out where they are made already, or refused by the matrix."""
    said = advice(
        tmp_path, "training.micro_batch_size=1", "model.vocab_size=32768",
        "engine.loss_chunk_tokens=4096", "parallel.recompute=full",
    )  # fmt: skip
    assert "rank 3 after 7 steps" in said
    assert said.endswith(
        "use engine.loss_chunk_tokens=2048 (now 4096, 0.50 GiB of logits), "
        "parallel.activation_offload=true or more ranks along parallel.dp_shard (now 1)"
    )


def test_other_errors_pass() -> None:
    anything: Any = SimpleNamespace(device=CPU)
    with (
        pytest.raises(RuntimeError, match="shapes"),
        explained(anything, anything, Path(), anything),
    ):
        raise RuntimeError("shapes")
    assert Shortage.of(ValueError("DefaultCPUAllocator"), CPU) is None


def test_the_numbers_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB // 2, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7 * GIB)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB.")
    found = Shortage.of(error, torch.device("cuda", 0))
    assert str(found) == "asked for 0.50 GiB, held 7.00 GiB, 0.50 GiB of 8.00 GiB were free"


def test_the_numbers_of_a_process_under_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("DefaultCPUAllocator: tried to allocate 8 bytes")
    machine = Shortage.of(error, CPU)
    assert machine is not None
    monkeypatch.setattr("resource.getrlimit", lambda kind: (2**20, 2**20))
    limited = Shortage.of(error, CPU)
    assert limited is not None
    assert (limited.free, limited.total) == (0, 2**20)
    assert machine.total > GIB


def test_history_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    record_history(False, CPU)
    with pytest.raises(ConfigError, match=r"memory_history=true .* device is cpu; set it to false"):
        record_history(True, CPU)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **fields: asked.append(fields)
    )
    record_history(True, torch.device("cuda", 0))
    assert asked == [{"max_entries": 100_000}]
