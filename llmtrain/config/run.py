"""The whole configuration of a training run, and the rules that cross its sections.

``check`` reports every broken rule at once: those here, and those about layouts and engines, which
are the support matrix in ``support``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import PurePath

from llmtrain.config.data import DataConfig, TokenizerConfig
from llmtrain.config.engine import EngineConfig
from llmtrain.config.fields import FATAL
from llmtrain.config.guard import GuardConfig
from llmtrain.config.mixture import (
    AdaptiveMixture,
    ConstantMixture,
    MixtureConfig,
    PhasesMixture,
    name_problem,
)
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig, implied_world_size
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
    mixture: MixtureConfig = field(default_factory=ConstantMixture)
    """Shares of the sources."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer of the stores."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out loss on the way."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What is done about spikes and updates that cannot be made."""
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
    messages = [message for message in found if message is not None]
    return messages or _broken_on_ramps(config, world)


def _broken_on_ramps(config: RunConfig, world: int) -> list[str]:
    """What the shapes of steps on a ramp break of the support matrix, where the last breaks none.

    A rule speaks of the batch and length it is shown, so the message begins with where they are.
    """
    training, messages = config.training, dict[str, None]()
    longest = training.sequence_length
    for units, length in training.steps.shapes()[:-1]:
        shown = replace(
            training,
            sequence_length=length,
            global_batch_tokens=units * longest,
            micro_batch_size=training.micro_batch_size * (longest // length),
            batch_ramp=(),
            length_ramp=(),
        )
        on_ramp = replace(config, training=shown)
        for limit in SUPPORT:
            if (message := limit.message(on_ramp, world)) is not None:
                messages[f"on the ramps of training, {message}"] = None
    return list(messages)


Rule = Callable[[RunConfig, int], str | None]
"""One rule that crosses sections: (config, number of processes) -> what is wrong, or None."""


def name_is_a_folder(config: RunConfig, world: int) -> str | None:
    """The run folder lies inside runs_dir."""
    parts = PurePath(config.name).parts if config.name is not None else ("made",)
    if parts and ".." not in parts and not PurePath(*parts).is_absolute():
        return None
    return f"name='{config.name}' names no folder inside runs_dir={config.runs_dir}; use name=NEW"


def batch_has_whole_rows(config: RunConfig, world: int) -> str | None:
    """Every global batch is a whole number of sequences of the longest length."""
    training, length = config.training, config.training.sequence_length
    batches = {"training.global_batch_tokens": training.global_batch_tokens} | {
        f"training.batch_ramp[{i}].global_batch_tokens": stage.global_batch_tokens
        for i, stage in enumerate(training.batch_ramp)
    }
    for name, tokens in batches.items():
        if tokens % length:
            near = max(1, round(tokens / length)) * length
            return (
                f"{name}={tokens} is no multiple of training.sequence_length={length}; use {near}"
            )
    return None


def lengths_cut_the_longest(config: RunConfig, world: int) -> str | None:
    """Every length of the ramp divides the longest."""
    longest = config.training.sequence_length
    for i, stage in enumerate(config.training.length_ramp):
        if longest % stage.sequence_length:
            return (
                f"training.length_ramp[{i}].sequence_length={stage.sequence_length} does not "
                f"divide training.sequence_length={longest}; use {longest} / 2, / 4, ..."
            )
    return None


def ramps_end_within_the_run(config: RunConfig, world: int) -> str | None:
    """No stage of a ramp is beyond the end of the run."""
    training = config.training
    for name in ("batch_ramp", "length_ramp"):
        for i, stage in enumerate(getattr(training, name)):
            if stage.until_tokens >= training.num_tokens:
                return (
                    f"training.{name}[{i}].until_tokens={stage.until_tokens} is not before the end "
                    f"of the run, training.num_tokens={training.num_tokens}; shorten the ramp or "
                    "train longer"
                )
    return None


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
    """The mixture names all sources and no other."""
    return name_problem(config.mixture, config.data.sources)


def phases_fit_the_run(config: RunConfig, world: int) -> str | None:
    """The phases of the mixture end with the run, not before it and not after it."""
    total = config.training.num_tokens
    if not isinstance(config.mixture, PhasesMixture):
        return None
    *earlier, last = (phase.until_tokens for phase in config.mixture.phases)
    for i, end in enumerate(earlier):
        if end is not None and end >= total:
            return (
                f"mixture.phases[{i}].until_tokens={end} is not before the end of the run, "
                f"training.num_tokens={total}, so phase {i + 1} never begins; shorten it, leave "
                "the later phases out or train longer"
            )
    if last is None or last == total:
        return None
    return (
        f"mixture.phases[{len(earlier)}].until_tokens={last} ends the last phase, the run ends at "
        f"training.num_tokens={total}; use until_tokens=null or add a phase"
    )


def adaptive_interval_covers_reading_ahead(config: RunConfig, world: int) -> str | None:
    """No batch is read ahead before the shares of its windows are decided."""
    ahead, mixture, training = config.data.prefetch_batches + 2, config.mixture, config.training
    batches = [stage.global_batch_tokens for stage in training.batch_ramp]
    largest = max([training.global_batch_tokens, *batches])
    least = ahead * largest
    if not isinstance(mixture, AdaptiveMixture) or mixture.interval_tokens >= least:
        return None
    return (
        f"mixture.interval_tokens={mixture.interval_tokens} is less than data.prefetch_batches + 2 "
        f"= {ahead} batches of training.global_batch_tokens={largest}; use at least {least}"
    )


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


def skipped_steps_are_in_the_run(config: RunConfig, world: int) -> str | None:
    """What is left out lies before the end of the run."""
    skips, training = config.data.skip_steps, config.training
    if not skips or batch_has_whole_rows(config, world) or skips[-1][0] <= training.num_steps:
        return None
    return (
        f"data.skip_steps holds [{skips[-1][0]}, {skips[-1][1]}], the run ends with step "
        f"{training.num_steps}; leave it out or train longer"
    )


def updates_can_be_skipped(config: RunConfig, world: int) -> str | None:
    """A spiking update is known before anything of it is made."""
    if "skip" not in config.guard.on_spike or not config.optimizer.in_backward:
        return None
    return (
        f"guard.on_spike=[{','.join(config.guard.on_spike)}] skips whole updates, with "
        "optimizer.in_backward=true they are made before the gradient norm is known; use "
        "guard.on_spike=[rollback] or optimizer.in_backward=false"
    )


def fim_tokens_are_known(config: RunConfig, world: int) -> str | None:
    """The model has rows for the tokens of fill-in-the-middle."""
    fim, vocab_size = config.data.fim, config.model.vocab_size
    largest = -1 if fim is None else max(fim.prefix_id, fim.middle_id, fim.suffix_id)
    if largest < vocab_size:
        return None
    return f"data.fim has id {largest}, model.vocab_size={vocab_size} ends below; use other ids"


def pairs_stay_whole(config: RunConfig, world: int) -> str | None:
    """Nothing takes the pairs of a preference run apart, or has no meaning for them."""
    training, data, cause = config.training, config.data, None
    if data.packing != "best_fit":
        cause = f"data.packing={data.packing} cuts pairs; use data.packing=best_fit"
    elif data.fim is not None:
        cause = "data.fim rearranges text, and pairs have a fixed order; use data.fim=null"
    elif training.length_ramp:
        cause = "training.length_ramp cuts pairs; use training.length_ramp=[]"
    elif training.z_loss_weight:
        cause = (
            f"training.z_loss_weight={training.z_loss_weight} has no meaning for pairs; use "
            "training.z_loss_weight=0"
        )
    if training.objective != "dpo" or cause is None:
        return None
    return f"training.objective=dpo: {cause}"


def best_checkpoints_are_measured(config: RunConfig, world: int) -> str | None:
    """Every checkpoint at its interval has a held-out loss where the best are kept."""
    keep, every = config.checkpoint, config.evaluation.every_steps
    if not keep.keep_best:
        return None
    if every is None or not config.data.validation or keep.every_steps % every:
        return (
            f"checkpoint.keep_best={keep.keep_best} ranks checkpoints by their held-out loss, "
            f"found evaluation.every_steps={every}, checkpoint.every_steps={keep.every_steps} and "
            f"{len(config.data.validation)} stores in data.validation; set data.validation.NAME="
            "DIR, and an evaluation.every_steps that divides checkpoint.every_steps"
        )
    name = keep.best_metric.partition("/")[2]
    if name and name not in config.data.validation:
        return (
            f"checkpoint.best_metric={keep.best_metric} names no store of data.validation; use one "
            f"of {', '.join(config.data.validation)}"
        )
    return None


def tasks_have_a_tokenizer(config: RunConfig, world: int) -> str | None:
    """Tasks are texts."""
    if config.evaluation.tasks and config.tokenizer.path is None:
        return (
            f"evaluation.tasks={list(config.evaluation.tasks)} found with tokenizer.path=null, "
            "tasks are texts; set tokenizer.path to the folder the stores were made with"
        )
    return None


DATA_RULES: tuple[Rule, ...] = (
    batch_has_whole_rows,
    lengths_cut_the_longest,
    ramps_end_within_the_run,
    mixture_names_the_sources,
    phases_fit_the_run,
    adaptive_interval_covers_reading_ahead,
)
"""Those without which there is no batch plan, whatever the model."""
RULES: tuple[Rule, ...] = (
    name_is_a_folder,
    *DATA_RULES,
    sequence_fits_the_model,
    schedule_fits_the_run,
    skipped_steps_are_in_the_run,
    updates_can_be_skipped,
    fim_tokens_are_known,
    pairs_stay_whole,
    best_checkpoints_are_measured,
    tasks_have_a_tokenizer,
)
