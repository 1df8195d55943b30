"""Which stages run, and which run together."""

import pytest

from data_pipeline.config.run import PipelineConfig
from data_pipeline.pipeline import passes
from llmtrain.errors import ConfigError

STAGES = ("url", "c4", "bad_words", "line_dedup", "language", "exact")


def test_neighbouring_steps_are_one_pass() -> None:
    groups = [("url",), ("c4", "bad_words"), ("line_dedup",), ("language",), ("exact",)]
    assert passes(PipelineConfig(stages=STAGES)) == groups


def test_skipped_stages_are_left_out_and_their_neighbours_join() -> None:
    config = PipelineConfig(stages=STAGES, skip=("bad_words", "line_dedup"))
    assert passes(config) == [("url",), ("c4", "language"), ("exact",)]


def test_only_what_is_in_the_list_can_be_skipped() -> None:
    with pytest.raises(ConfigError, match="skip names minhash, which is none of stages="):
        PipelineConfig(stages=STAGES, skip=("minhash",))
