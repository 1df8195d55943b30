"""The whole configuration of a training run, and the rules that cross its sections.

``check`` reports every broken rule at once: those here, and those about layouts and engines, which
are the support matrix in ``support``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath

from llmtrain.config.data import DataConfig, MixtureConfig, TokenizerConfig
from llmtrain.config.fields import FATAL
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import EngineConfig, ParallelConfig, implied_world_size
from llmtrain.config.support import SUPPORT
from llmtrain.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    MonitorConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything ``llmtrain train`` needs; one field per section."""

    name: str | None = None
    """Name of the run and of its folder.

    Null makes one from the model's shape and a hash of the fields that may not change in a run, so
    that the same command finds its run again.
    """
    runs_dir: str = "runs"
    """Folder that holds the run folders."""
    model: ModelConfig = field(metadata=FATAL)
    """The architecture."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Engine and precision."""
    training: TrainingConfig
    """Length, batch, seed."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The update rule."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over tokens."""
    data: DataConfig = field(default_factory=DataConfig)
    """Token stores."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Shares of the sources."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer of the stores."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out loss on the way."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What to log."""


def check(config: RunConfig, world_size: int | None = None) -> None:
    """Raise one ConfigError with every cross-section rule that ``config`` breaks."""
    if problems := broken_rules(config, world_size):
        raise ConfigError(problems)


def broken_rules(config: RunConfig, world_size: int | None = None) -> list[str]:
    """A message for every cross-section rule that ``config`` breaks on ``world_size`` processes.

    None means that their number is not known yet: the fewest that the layout needs are taken.
    """
    world = world_size or implied_world_size(config.parallel)
    found = [rule(config, world) for rule in RULES]
    found += [limit.message(config, world) for limit in SUPPORT]
    return [message for message in found if message is not None]


Rule = Callable[[RunConfig, int], str | None]
"""One rule that crosses sections: (config, number of processes) -> what is wrong, or None."""


def name_is_a_folder(config: RunConfig, world: int) -> str | None:
    """The run folder lies inside runs_dir."""
    parts = PurePath(config.name).parts if config.name is not None else ("made",)
    if parts and ".." not in parts and not PurePath(*parts).is_absolute():
        return None
    return f"name='{config.name}' names no folder inside runs_dir={config.runs_dir}; use name=NEW"


def batch_has_whole_rows(config: RunConfig, world: int) -> str | None:
    """The global batch is a whole number of sequences."""
    tokens, length = config.training.global_batch_tokens, config.training.sequence_length
    if tokens % length == 0:
        return None
    near = max(1, round(tokens / length)) * length
    return (
        f"training.global_batch_tokens={tokens} is no multiple of "
        f"training.sequence_length={length}; use {near}"
    )


def sequence_fits_the_model(config: RunConfig, world: int) -> str | None:
    """No row is longer than the model's positions."""
    length, longest = config.training.sequence_length, config.model.max_position_embeddings
    if length <= longest:
        return None
    return (
        f"training.sequence_length={length} is longer than model.max_position_embeddings="
        f"{longest}; use a sequence_length of at most {longest} or a longer model"
    )


def mixture_names_the_sources(config: RunConfig, world: int) -> str | None:
    """Weights and sources have the same names."""
    weights, sources = config.mixture.weights, config.data.sources
    if weights is None or set(weights) == set(sources):
        return None
    unknown, missing = sorted(set(weights) - set(sources)), sorted(set(sources) - set(weights))
    parts = [f"mixture.weights names {n}, no source of data.sources" for n in unknown]
    parts += [f"mixture.weights gives no share to the source {n}" for n in missing]
    known = ", ".join(sorted(sources)) or "none"
    return f"{'; '.join(parts)}; name exactly the sources: {known}"


def schedule_fits_the_run(config: RunConfig, world: int) -> str | None:
    """Warm-up and decay end within the run."""
    schedule, total = config.schedule, config.training.num_tokens
    decay = schedule.decay_tokens or 0
    if schedule.warmup_tokens + decay <= total:
        return None
    what = "schedule.warmup_tokens" + (" + schedule.decay_tokens" if decay else "")
    return (
        f"{what}={schedule.warmup_tokens + decay} is longer than "
        f"training.num_tokens={total}; shorten it or train longer"
    )


RULES: tuple[Rule, ...] = (
    name_is_a_folder,
    batch_has_whole_rows,
    sequence_fits_the_model,
    mixture_names_the_sources,
    schedule_fits_the_run,
)
