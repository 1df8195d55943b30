"""Targets that start processes from here: this machine, one node of several, DeepSpeed's hosts.

Invariant: nothing starts on any host before every host was looked at.

    plan = local(config)
"""

import logging
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmtrain.config.launch import DeepSpeedLaunch, LaunchConfig, LocalLaunch, TorchrunLaunch
from llmtrain.errors import ConfigError
from llmtrain.launch import shell
from llmtrain.launch.hostfile import chosen, read_hostfile
from llmtrain.launch.job import Job, interpreter, make_jobs, torchrun
from llmtrain.launch.plan import Plan
from llmtrain.launch.supervise import supervise, supervise_hosts

logger = logging.getLogger(__name__)

_CHANGED_BY_SHELL = re.compile(r"[^\w@%+=:,./~\[\]-]")


def local(config: LaunchConfig) -> Plan:
    """This machine alone."""
    launch = config.launch
    if not isinstance(launch, LocalLaunch):
        raise TypeError(launch.kind)
    (job,) = make_jobs(config)
    return _here(config, job, alone(config, job), None, launch.max_restarts)


def alone(config: LaunchConfig, job: Job) -> list[str]:
    """The command of a run on this machine alone."""
    if job.world_size == 1:
        return [interpreter(config), "-m", "llmtrain", "train", *job.words]
    return torchrun(config, job, ["--standalone"], job.world_size)


def node(config: LaunchConfig) -> Plan:
    """One node of several, which meet over c10d."""
    launch = config.launch
    if not isinstance(launch, TorchrunLaunch):
        raise TypeError(launch.kind)
    (job,) = make_jobs(config)
    nodes = config.cluster.num_nodes
    head = launch.head or f"localhost:{config.cluster.port}"
    meeting = [
        f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={head}",
        f"--rdzv-id={job.label}", f"--rdzv-conf=is_host={int(launch.node == 0)},read_timeout=600",
        f"--max-restarts={launch.max_restarts}",
    ]  # fmt: skip
    if launch.address is not None:
        meeting.append(f"--local-addr={launch.address}")
    port = int(head.rpartition(":")[2]) if launch.node == 0 else None
    return _here(config, job, torchrun(config, job, meeting, job.ranks[0]), port)


def _here(
    config: LaunchConfig, job: Job, command: list[str], port: int | None, max_restarts: int = 0
) -> Plan:
    """A command of this machine, after a look at it."""
    whole = [*setting(config.cluster.environment), *command]

    def start() -> int:
        if config.preflight:
            from llmtrain.launch.preflight import preflight  # a dry run does without the doctor

            found = preflight(job.words, num_gpus=job.gpus_used[0], port=port)
            if found:
                raise ConfigError([f"{socket.gethostname()}: {problem}" for problem in found])
        return supervise(whole, job.run, max_restarts=max_restarts)

    return Plan(shell.line(whole) + "\n", start)


def setting(environment: Mapping[str, str]) -> list[str]:
    """Words in front of a command that set variables for it."""
    return ["env", *(f"{n}={v}" for n, v in environment.items())] if environment else []


def deepspeed(config: LaunchConfig) -> Plan:
    """DeepSpeed's launcher, here or on the hosts of a hostfile."""
    launch = config.launch
    if not isinstance(launch, DeepSpeedLaunch):
        raise TypeError(launch.kind)
    if launch.hostfile is None:
        (job,) = make_jobs(config)
        alone = ["--num_gpus", str(job.world_size), "--master_port", str(config.cluster.port)]
        return _here(config, job, [*_guard(config), "--", *_runner(config, job, alone)], None)
    hosts = chosen(read_hostfile(Path(launch.hostfile)), launch.include, launch.exclude)
    (job,) = make_jobs(config, [len(slots) for slots in hosts.values()])
    commands = _on_hosts(config, launch, job, list(hosts))
    looks = {host: _over(launch, host, _look(config, job, host, number))
             for number, host in enumerate(hosts)}  # fmt: skip
    checks = [f"# every host first: {shell.line(words)}" for words in looks.values()]

    def start() -> int:
        if config.preflight:
            _look_at(looks)
        if launch.launcher == "ssh":
            return supervise_hosts(commands, job.run)
        relay = signal.SIGUSR1 if launch.launcher == "slurm" else signal.SIGTERM
        return supervise(commands[0], job.run, relay=relay)

    shown = [*(checks if config.preflight else ()), *map(shell.line, commands)]
    return Plan("\n".join(shown) + "\n", start)


def _on_hosts(
    config: LaunchConfig, launch: DeepSpeedLaunch, job: Job, hosts: Sequence[str]
) -> list[list[str]]:
    """Commands that start the ranks of all hosts: one that reaches all, or one for each."""
    meeting = ["--hostfile", str(Path(str(launch.hostfile)).absolute())]
    for name in ("include", "exclude"):
        if getattr(launch, name):
            meeting.append(f"--{name}={getattr(launch, name)}")
    meeting += ["--master_addr", launch.head or hosts[0], "--master_port", str(config.cluster.port)]
    before = setting(config.cluster.environment)
    if launch.launcher == "pdsh":
        if changed := [word for word in job.words if _CHANGED_BY_SHELL.search(word)]:
            raise ConfigError(
                f"launch.launcher=pdsh gives words to a shell of each host, {changed[0]!r} would "
                "not arrive as it is; use launch.launcher=ssh"
            )
        return [[*before, *_runner(config, job, [*meeting, "--launcher", "pdsh"])]]
    alone = [*meeting, "--no_ssh", "--force_multi"]
    guard = _guard(config)
    if launch.launcher == "slurm":
        words = [*before, *guard, "--",
                 *_runner(config, job, [*alone, "--node_rank", "NODE"])]  # fmt: skip
        script = shell.line(words).replace("--node_rank NODE", '--node_rank "$SLURM_PROCID"')
        srun = ["srun", "--ntasks-per-node=1", f"--nodes={len(hosts)}", "--cpu-bind=none"]
        return [[*srun, "--distribution=arbitrary", f"--nodelist={','.join(hosts)}",
                 "bash", "-c", f"exec {script}"]]  # fmt: skip
    return [
        _over(launch, host, [*before, *guard, "tied=true", "--",
                             *_runner(config, job, [*alone, "--node_rank", str(number)])])
        for number, host in enumerate(hosts)
    ]  # fmt: skip


def _guard(config: LaunchConfig) -> list[str]:
    """A supervisor beside DeepSpeed's launcher, which would leave its ranks running."""
    return [interpreter(config), "-m", "llmtrain.launch.supervise"]


def _runner(config: LaunchConfig, job: Job, meeting: Sequence[str]) -> list[str]:
    """DeepSpeed's launcher with the training command behind it."""
    # Without a GPU it would count the machine's sockets as its accelerators.
    setting = [] if job.gpus else ["env", "DS_ACCELERATOR=cpu"]
    start = [*setting, interpreter(config), "-m", "deepspeed.launcher.runner", *meeting]
    return [*start, "--module", "llmtrain", "train", *job.words]


def _over(launch: DeepSpeedLaunch, host: str, command: Sequence[str]) -> list[str]:
    """A command on another host, in the same folder as here."""
    if launch.launcher == "slurm":
        return ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={host}", *command]
    there = f"cd {shlex.quote(str(Path.cwd()))} && exec {shell.line(command)}"
    return [*shlex.split(launch.ssh), host, there]


def _look(config: LaunchConfig, job: Job, host: str, number: int) -> list[str]:
    """The look at one host; the ranks meet on the first."""
    words = [interpreter(config), "-m", "llmtrain.launch.preflight", f"node={host}"]
    words += [f"config={job.hash}", f"gpus={job.gpus_used[number]}"]
    if number == 0:
        words.append(f"port={config.cluster.port}")
    return [*words, "--", *job.words]


def _look_at(looks: Mapping[str, Sequence[str]]) -> None:
    """Look at all hosts at the same time.

    Raises:
        ConfigError: a line for each problem of each host.
    """

    def look(host: str) -> list[str]:
        done = subprocess.run(looks[host], capture_output=True, text=True, check=False)
        lines = [line for line in done.stderr.splitlines() if line.startswith(f"{host}: ")]
        if done.returncode == 0:
            return []
        said = [line for line in lines if not line.startswith((f"{host}: WARN", f"{host}: INFO"))]
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return said or [f"{host}: cannot be looked at, status {done.returncode}: {last[0]}"]

    with ThreadPoolExecutor(len(looks)) as pool:
        problems = [problem for found in pool.map(look, looks) for problem in found]
    if problems:
        raise ConfigError(problems)
    logger.info("%d hosts are ready", len(looks))
