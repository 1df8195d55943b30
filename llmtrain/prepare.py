"""What rank 0 settles before a training run exists on any other rank.

It makes paths absolute, names the run, opens every store and the tokenizer, compares with what the
run folder already holds, and locks it. Whatever is wrong is one error, found before any process
group is created; nothing is written unless all is right. A run that is done ends here.

    with ExitStack() as held:
        config = prepare(config, world_size=8, held=held)    # None where nothing is left to do
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from llmtrain import logs
from llmtrain.checkpoint import archive
from llmtrain.config.limits import Facts
from llmtrain.config.load import config_hash, from_yaml
from llmtrain.config.resume import changes, identity
from llmtrain.config.run import RunConfig, broken_rules
from llmtrain.config.training import MonitorConfig
from llmtrain.data.location import absolute
from llmtrain.data.mixture import check_tokenizers
from llmtrain.data.plan import plan_of
from llmtrain.data.roles import texts
from llmtrain.data.store import TokenStore, open_source
from llmtrain.errors import CheckpointError, ConfigError, DataError, LLMTrainError
from llmtrain.run.directory import RunDirectory
from llmtrain.tokenizer.tokenizer import Tokenizer
from llmtrain.tokenizer.tokenizer import load as load_tokenizer

logger = logging.getLogger(__name__)


def prepare(config: RunConfig, world_size: int, held: ExitStack) -> RunConfig | None:
    """The configuration every rank of the run uses, or None where the run is done.

    Writes ``run.json``; the run stays locked until ``held`` closes.

    Raises:
        ConfigError: every broken rule, and all problems of the data, of the tokenizer and of going
            on with the run that is there; or another process is at work on it.
    """
    config = resolve(config)
    run = RunDirectory(Path(config.runs_dir) / str(config.name))
    if problems := problems_here(config, world_size):
        raise ConfigError(problems)
    if _is_done(config, run):
        logger.info(
            "the run %s is done, all %d steps of it: nothing to do; a larger training.num_tokens "
            "goes on with it", run.path, config.training.num_steps,
        )  # fmt: skip
        return None
    try:
        held.enter_context(run.locked())
        logs.setup(run.path, rank=0)
    except OSError as error:
        raise ConfigError(
            f"the run folder {run.path} cannot be written ({error}); use another runs_dir"
        ) from error
    _log_changes(config, run)
    _log_padding(Facts(config, world_size))
    run.record(name=config.name, created=time.time())
    logger.info("run %s of world size %d, config %s", run.path, world_size, config_hash(config))
    return config


def problems_here(config: RunConfig, world_size: int) -> list[str]:
    """Everything that keeps a run, resolved, from starting on this machine; nothing is written."""
    run = RunDirectory(Path(config.runs_dir) / str(config.name))
    problems = broken_rules(config, world_size)
    return [
        *problems, *_data_problems(config), *_resume_problems(config, run),
        *_start_problems(config, run),
        *_tracker_problems(config), *_mirror_problems(config),
    ]  # fmt: skip


def resolve(config: RunConfig) -> RunConfig:
    """Paths made absolute and the run named: the same command gives the same name."""
    path, start = config.tokenizer.path, config.checkpoint.start_from
    config = replace(
        config,
        data=replace(
            config.data,
            sources={n: _absolute(p) for n, p in config.data.sources.items()},
            validation={n: _absolute(p) for n, p in config.data.validation.items()},
            cache_dir=None if config.data.cache_dir is None else absolute(config.data.cache_dir),
        ),
        tokenizer=replace(config.tokenizer, path=None if path is None else absolute(path)),
        checkpoint=replace(
            config.checkpoint, start_from=None if start is None else absolute(start)
        ),
        runs_dir=os.path.expanduser(config.runs_dir),
    )
    if config.name is None:
        model = config.model
        shape = f"{model.num_hidden_layers}x{model.hidden_size}"
        config = replace(config, name=f"{shape}-{identity(config)[:8]}")
    return config


def _absolute(at: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return absolute(at) if isinstance(at, str) else tuple(map(absolute, at))


def _data_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with stores and tokenizer, one sentence each."""
    if not config.data.sources:
        yield ("data.sources names no token store; set data.sources.NAME=DIR (made by "
               "llmtrain-data run or llmtrain-data tokenize)")  # fmt: skip
    tokenizer: Tokenizer | None = None
    if config.tokenizer.path is not None:
        try:
            tokenizer = load_tokenizer(config.tokenizer.path)
        except LLMTrainError as error:
            yield f"tokenizer.path: {error}"
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        yield (
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer in "
            f"{config.tokenizer.path}; set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    opened = dict[str, TokenStore]()
    for section in ("sources", "validation"):
        for name, path in getattr(config.data, section).items():
            try:
                store = open_source(path, config.data.cache_dir)
                _check_store(store, config, tokenizer)
                opened[f"data.{section}.{name}"] = store
            except DataError as error:
                yield f"data.{section}.{name}: {error}"
    yield from _trained_on(opened)
    yield from _mixture_problems(config, opened)


def _mixture_problems(config: RunConfig, opened: Mapping[str, TokenStore]) -> Iterator[str]:
    """What keeps good stores from being trained on together."""
    names = config.data.sources
    sources = {n: opened[path] for n in names if (path := f"data.sources.{n}") in opened}
    if not sources or len(sources) < len(names) or broken_rules(config):
        return  # said already
    try:
        check_tokenizers(opened)
        plan_of(config, sources)
    except ConfigError as error:
        yield from error.problems
    except DataError as error:
        yield str(error)


def _trained_on(opened: Mapping[str, TokenStore]) -> Iterator[str]:
    """Which held-out stores are among those that are trained on."""
    trained = {
        member.fingerprint: path
        for path, store in opened.items()
        for member in store.members
        if path.startswith("data.sources.")
    }
    for path, store in opened.items():
        seen = [m for m in store.members if m.fingerprint in trained]
        if path.startswith("data.validation.") and seen:
            yield (
                f"{path}: {seen[0].name} holds the same tokens as {trained[seen[0].fingerprint]}, "
                "which is trained on; use a store that was held out, or leave it out"
            )


def _check_store(store: TokenStore, config: RunConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse a store of another tokenizer, of ids the model has no row for, or damaged."""
    store.check_ends()
    if tokenizer is not None:
        store.check_tokenizer(tokenizer.hash)
    if store.manifest is not None and store.manifest.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{store.name} has a vocabulary of {store.manifest.vocab_size}, "
            f"model.vocab_size={config.model.vocab_size} is smaller; set model.vocab_size to at "
            f"least {store.manifest.vocab_size}"
        )
    if config.training.objective == "dpo":
        from llmtrain.data.pairs import PairStore  # imports torch, which other runs go without here

        PairStore(store, config.training.sequence_length)
    elif store.has_roles and len(texts(store.roles(*store.document_span(0)))) > 1:
        raise DataError(
            f"{store.name} holds pairs of answers, and training.objective="
            f"{config.training.objective} would learn the rejected ones too; use "
            "training.objective=dpo"
        )


def _changes(config: RunConfig, run: RunDirectory) -> tuple[list[str], list[str]]:
    """What differs from the run that is there: (may not change, may change)."""
    if not run.config_yaml.is_file() or not any(run.checkpoints.glob("step-*")):
        return [], []
    return changes(from_yaml(run.config_yaml.read_text(encoding="utf-8")), config)


def _is_done(config: RunConfig, run: RunDirectory) -> bool:
    """Whether ``config`` asks for no step beyond a whole checkpoint the run ended with."""
    last = config.training.num_steps
    if run.done_at() != last or (config.training.stop_at_step or last) < last:
        return False
    for step, path in archive.scan(run.checkpoints)[:1]:
        try:
            archive.open_checkpoint(path)
        except CheckpointError:
            return False  # going on says what is damaged and falls back
        return step == last
    return False


def _resume_problems(config: RunConfig, run: RunDirectory) -> Iterator[str]:
    """Fields that may not change in the run that is there."""
    try:
        fixed, _ = _changes(config, run)
    except ConfigError as error:
        yield f"{run.config_yaml}: {error}; put the file back, or start another run with name=NEW"
        return
    for line in fixed:
        yield (f"{line} cannot change in the run {run.path}; put it back, or start another run "
               "with name=NEW")  # fmt: skip


def _start_problems(config: RunConfig, run: RunDirectory) -> Iterator[str]:
    """A checkpoint to start from that is not there, where the run has none of its own yet."""
    start = config.checkpoint.start_from
    if start is None or archive.scan(run.checkpoints):
        return
    folder = Path(start)
    if not ((folder / archive.META).is_file() or archive.scan(folder / "checkpoints")):
        yield (
            f"checkpoint.start_from={start} holds no checkpoint; give a run folder (runs/NAME, or "
            "what llmtrain import made) or one of its checkpoints/step-... folders"
        )


def _tracker_problems(config: RunConfig) -> Iterator[str]:
    """Weights & Biases or TensorBoard asked for by name, but not installed or not as named."""
    checks: list[Callable[[MonitorConfig], None]] = []
    if config.monitor.wandb in ("online", "offline"):
        from llmtrain.train.tracker import check_tracker

        checks.append(check_tracker)
    if config.monitor.tensorboard:
        from llmtrain.train.tensorboard import check_tensorboard

        checks.append(check_tensorboard)
    for check in checks:
        try:
            check(config.monitor)
        except ConfigError as error:
            yield str(error)


def _mirror_problems(config: RunConfig) -> Iterator[str]:
    """A mirror of checkpoints that this machine cannot reach."""
    if config.checkpoint.mirror is not None:
        from llmtrain.checkpoint.mirror import Mirror

        try:
            Mirror.of(config.checkpoint)
        except ConfigError as error:
            yield str(error)


def _log_padding(facts: Facts) -> None:
    """Say what share of a step computes nothing, where the ranks do not divide the batch."""
    if not facts.padding_rows:
        return
    run = facts.padding_rows + (facts.rows or 0)
    logger.warning(
        "%d rows do not divide by %d data-parallel ranks x training.micro_batch_size=%d%s: %d of "
        "%d rows run are padding, which changes no number and costs %.0f %% of the compute; "
        "another number of ranks or micro_batch_size costs less",
        facts.rows, facts.data_ranks, facts.t.micro_batch_size,
        f" into at least {facts.fewest_microbatches} micro-batches" if facts.p.pp > 1 else "",
        facts.padding_rows, run, 100 * facts.padding_rows / run,
    )  # fmt: skip


def _log_changes(config: RunConfig, run: RunDirectory) -> None:
    """Say with which other values the run goes on, and what it asks for in vain."""
    for line in _changes(config, run)[1]:
        logger.info("run %s goes on with %s", run.path, line)
    if config.evaluation.every_steps is not None and not config.data.validation:
        logger.warning(
            "evaluation.every_steps=%d evaluates nothing: data.validation names no store; set "
            "data.validation.NAME=DIR", config.evaluation.every_steps,
        )  # fmt: skip
