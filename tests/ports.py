"""Ports of this machine for servers of tests.

What the kernel gives a server that asks for any port it may give to a connection a moment later,
before the server listens. Those outside its range for connections are left alone.
"""

import random
import socket
from pathlib import Path

_FIRST = 10_000
_DRAW = random.SystemRandom()  # a seed would give all workers the same


def free_ports(count: int) -> list[int]:
    """Return different ports that nothing listens on and no connection will be given."""
    found: set[int] = set()
    beyond = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while len(found) < count:
        port = _DRAW.randrange(_FIRST, beyond)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.add(port)
    return sorted(found)
