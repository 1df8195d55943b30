"""Where and of what a run was made: code, versions, machines, data; one line for each start.

RUN/environment.jsonl keeps them all, as a run may go on with other code on other machines.

    here = collect(world)                                      # every rank
    found = describe(config, here, plan, attempt=1)            # rank 0
    append(run.environment_jsonl, found)
"""

import json
import logging
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import llmtrain
from llmtrain.data.plan import BatchPlan
from llmtrain.parallel.mesh import World

logger = logging.getLogger(__name__)

_PACKAGES = ("llmtrain", "torch", "numpy", "deepspeed", "flash-attn", "triton", "torchao", "wandb")


def collect(world: World) -> list[tuple[str, str]] | None:
    """Host and device of every rank, in their order, on rank 0; None elsewhere. Collective."""
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return world.collect((socket.gethostname(), name))


def describe(
    ranks: list[tuple[str, str]], plan: BatchPlan, layout: Mapping[str, int], attempt: int
) -> dict[str, Any]:
    """Say what a start of a run is made of, JSON-ready."""
    return {
        "attempt": attempt,
        "time": time.time(),
        "git": git_state(Path(llmtrain.__file__).parent),
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "hosts": sorted({host for host, _ in ranks}),
        "devices": dict(_counted([device for _, device in ranks])),
        "layout": dict(layout),
        "data": {
            name: {
                "folder": str(order.store.path),
                "fingerprint": order.store.fingerprint,
                "tokens": order.store.num_tokens,
                "order": order.kind,
            }
            for name, order in zip(plan.source_names, plan.orders, strict=True)
        },
        "data_fingerprint": plan.fingerprint,
    }


def append(path: Path, found: Mapping[str, Any]) -> None:
    """Add a line to the file of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found, ensure_ascii=False) + "\n")


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that ``folder`` lies in and whether files differ; None without one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        asked = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _counted(names: list[str]) -> list[tuple[str, int]]:
    return [(name, names.count(name)) for name in sorted(set(names))]
