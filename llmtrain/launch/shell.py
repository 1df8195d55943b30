"""Commands and scripts as text: quoting, templates, and what a variable of the environment does.

Invariant: a template names every value it wants as ``{{name}}``; one it does not know, or that is
not given, is an error, never an empty place.

    script = fill(template("slurm.sbatch", None), {"name": "demo", ...})
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import llmtrain
from llmtrain.errors import ConfigError

_PLACE = re.compile(r"\{\{(\w+)\}\}")

WHY: Mapping[str, str] = {
    "OMP_NUM_THREADS": "threads of a rank on the processor",
    "NCCL_DEBUG": "what NCCL says: WARN, INFO",
    "NCCL_IB_DISABLE": "no InfiniBand, even where a driver is loaded",
    "NCCL_IB_HCA": "which network cards NCCL may use",
    "NCCL_IB_TIMEOUT": "how long a port waits for an answer: 4.1 us x 2^N",
    "NCCL_IB_GID_INDEX": "which address of a port RoCE uses: 3 is mostly RoCE v2",
    "NCCL_NET_GDR_LEVEL": "how far a GPU may be from the card that reads its memory",
    "NCCL_SOCKET_IFNAME": "interfaces of the first meeting, and of the data where there is no IB",
    "NCCL_SOCKET_NTHREADS": "threads of a connection over sockets",
    "NCCL_NSOCKS_PERTHREAD": "sockets of each of those threads",
    "GLOO_SOCKET_IFNAME": "interface of gloo, which carries the control messages",
    "FI_PROVIDER": "libfabric takes the Elastic Fabric Adapter",
    "FI_EFA_USE_DEVICE_RDMA": "the adapter reads GPU memory directly",
    "FI_EFA_USE_HUGE_PAGE": "huge pages break in processes that fork",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "a rank whose peer died ends instead of hanging",
    "DS_ACCELERATOR": "DeepSpeed counts sockets as accelerators without it",
}
"""What the variables of ``cluster.environment`` do; others go through without a word."""


def line(words: Sequence[str]) -> str:
    """A command as a shell reads it."""
    return shlex.join(words)


def exports(environment: Mapping[str, str]) -> str:
    """Lines of shell that set variables, each with what it does."""
    lines = [
        f"export {name}={shlex.quote(value)}" + (f"  # {WHY[name]}" if name in WHY else "")
        for name, value in environment.items()
    ]
    return "\n".join(lines)


def folder() -> Path:
    """Folder of the templates: inside the package in a wheel, beside it in a checkout."""
    package = Path(llmtrain.__file__).resolve().parent
    for each in (package / "launch" / "templates", package.parent / "launch"):
        if (each / "slurm.sbatch").is_file():
            return each
    raise ConfigError(f"no launch templates in or beside {package}; install llmtrain again")


def template(name: str, other: str | None) -> str:
    """Text of a template, or of the file that stands in for it.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = folder() / name if other is None else Path(other)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"launch.template={path} cannot be read: {error.strerror}") from error


def fill(text: str, values: Mapping[str, str]) -> str:
    """Put the values in their places; a line that is left empty by an empty value goes.

    Raises:
        ConfigError: a place without a value.
    """
    _check(text, values)
    lines = list[str]()
    for each in text.splitlines():
        filled = _PLACE.sub(lambda place: values[place[1]], each)
        if filled.strip() or not _PLACE.search(each):
            lines.append(filled)
    return "\n".join(lines) + "\n"


def fill_yaml(text: str, values: Mapping[str, Any]) -> str:
    """The same for YAML: a value of any type takes the place, None takes away its key or item.

    Raises:
        ConfigError: a place without a value, or text that is no YAML.
    """
    _check(text, values)
    quoted = re.sub(r"(?<!['\"\w])(\{\{\w+\}\})(?!['\"\w])", r"'\1'", text)
    try:
        tree = yaml.safe_load(quoted)
    except yaml.YAMLError as error:
        raise ConfigError(f"the template is not YAML: {error}") from error
    return yaml.dump(_put(tree, values), Dumper=_Dumper, sort_keys=False, width=1000)


def _check(text: str, values: Mapping[str, Any]) -> None:
    if unknown := sorted(set(_PLACE.findall(text)) - set(values)):
        raise ConfigError(
            f"the template has no value for {', '.join(unknown)}; it may name "
            f"{', '.join(sorted(values))}"
        )


def _put(node: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(node, dict):
        pairs = {key: _put(value, values) for key, value in node.items()}
        return {key: value for key, value in pairs.items() if value is not None}
    if isinstance(node, list):
        return [value for each in node if (value := _put(each, values)) is not None]
    if not isinstance(node, str):
        return node
    if whole := _PLACE.fullmatch(node):
        return values[whole[1]]
    return _PLACE.sub(lambda place: str(values[place[1]]), node)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, so that a script stays readable."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)
