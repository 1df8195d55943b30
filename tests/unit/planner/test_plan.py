"""The plan against what torch does: saved tensors of a block, orders of pipelines, bytes held."""

from dataclasses import replace

import pytest
import torch

from benchmarks.pipeline_idle import operations
from llmtrain.cli import main
from llmtrain.config.load import load
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import Schedule
from llmtrain.config.plan import PlanConfig
from llmtrain.config.run import broken_rules
from llmtrain.parallel.recompute import Policy, measure_block
from llmtrain.planner.activations import block_bytes_per_token, live_forwards
from llmtrain.planner.estimate import GIB, estimate
from llmtrain.planner.search import overrides, search

SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MODELS = [
    SMALL,
    replace(SMALL, qk_norm=True),
    replace(SMALL, num_key_value_heads=1, attention_bias=True),
    replace(SMALL, head_dim=32),
]
ORDERS: list[tuple[Schedule, int]] = [
    ("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3),
    ("interleaved_zero_bubble", 2), ("interleaved_zero_bubble", 3), ("zbv", 2), ("dualpipev", 2),
]  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_bytes_of_a_block_are_those_it_saves(model: ModelConfig, policy: Policy) -> None:
    saved = measure_block(model, torch.float32, torch.device("cpu")).kept_bytes[policy]
    assert block_bytes_per_token(model, item=4, tp=1, recompute=policy) * 128 == saved


def test_tensor_parallel_ranks_share_all_but_the_gathered_inputs() -> None:
    whole, half = (block_bytes_per_token(SMALL, 2, tp, "none") for tp in (1, 2))
    gathered = 2 * SMALL.hidden_size * 2
    assert half == gathered + (whole - gathered) / 2


@pytest.mark.parametrize(("pp", "microbatches"), [(2, 4), (4, 8), (4, 16)])
@pytest.mark.parametrize(("schedule", "stages"), ORDERS)
def test_forwards_that_wait_are_those_of_torchs_order(
    schedule: Schedule, stages: int, pp: int, microbatches: int
) -> None:
    for rank, order in enumerate(operations(schedule, pp, microbatches, stages)):
        live = peak = 0
        for operation in (operation for action in order for operation in action):
            live += (operation.kind == "F") - (operation.kind in ("B", "W"))
            peak = max(peak, live)
        assert live_forwards(schedule, pp, rank, microbatches, stages) == peak


def plan(*words: str) -> PlanConfig:
    return load("plan", list(words), PlanConfig, [])


def test_state_of_a_7b_model_over_64_gpus_is_16_bytes_a_parameter() -> None:
    found = estimate(plan("model=llama2_7b", "num_gpus=64"))
    assert found.memory.state / GIB == pytest.approx(6.738e9 * 16 / 64 / GIB, rel=0.01)
    assert found.microbatches == 4
    assert found.fits


def test_more_than_one_microbatch_keeps_whole_gradients() -> None:
    words = ("model=llama2_7b", "num_gpus=64", "training.global_batch_tokens=262144")
    one, four = estimate(plan(*words)), estimate(plan(*words[:2]))
    assert one.microbatches == 1
    assert four.memory.gathered - one.memory.gathered > 6.738e9 * 4 * 0.9


def test_what_a_search_gives_fits_breaks_no_rule_and_is_the_fastest_first() -> None:
    config = plan("model=llama3_2_1b", "num_gpus=8", "search=true")
    found = search(config)
    assert all(one.fits and not broken_rules(one.config, 8) for one in found)
    assert found[0].step_s <= min(one.step_s for one in found) * 1.01
    again = estimate(plan("model=llama3_2_1b", "num_gpus=8", *overrides(found[0].config)))
    assert again.memory == found[0].memory
    assert again.step_s == found[0].step_s


def test_the_command_says_what_fits_and_what_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=llama3_2_1b", "num_gpus=8"]) == 0
    assert "fits: " in capsys.readouterr().out
    assert main(["plan", "model=llama3_70b", "num_gpus=8"]) == 1
    assert "does not fit: " in capsys.readouterr().out
    assert main(["plan", "model=llama3_1_405b", "num_gpus=8", "search=true"]) == 1
    assert capsys.readouterr().out.startswith("no layout of 8 x H100 fits; use more GPUs")
    assert main(["plan", "gpu=H900"]) == 2
    assert "gpu=H900 is not known; use one of B200" in capsys.readouterr().err
