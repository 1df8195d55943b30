"""The composition root of training: from one RunConfig to stores, engine, loop and sinks.

Here alone the whole configuration is seen; every part is given its own section. All resources sit
on one ExitStack, and the failure path runs no collective.

    status = train(config)   # every rank calls it with the same configuration
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmtrain import logs
from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.checkpoint.facts import data_facts
from llmtrain.checkpoint.start import ORIGIN, adapter_facts, check_scale, start_from
from llmtrain.config.load import to_plain, write_yaml
from llmtrain.config.objective import DpoConfig
from llmtrain.config.run import RunConfig
from llmtrain.data.held_out import EvaluationBatches, held_out_of
from llmtrain.data.loader import Batches
from llmtrain.data.plan import BatchPlan, plan_of
from llmtrain.data.store import open_sources
from llmtrain.engine.choose import make_engine
from llmtrain.engine.protocol import Engine, LossFunction
from llmtrain.errors import LLMTrainError, OutOfMemoryError
from llmtrain.eval.in_training import TasksInTraining
from llmtrain.hang.heartbeat import Phase
from llmtrain.ops.attention.check import check_attention
from llmtrain.ops.attention.choose import choose_attention, needs_of
from llmtrain.ops.cross_entropy import CrossEntropyStep
from llmtrain.ops.kernels import choose_kernels
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.optim.schedule import Schedule, learning_rate
from llmtrain.parallel.host_memory import keep_freed_memory
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import job_end
from llmtrain.run.directory import ExitReason, RunDirectory
from llmtrain.run.journal import RunJournal
from llmtrain.run.mixing import Mixing
from llmtrain.run.progress import Progress
from llmtrain.train import loop
from llmtrain.train.document_losses import DocumentLosses
from llmtrain.train.evaluation import Evaluation
from llmtrain.train.feed import Copies, Feed
from llmtrain.train.guard import Guard, stop_signals
from llmtrain.train.loss import Observer, pretraining_loss
from llmtrain.train.memory import explained, record_history
from llmtrain.train.metrics import Meter
from llmtrain.train.norms import layers_of
from llmtrain.train.preference_loss import preference_loss
from llmtrain.train.profiler import Profiler
from llmtrain.train.recheck import Recheck
from llmtrain.train.reference import Preferences, preferences_of
from llmtrain.train.rollback import go_back
from llmtrain.train.start_checks import check_ranks
from llmtrain.train.time_limit import TimeLimit
from llmtrain.train.watch import Parts, Watch, open_watch
from llmtrain.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Run ``config`` from its newest checkpoint to its end; returns the exit status."""
    run = RunDirectory(Path(config.runs_dir) / str(config.name))
    world = World(config.parallel, config.engine)
    logs.setup(run.path, world.rank)
    progress = Progress(
        num_steps=config.training.num_steps,
        steps=config.training.steps,
        stop_at_step=config.training.stop_at_step,
    )
    reason = ExitReason.FAILED
    if world.rank == 0:
        run.clear_status()
    try:
        with world, explained(config, world, run.path, progress):
            record_history(config.monitor.memory_history, world.device)
            reason = _train(config, run, world, progress)
            if reason is ExitReason.PEER_LOST:
                raise SystemExit(reason.code)  # the mesh is left without a collective
    except LLMTrainError as error:
        no_room = isinstance(error, OutOfMemoryError)
        reason = ExitReason.OUT_OF_MEMORY if no_room else ExitReason.REFUSED
        raise
    finally:
        if world.rank == 0:
            run.write_status(reason, progress.step)
    logger.info("%s at step %d of %d", reason.value, progress.step, progress.num_steps)
    return reason.code


def _train(config: RunConfig, run: RunDirectory, world: World, progress: Progress) -> ExitReason:
    """Build what a run has once, and run the loop; again where the guard went back."""
    with ExitStack() as stack:
        built = _build(stack, config, run, world, progress)
        check_ranks(world, built.plan.fingerprint)
        while (reason := _attempt(built)) is ExitReason.ROLLED_BACK:
            pass
        if reason.code != ExitReason.PREEMPTED.code:  # there the time left is short
            built.checkpoints.wait_for_mirror()
        if reason.code in (0, ExitReason.PREEMPTED.code):  # everything is on disk
            built.checkpoints.drop_memory()
        return reason


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """What outlives a rollback."""

    config: RunConfig
    run: RunDirectory
    world: World
    progress: Progress
    stop_asked: Callable[[], bool]
    limit: TimeLimit
    plan: BatchPlan
    held_out: EvaluationBatches | None
    preferences: Preferences | None
    documents: DocumentLosses
    engine: Engine
    mixing: Mixing
    journal: RunJournal
    checkpoints: Checkpoints
    watchdog: Watchdog


def _build(
    stack: ExitStack, config: RunConfig, run: RunDirectory, world: World, progress: Progress
) -> _Built:
    """Make what outlives a rollback, with what it holds open on ``stack``."""
    stop_asked = stack.enter_context(stop_signals())
    watchdog = stack.enter_context(
        Watchdog(config.monitor, run, world, timeout_s=config.engine.timeout_s)
    )
    data = config.data
    plan = plan_of(config, open_sources(data.sources, data.cache_dir, check=False))
    documents = DocumentLosses(run.path, world, plan.source_names, config.monitor)
    preferences = preferences_of(config, plan, world, run.path, documents.observe)
    held_out = _held_out(config, world, preferences)
    num_sources = max(len(p.source_names) for p in (plan, held_out) if p is not None)
    engine = engine_of(config, world, num_sources, (preferences or documents).observe)
    stack.callback(engine.close)
    mixing = Mixing(plan)
    journal = RunJournal(
        plan, mixing, run.journal_json if world.rank == 0 else None,
        accept_changed=data.accept_changed,
    )  # fmt: skip
    checkpoints = Checkpoints(
        run.checkpoints, config.checkpoint, engine, facts=data_facts(plan), journal=journal,
        carried=lambda: {
            **run.read_record(), **adapter_facts(config.model),
            **({} if preferences is None else preferences.facts),
        },
        beat=lambda: world.beat.at(Phase.START),
    )  # fmt: skip
    stack.callback(checkpoints.close)
    limit = TimeLimit(
        config.training.max_time_s, job_end(), grace_s=config.checkpoint.grace_s,
        save_s=lambda: checkpoints.save_s,
    )  # fmt: skip
    return _Built(
        config=config, run=run, world=world, progress=progress,
        stop_asked=(lambda: limit.reached() or stop_asked()) if world.rank == 0 else stop_asked,
        limit=limit, plan=plan, held_out=held_out, preferences=preferences, documents=documents,
        engine=engine, mixing=mixing, journal=journal, checkpoints=checkpoints, watchdog=watchdog,
    )  # fmt: skip


def _held_out(
    config: RunConfig, world: World, preferences: Preferences | None
) -> EvaluationBatches | None:
    """What the run is evaluated on, pairs where it trains on pairs; None without any."""
    if preferences is not None:
        return preferences.held_out
    return held_out_of(config, world.dp_rank, world.dp_size)


def _attempt(built: _Built) -> ExitReason:
    """Resume, open what reads batches and what watches, and run the loop."""
    config, world, progress = built.config, built.world, built.progress
    engine, checkpoints = built.engine, built.checkpoints
    world.beat.at(Phase.START)
    with ExitStack() as stack:
        _resume(config, built.run, world, progress, engine, checkpoints)
        if built.preferences is not None:
            built.preferences.open(engine, checkpoints.restored, progress.step, checkpoints)
        copies = Copies(world.device)
        ahead = stack.enter_context(_batches(built, copies))
        batches = Feed(built.documents.asking(ahead), copies, world.beat)
        schedule = learning_rate(config.optimizer, config.schedule, config.training.num_tokens)
        watch = open_watch(stack, config.monitor, _watched(built, batches, schedule))
        guard = _guard(built, watch)
        if checkpoints.restored is None and config.guard.may_go_back:
            watch.saver.save(progress)  # so that there is always something to go back to
        batches_checked, checks = _checked(built, watch, guard)
        keep_freed_memory(world.device)
        reason = loop.train(
            engine, batches_checked, progress=progress, schedule=schedule,
            guard=guard, checkpoints=watch.saver, hooks=_hooks(built, watch, guard, checks, stack),
        )  # fmt: skip
        return _settled(built, watch, guard, reason)


def _watched(built: _Built, batches: Feed, schedule: Schedule) -> Parts:
    """What is shown of this attempt to all that watch it."""
    config, world = built.config, built.world
    return Parts(
        run=built.run, world=world, progress=built.progress, engine=built.engine, plan=built.plan,
        batches=batches, saver=built.checkpoints, schedule=schedule, layers=layers_of(config.model),
        meter=Meter.of(config.model, world.device, world.world_size, config.monitor.peak_tflops),
        watchdog=built.watchdog, compiled=config.engine.compile, plain_config=to_plain(config),
    )  # fmt: skip


def _guard(built: _Built, watch: Watch) -> Guard:
    """The guard as the checkpoint left it; those to come keep it."""
    config, restored = built.config, built.checkpoints.restored
    late_s = max(20.0, config.checkpoint.grace_s / 2)  # the other half is for the save
    guard = Guard(
        config.guard, agree=partial(built.world.agree, grace_s=late_s),
        stop_asked=built.stop_asked,
        device=built.world.device, check_every_steps=config.monitor.log_every_steps,
        tell=watch.events.write, trace=_trace(built),
        saved=None if restored is None else restored.meta.get("guard"),
    )  # fmt: skip
    built.checkpoints.guard = guard.to_plain
    return guard


def _trace(built: _Built) -> str:
    return f"llmtrain trace run={built.run.path}"


def _settled(built: _Built, watch: Watch, guard: Guard, reason: ExitReason) -> ExitReason:
    """Go back where the loop ended for that, else say how it ended; returns what came of it."""
    if reason is ExitReason.ROLLED_BACK:
        reason = go_back(
            guard, built.checkpoints, built.plan, built.journal, tell=watch.events.write,
            trace=f"{_trace(built)} attempt={watch.events.attempt}", reached=built.progress.step,
        )  # fmt: skip
    if guard.sound_step is not None:
        built.checkpoints.distrust(guard.sound_step)
    if reason is not ExitReason.ROLLED_BACK:
        watch.events.ended(reason, guard.why or built.limit.why)
    if reason is ExitReason.PREEMPTED and built.limit.why:
        reason = ExitReason.TIME_LIMIT
    if reason.code == ExitReason.PREEMPTED.code and built.world.rank == 0:
        built.run.write_status(reason, built.progress.step)  # time may be up before all is closed
    return reason


def _checked(built: _Built, watch: Watch, guard: Guard) -> tuple[loop.BatchSource, list[loop.Hook]]:
    """Where the loop pulls from, and the hook that searches for silent corruption, if any."""
    config = built.config
    if config.guard.recheck_every_steps is None:
        return watch.batches, []
    recheck = Recheck(
        built.world, built.engine, every_steps=config.guard.recheck_every_steps,
        exact=built.world.device.type == "cpu" or config.engine.deterministic,
        compiled=config.engine.compile, sound_step=built.progress.step,
    )  # fmt: skip
    recheck.found, recheck.report = guard.distrust, watch.report
    return recheck.watching(watch.batches), [recheck]


def _hooks(
    built: _Built, watch: Watch, guard: Guard, checks: list[loop.Hook], stack: ExitStack
) -> list[loop.Hook]:
    """What is told of every step, in order."""
    config, world = built.config, built.world

    @contextmanager
    def pause() -> Iterator[Callable[[], bool]]:
        with built.limit.paused():
            yield guard.stop_requested

    hooks: list[loop.Hook] = [*watch.before, *checks]
    if built.held_out is not None:
        evaluation = Evaluation(
            built.engine, built.held_out, world.device,
            every_steps=config.evaluation.every_steps or 1, report=watch.report, pause=pause,
        )  # fmt: skip
        hooks.append(evaluation)
        built.checkpoints.scores = evaluation.scores
    if config.evaluation.tasks:
        hooks.append(TasksInTraining(
            config, built.run, world, built.engine, report=watch.report, pause=pause
        ))  # fmt: skip
    collection = stack.enter_context(loop.GarbageCollection())
    hooks += [built.mixing, collection, built.documents, *watch.after]
    if config.monitor.profile_steps is not None:
        hooks.append(stack.enter_context(Profiler(
            built.run.path / "traces", world.rank, config.monitor.profile_steps, built.progress
        )))  # fmt: skip
    return hooks


def _resume(
    config: RunConfig,
    run: RunDirectory,
    world: World,
    progress: Progress,
    engine: Engine,
    checkpoints: Checkpoints,
) -> None:
    """Go on from the newest checkpoint, or begin; settle what the run's folder says of itself."""
    if not checkpoints.restore(progress) and config.checkpoint.start_from is not None:
        carried = start_from(config.checkpoint.start_from, engine, config.model)
        if world.rank == 0 and ORIGIN in carried:
            run.record(**{ORIGIN: carried[ORIGIN]})
    restored = checkpoints.restored
    if restored is not None:  # on a new disk no config.yaml was compared
        check_scale(restored.path, restored.meta["carried"], config.model)
    checkpoints.prepare()
    checkpoints.check_room(progress)
    if world.rank == 0:
        if restored is not None:  # on a new disk there is no run.json yet
            run.record(**restored.meta["carried"])
        write_yaml(config, run.config_yaml)


def _batches(built: _Built, copies: Copies) -> Batches:
    config, world, preferences = built.config, built.world, built.preferences
    return Batches(
        built.plan, dp_rank=world.dp_rank, dp_size=world.dp_size,
        micro_batch_size=config.training.micro_batch_size, parallel=config.parallel,
        prefetch=config.data.prefetch_batches, finish=copies.start,
        pairs=None if preferences is None else preferences.sources,
    )  # fmt: skip


def engine_of(
    config: RunConfig, world: World, num_sources: int, observe: Observer | None = None
) -> Engine:
    """Make this rank's engine of a run; ``observe`` is shown the loss of every token."""
    training = config.training
    needs = needs_of(config.model, config.engine)
    check_attention(
        choose_attention(config.engine.attention, world.device, needs), world.device, needs,
        config.model.sliding_window, config.model.attn_logit_softcapping,
    )  # fmt: skip
    kernels = choose_kernels(config.engine.kernels, world.device)
    return make_engine(
        config.model, config.parallel, config.engine, world, seed=training.seed,
        loss=_loss(config, num_sources, observe, kernels.cross_entropy_step),
        optimizer_factory=optimizer_factory(config.optimizer, config.training.seed),
        grad_clip_norm=config.optimizer.grad_clip_norm,
        update_in_backward=config.optimizer.in_backward,
    )  # fmt: skip


def _loss(
    config: RunConfig, num_sources: int, observe: Observer | None, step: CrossEntropyStep
) -> LossFunction:
    """Make what the last stage computes, by ``training.objective``."""
    training, chunk_tokens = config.training, config.engine.loss_chunk_tokens
    if training.objective == "dpo":
        dpo = training.dpo or DpoConfig()
        return preference_loss(dpo, num_sources, chunk_tokens, observe, step)
    return pretraining_loss(num_sources, chunk_tokens, training.z_loss_weight, observe, step)
