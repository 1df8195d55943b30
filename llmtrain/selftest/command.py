"""``llmtrain selftest resume``: k + m steps against k steps, SIGKILL, and m in fresh processes.

Every part is a real run, started by ``llmtrain launch target=local`` with as many ranks as the
layout needs. Compared are parameters, optimizer state and the losses of the m steps.

Invariant: the exit status is 0 only if every bit is the same.

    llmtrain selftest resume parallel.pp=2 engine.precision=fp32
"""

import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.checkpoint import archive
from llmtrain.config.load import load
from llmtrain.config.run import RunConfig
from llmtrain.config.selftest import SelftestConfig
from llmtrain.errors import ConfigError
from llmtrain.run.directory import RunDirectory
from llmtrain.selftest.children import Child
from llmtrain.selftest.compare import compare, table
from llmtrain.selftest.random_store import write_random_store

logger = logging.getLogger(__name__)

DEFAULTS = (
    "training.num_tokens=1e6", "training.sequence_length=64", "training.global_batch_tokens=256",
    "engine.deterministic=true",
)  # fmt: skip
"""Words before the user's, which decide."""


def main(config: SelftestConfig) -> int:
    """Run the test and print its table; 0 where it passes, else 1."""
    with _folder(config) as folder:
        words = _words(config, folder)
        done = config.steps + config.more_steps
        straight, killed = RunDirectory(folder / "straight"), RunDirectory(folder / "killed")
        logger.info("1 of 3: %d steps without a stop", done)
        stop = f"training.stop_at_step={done}"
        Child([*words, "name=straight", stop], folder / "straight.log").finish()
        logger.info("2 of 3: the same, killed once step %d is saved", config.steps)
        _kill_after_save(Child([*words, "name=killed"], folder / "killed.log"), killed, config)
        logger.info("3 of 3: %d more steps in fresh processes", config.more_steps)
        Child([*words, "name=killed", stop], folder / "resumed.log").finish()
        findings = compare(straight, killed, config.steps, done)
    exact = all(finding.same for finding in findings)
    sys.stdout.write(table(findings))
    sys.stdout.write(
        f"{config.test}: {'exact' if exact else 'NOT EXACT'}: {config.steps} + {config.more_steps} "
        f"steps against {done}\n"
    )
    return 0 if exact else 1


@contextmanager
def _folder(config: SelftestConfig) -> Iterator[Path]:
    """Where the runs are: kept, or gone at the end."""
    if config.out is None:
        with tempfile.TemporaryDirectory(prefix="selftest-") as name:
            yield Path(name)
        return
    folder = Path(config.out).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"out={config.out} is not empty; delete it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _words(config: SelftestConfig, folder: Path) -> list[str]:
    """The training command line of all runs: the user's, with what the test needs."""
    words = [*DEFAULTS, *config.overrides]
    if not any(word.startswith(("model=", "experiment=")) for word in words):
        words = ["model=llama_demo", *words]
    folders = [Path(each) for each in config.config_dirs]
    training = load("train", words, RunConfig, folders)
    done = config.steps + config.more_steps
    has, least = training.training.num_steps, (done + 1) * training.training.global_batch_tokens
    if has <= done:
        raise ConfigError(
            f"steps + more_steps={done} must be less than the {has} steps of the run; use "
            f"training.num_tokens={least} or more, or fewer steps"
        )
    if not training.data.sources:
        store = write_random_store(folder / "store", training)
        words.append(f"data.sources.random={store}")
    return [
        *(f"--config-dir={each}" for each in folders), *words, f"runs_dir={folder}",
        f"checkpoint.every_steps={config.steps}", "monitor.log_every_steps=1",
        "monitor.wandb=disabled",
    ]  # fmt: skip


def _kill_after_save(child: Child, run: RunDirectory, config: SelftestConfig) -> None:
    """Kill every process of the run as soon as the checkpoint is there.

    What the run saved besides is deleted, as if the kill had come sooner.
    """
    child.kill_when(lambda: any(s == config.steps for s, _ in archive.scan(run.checkpoints)))
    for step, path in archive.scan(run.checkpoints):
        if step > config.steps:
            archive.remove(path)
    run.clear_status()
