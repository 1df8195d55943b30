"""An interpreter for launched runs whose processes have torch imported already.

A launcher that is told ``cluster.python=WARM`` starts a small program, as it would start Python.
That asks a live process (tests/world.py) to fork one that runs the same module with the same words,
environment, folder, cores and files, passes signals on to it, and ends as it ends. Whoever kills
the program kills the run. All but training commands, torchrun among it, is Python as it is; where
WARM_ALL is set, torchrun and the other commands of ``llmtrain`` are forked too.

    python = warm_python(Path("warm"))
    subprocess.run([python, "-m", "llmtrain", "train", ...])
"""

import json
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from tests.world import fork_rank

STUB = """\
#!{python} -IS
import os, sys
python, place, me = {python!r}, {place!r}, {me!r}
words = sys.argv[1:]
module = words[1:] if words[:1] == ["-u"] else words
named = [["-m", "llmtrain"], ["-m", "torch.distributed.run"]] if "WARM_ALL" in os.environ else []
if module[:3] != ["-m", "llmtrain", "train"]:
    os.environ["PYTHON_EXEC"] = me  # what torchrun starts its ranks with
    if module[:2] not in named:
        os.execv(python, [python, *words])
import json, signal, socket
relayed = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
ignored = [n for n in relayed if signal.getsignal(n) == signal.SIG_IGN]
signal.pthread_sigmask(signal.SIG_BLOCK, relayed)
about = json.dumps(dict(
    words=module[1:], folder=os.getcwd(), ignored=ignored,
    cores=sorted(os.sched_getaffinity(0)), environment=dict(os.environ),
)).encode()
line = socket.socket(socket.AF_UNIX)
line.connect(place)
socket.send_fds(line, [len(about).to_bytes(8, "big")], [0, 1, 2])
line.sendall(about)
for number in relayed:  # one that is ignored here may have a handler there by now
    signal.signal(number, lambda n, _: line.send(bytes([n])))
signal.pthread_sigmask(signal.SIG_UNBLOCK, relayed)
status = line.recv(2)
if len(status) < 2:
    os._exit(70)
if status[0]:
    signal.signal(status[0], signal.SIG_DFL)
    os.kill(os.getpid(), status[0])
os._exit(status[1])
"""
_START_S = 300.0


def warm_python(folder: Path) -> Path:
    """Start the process that forks; gives the program. Both end with this process."""
    program, place = folder / "python", folder / "socket"
    program.write_text(STUB.format(python=sys.executable, place=str(place), me=str(program)))
    program.chmod(0o755)
    fork_rank().pipe.send((serve, 0, 1, "", (str(place), os.getpid())))
    deadline = time.monotonic() + _START_S
    while not place.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nobody listens at {place} after {_START_S:g} s")
        time.sleep(0.01)
    return program


def serve(place: object, path: str, owner: int) -> None:
    """Fork a keeper for everyone who calls, as long as ``owner`` is there."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are buried by the kernel
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{path}.new")
        listening.listen(16)
        listening.settimeout(1.0)
        os.rename(f"{path}.new", path)  # who sees it can call
        while Path(f"/proc/{owner}").exists():
            try:
                line, _ = listening.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listening.close()
                _keep(line)
            line.close()
    os._exit(0)


def _keep(line: socket.socket) -> None:
    """Fork the run, pass on what the program is sent, and tell how the run ended."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        line.setblocking(True)
        head, files, _, _ = socket.recv_fds(line, 8, 3)
        with line.makefile("rb") as reader:
            about = json.loads(reader.read(int.from_bytes(head, "big")))
        pid = os.fork()
        if pid == 0:
            line.close()
            _run(files, **about)
        for file in files:
            os.close(file)
        ended = os.pidfd_open(pid)
        while ended not in (ready := select.select([ended, line], [], [])[0]):
            numbers = line.recv(16) if line in ready else b""
            for number in numbers or [signal.SIGKILL]:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            if not numbers:
                break
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(OSError):
            line.sendall(bytes([-code, 0] if code < 0 else [0, code]))
    finally:
        os._exit(0)


def _run(
    files: list[int],
    words: list[str],
    folder: str,
    ignored: list[int],
    cores: list[int],
    environment: dict[str, str],
) -> None:
    """Be the process that the program stands for."""
    status = 1
    try:
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        os.setsid()
        os.chdir(folder)
        os.sched_setaffinity(0, cores)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
