"""What ranks do in the tests of the search for silent corruption."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.build import engine_of
from llmtrain.config.run import RunConfig
from llmtrain.model.layers import Block
from llmtrain.parallel import compile as compiler
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.run.progress import Progress
from llmtrain.train.recheck import Recheck
from tests.distributed.layouts import SHAPE
from tests.distributed.rig import Rig, digest, snapshot

FAULTY_RANK = 1
FAULTY_LAYER = 1


@dataclass(frozen=True)
class Checked:
    """What a rank was told, and digests of its state after two steps more."""

    found: list[str]
    state: str
    untouched: str


def recheck(place: Place, config: RunConfig, faulty: bool) -> Checked:
    """Train with a search after the second of four steps, and without one."""
    wrong = faulty and place.rank == FAULTY_RANK
    with World(config.parallel, config.engine, place) as world:
        with made(world, config) as r:
            r.train(range(4))
            untouched = digest(snapshot(r.engine))
        with made(world, config) as r:
            r.train(range(2))
            with fault(r.engine.stages()) if wrong else nullcontext():
                found = searched(r)
            r.train(range(2, 4))
            return Checked(found, digest(snapshot(r.engine)), untouched)


@contextmanager
def made(world: World, config: RunConfig) -> Iterator[Rig]:
    """An engine as a run has it; compiled blocks by a compiler that is quick."""
    before, compiler.BACKEND = compiler.BACKEND, "aot_eager"
    engine = engine_of(config, world, SHAPE.num_sources)
    try:
        yield Rig(config, world, engine)
    finally:
        engine.close()
        compiler.BACKEND = before


def searched(r: Rig) -> list[str]:
    """Search on the batch of the second step; what the rank is told."""
    found: list[str] = []
    check = Recheck(
        r.world, r.engine, every_steps=1, exact=True, compiled=r.config.engine.compile,
        sound_step=0,
    )  # fmt: skip
    check.found = lambda why, sound_step: found.append(why)
    check.keep(1, r.batch(1))
    progress = Progress(num_steps=4, steps=r.config.training.steps, step=2)
    check.after_step(progress, r.engine.eval_step(r.batch(1)))
    return found


@contextmanager
def fault(stages: Any) -> Iterator[None]:
    """Flip one bit of a gradient inside the second backward of one block."""
    runs = 0

    def spoil(module: nn.Module, given: Any, output: Tensor) -> None:
        nonlocal runs
        if torch.is_grad_enabled():
            runs += 1
            if runs == 2:
                output.register_hook(flipped)

    blocks = [m for stage in stages for m in stage.modules() if isinstance(m, Block)]
    (block,) = (one for one in blocks if one.self_attn.layer == FAULTY_LAYER)
    handle = block.mlp.up_proj.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()
    assert runs == 2


def flipped(gradient: Tensor) -> Tensor:
    """A copy of a float32 gradient with a bit of its largest element flipped."""
    spoilt = gradient.detach().clone().contiguous()
    spoilt.view(-1).view(torch.int32)[gradient.abs().argmax()] ^= 1 << 10
    return spoilt
