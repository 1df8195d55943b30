"""The engine in one process against plain PyTorch: loss, gradients, clip, update, refused steps."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.engine import EngineConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import synthetic_batch
from llmtrain.engine.native import NativeEngine
from llmtrain.engine.step import no_limits
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.optim.optimizer import EPS, optimizer_factory
from llmtrain.parallel.apply import build_local_model
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.loss import pretraining_loss
from tests.distributed.layouts import MODEL, SHAPE, SINGLE

SEED = 5
LR = 3e-3
CPU = torch.device("cpu")


def engine(grad_clip_norm: float) -> NativeEngine:
    """An fp64 engine of one process."""
    config = EngineConfig(precision="fp64", device="cpu")
    with World(SINGLE.parallel, config, Place()) as world:
        loss = pretraining_loss(SHAPE.num_sources, chunk_tokens=16)
        local = build_local_model(MODEL, SINGLE.parallel, config, world, SEED, loss)
        return NativeEngine(local, optimizer_factory(OptimizerConfig()), grad_clip_norm)


def batches(num_microbatches: int) -> Iterator[StepBatch]:
    for step in range(3):
        whole = synthetic_batch(SHAPE, seed=3, step=step)
        yield replace(whole, num_microbatches=num_microbatches)


def mean_loss(model: Transformer, batch: StepBatch) -> Tensor:
    """The definition: weighted losses over the sum of the weights."""
    logits = model.logits(model(batch.tokens, batch.positions, batch.document_ids))
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    return (losses * batch.loss_weight.flatten()).sum() / batch.loss_weight.sum()


@pytest.mark.parametrize("grad_clip_norm", [0.05, float("inf")])
@pytest.mark.parametrize("num_microbatches", [1, 8])
def test_steps_are_those_of_plain_pytorch(num_microbatches: int, grad_clip_norm: float) -> None:
    trained = engine(grad_clip_norm)
    model = Transformer(MODEL).double()
    initialize_model(model, MODEL, SEED)
    config = OptimizerConfig()
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR, betas=(config.beta1, config.beta2), eps=EPS,
    )  # fmt: skip
    # a clip's divisor is fp32, as torch's fused optimizers take it
    exact = (
        {"rtol": 1e-9, "atol": 1e-12}
        if math.isinf(grad_clip_norm)
        else {"rtol": 1e-6, "atol": 1e-9}
    )
    for batch in batches(num_microbatches):
        result = trained.train_step(batch, LR, no_limits(CPU))
        plain.zero_grad()
        loss = mean_loss(model, batch)
        loss.backward()
        gradients = trained.gradients()
        for name, parameter in named.items():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name], parameter.grad, **exact)
        norm = torch.nn.utils.clip_grad_norm_(named.values(), grad_clip_norm)
        plain.step()
        mean = result.loss_sum / result.target_tokens
        assert mean.item() == pytest.approx(loss.item(), exact["rtol"])
        assert result.grad_norm.item() == pytest.approx(norm.item(), exact["rtol"])
    updated = trained.full_parameters()
    for name, parameter in named.items():
        torch.testing.assert_close(updated[name], parameter.detach(), **exact)


def test_gradients_of_a_refused_step_are_not_clipped() -> None:
    trained = engine(grad_clip_norm=0.05)
    (batch, *_) = batches(1)
    limits = replace(no_limits(CPU), max_loss=torch.tensor(0.5))
    result = trained.train_step(batch, LR, limits)
    assert not result.applied
    whole = torch.stack([g.norm() for g in trained.gradients().values()]).norm()
    assert whole.item() == pytest.approx(result.grad_norm.item(), 1e-9)
