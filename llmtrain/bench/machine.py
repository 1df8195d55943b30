"""What figures were measured on and with: processor, device, versions, commit, command.

Invariant: nothing here changes anything, and what cannot be found is null.

    facts(torch.device("cpu"))["processor"]
"""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import llmtrain
from llmtrain.startup import code_version

_PACKAGES = ("triton", "torchao", "flash-attn", "flash-attn-4", "liger-kernel", "deepspeed")


def facts(device: torch.device) -> dict[str, Any]:
    """Describe machine, software and command, ready for JSON."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "llmtrain": code_version(),
        "commit": _commit(),
        "command": shlex.join(["llmtrain", *sys.argv[1:]]),
    }


def processor() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this code lies in, ``-dirty`` where files differ from it."""
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(llmtrain.__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None if asked.returncode == 0 else None
