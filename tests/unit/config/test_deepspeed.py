"""DeepSpeed's own keys: what passes, what is refused, and with which sentence."""

import re

import pytest

from llmtrain.config.deepspeed import (
    PASSED,
    REFUSED,
    SET_HERE,
    deepspeed_version,
    passthrough_problems,
    pipeline_is_right,
)
from llmtrain.config.engine import EngineConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.strict import build, schema_paths
from llmtrain.errors import ConfigError


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000}},
        {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}},
        {"comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}, "log_level": "info"},
        {"timers": {"throughput": {"enabled": False}}, "flops_profiler": {"module_depth": -1}},
        {"zero_optimization": {"stage3_allgather_sequential": True, "sub_group_size": 1e9}},
    ],
)
def test_what_llmtrain_does_not_model_passes(config: dict[str, object]) -> None:
    assert passthrough_problems(config) == []


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"train_batch_size": 8},
         "config.train_batch_size follows from training.global_batch_tokens; set that instead"),
        ({"gradient_clipping": 0.5},
         "config.gradient_clipping follows from optimizer.grad_clip_norm; set that instead"),
        ({"zero_optimization": {"stage": 2}},
         "config.zero_optimization.stage follows from engine.deepspeed.zero_stage; "
         "set that instead"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}},
         "config.zero_optimization.offload_param.device follows from "
         "engine.deepspeed.offload_parameters; set that instead"),
        ({"prescale_gradients": True},
         "config.prescale_gradients is not supported: llmtrain sums gradients itself, exactly, "
         "weighted by target tokens; leave it out"),
        ({"zero_optimization": {"overlap_com": True}},
         "config.zero_optimization.overlap_com is no key that DeepSpeed reads; did you mean "
         "config.zero_optimization.overlap_comm?"),
        ({"coms_logger": {"enabled": True}},
         "config.coms_logger is no key that DeepSpeed reads; did you mean config.comms_logger?"),
        ({"zero_optimization": {"offload_param": {"buffer_count": 2}}},
         "config.zero_optimization.offload_param.buffer_count is not supported: llmtrain offloads "
         "to the host's memory, where it has no effect; leave it out"),
        ({"zero_optimization": {"zero_quantized_weights": True}},
         "config.zero_optimization.zero_quantized_weights is not supported: it changes what a step "
         "computes; leave it out"),
        ({"zero_optimization": {"overlap_comm": "maybe"}},
         "config.zero_optimization.overlap_comm=maybe must be true or false"),
        ({"zero_optimization": {"reduce_bucket_size": -5}},
         "config.zero_optimization.reduce_bucket_size=-5 must be a whole number above 0"),
        ({"log_level": "loud"},
         "config.log_level=loud must be one of debug, info, warning, error, critical"),
        ({"zero_optimization": True},
         "config.zero_optimization=True is not a section; "
         "write config.zero_optimization.KEY=VALUE"),
    ],
)  # fmt: skip
def test_the_rest_is_one_sentence(config: dict[str, object], sentence: str) -> None:
    assert passthrough_problems(config) == [sentence]


def test_settings_of_an_offload_that_is_off_are_refused() -> None:
    pinned = {"zero_optimization": {"offload_param": {"pin_memory": False}}}
    tree = {"deepspeed": {"config": pinned, "zero_stage": 3}}
    with pytest.raises(ConfigError) as caught:
        build(EngineConfig, tree, "engine")
    assert caught.value.problems == [
        "engine.deepspeed.config.zero_optimization.offload_param.pin_memory has no effect with "
        "offload_parameters=false; set offload_parameters=true or leave it out"
    ]
    tree["deepspeed"]["offload_parameters"] = True
    assert build(EngineConfig, tree, "engine").deepspeed.offload_parameters


def test_keys_of_another_stage_are_refused() -> None:
    config = {"zero_optimization": {"max_live_parameters": 1000, "overlap_comm": True}}
    assert passthrough_problems(config, zero_stage=3) == []
    assert passthrough_problems(config, zero_stage=1) == [
        "config.zero_optimization.max_live_parameters has no effect with zero_stage=1, only with "
        "3; leave it out"
    ]
    assert passthrough_problems(config, zero_stage=0)[1] == (
        "config.zero_optimization.overlap_comm has no effect with zero_stage=0, only with 1, 2, 3; "
        "leave it out"
    )


def test_every_field_that_a_sentence_names_exists() -> None:
    known = schema_paths(RunConfig)
    for text in SET_HERE.values():
        for name in re.findall(r"\w+(?:\.\w+)+", text):
            assert name in known, name


def test_a_key_has_one_rule() -> None:
    assert not set(PASSED) & set(SET_HERE)
    assert not set(PASSED) & set(REFUSED)
    assert not set(SET_HERE) & set(REFUSED)


@pytest.mark.parametrize(
    ("version", "right"),
    [("0.18.3", False), ("0.19.2", False), ("0.19.3", True), ("0.19.8+cpu", True), ("1.0", True)],
)
def test_pipelines_need_a_release_that_is_right(version: str, right: bool) -> None:
    assert pipeline_is_right(version) is right


def test_the_installed_version_is_known() -> None:
    installed = deepspeed_version()
    assert installed is not None
    assert pipeline_is_right(installed)
