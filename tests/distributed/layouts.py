"""Bodies that ranks run in the tests of layouts, and the layouts themselves."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed import PrefixStore

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import EngineConfig, ParallelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import BatchShape, rank_rows, synthetic_batch
from llmtrain.engine.native import NativeEngine, no_limits
from llmtrain.errors import CheckpointError
from llmtrain.parallel.apply import build_stage
from llmtrain.parallel.fsdp import local_part
from llmtrain.parallel.mesh import Place, World
from llmtrain.train.loss import pretraining_loss
from llmtrain.train.optimizer import optimizer_factory

MODEL = ModelConfig(
    vocab_size=67,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    qk_norm=True,
    attention_bias=True,
)
"""Small, with sizes that neither 2 nor 4 shards divide evenly everywhere."""

SHAPE = BatchShape(rows=8, sequence_length=24, vocab_size=MODEL.vocab_size)

LAYOUTS = {
    "single": ParallelConfig(dp_shard=1),
    "dp2": ParallelConfig(dp_replicate=2, dp_shard=1),
    "fsdp2": ParallelConfig(dp_shard=2),
    "pp2_gpipe": ParallelConfig(pp=2, dp_shard=1, schedule="gpipe"),
    "pp2_1f1b": ParallelConfig(pp=2, dp_shard=1, schedule="1f1b"),
    "dp2_pp2": ParallelConfig(pp=2, dp_replicate=2, dp_shard=1),
    "fsdp2_pp2": ParallelConfig(pp=2, dp_shard=2),
    "fsdp4": ParallelConfig(dp_shard=4),
    "hsdp2x2": ParallelConfig(dp_replicate=2, dp_shard=2),
}


def size_of(layout: str) -> int:
    parallel = LAYOUTS[layout]
    assert isinstance(parallel.dp_shard, int)
    return parallel.pp * parallel.dp_replicate * parallel.dp_shard


@dataclass
class Rig:
    """An engine in one layout and its batches."""

    world: World
    engine: NativeEngine

    def batch(self, step: int) -> StepBatch:
        whole = synthetic_batch(SHAPE, seed=3, step=step)
        return rank_rows(whole, self.world.dp_rank, self.world.dp_size, micro_batch_size=1)

    def train(self, steps: range, lr: float = 3e-3) -> list[float]:
        limits = no_limits(self.world.device)
        results = [self.engine.train_step(self.batch(step), lr, limits) for step in steps]
        return [(r.loss_sum / r.target_tokens).item() for r in results]


@contextmanager
def rig(
    place: Place, layout: str, precision: str = "fp32", model: ModelConfig = MODEL
) -> Iterator[Rig]:
    engine_config = EngineConfig(precision=precision, device="cpu", timeout_s=60.0)
    parallel = LAYOUTS[layout]
    with World(parallel, engine_config, place) as world:
        loss = pretraining_loss(num_sources=SHAPE.num_sources, chunk_tokens=16)
        stage = build_stage(model, parallel, engine_config, world, seed=5, loss=loss)
        factory = optimizer_factory(OptimizerConfig())
        engine = NativeEngine(stage, factory, grad_clip_norm=1.0)
        yield Rig(world, engine)
        engine.close()


@dataclass(frozen=True)
class Curve:
    """What a short run shows; floats of every step in order."""

    start: str
    """Digest of the starting parameters."""
    held_out: float
    """Loss of step 0's batch by eval_step, before any update."""
    losses: list[float]
    grad_norms: list[float]
    source_losses: list[float]


def curve(place: Place, layout: str, precision: str, num_steps: int) -> Curve:
    """Evaluate once, then train ``num_steps`` steps."""
    with rig(place, layout, precision) as r:
        start = digest(r.engine.full_parameters())
        evaluated = r.engine.eval_step(r.batch(0))
        assert not evaluated.applied.item()
        limits = no_limits(r.world.device)
        results = [r.engine.train_step(r.batch(s), 3e-3, limits) for s in range(num_steps)]
        assert all(result.applied.item() for result in results)
        return Curve(
            start=start,
            held_out=(evaluated.loss_sum / evaluated.target_tokens).item(),
            losses=[(x.loss_sum / x.target_tokens).item() for x in results],
            grad_norms=[x.grad_norm.item() for x in results],
            source_losses=[
                (x.metrics["source_loss_sum"] / x.metrics["source_tokens"])[1].item()
                for x in results
            ],
        )


def gradients(
    place: Place, layout: str, precision: str, tied: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and full gradients of one step; gradients from rank 0 only."""
    with rig(place, layout, precision, replace(MODEL, tie_word_embeddings=tied)) as r:
        loss = r.train(range(1))[0]
        whole = r.engine.gradients()
        return loss, whole if place.rank == 0 else {}


def gated(place: Place, layout: str, reason: str) -> tuple[bool, bool, list[float], list[float]]:
    """A refused step between two good ones.

    Returns:
        Whether the step was refused, whether state kept its bits, and the next losses with and
        without it.
    """
    with rig(place, layout) as r:
        r.train(range(2))
        before = snapshot(r.engine)
        bad, limits = r.batch(2), no_limits(r.world.device)
        if reason == "not finite":
            bad = replace(bad, loss_weight=bad.loss_weight * math.nan)
        elif reason == "loss":
            limits = replace(limits, max_loss=torch.tensor(0.5))
        else:
            limits = replace(limits, max_grad_norm=torch.tensor(1e-3))
        refused = not r.engine.train_step(bad, 3e-3, limits).applied.item()
        after = snapshot(r.engine)
        same = before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )
        with_it = r.train(range(3, 5))
    again = place.store and PrefixStore("again", place.store)
    with rig(replace(place, store=again), layout) as r:
        r.train(range(2))
        return refused, same, with_it, r.train(range(3, 5))


def snapshot(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Copy the tensors this rank holds."""
    return {name: local_part(tensor).clone() for name, tensor in engine.state_dict().items()}


def save(place: Place, layout: str, precision: str, folder: str) -> list[float]:
    """Train two steps, save, and return the next three losses."""
    with rig(place, layout, precision) as r:
        r.train(range(2))
        dcp.save(r.engine.state_dict(), checkpoint_id=folder)
        return r.train(range(2, 5))


def load(place: Place, layout: str, precision: str, folder: str) -> list[float]:
    """Load what ``save`` wrote into a fresh engine and return the next three losses."""
    with rig(place, layout, precision) as r:
        state = r.engine.state_dict()
        dcp.load(state, checkpoint_id=folder)
        r.engine.load_state_dict(state)
        return r.train(range(2, 5))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hash names, shapes and bits."""
    whole = hashlib.blake2b()
    for name in sorted(tensors):
        whole.update(f"{name}{tuple(tensors[name].shape)}".encode())
        whole.update(tensors[name].contiguous().numpy().tobytes())
    return whole.hexdigest()


def relative(got: list[float], want: list[float]) -> float:
    """Largest relative difference of two lists."""
    return max(abs(g - w) / abs(w) for g, w in zip(got, want, strict=True))


def load_incomplete(place: Place, layout: str) -> str:
    """The message about a state that lacks a tensor."""
    with rig(place, layout) as r:
        state = {k: v for k, v in r.engine.state_dict().items() if k != "model.model.norm.weight"}
        try:
            r.engine.load_state_dict(state)
        except CheckpointError as error:
            return str(error)
    return "loaded"
