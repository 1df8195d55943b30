"""Files and short messages between the nodes of a run, over sockets of their own.

The save threads use it behind the training, whose process groups belong to the main thread. The
first rank of each node serves; one request is one connection. Every address of a machine is
offered, and the first that answers as the right machine is used.

Invariant: what arrives is what was sent (blake3) or the request fails; nobody is served without the
secret, which travels over the process group.

    links = Links(folder)
    links.join([offer of every node], here=0)
    links.put(1, "step-000000100", path, record)     # into the folder of node 1
    links.exchange("100 written", {...})             # the values of all nodes, on each of them
"""

import fcntl
import hmac
import json
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedRWPair
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import tensor_files
from llmtrain.errors import CheckpointError

PATIENCE_S = 600.0
"""Longest wait for an answer of another node."""
_REACH_S = 3.0
_SIOCGIFADDR = 0x8915
_BLOCK_BYTES = 1 << 22
_HEADER_BYTES = 1 << 26

Record = Mapping[str, Any]
"""Size and blake3 of a file."""
Offer = dict[str, Any]
"""Addresses, port and secret of a node."""

logger = logging.getLogger(__name__)


class Links:
    """This node's server, and its way to those of the others."""

    def __init__(self, folder: Path) -> None:
        """Serve the files below ``folder``.

        Raises:
            OSError: no port can be had.
        """
        self._folder = folder
        both = socket.has_dualstack_ipv6()
        self._server = socket.create_server(
            ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
        self._secret = secrets.token_hex(16)
        self._offers: Sequence[Offer] = ()
        self._here = 0
        self._reached: dict[int, str] = {}
        self._closed = False
        self._tables: dict[str, dict[int, Any]] = {}
        self._news = threading.Condition()
        threading.Thread(target=self._accept, name="node-links", daemon=True).start()

    @property
    def offer(self) -> Offer:
        """How others reach this node."""
        port = self._server.getsockname()[1]
        return {"addresses": _addresses(), "port": port, "secret": self._secret}

    def join(self, offers: Sequence[Offer], here: int) -> None:
        """Know the ``offers`` of all nodes, of which this one is ``here``; the first is the hub."""
        self._offers, self._here = offers, here

    def reach(self, node: int) -> None:
        """Find an address that ``node`` answers at; raises CheckpointError."""
        if node in (self._here, *self._reached):
            return
        offer = self._offers[node]
        for address in offer["addresses"]:
            self._reached[node] = address
            with suppress(CheckpointError):
                self._ask(node, {"act": "hello"}, _REACH_S)
                return
            del self._reached[node]
        raise CheckpointError(
            f"none of the addresses {', '.join(offer['addresses'])} answers at port {offer['port']}"
        )

    def put(self, node: int, folder: str, path: Path, record: Record) -> None:
        """Have ``node`` hold the file at ``path`` in its ``folder``; raises CheckpointError."""
        self._ask(node, {"act": "put", "folder": folder, "name": path.name, **record}, file=path)

    def get(self, node: int, folder: str, target: Path, record: Record) -> None:
        """Bring a file of ``node`` to ``target``; raises CheckpointError where it is another."""
        with self._asking(node, {"act": "get", "folder": folder, "name": target.name}) as stream:
            _answer(stream)
            _receive(stream, target, record)

    def exchange(self, key: str, value: Any, wait: bool = True) -> list[Any]:
        """Give ``value`` and take those of all nodes, in order; a ``key`` is used once.

        Nothing is taken where it does not ``wait``. Raises CheckpointError.
        """
        if self._here == 0:
            return self._meet(key, 0, json.loads(json.dumps(value)), wait)
        asked = {"act": "meet", "key": key, "node": self._here, "value": value, "wait": wait}
        values: list[Any] = self._ask(0, asked)["values"]
        return values

    def close(self) -> None:
        """Serve no longer; who waits is told."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _ask(
        self, node: int, asked: Record, limit_s: float = PATIENCE_S, file: Path | None = None
    ) -> dict[str, Any]:
        with self._asking(node, asked, limit_s, file) as stream:
            return _answer(stream)

    @contextmanager
    def _asking(
        self, node: int, asked: Record, limit_s: float = PATIENCE_S, file: Path | None = None
    ) -> Iterator[BufferedRWPair]:
        """Send a request, and ``file`` behind it."""
        self.reach(node)
        offer = self._offers[node]
        try:
            place = (self._reached[node], offer["port"])
            with (
                socket.create_connection(place, min(limit_s, 2 * _REACH_S)) as connection,
                connection.makefile("rwb") as stream,
            ):
                connection.settimeout(limit_s)
                stream.write(json.dumps({"secret": offer["secret"], **asked}).encode() + b"\n")
                stream.flush()
                if file is not None:
                    with file.open("rb") as content:
                        connection.sendfile(content)
                    connection.shutdown(socket.SHUT_WR)
                yield stream
        except OSError as error:
            raise CheckpointError(f"the exchange with node {node} failed ({error})") from error

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Answer one request."""
        acts: dict[str, Callable[..., Record | None]] = {
            "hello": lambda stream: {}, "put": self._take, "get": self._give, "meet": self._seat,
        }  # fmt: skip
        connection.settimeout(PATIENCE_S)
        with suppress(OSError, ValueError), connection, connection.makefile("rwb") as stream:
            asked = json.loads(stream.readline(_HEADER_BYTES))
            if not hmac.compare_digest(str(asked.pop("secret", "")), self._secret):
                return
            try:
                answer = acts[asked.pop("act")](stream, **asked)
            except (OSError, CheckpointError) as error:
                answer = {"problem": str(error)}
            if answer is not None:
                stream.write(json.dumps(answer).encode() + b"\n")
                stream.flush()

    def _take(self, stream: BufferedRWPair, folder: str, name: str, **record: Any) -> Record:
        target = self._inside(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _receive(stream, target, record)
        except OSError:
            while stream.read(_BLOCK_BYTES):  # what is sent is read, else the answer is lost
                pass
            raise
        return {}

    def _give(self, stream: BufferedRWPair, folder: str, name: str) -> None:
        with self._inside(folder, name).open("rb") as content:
            stream.write(b"{}\n")
            while block := content.read(_BLOCK_BYTES):
                stream.write(block)
        stream.flush()

    def _seat(self, stream: BufferedRWPair, key: str, node: int, value: Any, wait: bool) -> Record:
        return {"values": self._meet(key, node, value, wait)}

    def _meet(self, key: str, node: int, value: Any, wait: bool) -> list[Any]:
        """On the hub: keep a value, and give all of them once they are there."""
        with self._news:
            table, everyone = self._tables.setdefault(key, {}), range(len(self._offers))
            table[node] = value
            if len(table) == len(everyone):
                del self._tables[key]
                self._news.notify_all()
            if not wait:
                return []
            self._news.wait_for(lambda: len(table) == len(everyone) or self._closed, PATIENCE_S)
            if late := [other for other in everyone if other not in table]:
                raise CheckpointError(f"nodes {late} did not say what they wrote")
            return [table[other] for other in everyone]

    def _inside(self, folder: str, name: str) -> Path:
        if "/" in folder + name or ".." in (folder, name):
            raise CheckpointError(f"{folder}/{name} is no file of a checkpoint")
        return self._folder / folder / name


def _answer(stream: BufferedRWPair) -> dict[str, Any]:
    """What the other node says to a request; raises CheckpointError with its problem."""
    line = stream.readline(_HEADER_BYTES)
    if not line:
        raise CheckpointError("the other node has closed the connection")
    answer: dict[str, Any] = json.loads(line)
    if "problem" in answer:
        raise CheckpointError(str(answer["problem"]))
    return answer


def _receive(stream: BufferedRWPair, target: Path, record: Record) -> None:
    """Write what arrives to ``target``, and compare it with its ``record``."""

    def parts() -> Iterator[memoryview]:
        block, left = memoryview(bytearray(_BLOCK_BYTES)), int(record["bytes"])
        while left:
            count = stream.readinto(block[: min(left, _BLOCK_BYTES)])
            if not count:
                raise CheckpointError(f"{target.name} did not arrive to its end")
            yield block[:count]
            left -= count

    if tensor_files.write_bytes(target, parts()) != dict(record):
        target.unlink()
        raise CheckpointError(f"{target.name} does not match its checksum")


def _addresses() -> list[str]:
    """Every address of this machine that another may reach, and its own loop last."""
    found = []
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asked = struct.pack("256s", name.encode()[:15])
            answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, asked)
            found.append(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, *_ = line.split()
            if scope == "00":  # global
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return sorted(found, key=lambda address: address.startswith("127."))
