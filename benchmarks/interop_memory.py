"""Memory of an import and an export of a checkpoint of the size of LLaMA 2 7B.

Writes random bf16 weights shard by shard as a Hugging Face folder, imports it, deletes it, exports
it again, and compares every tensor with what was drawn. Prints the peak of resident memory of the
two commands; fails above 3 GB, or where a byte differs. Needs twice the checkpoint on disk.

    python -m benchmarks.interop_memory out=/data/interop
    python -m benchmarks.interop_memory out=/data/interop layers=2 json=interop.json
"""

import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.interop.families import family_of, read_config
from llmtrain.interop.layout import layout_of, shapes_there
from llmtrain.interop.safetensors import TensorFolder
from llmtrain.interop.shards import ShardWriter

BUDGET_BYTES = 3 * 10**9
SHARD_BYTES = 5 * 10**9
DEFAULTS = {"out": "", "layers": "32", "json": ""}
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Make the checkpoint, send it there and back, and print what it took."""
    given = dict(a.partition("=")[::2] for a in arguments)
    options = {**DEFAULTS, **given}
    if given.keys() - DEFAULTS.keys() or not options["out"]:
        raise ConfigError(f"found {sorted(given)}, expected out=DIR [layers=32] [json=FILE]")
    folder = Path(options["out"]).resolve()
    config = {**CONFIG, "num_hidden_layers": int(options["layers"])}
    size = make_folder(folder / "first", config)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.interop_memory {' '.join(arguments)}",
        "checkpoint_gb": round(size / 1e9, 2), "layers": config["num_hidden_layers"],
        "import": command("import", f"from={folder}/first", f"run={folder}/run"),
    }  # fmt: skip
    shutil.rmtree(folder / "first")
    words = (f"run={folder}/run", f"to={folder}/second", "dtype=bf16")
    result["export"] = command("export", *words)
    result["tensors_equal"] = compare(folder / "second")
    shutil.rmtree(folder)
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    text = json.dumps(result, indent=1)
    print(text)
    if options["json"]:
        Path(options["json"]).write_text(text + "\n")
    peak = max(result[name]["peak_bytes"] for name in ("import", "export"))
    return 0 if peak < BUDGET_BYTES else 1


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values of a tensor: those of its name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
    words = np.random.SFC64(seed).random_raw(-(-math.prod(shape) // 4)).view(np.int16)
    words &= 0x3FFF  # below 2, and no NaN
    return torch.from_numpy(words[: math.prod(shape)]).view(torch.bfloat16).view(shape)


def make_folder(folder: Path, config: dict[str, Any]) -> int:
    """Write config and weights; returns the bytes of the weights."""
    _, model = read_config(config)
    shapes = shapes_there(layout_of(model, family_of("llama"), model.vocab_size))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    layouts = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with ShardWriter(folder, layouts, SHARD_BYTES) as shards:
        for name, shape in shapes.items():
            shards.put(name, range(shape[0]), drawn(name, shape))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def command(*words: str) -> dict[str, Any]:
    """Run one ``llmtrain`` command in a process of its own; its time and its peak of memory."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "llmtrain", *words])
    peak, before = 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    while process.poll() is None:
        peak = max(peak, high_water(process.pid))
        time.sleep(0.02)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"llmtrain {words[0]} ended with status {process.returncode}")
    return {
        "peak_bytes": peak, "wall_s": round(time.monotonic() - started, 1),
        "processor_s": round(sum(after[:2]) - sum(before[:2]), 1),
    }  # fmt: skip


def high_water(pid: int) -> int:
    """Most resident bytes a live process ever had, files it maps included; 0 where it is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def compare(folder: Path) -> int:
    """Compare every tensor with what was drawn; returns their number."""
    tensors = TensorFolder(folder)
    for name, stored in tensors.tensors.items():
        found = tensors.rows(name, 0, stored.shape[0])
        if not found.view(torch.int16).equal(drawn(name, stored.shape).view(torch.int16)):
            raise SystemExit(f"{name} is not what was written")
    return len(tensors.tensors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
