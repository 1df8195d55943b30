"""Two hosts on this machine: network namespaces joined by a veth pair, each with an address.

Neither reaches the machine's own network. ``ssh`` among them is a script of the same form that
enters the namespace; there is no sshd. Needs root and iproute2.

    with Hosts(Path("hosts")) as hosts:
        subprocess.run(hosts.command(0, ["ip", "address"]))
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "veth0"


def missing() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if shutil.which("ip") is None:
        return "needs ip: apt-get install iproute2"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    trial = f"llmtrain-trial-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", trial], capture_output=True, check=False).returncode:
        return "this container may not make network namespaces"
    subprocess.run(["ip", "netns", "delete", trial], check=True)
    return None


class Hosts:
    """Two namespaces, gone when the context ends."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"llmtrain-{os.getpid()}-{number}" for number in range(2)]
        self.links = [f"ve{os.getpid()}n{number}" for number in range(2)]
        self.ssh = folder / "ssh"

    def __enter__(self) -> Self:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
            for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
                _ip("link", "set", link, "netns", name)
                _ip("-n", name, "link", "set", link, "name", INTERFACE)
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
                _ip("-n", name, "link", "set", "lo", "up")
            self._write_ssh()
        except BaseException:
            self._delete()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._delete()

    def command(self, host: int, words: Sequence[str]) -> list[str]:
        """A command on one of the hosts."""
        return ["ip", "netns", "exec", self.names[host], *words]

    def _write_ssh(self) -> None:
        """``ssh ADDRESS COMMAND``: a shell in the namespace with that address."""
        cases = "\n".join(
            f'{address}) exec ip netns exec {name} sh -c "$*" ;;'
            for name, address in zip(self.names, ADDRESSES, strict=True)
        )
        self.ssh.write_text(
            f'#!/bin/sh\nhost=$1\nshift\ncase "$host" in\n{cases}\nesac\nexit 255\n'
        )
        self.ssh.chmod(0o755)

    def _delete(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(['ip', *words])}: {done.stderr.strip()}")
