"""The ``llmtrain-data`` command line: composes a configuration and runs one command.

Nothing but the configuration is imported before it is known to be right, so ``--help`` and wrong
input answer at once. Exit status: 0 done, 2 wrong input (one message), 1 a fault.

    llmtrain-data run pipeline=demo input.web=crawl/*.warc.gz out=corpus num_workers=2
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from data_pipeline.config import (
    RunConfig,
    SampleConfig,
    TokenizeConfig,
    TrainTokenizerConfig,
    VerifyConfig,
)
from llmtrain import logs
from llmtrain.config.load import load, options, to_yaml
from llmtrain.errors import ConfigError

OPTIONS = """\
options of every command:
  key=value           set a field: out=corpus pipeline.split.validation_share=0.01
  --cfg job           print the configuration that would be used, and stop
  --config-dir DIR    more pipelines from DIR/pipeline/NAME.yaml
  --help, -h          this text, or that of one command
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command; its root is ``conf/data_NAME.yaml``, its function ``commands.NAME``."""

    help: str
    """One line."""
    schema: type[Any]
    """Dataclass of its configuration."""
    example: str
    """Arguments that show it at work."""


COMMANDS = {
    "run": Command(
        help="raw crawl to token stores, resumable at every shard",
        schema=RunConfig,
        example="pipeline=c4_fast 'input.web=crawl/*.warc.gz' out=corpus num_workers=8",
    ),
    "sample": Command(
        help="make a crawl from the documentation on this machine",
        schema=SampleConfig,
        example="out=demo/crawl",
    ),
    "tokenizer": Command(
        help="train a tokenizer on clean text",
        schema=TrainTokenizerConfig,
        example="'input=data/*.jsonl.zst' vocab_size=32000 out=tokenizer",
    ),
    "tokenize": Command(
        help="clean text to a token store",
        schema=TokenizeConfig,
        example="'input=data/*.jsonl.zst' text_field=text tokenizer=tokenizer out=stores/mine",
    ),
    "verify": Command(
        help="check every byte of a token store against its manifest",
        schema=VerifyConfig,
        example="store=stores/mine",
    ),
}
"""Commands by name."""


@dataclass(slots=True)
class Arguments:
    """The command line, taken apart."""

    command: str | None = None
    overrides: list[str] = field(default_factory=list)
    config_dirs: list[Path] = field(default_factory=list)
    show: bool = False
    help: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return logs.run_command(lambda: _dispatch(parse(words)))


def _dispatch(arguments: Arguments) -> int:
    if arguments.help or arguments.command is None:
        sys.stdout.write(help_text(arguments.command))
        return 0 if arguments.help else 2
    command = COMMANDS[arguments.command]
    root = f"data_{arguments.command}"
    config = load(root, arguments.overrides, command.schema, arguments.config_dirs)
    if arguments.show:
        sys.stdout.write(to_yaml(config))
        return 0
    logs.setup(None)
    try:
        module = import_module("data_pipeline.commands")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("data_pipeline", "llmtrain")):
            raise
        raise ConfigError(
            f"the data pipeline needs {error.name}; pip install 'llmtrain[data]'"
        ) from error
    status: int = getattr(module, arguments.command)(config)
    return status


def parse(words: Sequence[str]) -> Arguments:
    """Take a command line apart.

    Raises:
        ConfigError: an unknown command or option, an option without its value.
    """
    arguments, rest = Arguments(), list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "--cfg"):
            if not equals and not rest:
                raise ConfigError(f"{name} needs a value")
            value = value if equals else rest.pop(0)
            if name == "--config-dir":
                arguments.config_dirs.append(Path(value))
            elif value == "job":
                arguments.show = True
            else:
                raise ConfigError(f"--cfg={value} is unknown; use --cfg job")
        elif word in ("--help", "-h"):
            arguments.help = True
        elif word.startswith("-"):
            raise ConfigError(f"unknown option {word}; use --cfg, --config-dir or --help")
        elif arguments.command is not None:
            arguments.overrides.append(word)
        elif word in COMMANDS:
            arguments.command = word
        else:
            close = get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(COMMANDS)}"
            raise ConfigError(f"unknown command {word}; {hint}")
    return arguments


def help_text(name: str | None) -> str:
    """Help of the whole, or of one command."""
    if name is None:
        lines = [f"  {n:<11}{c.help}" for n, c in COMMANDS.items()]
        return (
            "usage: llmtrain-data COMMAND [key=value ...] [options]\n\n"
            "commands:\n" + "\n".join(lines) + f"\n\n{OPTIONS}\n"
            "llmtrain-data COMMAND --help shows an example.\n"
        )
    command = COMMANDS[name]
    pipelines = f"pipeline=NAME, one of: {', '.join(options('pipeline'))}\n\n"
    return (
        f"usage: llmtrain-data {name} [key=value ...] [options]\n\n{command.help}\n\n"
        f"example:\n  llmtrain-data {name} {command.example}\n\n"
        f"{pipelines if name == 'run' else ''}{OPTIONS}\n"
        f"llmtrain-data {name} --cfg job shows every field and its value; docs/data.md explains.\n"
    )
