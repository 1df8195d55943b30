"""Take a command line apart, the same way for every console script.

Words that are no option and follow the command are overrides; nothing is composed here, and neither
Hydra nor torch is imported.

    arguments = parse(["train", "model=llama_tiny", "--cfg", "job"], COMMANDS, OPTIONS)
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from llmtrain.errors import ConfigError

OPTIONS = ("--cfg", "--config-dir", "--help")
"""Options of every console script."""
MULTIRUN = "--multirun"
"""Option of scripts that run sweeps."""

_SHORT = {"-c": "--cfg", "-cd": "--config-dir", "-h": "--help", "-m": MULTIRUN}
_VALUE_OF = {"--cfg": "job", "--config-dir": "DIR"}
_OF_A_LAUNCHER = ("--local_rank", "--local-rank")


@dataclass(slots=True)
class Arguments:
    """The command line, taken apart."""

    command: str | None = None
    """Name of the command; None where none was given."""
    overrides: list[str] = field(default_factory=list)
    """Words after the command, ``key=value`` or ``group=NAME``."""
    config_dirs: list[Path] = field(default_factory=list)
    """Folders with more configuration groups."""
    show: bool = False
    """Whether to print the configuration and stop."""
    multirun: bool = False
    """Whether to run every combination of comma-separated values."""
    help: bool = False
    """Whether to print the help and stop."""
    local_rank: int | None = None
    """Number of this process on its machine, where the launcher gave it as an option."""


def parse(
    words: Sequence[str], commands: Collection[str], options: Sequence[str] = OPTIONS
) -> Arguments:
    """Take a command line apart.

    Raises:
        ConfigError: an unknown command or option, an option without its value.
    """
    arguments, rest = Arguments(), list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        option = _SHORT.get(name, name)
        if name in _OF_A_LAUNCHER and value.isdecimal():  # deepspeed puts it before the command
            arguments.local_rank = int(value)
            continue
        if option in _VALUE_OF and not equals:
            if not rest:
                raise ConfigError(f"{name} needs a value; write {name}={_VALUE_OF[option]}")
            value = rest.pop(0)
        if option.startswith("-"):
            if option not in options or (equals and option not in _VALUE_OF):
                raise ConfigError(f"unknown option {word}{near(word, options)}")
            _set_option(arguments, option, value)
        elif arguments.command is not None:
            arguments.overrides.append(word)
        elif word in commands:
            arguments.command = word
        else:
            raise ConfigError(f"unknown command {word}{near(word, commands)}")
    return arguments


def verbatim(overrides: Sequence[str], fields: Collection[str]) -> list[str]:
    """Quote the values of some fields, so that addresses and ids reach them as they are."""
    return [_quoted(word) if word.partition("=")[0] in fields else word for word in overrides]


def _quoted(word: str) -> str:
    key, _, value = word.partition("=")
    if value[:1] in ("'", '"') or value == "null":
        return word
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


def _set_option(arguments: Arguments, option: str, value: str) -> None:
    if option == "--config-dir":
        arguments.config_dirs.append(Path(value))
    elif option == "--cfg":
        if value != "job":
            raise ConfigError(f"--cfg={value} is unknown; use --cfg job")
        arguments.show = True
    elif option == MULTIRUN:
        arguments.multirun = True
    else:
        arguments.help = True


def near(word: str, choices: Collection[str]) -> str:
    """End a sentence about ``word`` with the nearest of ``choices``, or with all of them."""
    close = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; use one of {', '.join(choices)}"
