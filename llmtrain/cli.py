"""The ``llmtrain`` command line: which command, composed from what, run by which function.

Invariant: nothing here imports torch before the configuration is known to be right, and under a
launcher rank 0 alone composes it; the other ranks build from the bytes it publishes.

    llmtrain train experiment=demo data.sources.mine=stores/mine
    torchrun --nproc-per-node 2 -m llmtrain train parallel.pp=2 ...
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

from llmtrain import logs
from llmtrain.config.arguments import MULTIRUN, OPTIONS, Arguments, parse, verbatim
from llmtrain.config.bench import BenchConfig
from llmtrain.config.commands import ParityConfig, ReportConfig
from llmtrain.config.doctor import DoctorConfig
from llmtrain.config.generate import EvalConfig, GenerateConfig
from llmtrain.config.interop import ExportConfig, ImportConfig
from llmtrain.config.launch import VERBATIM as LAUNCH_VERBATIM
from llmtrain.config.launch import LaunchConfig
from llmtrain.config.launch import split as split_launch
from llmtrain.config.load import (
    config_hash,
    load,
    options,
    root_groups,
    to_yaml,
)
from llmtrain.config.plan import PlanConfig
from llmtrain.config.run import RunConfig, check
from llmtrain.config.selftest import SelftestConfig
from llmtrain.config.selftest import split as split_selftest
from llmtrain.config.strict import build
from llmtrain.config.trace import TraceConfig
from llmtrain.errors import ConfigError

logger = logging.getLogger(__name__)

MAIN_OPTIONS = """\
options of every command:
  key=value           set a field: model.num_hidden_layers=4 data.sources.mine=DIR
  group=NAME          choose a file of a group: model=llama_demo experiment=demo
  --cfg job           print the configuration that would be used, and stop
  --multirun, -m      run every combination of comma-separated values: optimizer.lr=1e-3,3e-3
  --config-dir DIR    more groups from DIR, for example DIR/experiment/mine.yaml
  --help, -h          this text, or that of one command
"""
_STATUS = """\
exit status:
  0 done, or nothing left to do      1 a fault: the same command goes on from the newest checkpoint
  2 wrong input, nothing was done    3 stopped on request, with a checkpoint: likewise
  4 stopped for a person: RUN/status.json and docs/operations.md say what to do
"""


SPLITS: Mapping[type[Any], Callable[[list[str]], tuple[list[str], list[str]]]] = {
    LaunchConfig: split_launch,
    SelftestConfig: split_selftest,
}
"""Commands that take a training command line, and what takes their own words out of it."""

STOPPED = 3
"""Exit status of a run that was asked to stop and saved."""
NEEDS_A_PERSON = 4
"""Exit status of a run that another start would end the same way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: root of its configuration, schema, and the function that runs it."""

    help: str
    """One line."""
    schema: type[Any]
    """Dataclass of its configuration."""
    entry: str
    """``module:function``, called with the configuration; returns the exit status."""
    prepare: str | None = None
    """``module:function`` that rank 0 calls with (config, world size, held) before it publishes.

    It returns the configuration to use, None where nothing is left to do; what it puts on the
    ExitStack ``held`` stays until the command ends.
    """
    example: str
    """Overrides that show it at work."""
    ranks: bool = False
    """Whether a launcher may start it on several ranks."""
    verbatim: tuple[str, ...] = ()
    """Fields whose values are taken as they are written, whatever characters they hold."""


COMMANDS = {
    "train": Command(
        help="train a model; the same command again continues the run",
        schema=RunConfig,
        entry="llmtrain.build:train",
        prepare="llmtrain.prepare:prepare",
        example="experiment=demo data.sources.mine=stores/mine",
        ranks=True,
    ),
    "parity": Command(
        help="compare loss and every gradient of a layout with one device",
        schema=ParityConfig,
        entry="llmtrain.parity:main",
        example="model=llama_demo parallel.pp=2 parallel.schedule=1f1b",
        ranks=True,
    ),
    "plan": Command(
        help="memory, step time and days of a run on GPUs that are not here; finds a layout",
        schema=PlanConfig,
        entry="llmtrain.planner.command:main",
        example="model=llama3_8b num_gpus=64 gpu=H100 search=true",
    ),
    "bench": Command(
        help="tokens/s, MFU, memory and time by part of training, or of single kernels",
        schema=BenchConfig,
        entry="llmtrain.bench.command:main",
        example="model=llama_demo engine.compile=true profile=true",
        ranks=True,
    ),
    "generate": Command(
        help="sample text from a run",
        schema=GenerateConfig,
        entry="llmtrain.eval.generate:main",
        example="run=runs/demo 'prompt=Return the' max_new_tokens=64",
        ranks=True,
        verbatim=("run", "prompts_file", "out"),
    ),
    "eval": Command(
        help="held-out loss of a run per source, or tasks of lm-evaluation-harness",
        schema=EvalConfig,
        entry="llmtrain.eval.command:main",
        example="run=runs/demo    (or tasks=[hellaswag,arc_easy])",
        ranks=True,
        verbatim=("run",),
    ),
    "import": Command(
        help="make a checkpoint to train from out of a Hugging Face folder",
        schema=ImportConfig,
        entry="llmtrain.interop.command:import_main",
        example="from=Qwen2.5-0.5B run=runs/qwen vocab_multiple=128",
        verbatim=("from", "run", "adapter"),
    ),
    "export": Command(
        help="write a checkpoint of a run as a Hugging Face folder",
        schema=ExportConfig,
        entry="llmtrain.interop.command:export_main",
        example="run=runs/demo to=demo-hf dtype=bf16",
        verbatim=("run", "to", "chat_template", "base"),
    ),
    "report": Command(
        help="one self-contained HTML page of a run, of several beside each other, or of a sweep",
        schema=ReportConfig,
        entry="llmtrain.report.page:main",
        example="run=runs/demo",
    ),
    "trace": Command(
        help="the documents in the batch of a step, or the steps that saw a document",
        schema=TraceConfig,
        entry="llmtrain.trace.command:main",
        example="run=runs/demo step=12 text=true    (or url=ADDRESS, doc=ID; verify, losses)",
        verbatim=("url", "doc"),
    ),
    "launch": Command(
        help="start a training run here, under Slurm, on Kubernetes, with one changed word",
        schema=LaunchConfig,
        entry="llmtrain.launch.command:main",
        example="target=slurm cluster=infiniband dry_run=true experiment=demo",
        verbatim=LAUNCH_VERBATIM,
    ),
    "selftest": Command(
        help="prove on a training command that a killed run goes on bit by bit",
        schema=SelftestConfig,
        entry="llmtrain.selftest.command:main",
        example="resume parallel.pp=2 data.sources.mine=stores/mine",
    ),
    "doctor": Command(
        help="what this machine has, and what is in the way of a run on it",
        schema=DoctorConfig,
        entry="llmtrain.doctor.command:main",
        example="runs_dir=/shared/runs    (or quick=true, json=true)",
    ),
}  # fmt: skip
"""Commands by name; each has its root in ``conf/NAME.yaml``."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher's environment says about this process."""

    rank: int = 0
    world_size: int = 1
    launched: bool = False

    @classmethod
    def from_environment(cls) -> "Launch":
        """RANK and WORLD_SIZE as torchrun, deepspeed and the Slurm script set them."""
        ranks = (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        return cls(*ranks, launched="RANK" in os.environ)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (0, 1 fault, 2 input, 3 stopped, 4 a person)."""
    launch = Launch.from_environment()
    if launch.launched and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # its launcher was shielded, it is not
    words = list(sys.argv[1:] if argv is None else argv)
    return logs.run_command(lambda: _dispatch(words, launch), launch.rank)


def _dispatch(words: list[str], launch: Launch) -> int:
    try:
        arguments = parse(words, COMMANDS, (*OPTIONS, MULTIRUN))
        if arguments.local_rank is not None:
            os.environ["LOCAL_RANK"] = str(arguments.local_rank)
        _check_launch(arguments, launch)
    except ConfigError:
        if launch.rank == 0:
            raise
        time.sleep(1.0)  # every rank sees the same; a launcher ends rank 0 when one leaves
        return 2
    if arguments.help or arguments.command is None:
        if launch.rank == 0:
            sys.stdout.write(help_text(arguments.command))
        return 0 if arguments.help else 2
    command = COMMANDS[arguments.command]
    arguments.overrides = verbatim(arguments.overrides, command.verbatim)
    if arguments.show:
        if launch.rank == 0:
            sys.stdout.write(to_yaml(_compose(command, arguments)))
        return 0
    if arguments.multirun and arguments.command == "launch":
        raise ConfigError(
            "llmtrain launch starts one run; for several, target=slurm "
            '\'launch.array=["optimizer.lr=1e-3","optimizer.lr=3e-3"]\''
        )
    if arguments.multirun:
        return _multirun(command, arguments)
    with ExitStack() as held:
        config, status = _agreed(command, arguments, launch, held)
        if config is not None:
            status = _call(command.entry, config)
    # A launcher would restart a rank that ended on purpose; status.json says what happened.
    return 0 if launch.launched and status in (STOPPED, NEEDS_A_PERSON) else status


def _check_launch(arguments: Arguments, launch: Launch) -> None:
    """Refuse what makes no sense on several ranks."""
    if launch.world_size == 1 or arguments.command is None:
        return
    if arguments.multirun or not COMMANDS[arguments.command].ranks:
        what = "--multirun" if arguments.multirun else f"llmtrain {arguments.command}"
        raise ConfigError(
            f"{what} runs in one process, started were {launch.world_size}; leave torchrun out"
        )


def help_text(name: str | None) -> str:
    """Help of the whole, or of one command with its groups."""
    if name is None:
        lines = [f"  {n:<10}{c.help}" for n, c in COMMANDS.items()]
        return (
            "usage: llmtrain COMMAND [key=value ...] [options]\n\n"
            "commands:\n" + "\n".join(lines) + f"\n\n{MAIN_OPTIONS}\n{_STATUS}\n"
            "llmtrain COMMAND --help lists the groups of a command.\n"
        )
    command = COMMANDS[name]
    rows = [
        f"  {group:<12}{', '.join(options(group))} [{default or 'none'}]"
        for group, default in root_groups(name).items()
    ]
    table = "groups, their files and [the default]:\n" + "\n".join(rows) + "\n\n" if rows else ""
    return (
        f"usage: llmtrain {name} [key=value ...] [options]\n\n{command.help}\n\n"
        f"example:\n  llmtrain {name} {command.example}\n\n{table}{MAIN_OPTIONS}\n"
        f"llmtrain {name} --cfg job shows every field and its value; docs/config.md explains.\n"
    )


def _compose(command: Command, arguments: Arguments) -> Any:
    """The configuration as the command line has it, built but not checked against the world."""
    root = str(arguments.command)
    if command.schema not in SPLITS:
        return load(root, arguments.overrides, command.schema, arguments.config_dirs)
    own, training = SPLITS[command.schema](arguments.overrides)
    config = load(root, own, command.schema, arguments.config_dirs)
    folders = tuple(str(folder.resolve()) for folder in arguments.config_dirs)
    return replace(config, overrides=tuple(training), config_dirs=folders)


def _agreed(
    command: Command, arguments: Arguments, launch: Launch, held: ExitStack
) -> tuple[Any, int]:
    """The same configuration on all ranks; None and an exit status where rank 0 has none."""
    logs.setup(None, launch.rank)
    if launch.world_size == 1:
        return _prepared(command, arguments, 1, held), 0
    from llmtrain.startup import agree_on_config

    world_size = launch.world_size
    compose_here = partial(_prepared, command, arguments, world_size, held)
    return agree_on_config(command.schema, launch.rank, compose_here)


def _prepared(command: Command, arguments: Arguments, world_size: int, held: ExitStack) -> Any:
    """The configuration that every rank will use, if any; called on rank 0 alone."""
    return _prepare(command, _compose(command, arguments), world_size, held)


def _prepare(command: Command, config: Any, world_size: int, held: ExitStack) -> Any:
    if command.prepare is not None:
        return _call(command.prepare, config, world_size, held)
    if isinstance(config, ParityConfig | BenchConfig):
        check(config, None if world_size == 1 else world_size)
    return config


def _multirun(command: Command, arguments: Arguments) -> int:
    """Run a sweep: every job is a run of its own; returns the worst exit status."""
    from llmtrain.sweep.command import multirun, sort_out
    from llmtrain.sweep.task import SweepTask

    logs.setup(None)
    fixed, swept, for_hydra = sort_out(arguments.overrides)
    dirs = [f"--config-dir={folder}" for folder in arguments.config_dirs]
    task = SweepTask(
        command=(str(arguments.command), "--multirun", *dirs, *arguments.overrides),
        fixed=fixed,
        swept=swept,
        run=partial(_run_job, command),
        config_dirs=tuple(arguments.config_dirs),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
    return multirun(str(arguments.command), task, for_hydra)


def _run_job(command: Command, tree: dict[str, object]) -> int:
    """One job of a sweep in this process; who stops it means the sweep."""
    logs.setup(None)
    status = logs.run_command(lambda: _job(command, tree))
    if status in (STOPPED, logs.INTERRUPTED):
        raise SystemExit(status)
    return status


def _job(command: Command, tree: dict[str, object]) -> int:
    """Prepare and run; a run is named after all of its fields, so that jobs never meet."""
    config = build(command.schema, tree)
    if isinstance(config, RunConfig):
        config = replace(config, name=f"{config.name or 'sweep'}-{config_hash(config)}")
    with ExitStack() as held:
        config = _prepare(command, config, 1, held)
        status: int = 0 if config is None else _call(command.entry, config)
    return status


def _call(target: str, *values: Any) -> Any:
    """Import ``module:function`` and call it."""
    module, _, function = target.partition(":")
    entry: Callable[..., Any] = getattr(import_module(module), function)
    return entry(*values)
