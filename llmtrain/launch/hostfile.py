"""DeepSpeed's hostfile, and which of its hosts and slots are used.

chosen(read_hostfile(Path("hostfile")), include="n0@n1:0,2", exclude="")
"""

import re
from collections.abc import Mapping
from pathlib import Path

from llmtrain.errors import ConfigError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of every host, in the order of the file.

    Raises:
        ConfigError: no such file, a line of another form, a host named twice, or no host.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"launch.hostfile={path} cannot be read: {error.strerror}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise ConfigError(f"{path}, line {number}: '{line}' is not of the form 'n0 slots=8'")
        if found[1] in hosts:
            raise ConfigError(f"{path}, line {number}: {found[1]} is named twice; leave one out")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"{path} names no host; write lines 'n0 slots=8'")
    return hosts


def chosen(hosts: Mapping[str, int], include: str, exclude: str) -> dict[str, list[int]]:
    """Slots to use on every host that is left, in the order of ``hosts``.

    Raises:
        ConfigError: a filter names an unknown host or slot, or leaves nothing.
    """
    all_of_them = {host: list(range(slots)) for host, slots in hosts.items()}
    key, text = ("include", include) if include else ("exclude", exclude)
    named = _named(key, text, all_of_them) if text else {}
    if include:
        kept = {host: named.get(host, []) for host in all_of_them}
    else:
        kept = {host: [s for s in slots if s not in named.get(host, ())]
                for host, slots in all_of_them.items()}  # fmt: skip
    if not any(kept.values()):
        raise ConfigError(f"launch.{key}={text} leaves no host; choose fewer")
    return {host: slots for host, slots in kept.items() if slots}


def _named(key: str, text: str, hosts: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Hosts and slots a filter names."""
    found: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if host not in hosts:
            raise ConfigError(f"launch.{key} names {host}; the hosts are {', '.join(hosts)}")
        try:
            slots = [int(number) for number in numbers.split(",")] if colon else hosts[host]
        except ValueError:
            raise ConfigError(f"launch.{key}: '{part}' is not of the form host:0,2") from None
        if wrong := [slot for slot in slots if slot not in hosts[host]]:
            raise ConfigError(
                f"launch.{key} names slot {wrong[0]} of {host}, which has {len(hosts[host])}, "
                "the first is 0"
            )
        found[host] = sorted({*found.get(host, []), *slots})
    return found
