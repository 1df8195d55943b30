"""How the ranks of one run come to the same configuration and know that they run the same code.

Rank 0 composes, checks and publishes bytes over the rendezvous store; the others build from those
bytes and never read a configuration from disk. A configuration error is published too, so that
every rank leaves at once and rank 0 alone prints it.
"""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import blake3

import llmtrain
from llmtrain import logs
from llmtrain.config.load import from_yaml, to_yaml
from llmtrain.config.strict import build
from llmtrain.errors import ConfigError
from llmtrain.parallel.place import publish_config

T = TypeVar("T")


def agree_on_config(
    schema: type[T], rank: int, compose: Callable[[], T | None]
) -> tuple[T | None, int]:
    """The configuration rank 0 composes, on every rank; or none and an exit status.

    Nothing is left to do where ``compose`` gives None: status 0. Rank 0 reports an error before it
    publishes it: a launcher ends all ranks when one leaves.

    Raises:
        ConfigError: this rank runs other code than rank 0.
    """
    if rank == 0:
        try:
            config, status = compose(), 0
        except (Exception, KeyboardInterrupt) as error:
            config, status = None, logs.report(error)
        if config is None:
            publish_config(json.dumps({"status": status}).encode())
            return None, status
        message = {"code": code_version(), "config": to_yaml(config)}
        publish_config(json.dumps(message).encode())
        return config, 0
    received = json.loads(publish_config(None))
    if "status" in received:
        return None, int(received["status"])
    if received["code"] != code_version():
        raise ConfigError(
            f"this rank runs code {code_version()} in {Path(llmtrain.__file__).parent}, rank 0 "
            f"runs {received['code']}; install the same version on every machine"
        )
    return build(schema, from_yaml(received["config"])), 0


def code_version() -> str:
    """Version of this package, hash of its source, and version of torch."""
    package = Path(llmtrain.__file__).parent
    digest = blake3.blake3()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{_version('llmtrain')}+{digest.hexdigest(length=6)} torch {_version('torch')}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "0"
