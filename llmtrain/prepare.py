"""What rank 0 settles before a training run exists on any other rank.

It makes paths absolute, names the run, opens every store and the tokenizer, compares with what the
run folder already holds. Whatever is wrong is one error, found before any process group is created;
nothing is written unless all is right.
"""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llmtrain import logs
from llmtrain.config.load import config_hash, from_yaml
from llmtrain.config.resume import changes, identity
from llmtrain.config.run import RunConfig, broken_rules
from llmtrain.data.store import TokenStore
from llmtrain.errors import ConfigError, DataError, LLMTrainError
from llmtrain.tokenizer.tokenizer import Tokenizer
from llmtrain.tokenizer.tokenizer import load as load_tokenizer
from llmtrain.train.rundir import RunDirectory

logger = logging.getLogger(__name__)


def prepare(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration every rank of the run uses; also writes ``run.json``.

    Raises:
        ConfigError: every broken rule, and all problems of the data, of the tokenizer and of going
            on with the run that is there.
    """
    config = resolve(config)
    run = RunDirectory(Path(config.runs_dir) / str(config.name))
    problems = broken_rules(config, world_size)
    problems += [*_data_problems(config), *_resume_problems(config, run), *_wandb_problems(config)]
    if problems:
        raise ConfigError(problems)
    logs.setup(run.path, rank=0)
    _log_changes(config, run)
    run.record(name=config.name, created=time.time())
    logger.info("run %s of world size %d, config %s", run.path, world_size, config_hash(config))
    return config


def resolve(config: RunConfig) -> RunConfig:
    """Paths made absolute and the run named: the same command gives the same name."""
    path = config.tokenizer.path
    config = replace(
        config,
        data=replace(
            config.data,
            sources={n: _absolute(p) for n, p in config.data.sources.items()},
            validation={n: _absolute(p) for n, p in config.data.validation.items()},
        ),
        tokenizer=replace(config.tokenizer, path=None if path is None else _absolute(path)),
    )
    if config.name is None:
        model = config.model
        shape = f"{model.num_hidden_layers}x{model.hidden_size}"
        config = replace(config, name=f"{shape}-{identity(config)[:8]}")
    return config


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


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
    for section in ("sources", "validation"):
        for name, path in getattr(config.data, section).items():
            try:
                _check_store(TokenStore.open(path), config, tokenizer)
            except DataError as error:
                yield f"data.{section}.{name}: {error}"


def _check_store(store: TokenStore, config: RunConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse a store of another tokenizer or of ids the model has no row for."""
    if tokenizer is not None:
        store.check_tokenizer(tokenizer.hash)
    if store.manifest is not None and store.manifest.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{store.path} has a vocabulary of {store.manifest.vocab_size}, "
            f"model.vocab_size={config.model.vocab_size} is smaller; set model.vocab_size to at "
            f"least {store.manifest.vocab_size}"
        )


def _changes(config: RunConfig, run: RunDirectory) -> tuple[list[str], list[str]]:
    """What differs from the run that is there: (may not change, may change)."""
    if not run.config_yaml.is_file() or not any(run.checkpoints.glob("step-*")):
        return [], []
    return changes(from_yaml(run.config_yaml.read_text(encoding="utf-8")), config)


def _resume_problems(config: RunConfig, run: RunDirectory) -> Iterator[str]:
    """Fields that may not change in the run that is there."""
    for line in _changes(config, run)[0]:
        yield (f"{line} cannot change in the run {run.path}; put it back, or start another run "
               "with name=NEW")  # fmt: skip


def _wandb_problems(config: RunConfig) -> Iterator[str]:
    """Weights & Biases asked for by name, but not installed."""
    if config.monitor.wandb in ("online", "offline"):
        from llmtrain.train.tracker import check_installed

        try:
            check_installed(config.monitor)
        except ConfigError as error:
            yield str(error)


def _log_changes(config: RunConfig, run: RunDirectory) -> None:
    """Say with which other values the run goes on."""
    for line in _changes(config, run)[1]:
        logger.info("run %s goes on with %s", run.path, line)
