"""What benchmarks say on the way, and figures as files keep them."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_VERSIONS = (
    "import importlib.metadata as m, json, sys;"
    "found = {d.name.lower(): d.version for d in m.distributions()};"
    "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
)


def host() -> dict[str, Any]:
    """Describe the machine that measures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((n.split(":")[1].strip() for n in lines if n.startswith("model name")), ""),
        "cores": os.cpu_count(), "system": platform.platform(),
        "python": platform.python_version(), "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip


def commit() -> str:
    """Return the version of the code that ran."""
    command = ["git", "describe", "--always", "--dirty"]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(command, capture_output=True, text=True, cwd=root).stdout.strip()


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those of some packages that another interpreter has."""
    command = [str(python), "-c", _VERSIONS, *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def rounded(value: Any) -> Any:
    """Round every number to four digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def note(text: str) -> None:
    """Say on standard error what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
