"""Names, clock and fast network of this machine.

for finding in [*hostname(), *clock(), *infiniband()]: ...
"""

import ctypes
import ipaddress
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from llmtrain.doctor.finding import Finding

INFINIBAND = Path("/sys/class/infiniband")
"""Where the kernel lists InfiniBand and RoCE devices."""

_UNSYNCHRONISED = 0x0040
_OLDEST_CLOCK = 1735689600
"""2025-01-01: a clock before it was never set."""


def hostname() -> Iterator[Finding]:
    """The name other machines would use, and what it stands for."""
    name = socket.gethostname()
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError as error:
        yield Finding(
            name="host name", value=f"{name} has no address ({error.strerror})", verdict="bad",
            advice=f"ranks find each other by it: add 'ADDRESS {name}' to /etc/hosts",
        )  # fmt: skip
        return
    value = f"{name} is {', '.join(sorted(found))}"
    if all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found):
        yield Finding(
            name="host name", value=value, verdict="warn",
            advice="one machine alone is fine; with several, give addresses and not names "
            "(launch.head, launch.address), or correct /etc/hosts",
        )  # fmt: skip
    else:
        yield Finding(name="host name", value=value)


def clock() -> Iterator[Finding]:
    """The time, and whether something keeps it right."""
    now = time.time()
    value = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < _OLDEST_CLOCK:
        advice = "the clock was never set: certificates fail; start chrony or systemd-timesyncd"
        yield Finding(name="clock", value=value, verdict="bad", advice=advice)
        return
    # struct timex of the kernel: modes, offset, freq, maxerror, esterror, status, ...
    words = (ctypes.c_long * 64)()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(words))
    if state < 0:
        yield Finding(name="clock", value=f"{value}, unknown whether it is kept right")
    elif words[5] & _UNSYNCHRONISED:
        yield Finding(
            name="clock", value=f"{value}, nothing keeps it right", verdict="warn",
            advice="logs of several nodes will not match: start chrony or systemd-timesyncd",
        )  # fmt: skip
    else:
        yield Finding(name="clock", value=f"{value}, kept right")


def infiniband(devices: Path = INFINIBAND) -> Iterator[Finding]:
    """Every port of every InfiniBand or RoCE device."""
    ports = sorted(devices.glob("*/ports/*"))
    if not ports:
        yield Finding(name="InfiniBand", value="none; nodes would talk over Ethernet sockets")
    for port in ports:
        name = f"{port.parent.parent.name} port {port.name}"
        state, rate, link = (_read(port / each) for each in ("state", "rate", "link_layer"))
        value = f"{link or 'unknown link'}, {rate or 'unknown rate'}, {state or 'unknown state'}"
        if "ACTIVE" in state:
            yield Finding(name=name, value=value)
        else:
            yield Finding(
                name=name, value=value, verdict="warn",
                advice=f"NCCL cannot use it; look at ibstat and the cable, or leave it out with "
                f"NCCL_IB_HCA=^{port.parent.parent.name}",
            )  # fmt: skip


def taken(port: int) -> str | None:
    """Why nothing could listen on a TCP port of this machine; None where something could."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
