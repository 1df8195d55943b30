"""What is measured of a block is what it keeps, and a budget is used up as well as it can be."""

import itertools
import logging

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.model.layers import Block, BlockContext
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.sdpa import sdpa_attention
from llmtrain.ops.attention.spec import AttentionSpec
from llmtrain.ops.rope import Rotation
from llmtrain.parallel import recompute
from llmtrain.parallel.recompute import BlockCost, apply_recompute, choose_policies, measure_block

MODEL = ModelConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    qk_norm=True,
)
CPU = torch.device("cpu")
COST = BlockCost(
    kept_bytes={"none": 100, "selective": 55, "full": 10},
    flops={"none": 0, "selective": 7, "full": 400},
)


def real_block() -> tuple[Block, torch.Tensor, BlockContext, list[torch.Tensor]]:
    """A block on one row as long as the measured one, and the tensors that are not its own."""
    block = Block(MODEL, 0, sdpa_attention)
    x = torch.randn(1, 128, MODEL.hidden_size, requires_grad=True)
    positions = torch.arange(128, dtype=torch.int32)[None]
    rotation = Rotation.at(positions, torch.ones(MODEL.head_size // 2), 1.0, torch.float32)
    context = BlockContext(rotation, AttentionSpec.within(positions, torch.zeros_like(positions)))
    shared = [*block.parameters(), rotation.cos, rotation.sin, context.spec.bias(torch.float32)]
    return block, x, context, shared


def test_bytes_of_none_are_what_autograd_saves() -> None:
    block, x, context, shared = real_block()
    others = {t.untyped_storage().data_ptr() for t in shared}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = block(x, context)
    assert out.requires_grad
    kept = measure_block(MODEL, torch.float32, CPU).kept_bytes
    assert kept["none"] == sum(storage.nbytes() for storage in held.values())


def test_bytes_of_selective_are_what_torch_caches() -> None:
    block, x, context, _ = real_block()
    caching, _ = recompute._selective_contexts()
    with caching:
        block(x, context)
    cached = [
        wrapped.val if hasattr(wrapped, "val") else wrapped
        for operation in recompute.kept_operations()
        for entry in caching.storage.get(operation, {}).values()
        for wrapped in (entry if isinstance(entry, tuple) else (entry,))
    ]
    kept = measure_block(MODEL, torch.float32, CPU).kept_bytes
    assert kept["selective"] == x.nbytes + sum(t.nbytes for t in cached)


def test_full_repeats_all_but_the_last_product() -> None:
    products = 2 * 128 * (sum(p.numel() for p in Block(MODEL, 0, sdpa_attention).parameters()))
    last = 2 * 128 * MODEL.hidden_size * MODEL.intermediate_size
    attention = 4 * 128 * 128 * MODEL.hidden_size
    flops = measure_block(MODEL, torch.float32, CPU).flops
    assert flops["full"] - flops["selective"] == pytest.approx(
        products - last + attention, rel=0.01
    )


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.33, 0.5, 0.55, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_least_recomputation_within_the_budget(budget: float, num_blocks: int) -> None:
    chosen = choose_policies(num_blocks, COST, budget)

    def flops(policies) -> int:  # type: ignore[no-untyped-def]
        return sum(COST.flops[p] for p in policies)

    def kept(policies) -> int:  # type: ignore[no-untyped-def]
        return sum(COST.kept_bytes[p] for p in policies)

    all_choices = itertools.product(COST.flops, repeat=num_blocks)
    fitting = [c for c in all_choices if kept(c) <= budget * num_blocks * 100]
    assert kept(chosen) <= budget * num_blocks * 100
    assert flops(chosen) == min(map(flops, fitting))


def test_a_budget_below_the_inputs_recomputes_all_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_policies(3, COST, 0.05) == ["full"] * 3
    assert "recompute_budget=0.05 cannot be kept" in caplog.text


def test_names_of_parameters_stay() -> None:
    with torch.device("meta"):
        model = Transformer(MODEL)
    names = [name for name, _ in model.named_parameters()]
    apply_recompute(model, ParallelConfig(recompute="full"), torch.float32, CPU)
    assert [name for name, _ in model.named_parameters()] == names
