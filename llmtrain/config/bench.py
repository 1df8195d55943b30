"""What ``llmtrain bench`` takes: a whole training command line, and how to measure it."""

from dataclasses import dataclass
from typing import Literal

from llmtrain.config.fields import below, not_positive
from llmtrain.config.run import RunConfig
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig(RunConfig):
    """``llmtrain bench``: how fast this machine trains a model, and where the time goes.

    It reads model, parallel, engine, training and optimizer of a training command line: batches
    are made from the seed before the clock starts, the rate is ``optimizer.lr``, no checkpoint is
    written. Batches and rows have their full size, whatever ramps there are.
    """

    part: Literal["step", "kernels"] = "step"
    """``step``: training steps; ``kernels``: every attention backend and kernel by itself."""
    documents: Literal["packed", "whole"] = "packed"
    """``packed``: about four documents in a row, kept apart by masks; ``whole``: one a row."""
    warmup_steps: int = 3
    """Steps before the clock starts; whatever compiles does it here."""
    steps: int = 10
    """Steps that are timed, or repeats of a kernel; the median and the quartiles are reported."""
    profiled_steps: int = 2
    """Steps after those under the profiler, for the time by part; 0 leaves that out."""
    profile: bool = False
    """Keep the profiler's trace of those steps in OUT/traces, to be opened in Perfetto."""
    rate_seconds: float = 1.0
    """About how long the copy rate and the matrix rate of the machine are each measured."""
    out: str = "bench"
    """Folder for NAME.json and NAME.html; NAME is ``name``, or made from model and precision."""

    def __post_init__(self) -> None:
        """Refuse measurements of nothing."""
        problems = below(self, 1, "warmup_steps", "steps") + below(self, 0, "profiled_steps")
        problems += not_positive(self, "rate_seconds")
        if self.profile and not self.profiled_steps:
            problems.append("profile=true keeps a trace of profiled_steps=0 steps; use 1 or more")
        if problems:
            raise ConfigError(problems)
