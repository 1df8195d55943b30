"""Updates in the backward: the numbers of a plain step, one gradient at a time."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmtrain.config.engine import EngineConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import synthetic_batch
from llmtrain.engine.native import NativeEngine
from llmtrain.engine.step import no_limits
from llmtrain.errors import ConfigError
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.apply import build_local_model
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.loss import pretraining_loss
from tests.distributed.layouts import MODEL, SHAPE, SINGLE
from tests.host_waits import NoHostWait, as_copied

CPU = torch.device("cpu")
LR = 1e-2


def engine(
    in_backward: bool, kind: str = "adamw", precision: str = "fp32", tied: bool = False
) -> NativeEngine:
    config = EngineConfig(precision=precision, device="cpu")
    model = replace(MODEL, tie_word_embeddings=tied)
    with World(SINGLE.parallel, config, Place()) as world:
        loss = pretraining_loss(SHAPE.num_sources, chunk_tokens=16)
        local = build_local_model(model, SINGLE.parallel, config, world, 5, loss)
        factory = optimizer_factory(OptimizerConfig(kind=kind))
        return NativeEngine(local, factory, math.inf, update_in_backward=in_backward)


def batch(step: int) -> StepBatch:
    return replace(synthetic_batch(SHAPE, seed=3, step=step), num_microbatches=1)


def state(of: NativeEngine) -> dict[str, Tensor]:
    views = {}
    for name, value in of.state_dict().items():
        for _, view in getattr(value, "chunks", [((), value)]):
            views[name] = view.clone()
    return views


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("kind", "precision", "tied"),
    [("adamw", "fp32", True), ("lion", "fp32", False), ("adamw", "bf16", False)],
)
def test_the_bits_of_an_update_after_the_backward(kind: str, precision: str, tied: bool) -> None:
    plain, inside = (engine(b, kind, precision, tied) for b in (False, True))
    for step in range(3):
        want = plain.train_step(batch(step), LR, no_limits(CPU))
        got = inside.train_step(batch(step), LR, no_limits(CPU))
        assert torch.equal(got.loss_sum, want.loss_sum)
        assert torch.equal(got.grad_norm, want.grad_norm)
        assert got.applied
        assert same(state(inside), state(plain))


def test_a_state_goes_from_one_to_the_other() -> None:
    plain, inside = engine(False), engine(True)
    plain.train_step(batch(0), LR, no_limits(CPU))
    inside.load_state_dict(plain.state_dict())
    for one in (plain, inside):
        one.train_step(batch(1), LR, no_limits(CPU))
    assert same(state(inside), state(plain))


def test_gradients_do_not_live_together(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = engine(True)
    owned = inside._local.parameters
    most = 0
    step = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW) -> None:
        nonlocal most
        most = max(most, sum(o.tensor.grad is not None for o in owned))
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    limits, first = no_limits(CPU), as_copied(batch(0))
    inside.train_step(first, LR, limits)
    with NoHostWait():
        inside.train_step(first, LR, limits)
    assert most == 1
    assert all(o.tensor.grad is None and o.local.grad is None for o in owned)
    with pytest.raises(ConfigError, match=r"in_backward=true frees every gradient"):
        inside.gradients()


def test_a_gradient_that_is_not_finite_leaves_its_parameter_alone() -> None:
    inside = engine(True)
    before = state(inside)
    bad = batch(0)
    result = inside.train_step(
        replace(bad, loss_weight=bad.loss_weight * math.nan), LR, no_limits(CPU)
    )
    assert not result.applied
    assert same(state(inside), before)
    one = next(o for o in inside._local.parameters if o.info.name.endswith("0.mlp.up_proj.weight"))
    one.tensor.register_hook(lambda g: g * math.inf)  # type: ignore[no-untyped-call]
    result = inside.train_step(batch(0), LR, no_limits(CPU))
    assert not result.applied
    after = state(inside)
    alone = [n for n in before if torch.equal(before[n], after[n])]
    assert sorted(alone) == sorted(n for n in before if one.info.name in n)


@pytest.mark.parametrize("refused", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj"])
def test_a_run_goes_on_alike_from_a_state_after_a_step_refused_in_part(refused: str) -> None:
    """The first parameter's count is what is saved; the others' must be the same."""
    inside, resumed = engine(True), engine(True)
    inside.train_step(batch(0), LR, no_limits(CPU))
    one = next(o for o in inside._local.parameters if o.info.name.startswith(refused))
    hook = one.tensor.register_hook(lambda g: g * math.inf)  # type: ignore[no-untyped-call]
    inside.train_step(batch(1), LR, no_limits(CPU))
    hook.remove()
    counts = [inside._optimizer.state[o.local]["step"].item() for o in inside._local.parameters]
    assert counts == [2.0] * len(counts)
    resumed.load_state_dict(state(inside))
    for both in (inside, resumed):
        both.train_step(batch(2), LR, no_limits(CPU))
    assert same(state(resumed), state(inside))
