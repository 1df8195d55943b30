"""A real Slurm on this machine: munged, slurmctld and several slurmd, each with its own port.

Everything lives in one folder and ends with the context; the machine's own configuration, if there
is one, is neither read nor changed. Debian has it all in ``slurm-wlm`` and ``munge``.

    python -m tests.slurm_cluster nodes=2 -- sinfo        # run a command inside such a cluster
    with SlurmCluster(Path("cluster")) as cluster: ...    # cluster.environment has SLURM_CONF
"""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
PACKAGES = "apt-get install slurm-wlm munge"
_START_SECONDS = 30.0

CONFIGURATION = """\
ClusterName=onemachine
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
ReturnToService=2
SlurmdTimeout=5
KillWait=1
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=work Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=other Nodes=ALL MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return the programs a cluster needs and this machine does not have."""
    return [name for name in PROGRAMS if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class SlurmCluster:
    """A cluster of ``num_nodes`` nodes with one core each, all of them this machine."""

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        self.folder = folder.resolve()
        self.names = [f"n{i}" for i in range(num_nodes)]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        configuration = str(self.folder / "slurm.conf")
        self.environment = {**os.environ, "SLURM_CONF": configuration, "PATH": path}

    def __enter__(self) -> Self:
        if missing := missing_programs():
            raise RuntimeError(f"this machine has no {', '.join(missing)}; {PACKAGES}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._configure()
        try:
            self._start("munged", *self._munge_options())
            self._await((self.folder / "munge.socket").exists, "munged")
            self._start("slurmctld", "-D", "-i")
            for name in self.names:
                self.start_node(name)
            self._await(
                lambda: self.command("sinfo", "-h", "-t", "idle", "-o", "%D") != "", "Slurm"
            )
            self._await(self._all_idle, "Slurm")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start_node(self, name: str) -> None:
        """Start the daemon of one node."""
        self._start("slurmd", "-D", "-N", name, key=name)

    def kill_node(self, name: str) -> None:
        """Kill the daemon of one node and, as a power cut would, the jobs on it."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for process in self._steps_of(name):
            for pid in [*_below(process), process]:
                _kill(pid)

    def stop(self) -> None:
        """End jobs and daemons."""
        if "slurmctld" in self.daemons:
            self.command("scancel", "--quiet", "--user", getpass.getuser())
            deadline = time.monotonic() + 10
            while self.command("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(list(self.daemons.values())):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()

    def command(self, *words: str) -> str:
        """Return what a program of Slurm prints; nothing if it fails."""
        found = subprocess.run(
            words, env=self.environment, check=False, capture_output=True, text=True, timeout=30
        )
        return found.stdout.strip() if found.returncode == 0 else ""

    def _configure(self) -> None:
        ports = free_ports(1 + len(self.names))
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host, user=getpass.getuser(), folder=self.folder, controller_port=ports[0],
                nodes=nodes,
            )
        )  # fmt: skip
        (self.folder / "state").mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.folder.chmod(0o755)

    def _munge_options(self) -> list[str]:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed",
                 "log-file": "log"}  # fmt: skip
        named = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
        return ["--foreground", "--force", *named]

    def _start(self, program: str, *options: str, key: str = "") -> None:
        name = key or program
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [_find(program) or program, *options], env=self.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not condition():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                said = "".join(
                    f"\n{path.name}: {path.read_text(errors='replace')[-500:]}"
                    for path in sorted(self.folder.glob("*.out"))
                )
                raise RuntimeError(f"{what} did not start in {self.folder}; ended: {ended}{said}")
            time.sleep(0.05)

    def _all_idle(self) -> bool:
        states = self.command("sinfo", "-h", "-N", "-p", "work", "-o", "%T").split()
        return states == ["idle"] * len(self.names)

    def _steps_of(self, node: str) -> list[int]:
        """Processes of Slurm that look after the jobs of a node."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            here = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in words
            if here and f"SLURMD_NODENAME={node}".encode() in words:
                found.append(int(path.name))
        return found


def _below(pid: int) -> list[int]:
    """Process ids below one."""
    try:
        children = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (*_below(child), child)]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return


def main(words: list[str]) -> int:
    """Run a command inside a cluster; returns its status."""
    options, _, command = " ".join(words).partition("-- ")
    settings = dict(word.split("=", 1) for word in options.split())
    if not command or settings.keys() - {"nodes"}:
        sys.stderr.write("usage: python -m tests.slurm_cluster [nodes=N] -- COMMAND\n")
        return 2
    started = words[words.index("--") + 1 :]
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        SlurmCluster(Path(folder), int(settings.get("nodes", 2))) as cluster,
    ):
        return subprocess.run(started, env=cluster.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
