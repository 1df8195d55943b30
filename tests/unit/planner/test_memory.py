"""The planner's shapes are the model's, and its bytes add up over ranks."""

from dataclasses import replace

import pytest

from llmtrain.config.adapter import AdapterConfig
from llmtrain.config.engine import DeepSpeedConfig, EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.model.parameters import num_parameters, parameter_table
from llmtrain.planner.memory import parameter_shapes, seats_of, state_bytes

SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
VARIANTS = [
    SMALL,
    replace(SMALL, attention_bias=True, attention_output_bias=True),
    replace(SMALL, qk_norm=True, head_dim=16),
    replace(SMALL, tie_word_embeddings=True),
]
ADAPTED = [
    replace(SMALL, attention_bias=True, attention_output_bias=True, adapter=AdapterConfig(rank=5)),
    replace(SMALL, adapter=AdapterConfig(rank=2, targets=("q_proj", "down_proj"))),
]


@pytest.mark.parametrize("config", VARIANTS + ADAPTED)
def test_shapes_are_the_models(config: ModelConfig) -> None:
    table = {info.name: info.shape for info in parameter_table(config) if info.tied_to is None}
    assert parameter_shapes(config) == table


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_one_process_holds_everything_once(config: ModelConfig, optimizer: str) -> None:
    parallel, (seat,) = ParallelConfig(dp_shard=1), seats_of(ParallelConfig(dp_shard=1), 1)
    found = state_bytes(config, parallel, EngineConfig(), OptimizerConfig(kind=optimizer), 1, seat)

    moved = sum(
        info.numel * {"adamw": 2, "lion": 1, "muon": 1 if _in_block(info) else 2}[optimizer]
        for info in parameter_table(config)
        if info.tied_to is None
    )
    assert found.parameters == found.gradients == 4 * num_parameters(config)
    assert found.optimizer == 4 * moved + 4 * len(parameter_shapes(config))


def _in_block(info) -> bool:  # type: ignore[no-untyped-def]
    return info.decay and ".layers." in info.name


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(dp_shard=2),
        ParallelConfig(dp_shard=2, cp=2),
        ParallelConfig(dp_shard=1, tp=2),
        ParallelConfig(pp=3, dp_shard=1),
    ],
)
def test_optimizer_state_is_whole_over_the_ranks(parallel: ParallelConfig) -> None:
    """Norms are on every tensor-parallel rank; nothing else is held twice."""
    assert isinstance(parallel.dp_shard, int)
    lion = OptimizerConfig(kind="lion")
    ranks = [
        state_bytes(SMALL, parallel, EngineConfig(), lion, parallel.dp_shard, seat).optimizer
        for seat in seats_of(parallel, parallel.dp_shard)
    ]
    norms = (2 * SMALL.num_hidden_layers + 1) * SMALL.hidden_size * (parallel.tp - 1)
    tensors = len(parameter_shapes(SMALL)) * (len(ranks) // parallel.pp)
    assert sum(ranks) == 4 * (num_parameters(SMALL) + norms + tensors)


@pytest.mark.parametrize(
    ("engine", "optimizer", "expected"),
    [
        ({}, {}, 4 + 2 + 4 + 8),
        ({"fp8": "rowwise"}, {}, 4 + 2 + 4 + 8),
        ({}, {"state_dtype": "bf16"}, 4 + 2 + 4 + 4),
        ({"master_dtype": "bf16"}, {}, 2 + 4 + 8),
        ({"master_dtype": "bf16"}, {"state_dtype": "bf16"}, 2 + 4 + 4),
        ({"master_dtype": "bf16"}, {"state_dtype": "bf16", "in_backward": True}, 2 + 4),
    ],
)
def test_bytes_per_parameter_are_those_of_docs_precision(
    engine: dict[str, str], optimizer: dict[str, str], expected: int
) -> None:
    parallel = ParallelConfig(dp_shard=1)
    (seat,) = seats_of(parallel, 1)
    config = EngineConfig(precision="bf16", **engine)  # type: ignore[arg-type]
    rule = OptimizerConfig(**optimizer)  # type: ignore[arg-type]
    found = state_bytes(SMALL, parallel, config, rule, 1, seat).total
    assert found == expected * num_parameters(SMALL) + 4 * len(parameter_shapes(SMALL))


def test_mixed_precision_adam_is_published_bytes_per_parameter() -> None:
    """arXiv:1910.02054, section 3.1: K = 12 bytes beside bf16 parameters; ZeRO 1 shards them."""
    model = replace(SMALL, vocab_size=8192, hidden_size=512, intermediate_size=2048)
    seat = next(seats_of(ParallelConfig(dp_shard=8), 8))
    engine = EngineConfig(
        kind="deepspeed", precision="bf16", deepspeed=DeepSpeedConfig(zero_stage=2)
    )
    found = state_bytes(model, ParallelConfig(dp_shard=8), engine, OptimizerConfig(), 8, seat)

    per_parameter = (found.parameters + found.optimizer) / num_parameters(model)
    assert per_parameter == pytest.approx(2 + 12 / 8, rel=1e-3)
