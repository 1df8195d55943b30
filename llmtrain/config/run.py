"""The whole configuration of a training run, and the rules that cross its sections.

Rules are a table of (predicate, message); ``check`` reports every broken one at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath

from llmtrain.config.data import DataConfig, MixtureConfig, TokenizerConfig
from llmtrain.config.fields import FATAL
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import (
    EngineConfig,
    ParallelConfig,
    implied_world_size,
    resolve_dp_shard,
)
from llmtrain.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    MonitorConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from llmtrain.errors import ConfigError, LayoutError


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
    return [message for rule in RULES if (message := rule(config, world)) is not None]


Rule = Callable[[RunConfig, int], str | None]
"""One rule that crosses sections: (config, number of processes) -> what is wrong, or None."""


def _data_ranks(config: RunConfig, world: int) -> int | None:
    """Data-parallel ranks, or None where the layout itself does not fit."""
    try:
        return config.parallel.dp_replicate * resolve_dp_shard(config.parallel, world)
    except LayoutError:
        return None


def _rows(config: RunConfig) -> int | None:
    """Rows of the global batch, or None where they are not whole."""
    training = config.training
    whole = training.global_batch_tokens % training.sequence_length == 0
    return training.global_batch_size if whole else None


def axes_make_the_world(config: RunConfig, world: int) -> str | None:
    """Pp x dp_replicate x dp_shard is the number of processes."""
    try:
        resolve_dp_shard(config.parallel, world)
    except LayoutError as error:
        return str(error)
    return None


def name_is_a_folder(config: RunConfig, world: int) -> str | None:
    """The run folder lies inside runs_dir."""
    parts = PurePath(config.name).parts if config.name is not None else ("made",)
    if parts and ".." not in parts and not PurePath(*parts).is_absolute():
        return None
    return f"name='{config.name}' names no folder inside runs_dir={config.runs_dir}; use name=NEW"


def stages_have_layers(config: RunConfig, world: int) -> str | None:
    """Every pipeline stage holds at least one block."""
    pp, layers = config.parallel.pp, config.model.num_hidden_layers
    if pp <= layers:
        return None
    return (
        f"parallel.pp={pp} is more stages than model.num_hidden_layers={layers} blocks; "
        f"use parallel.pp of at most {layers}"
    )


def batch_has_whole_rows(config: RunConfig, world: int) -> str | None:
    """The global batch is a whole number of sequences."""
    tokens, length = config.training.global_batch_tokens, config.training.sequence_length
    if _rows(config) is not None:
        return None
    near = max(1, round(tokens / length)) * length
    return (
        f"training.global_batch_tokens={tokens} is no multiple of "
        f"training.sequence_length={length}; use {near}"
    )


def ranks_share_the_batch(config: RunConfig, world: int) -> str | None:
    """Every data-parallel rank gets the same whole number of micro-batches."""
    rows, ranks = _rows(config), _data_ranks(config, world)
    micro = config.training.micro_batch_size
    if rows is None or ranks is None or rows % (ranks * micro) == 0:
        return None
    unit = ranks * micro
    tokens = max(1, round(rows / unit)) * unit * config.training.sequence_length
    return (
        f"training.global_batch_tokens={config.training.global_batch_tokens} is {rows} rows, which "
        f"{ranks} data-parallel ranks x training.micro_batch_size={micro} do not divide; "
        f"use training.global_batch_tokens={tokens} or another micro_batch_size"
    )


def pipeline_is_filled(config: RunConfig, world: int) -> str | None:
    """A pipeline runs at least as many micro-batches as it has stages: fewer hang."""
    rows, ranks, pp = _rows(config), _data_ranks(config, world), config.parallel.pp
    if rows is None or ranks is None or pp == 1:
        return None
    count = rows // (ranks * config.training.micro_batch_size)
    if count >= pp or rows % (ranks * config.training.micro_batch_size):
        return None
    return (
        f"parallel.pp={pp} needs at least {pp} micro-batches per rank, found {count} "
        f"({rows} rows / {ranks} data-parallel ranks / training.micro_batch_size="
        f"{config.training.micro_batch_size}); use a larger training.global_batch_tokens"
    )


def head_is_on_one_stage(config: RunConfig, world: int) -> str | None:
    """Tied embeddings would live on the first and the last stage at once."""
    if config.parallel.pp == 1 or not config.model.tie_word_embeddings:
        return None
    return (
        f"model.tie_word_embeddings=true does not work with parallel.pp={config.parallel.pp}: the "
        "matrix would be on two stages; use parallel.pp=1 or model.tie_word_embeddings=false"
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
    axes_make_the_world,
    name_is_a_folder,
    stages_have_layers,
    batch_has_whole_rows,
    ranks_share_the_batch,
    pipeline_is_filled,
    head_is_on_one_stage,
    sequence_fits_the_model,
    mixture_names_the_sources,
    schedule_fits_the_run,
)
