"""What DeepSpeed is told, and that its own keys are laid over it."""

from llmtrain.config.engine import DeepSpeedConfig, EngineConfig
from llmtrain.engine.deepspeed.settings import deepspeed_json


def engine(precision: str = "fp32", **deepspeed: object) -> EngineConfig:
    return EngineConfig(
        kind="deepspeed", precision=precision, deepspeed=DeepSpeedConfig(**deepspeed)
    )


def test_deepspeed_neither_clips_nor_steps_on_its_own() -> None:
    settings = deepspeed_json(engine(zero_stage=2), data_ranks=3, num_elements=10)
    assert settings["train_batch_size"] == 3
    assert settings["gradient_clipping"] == 0.0
    assert settings["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 10,
        "memory_efficient_linear": False,
        "compute_grad_norm": False,
    }
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not {"optimizer", "scheduler", "bf16"} & set(settings)


def test_bf16_accumulates_in_fp32() -> None:
    settings = deepspeed_json(engine("bf16"), data_ranks=1, num_elements=10)
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    whole = deepspeed_json(engine("bf16", zero_stage=0), data_ranks=1, num_elements=10)
    assert "bf16" not in whole


def test_own_keys_are_laid_over_section_by_section() -> None:
    zero = {"reduce_bucket_size": 5, "offload_optimizer": {"pin_memory": False}}
    asked = engine(offload_optimizer=True, config={"zero_optimization": zero, "log_level": "info"})
    settings = deepspeed_json(asked, data_ranks=1, num_elements=10)
    assert settings["zero_optimization"] == {
        "stage": 1,
        "reduce_bucket_size": 5,
        "memory_efficient_linear": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert settings["log_level"] == "info"
