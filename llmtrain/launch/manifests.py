"""Targets whose machines are somebody else's: a JobSet of Kubernetes, a task of SkyPilot.

Invariant: what is submitted is what a dry run prints; files of the run are on the volumes of the
nodes, so that nothing about them is asked here.

    plan = kubernetes(config)
"""

import logging
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from llmtrain.config.launch import KubernetesLaunch, LaunchConfig, SkyPilotLaunch
from llmtrain.errors import ConfigError
from llmtrain.launch import shell
from llmtrain.launch.job import Job, interpreter, make_jobs
from llmtrain.launch.plan import Plan

logger = logging.getLogger(__name__)


def kubernetes(config: LaunchConfig) -> Plan:
    """One pod per node."""
    launch = config.launch
    if not isinstance(launch, KubernetesLaunch):
        raise TypeError(launch.kind)
    (job,) = make_jobs(config)
    runs = PurePosixPath(launch.folder) / job.config.runs_dir
    if not any(runs.is_relative_to(path) for path in launch.volumes.values()):
        raise ConfigError(
            f"runs_dir={runs} is in the container and lost with it; mount a claim there, "
            "'launch.volumes={CLAIM: /runs}' runs_dir=/runs"
        )
    place = {
        "node": "$JOB_COMPLETION_INDEX",
        "head": f"{job.label}-node-0-0.{job.label}",
        "address": "$(hostname -i | cut -d ' ' -f 1)",
    }
    literal = replace(job, words=tuple(map(_literal, job.words)))
    run = _literal(str(runs / str(job.config.name)))
    values = _of_job(config, job, _script(config, literal, run, place))
    manifest = shell.fill_yaml(
        shell.template("kubernetes.yaml", launch.template),
        values | _of_pod(config, launch, job),
    )
    return Plan(manifest, lambda: _hand_over(["kubectl", "create", "-f", "-"], manifest))


def _of_pod(config: LaunchConfig, launch: KubernetesLaunch, job: Job) -> dict[str, Any]:
    """What the manifest says of a pod."""
    cluster = config.cluster
    amounts = {launch.gpu_resource: str(job.gpus)} if job.gpus else {}
    amounts |= dict(launch.resources)
    requests = dict(amounts)
    if cluster.cpus_per_node is not None:
        requests["cpu"] = str(cluster.cpus_per_node)
    if cluster.memory_gib is not None:
        requests["memory"] = amounts["memory"] = f"{cluster.memory_gib}Gi"
    shared = {"medium": "Memory", "sizeLimit": f"{launch.shm_gib}Gi"}
    claims = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}}
              for claim in launch.volumes]  # fmt: skip
    mounts = [{"name": claim, "mountPath": path} for claim, path in launch.volumes.items()]
    return {
        "namespace": launch.namespace,
        "queue": launch.queue,
        "max_restarts": launch.max_restarts,
        "grace_s": launch.grace_s,
        "service_account": launch.service_account,
        "node_selector": dict(launch.node_selector) or None,
        "tolerations": [{"key": key, "operator": "Exists"} for key in launch.tolerations] or None,
        "image": launch.image,
        "folder": launch.folder,
        "environment": [{"name": n, "value": _literal(v)} for n, v in cluster.environment.items()]
        or None,
        "secrets": [{"secretRef": {"name": name}} for name in launch.secrets] or None,
        "requests": requests or None,
        "limits": amounts or None,
        "mounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}, *mounts],
        "volumes": [{"name": "shared-memory", "emptyDir": shared}, *claims],
    }


def skypilot(config: LaunchConfig) -> Plan:
    """One task, on whichever machines SkyPilot finds."""
    launch = config.launch
    if not isinstance(launch, SkyPilotLaunch):
        raise TypeError(launch.kind)
    (job,) = make_jobs(config)
    if job.gpus and launch.accelerators is None:
        raise ConfigError(
            f"cluster.gpus_per_node={job.gpus}, launch.accelerators names none; set "
            f"launch.accelerators=H100:{job.gpus}, or cluster=cpu"
        )
    place = {
        "node": "$SKYPILOT_NODE_RANK",
        "head": '$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
        "address": '$(echo "$SKYPILOT_NODE_IPS" | sed -n "$((node + 1))p")',
    }
    runs, cluster = PurePosixPath(job.config.runs_dir), config.cluster
    script = _script(config, job, str(runs / str(job.config.name)), place)
    values = {
        **_of_job(config, job, script),
        "workdir": launch.workdir,
        "infra": launch.infra,
        "accelerators": launch.accelerators,
        "cpus": None if cluster.cpus_per_node is None else f"{cluster.cpus_per_node}+",
        "memory": None if cluster.memory_gib is None else f"{cluster.memory_gib}+",
        "use_spot": launch.use_spot,
        "disk_gib": launch.disk_gib,
        "image": launch.image,
        "mounts": dict(launch.mounts) or None,
        "environment": dict(cluster.environment) or None,
        "setup": "\n".join(launch.setup) or None,
    }
    task = shell.fill_yaml(shell.template("skypilot.yaml", launch.template), values)
    command = ["sky", "jobs", "launch"] if launch.managed else ["sky", "launch", "-c", job.label]
    return Plan(task, lambda: _hand_over([*command, "--yes", "--detach-run"], task, as_file=True))


def _of_job(config: LaunchConfig, job: Job, script: str) -> dict[str, Any]:
    """What every template may say."""
    return {
        "name": job.label,
        "num_nodes": len(job.ranks),
        "port": config.cluster.port,
        "script": script,
    }


def _script(config: LaunchConfig, job: Job, run: str, place: Mapping[str, str]) -> str:
    """What a node runs; ``place`` is how a shell there learns its number and the addresses."""
    values = {
        **place,
        "python": shlex.quote(interpreter(config)),
        "hash": job.hash,
        "gpus": str(job.gpus_used[0]),
        "port": str(config.cluster.port),
        "words": shlex.join(job.words),
        "run": shlex.quote(run),
        "num_nodes": str(len(job.ranks)),
        "ranks": str(job.ranks[0]),
        "name": job.label,
    }
    return shell.fill(shell.template("node.sh", None), values)


def _literal(text: str) -> str:
    """What Kubernetes makes the text of: it replaces $(NAME) by a variable and halves $$."""
    return re.sub(r"\$\$+|\$(?=\()", lambda found: found[0] * 2, text)


def _hand_over(command: Sequence[str], content: str, as_file: bool = False) -> int:
    """Give a manifest to the program that knows the cluster.

    Raises:
        ConfigError: there is no such program, or it refuses.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"no {command[0]} on this machine; install it, or keep what dry_run=true prints"
        )
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        words = [*command, file.name] if as_file else command
        done = subprocess.run(words, input=None if as_file else content, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"{shell.line(command)} refuses, status {done.returncode}")
    return 0
