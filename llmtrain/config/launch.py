"""What ``llmtrain launch`` takes beside a training command line: where a run is started, and how.

    llmtrain launch target=slurm launch.partition=gpu cluster.num_nodes=4 model=llama3_8b ...

``target=NAME`` chooses the file conf/launch/NAME.yaml, ``cluster=NAME`` what the machines are like.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmtrain.config.fields import below
from llmtrain.errors import ConfigError

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalLaunch:
    """This machine alone: one process, or torchrun where there are several ranks."""

    kind: Literal["local"] = "local"
    """This target."""
    max_restarts: int = 0
    """Starts after a fault; each goes on from the newest checkpoint."""

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        _refuse(below(self, 0, "max_restarts"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchrunLaunch:
    """This machine as one node of cluster.num_nodes: the same line runs on every node."""

    kind: Literal["torchrun"] = "torchrun"
    """This target."""
    head: str | None = None
    """``address:port`` of node 0, where the nodes meet; needed from two nodes on."""
    node: int = 0
    """Number of this node; node 0 hosts the meeting point."""
    address: str | None = None
    """Address under which other nodes reach this one; null means its host name."""
    max_restarts: int = 0
    """Restarts by torchrun after a fault on any node; all nodes start again together."""

    def __post_init__(self) -> None:
        """Refuse what is no address."""
        problems = below(self, 0, "node", "max_restarts")
        if self.head is not None and not _ADDRESS.fullmatch(self.head):
            problems.append(f"head={self.head} is no address:port; write 10.0.0.1:29500")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedLaunch:
    """DeepSpeed's launcher, on this machine or on the hosts of a hostfile."""

    kind: Literal["deepspeed"] = "deepspeed"
    """This target."""
    hostfile: str | None = None
    """File of lines ``address slots=8``; null means this machine alone."""
    include: str = ""
    """Hosts and slots to use, as ``host0@host1:0,2``; empty means all."""
    exclude: str = ""
    """Hosts and slots to leave out, in the same form."""
    launcher: Literal["ssh", "pdsh", "slurm"] = "ssh"
    """What reaches the hosts.

    ``ssh``: one connection to each; ``pdsh``: DeepSpeed's own; ``slurm``: srun in an allocation
    that exists, DeepSpeed's own Slurm runner cannot start a module.
    """
    ssh: str = "ssh -o BatchMode=yes"
    """ssh: command in front of a host's name, options included."""
    head: str | None = None
    """Address of the first host as the others reach it; null means its name in the hostfile."""

    def __post_init__(self) -> None:
        """Refuse a filter without hosts, and two filters."""
        problems = []
        if self.include and self.exclude:
            problems.append("include and exclude are both set; use one of them")
        if (self.include or self.exclude) and self.hostfile is None:
            problems.append("include and exclude choose among the hosts of hostfile; set hostfile")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeGroup:
    """Nodes of one kind in a job of several kinds."""

    num_nodes: int
    """Nodes of this kind."""
    ranks_per_node: int
    """Ranks, and GPUs where the cluster has any, on each of them."""
    partition: str | None = None
    """Partition; null means launch.partition."""
    constraint: str | None = None
    """Features they must have."""
    nodelist: str | None = None
    """Their names, as ``n[0-3]``."""

    def __post_init__(self) -> None:
        """Refuse an empty group."""
        _refuse(below(self, 1, "num_nodes", "ranks_per_node"))


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmLaunch:
    """A batch job of Slurm: sbatch, in it srun, in it torchrun once per node."""

    kind: Literal["slurm"] = "slurm"
    """This target."""
    partition: str | None = None
    """--partition."""
    account: str | None = None
    """--account."""
    qos: str | None = None
    """--qos."""
    time_limit: str | None = None
    """--time, as ``2-00:00:00`` or minutes."""
    constraint: str | None = None
    """--constraint."""
    nodelist: str | None = None
    """--nodelist, as ``n[0-3],m7``."""
    exclude: str | None = None
    """--exclude."""
    exclusive: bool = True
    """--exclusive: no other job on the nodes."""
    groups: tuple[NodeGroup, ...] = ()
    """Nodes of several kinds in one job, instead of cluster.num_nodes and its ranks_per_node."""
    array: tuple[str, ...] = ()
    """Overrides of each task of a job array, one run each: ["optimizer.lr=1e-3","training.seed=2"].

    Several overrides of one task are separated by spaces.
    """
    array_parallel: int | None = None
    """Tasks of the array that run at a time; null means all."""
    min_nodes: int | None = None
    """Fewest of cluster.num_nodes to start with: after one is lost, on the rest; null means all.

    An axis of the data parallelism has to be ``auto``.
    """
    requeue: bool = True
    """Queue the job again where it stopped with a checkpoint (time limit, preemption), hung, lost a
    rank or failed, as long as every start saves a step further.

    Not where it diverged or ran out of memory or disk.
    """
    signal_s: int = 120
    """Seconds before the time limit at which the run is asked to save and stop; 0 never asks."""
    setup: tuple[str, ...] = ()
    """Lines of shell before anything else on the first node: module load, activate, export."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch by their long names: {mail-user: "me@example.org"}."""
    wait: bool = False
    """Wait for the job and leave with its exit status."""
    template: str | None = None
    """Another script to fill in; null means launch/slurm.sbatch."""

    def __post_init__(self) -> None:
        """Refuse what sbatch would."""
        problems = below(self, 0, "signal_s") + below(self, 1, "array_parallel", "min_nodes")
        if self.time_limit is not None and not _TIME.fullmatch(self.time_limit):
            problems.append(f"time_limit={self.time_limit} is no time; write minutes or D-HH:MM:SS")
        if self.groups and (self.array or self.nodelist):
            problems.append("groups go with neither array nor nodelist; name nodes in each group")
        if self.groups and self.min_nodes is not None:
            problems.append("groups have fixed numbers of nodes; leave min_nodes out")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesLaunch:
    """A JobSet of Kubernetes: one pod per node, torchrun in each."""

    kind: Literal["kubernetes"] = "kubernetes"
    """This target."""
    image: str
    """Image with this package and its dependencies."""
    namespace: str = "default"
    """Namespace of the JobSet."""
    folder: str = "/workspace"
    """Working folder in the container; relative paths of the training command begin there."""
    volumes: Mapping[str, str] = field(default_factory=dict)
    """Persistent volume claim -> path at which it is mounted; runs_dir must lie on one."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name under which the cluster counts GPUs."""
    resources: Mapping[str, str] = field(default_factory=dict)
    """Further resources of every pod, as {rdma/hca: "8"}."""
    shm_gib: int = 16
    """Shared memory of every pod; Docker's default of 64 MiB is too little for NCCL."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Labels the nodes must have."""
    tolerations: tuple[str, ...] = ()
    """Taints of the nodes that keep other pods away, by key: [nvidia.com/gpu]."""
    queue: str | None = None
    """Local queue of Kueue, where the cluster has it."""
    service_account: str | None = None
    """Service account of the pods."""
    secrets: tuple[str, ...] = ()
    """Secrets whose keys become variables of the environment, for WANDB_API_KEY."""
    max_restarts: int = 20
    """Restarts of the whole set after a fault or an eviction; wrong input is never tried again."""
    grace_s: int = 300
    """Seconds a pod has to save when it is asked to leave."""
    template: str | None = None
    """Another manifest to fill in; null means launch/kubernetes.yaml."""

    def __post_init__(self) -> None:
        """Refuse names Kubernetes has no use for."""
        problems = below(self, 1, "shm_gib") + below(self, 0, "max_restarts", "grace_s")
        problems += [
            f"volumes.{claim}={path} is no absolute path"
            for claim, path in self.volumes.items()
            if not Path(path).is_absolute()
        ]
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class SkyPilotLaunch:
    """A task of SkyPilot, on whichever cloud has the machines."""

    kind: Literal["skypilot"] = "skypilot"
    """This target."""
    accelerators: str | None = None
    """GPUs of a node as SkyPilot names them, ``H100:8``; null means none."""
    infra: str | None = None
    """Where, as ``aws/us-east-1`` or ``k8s``; null lets SkyPilot choose."""
    use_spot: bool = False
    """Take machines that may be taken back."""
    managed: bool = True
    """Let SkyPilot start it again elsewhere when a machine is lost (sky jobs launch)."""
    disk_gib: int = 256
    """Disk of every node."""
    image: str | None = None
    """Image of the nodes, as ``docker:ADDRESS``; null means SkyPilot's."""
    workdir: str = "."
    """Folder that is copied to every node."""
    mounts: Mapping[str, str] = field(default_factory=dict)
    """Path on the nodes -> bucket or folder: {/runs: s3://bucket/runs}."""
    setup: tuple[str, ...] = ("pip install -r requirements.lock -e .",)
    """Lines of shell that prepare a node."""
    template: str | None = None
    """Another task to fill in; null means launch/skypilot.yaml."""

    def __post_init__(self) -> None:
        """Refuse a disk of nothing."""
        _refuse(below(self, 1, "disk_gib"))


Launch = (
    LocalLaunch | TorchrunLaunch | DeepSpeedLaunch | SlurmLaunch | KubernetesLaunch | SkyPilotLaunch
)
"""One of the targets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What the machines are like."""

    num_nodes: int = 1
    """Machines."""
    gpus_per_node: int | Literal["auto"] = "auto"
    """GPUs to ask for on each; ``auto`` counts those of this machine."""
    ranks_per_node: int | Literal["auto"] = "auto"
    """Processes on each; ``auto`` is one per GPU, without GPUs as many as the layout needs."""
    cpus_per_node: int | None = None
    """Cores to ask for on each; null asks for none."""
    memory_gib: int | None = None
    """Main memory to ask for on each; null asks for none."""
    port: int = 29500
    """TCP port where the ranks meet; Slurm takes one by the job's number instead."""
    python: str | None = None
    """Interpreter on the nodes; null means this one, in containers ``python``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of every process; docs/launch.md says what those of NCCL do."""

    def __post_init__(self) -> None:
        """Refuse empty clusters and ports that do not exist."""
        problems = below(self, 1, "num_nodes", "ranks_per_node", "cpus_per_node", "memory_gib")
        problems += below(self, 0, "gpus_per_node")
        if not 1 <= self.port <= 65535:
            problems.append(f"port={self.port} must be between 1 and 65535")
        problems += [
            f"environment.{name} is no name of a variable"
            for name in self.environment
            if not name.isidentifier()
        ]
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """``llmtrain launch``: start a training run here or on a cluster."""

    launch: Launch = field(default_factory=LocalLaunch)
    """Where to start; ``target=NAME`` chooses."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """What the machines are like."""
    dry_run: bool = False
    """Print what would run, and run nothing."""
    preflight: bool = True
    """Look at every node before anything starts: GPUs, limits, paths, port, configuration."""
    overrides: tuple[str, ...] = ()
    """The training command line; every other word of ``llmtrain launch`` becomes part of it."""
    config_dirs: tuple[str, ...] = ()
    """Folders with more groups, absolute; ``--config-dir`` sets them."""

    def __post_init__(self) -> None:
        """Refuse several nodes where the target has one."""
        several, launch = self.cluster.num_nodes > 1, self.launch
        problems = []
        if several and launch.kind == "local":
            problems.append(
                f"cluster.num_nodes={self.cluster.num_nodes}, target=local is this machine alone; "
                "use target=torchrun on every node, or deepspeed, slurm, kubernetes, skypilot"
            )
        if isinstance(launch, TorchrunLaunch) and several and launch.head is None:
            problems.append("launch.head is needed by several nodes; set launch.head=ADDRESS:PORT")
        if isinstance(launch, TorchrunLaunch) and launch.node >= self.cluster.num_nodes:
            problems.append(
                f"launch.node={launch.node} is none of cluster.num_nodes="
                f"{self.cluster.num_nodes}; the first node is 0"
            )
        fewest = launch.min_nodes if isinstance(launch, SlurmLaunch) else None
        if fewest is not None and fewest > self.cluster.num_nodes:
            problems.append(
                f"launch.min_nodes={fewest} is more than cluster.num_nodes="
                f"{self.cluster.num_nodes}; use at most that"
            )
        _refuse(problems)


OWN = frozenset({"target", "launch", "cluster", "dry_run", "preflight"})
"""First names of the overrides that launch reads itself."""


VERBATIM = tuple(
    f"launch.{name}"
    for name in ("nodelist", "exclude", "include", "constraint", "time_limit", "head", "ssh")
)
"""Fields whose values are taken as they are written: n[0-3], 4:00:00, n0@n1:0,2."""


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words for launch itself, ``target`` under its group's name, and those for training."""
    own, others = list[str](), list[str]()
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key == "target":
            own.append(word.replace("target", "launch", 1))
        else:
            (own if key.partition(".")[0] in OWN else others).append(word)
    return own, others


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)
