"""Looks at one node before its GPUs are taken: what the doctor asks, and what this run needs.

Invariant: nothing is written that stays, torch is not imported, every problem names the node.

    python -m llmtrain.launch.preflight config=9d1c7a20c0ffee11 gpus=8 port=29500 -- experiment=demo
"""

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtrain import logs
from llmtrain.config.doctor import DoctorConfig
from llmtrain.config.load import config_hash, load
from llmtrain.config.run import RunConfig
from llmtrain.doctor import command, gpus, network
from llmtrain.errors import ConfigError
from llmtrain.launch.supervise import arguments

logger = logging.getLogger(__name__)

_LIMIT_S = 20.0


class WrongInput(str):
    """A problem that every node has: the words themselves, or other code."""


def preflight(
    words: Sequence[str],
    *,
    expected: str | None = None,
    num_gpus: int = 0,
    port: int | None = None,
    head: str | None = None,
) -> list[str]:
    """What keeps a run from starting on this node, one sentence each.

    Args:
        words: the training command line.
        expected: hash of the configuration it comes to where the launch was made.
        num_gpus: GPUs the node has to have.
        port: TCP port that has to be free; None where another node listens.
        head: name or address of the node where the ranks meet.
    """
    try:
        config = _compose(words)
    except ConfigError as error:
        return [WrongInput(f"{problem} (where the launch was made this was right: other code or "
                           "groups?)") for problem in error.problems]  # fmt: skip
    found = list[str]()
    if expected is not None and config_hash(config) != expected:
        found.append(WrongInput(
            f"the same words come to configuration {config_hash(config)}, where the launch was "
            f"made to {expected}; install the same version of llmtrain and of conf/ on all nodes"
        ))  # fmt: skip
    return [
        *found, *_doctor(config), *_gpus(num_gpus), *_missing(config), *_unreachable(port, head)
    ]  # fmt: skip


def _compose(words: Sequence[str]) -> RunConfig:
    option = "--config-dir="
    folders = [Path(word.removeprefix(option)) for word in words if word.startswith(option)]
    others = [word for word in words if not word.startswith(option)]
    return load("train", others, RunConfig, folders)


def _doctor(config: RunConfig) -> Iterator[str]:
    """What the doctor calls bad; what it only warns of is logged."""
    found = command.examine(DoctorConfig(quick=True, runs_dir=config.runs_dir))
    for _, finding in found:
        text = f"{finding.name}: {finding.value}; {finding.advice}"
        if finding.verdict == "bad":
            yield text
        elif finding.verdict == "warn":
            logger.warning("%s", text)


def _gpus(expected: int) -> Iterator[str]:
    try:
        found = len(gpus.listed(_LIMIT_S)) if expected else 0
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        yield f"its GPUs cannot be counted: {error}"
        return
    if found < expected:
        yield f"{found} GPUs, the launch needs {expected}; look at nvidia-smi and cluster settings"


def _missing(config: RunConfig) -> Iterator[str]:
    """Which files of the run this node does not see."""
    named = [("tokenizer.path", config.tokenizer.path)]
    for section in ("sources", "validation"):
        for name, at in getattr(config.data, section).items():
            each = (at,) if isinstance(at, str) else at
            named += [(f"data.{section}.{name}", path) for path in each]
    for name, path in named:
        if path is not None and "://" not in path and not Path(path).expanduser().exists():
            yield f"{name}={path} is not there; use a folder that every node sees"


def _unreachable(port: int | None, head: str | None) -> Iterator[str]:
    if port is not None and (reason := network.taken(port)) is not None:
        yield f"port {port} cannot be used ({reason}); set cluster.port to a free one"
    if head is not None:
        try:
            socket.getaddrinfo(head, None)
        except OSError as error:
            yield f"{head}, where the ranks meet, has no address here ({error.strerror})"


def main(words: Sequence[str]) -> int:
    """Look at this node; returns 0, else 2 for wrong words, 1 for a node that is not ready."""
    given, rest = arguments(words)
    node = given.get("node") or socket.gethostname()
    logs.setup(None)
    handler = logging.getLogger().handlers[-1]
    handler.setFormatter(logging.Formatter(f"{node}: %(levelname)s %(message)s"))
    problems = preflight(
        rest,
        expected=given.get("config"),
        num_gpus=int(given.get("gpus", "0")),
        port=int(given["port"]) if "port" in given else None,
        head=given.get("head"),
    )
    for problem in problems:
        sys.stderr.write(f"{node}: {problem}\n")
    if not problems:
        logger.info("ready")
    return 0 if not problems else 2 if any(isinstance(p, WrongInput) for p in problems) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
