"""What most stages say of the shards they read, and their jobs: one per shard.

stage.run("steps", apply_steps, shard_jobs(shards, {"out": str(out)}))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.shards import Shard


def shard_inputs(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Return what a stage's key and manifest say of the shards it reads."""
    return [{"name": Path(shard.path).name, "digest": shard.digest} for shard in shards]


def shard_jobs(
    shards: Sequence[Shard], common: Mapping[str, Any], *, index: bool = False
) -> list[tuple[dict[str, Any], int]]:
    """One job per shard: its arguments and its size."""
    return [
        ({**common, "shard": shard, **({"index": i} if index else {})}, shard.text_bytes)
        for i, shard in enumerate(shards)
    ]
