"""Wrong starts are refused before any process group exists."""

import pytest
import torch

from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.errors import ConfigError
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place, grow_segments


def test_ranks_without_a_meeting_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set, but not RANK and MASTER_ADDR;"):
        Place.from_environment()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = Place(rank=1, world_size=4, local_rank=1, local_world_size=4)
    with pytest.raises(ConfigError, match="4 ranks on this machine need a GPU each, found 2;"):
        World(ParallelConfig(), EngineConfig(), place)
    assert World(ParallelConfig(), EngineConfig(device="cpu"), place).device.type == "cpu"


def test_a_gpu_asked_for_and_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        World(ParallelConfig(), EngineConfig(device="cuda"), Place())


def test_segments_grow_where_the_user_set_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch._C._accelerator_getAllocatorSettings
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    before = settings()
    grow_segments()
    assert settings() == before
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    try:
        grow_segments()
        assert settings() == "expandable_segments:True"
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
