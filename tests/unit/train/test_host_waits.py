"""The host never waits for the device between two logging steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain import build
from llmtrain.config.load import load
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import StepResult
from llmtrain.engine.step import no_limits
from llmtrain.parallel.place import Place
from llmtrain.run.directory import ExitReason
from llmtrain.run.progress import Progress
from llmtrain.train import loop
from tests.distributed.layouts import Layout, native, zero
from tests.distributed.rig import rig
from tests.end_to_end.commands import TINY, make_store
from tests.host_waits import NoHostWait, as_copied
from tests.world import RankPool

LOG_EVERY = 4
NUM_STEPS = 7


class NoSync:
    """Has torch raise where the host waits for a GPU."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


class Watched:
    """A batch source and the last hook: between the two a step may not wait, but when it logs."""

    def __init__(self, source: loop.BatchSource, watch: type[NoHostWait | NoSync]) -> None:
        self.source = source
        self.watch = watch
        self.modes: NoHostWait | NoSync | None = None
        self.steps: list[int] = []

    def at(self, step: int) -> StepBatch:
        logs = (step + 1) % LOG_EVERY == 0 or step + 1 == NUM_STEPS
        if logs:
            return self.source.at(step)
        with self.watch():
            batch = self.source.at(step)
        if batch.extent is None:
            batch = as_copied(batch)
        self.modes = self.watch()
        self.modes.__enter__()
        self.steps.append(step + 1)
        return batch

    def after_step(self, progress: Progress, result: StepResult) -> None:
        if self.modes is not None:
            self.modes.__exit__()
            self.modes = None


@pytest.mark.parametrize(
    "find", [lambda x: x.item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.tolist(),
             lambda x: x.cpu(), lambda x: bool(x[0]), lambda x: torch.tensor(3.0, device="cpu"),
             lambda x: x.unique(), lambda x: x.masked_select(x > 0), lambda x: x.numpy()]
)  # fmt: skip
def test_what_waits_is_found(find: Any) -> None:
    values = torch.ones(1)
    with NoHostWait(), pytest.raises(AssertionError, match="the host waits"):
        find(values)
    with NoHostWait():
        torch.where(values > 0, values, 0).sum().sqrt()
        assert torch.tensor([3, 4]).tolist() == [3, 4]


def train_watched(
    folder: Path, device: str, watch: type[NoHostWait | NoSync], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Train with metrics, guard, an adaptive mixture, evaluation, document losses, z-loss.

    Returns:
        The steps that were watched.
    """
    stores = {name: make_store(folder / name, seed) for seed, name in enumerate(("a", "b", "c"))}
    overrides = (
        *TINY, f"runs_dir={folder}", "name=watched", f"engine.device={device}",
        f"data.sources.a={stores['a']}", f"data.sources.b={stores['b']}",
        f"data.validation.c={stores['c']}", f"evaluation.every_steps={LOG_EVERY}",
        f"monitor.log_every_steps={LOG_EVERY}", f"monitor.document_loss_every_steps={LOG_EVERY}",
        f"training.num_tokens={NUM_STEPS * 256}", "training.z_loss_weight=1e-4",
        "mixture=adaptive", f"mixture.interval_tokens={LOG_EVERY * 256}",
        "monitor.progress_bar=false",
    )  # fmt: skip
    watched: list[Watched] = []
    train = loop.train

    def watching(engine: Any, batches: Any, *, hooks: Sequence[Any], **rest: Any) -> ExitReason:
        watched.append(Watched(batches, watch))
        return train(engine, watched[0], hooks=[*hooks, watched[0]], **rest)

    monkeypatch.setattr(loop, "train", watching)
    assert build.train(load("train", overrides, RunConfig)) == 0
    return watched[0].steps


def test_a_run_with_all_its_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_watched(tmp_path, "cpu", NoHostWait, monkeypatch) == [1, 2, 3, 5, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_watched(tmp_path, "cuda", NoSync, monkeypatch) == [1, 2, 3, 5, 6]


def waitless(place: Place, config: RunConfig) -> None:
    """A step after the first one, which may learn sizes."""
    with rig(place, config) as r:
        r.step(0)
        batch, limits = as_copied(r.batch(1)), no_limits(r.world.device)
        with NoHostWait():
            r.engine.train_step(batch, 1e-3, limits)


LAYOUTS = [
    native("muon", optimizer="muon"),
    native("lion bf16", optimizer="lion", precision="bf16"),
    native("fsdp2 recompute", dp_shard=2, recompute="selective"),
    native("tp2", tp=2),
    native("cp2 ring", cp=2, cp_method="ring"),
    native("cp2 all_gather", cp=2, cp_method="all_gather"),
    native("cp2 ulysses", cp=2, cp_method="ulysses"),
    native("pp2", pp=2),
    zero(0, " dp2", dp_shard=2),
    zero(2, " dp2", dp_shard=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_step_of_each_engine(layout: Layout, ranks: RankPool, deepspeed_ranks: RankPool) -> None:
    pool = ranks if layout.engine.kind == "native" else deepspeed_ranks
    pool.run(waitless, layout.config, size=layout.size)
