"""Target slurm: one batch script, in it srun over the nodes, in it torchrun.

Invariant: the script holds everything; it is kept in the folder of the run and may be submitted
again by hand. Every task of an array is a run of its own.

    llmtrain launch target=slurm cluster=infiniband cluster.num_nodes=2 dry_run=true ...
"""

import logging
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.launch import LaunchConfig, NodeGroup, SlurmLaunch
from llmtrain.errors import ConfigError
from llmtrain.launch import shell
from llmtrain.launch.job import Job, interpreter, make_jobs
from llmtrain.launch.plan import Plan

logger = logging.getLogger(__name__)

_SUBMIT_S = 60.0


def slurm(config: LaunchConfig) -> Plan:
    """A batch job, or an array of them."""
    launch = config.launch
    if not isinstance(launch, SlurmLaunch):
        raise TypeError(launch.kind)
    ranks = [group.ranks_per_node for group in launch.groups for _ in range(group.num_nodes)]
    jobs = make_jobs(config, ranks or None)
    folder = _folder(jobs)
    script = render(config, launch, jobs, folder)
    path = folder / "job.sbatch"
    command = ["sbatch", "--parsable", *(["--wait"] if launch.wait else []), str(path)]

    def start() -> int:
        return _submit(script, path, command)

    return Plan(f"# {path}, submitted by: {shell.line(command)}\n{script}", start)


def _folder(jobs: Sequence[Job]) -> Path:
    """Where script and output are kept: with the run, or beside the runs of an array."""
    first = jobs[0]
    if len(jobs) == 1:
        return first.run / "launch"
    return first.run.with_name(str(first.config.name).rpartition("-")[0]) / "launch"


def render(config: LaunchConfig, launch: SlurmLaunch, jobs: Sequence[Job], folder: Path) -> str:
    """The batch script."""
    first, groups = jobs[0], launch.groups
    each = [_Step(i, str(group.num_nodes), group.ranks_per_node) for i, group in enumerate(groups)]
    steps = each or [_Step(None, _num_nodes(first, launch), first.ranks[0])]
    places = _places(
        config, jobs, f"{_srun(steps, 'look')} || not_ready $?", _num_nodes(first, launch)
    )
    values = {
        **places,
        "meeting": shell.fill(shell.template("meeting.sh", None), places).rstrip(),
        "directives": "\n".join(_directives(config, launch, jobs, folder)),
        "folder": shlex.quote(str(Path.cwd())),
        "setup": "\n".join(launch.setup),
        "train": _srun(steps, "train"),
        "requeue": "true" if launch.requeue else "false",
    }
    return shell.fill(shell.template("slurm.sbatch", launch.template), values)


def prologue(config: LaunchConfig, launch: SlurmLaunch, job: Job, refused: Path) -> str:
    """Lines of shell before the step of another batch script: ``$train`` starts a node's ranks.

    Wrong input is status 2 and writes ``refused``, a node that is not ready is status 1.
    """
    num_nodes = _num_nodes(job, launch)
    look = _srun([_Step(None, num_nodes, job.ranks[0])], "look")
    note = f"[ $code -ne 2 ] || echo > {shlex.quote(str(refused))}"
    refuse = f"{look} || {{ code=$?; {note}; exit $code; }}"
    places = _places(config, [job], refuse, num_nodes)
    return "\n".join([
        *launch.setup, places["environment"], f"python={places['python']}", places["tasks"],
        shell.fill(shell.template("meeting.sh", None), places), "export train",
    ])  # fmt: skip


def _num_nodes(job: Job, launch: SlurmLaunch) -> str:
    """How many nodes a start has; Slurm says so where it may be fewer than were asked for."""
    return str(len(job.ranks)) if launch.min_nodes is None else "$SLURM_JOB_NUM_NODES"


def _places(config: LaunchConfig, jobs: Sequence[Job], look: str, num_nodes: str) -> dict[str, str]:
    """What a script says of the nodes and of what runs on them; ``look`` is its first step."""
    environment = dict(config.cluster.environment)
    if config.cluster.cpus_per_node is not None:  # srun no longer takes it from sbatch
        environment["SRUN_CPUS_PER_TASK"] = str(config.cluster.cpus_per_node)
    return {
        "environment": shell.exports(environment),
        "python": shlex.quote(interpreter(config)),
        "tasks": _tasks(jobs),
        "gpus": "$ranks" if any(jobs[0].gpus_used) else "0",
        "num_nodes": num_nodes,
        "preflight": look if config.preflight else "",
    }


@dataclass(frozen=True, slots=True)
class _Step:
    """The nodes of one kind."""

    group: int | None
    num_nodes: str
    ranks: int


def _srun(steps: Sequence[_Step], script: str) -> str:
    """Srun of one task per node, over nodes of one kind or of several."""
    parts = [
        ("" if step.group is None else f"--het-group={step.group} ")
        + f"--nodes={step.num_nodes} --ntasks-per-node=1 --cpu-bind=none "
        f'bash -c "${script}" node {step.ranks} "${{words[@]}}"'
        for step in steps
    ]
    return "srun " + " : \\\n    ".join(parts)


def _tasks(jobs: Sequence[Job]) -> str:
    """Lines of shell that set the words, the folder and the hash of this task's run."""

    def lines(job: Job, indent: str) -> str:
        words = f"\n{indent}    ".join(shlex.quote(word) for word in job.words)
        return (
            f"{indent}run={shlex.quote(str(job.run))}\n{indent}hash={job.hash}\n"
            f"{indent}words=(\n{indent}    {words}\n{indent})"
        )

    if len(jobs) == 1:
        return lines(jobs[0], "")
    cases = [f"    {number})\n{lines(job, ' ' * 8)}\n        ;;" for number, job in enumerate(jobs)]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"])


def _directives(
    config: LaunchConfig, launch: SlurmLaunch, jobs: Sequence[Job], folder: Path
) -> Iterator[str]:
    """The #SBATCH lines, those of further groups of nodes behind ``hetjob``."""
    several = len(jobs) > 1
    limit = f"%{launch.array_parallel}" if launch.array_parallel else ""
    options: dict[str, object] = {
        "job-name": jobs[0].label if not several else folder.parent.name,
        "output": str(folder).replace("%", "%%") + ("/%x-%A_%a.out" if several else "/%x-%j.out"),
        "open-mode": "append",
        "account": launch.account,
        "qos": launch.qos,
        "time": launch.time_limit,
        "array": f"0-{len(jobs) - 1}{limit}" if several else None,
        "signal": f"B:USR1@{launch.signal_s}" if launch.signal_s else None,
        "requeue": launch.requeue,
        "no-requeue": not launch.requeue,
        **launch.options,
    }
    groups = launch.groups or (_whole(jobs[0], launch),)
    for number, group in enumerate(groups):
        if number:
            yield "#SBATCH hetjob"
            options = {}
        of_nodes = {
            "partition": group.partition or launch.partition,
            "nodes": group.num_nodes
            if launch.min_nodes is None
            else f"{launch.min_nodes}-{group.num_nodes}",
            "ntasks-per-node": 1 if launch.min_nodes is None else None,  # it means the fewest
            "gpus-per-node": group.ranks_per_node if jobs[0].gpus else None,
            "cpus-per-task": config.cluster.cpus_per_node,
            "mem": None if config.cluster.memory_gib is None else f"{config.cluster.memory_gib}G",
            "constraint": group.constraint or launch.constraint,
            "nodelist": group.nodelist,
            "exclude": launch.exclude,
            "exclusive": launch.exclusive,
        }
        for name, value in {**options, **of_nodes}.items():
            if value is True:
                yield f"#SBATCH --{name}"
            elif value not in (None, False):
                if len(str(value).splitlines()) > 1:
                    raise ConfigError(f"--{name}={value!r} has several lines; sbatch takes one")
                yield f"#SBATCH --{name}={shlex.quote(str(value))}"


def _whole(job: Job, launch: SlurmLaunch) -> NodeGroup:
    """All nodes as one group."""
    return NodeGroup(
        num_nodes=len(job.ranks), ranks_per_node=job.gpus or job.ranks[0], nodelist=launch.nodelist
    )


def _submit(script: str, path: Path, command: Sequence[str]) -> int:
    """Keep the script and hand it to Slurm; returns the job's status where it is waited for.

    Raises:
        ConfigError: Slurm is not here, or does not take the job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("no sbatch on this machine; submit from a login node of the cluster")
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    waited = "--wait" in command
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        if job.stdout is None or job.stderr is None:
            raise RuntimeError("sbatch has no output")
        number = job.stdout.readline().strip().partition(";")[0]
        if number:
            logger.info("submitted job %s; its output: %s, squeue -j %s, scancel %s", number,
                        path.parent, number, number)  # fmt: skip
        code = job.wait(None if waited else _SUBMIT_S)
        if not number:
            if made:
                path.unlink()
            for folder in made:
                folder.rmdir()
            said = " ".join(job.stderr.read().split())
            raise ConfigError(f"sbatch does not take the job: {said}")
    return code if code in (0, 2, 3, 4) else 1
