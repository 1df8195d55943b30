"""What DeepSpeed is told, and that its own keys are laid over it."""

from llmtrain.config.parallel import DeepSpeedConfig, EngineConfig
from llmtrain.engine.deepspeed.settings import deepspeed_json


def engine(precision: str = "fp32", **deepspeed: object) -> EngineConfig:
    return EngineConfig(
        kind="deepspeed", precision=precision, deepspeed=DeepSpeedConfig(**deepspeed)
    )


def test_deepspeed_neither_clips_nor_steps_on_its_own() -> None:
    settings = deepspeed_json(engine(zero_stage=2), data_ranks=3, micro_batch_size=2)
    assert settings["train_batch_size"] == 6
    assert settings["gradient_clipping"] == 0.0
    assert settings["zero_optimization"] == {"stage": 2}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not {"optimizer", "scheduler", "bf16"} & set(settings)


def test_bf16_accumulates_in_fp32() -> None:
    settings = deepspeed_json(engine("bf16"), data_ranks=1)
    assert settings["bf16"] == {"enabled": True}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}


def test_own_keys_are_laid_over_section_by_section() -> None:
    own = {"zero_optimization": {"overlap_comm": True, "offload_optimizer": {"pin_memory": False}},
           "log_level": "info"}  # fmt: skip
    settings = deepspeed_json(engine(offload_optimizer=True, config=own), data_ranks=1)
    assert settings["zero_optimization"] == {
        "stage": 1,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "overlap_comm": True,
    }
    assert settings["log_level"] == "info"
