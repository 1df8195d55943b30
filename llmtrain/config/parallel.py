"""The layout (how many ranks along each mesh axis) and the engine that runs it.

A layout is a performance decision: none of these fields changes the numbers a run computes.
"""

from dataclasses import dataclass
from typing import Literal

from llmtrain.config.fields import below, not_positive
from llmtrain.errors import ConfigError, LayoutError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Ranks along each axis of the mesh; their product is the number of processes."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Data-parallel replicas that each hold everything (DDP)."""
    dp_shard: int | Literal["auto"] = "auto"
    """Data-parallel ranks that share parameters, gradients and optimizer state (FSDP2).

    ``auto`` takes all ranks that the other axes leave.
    """
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    """Order in which a pipeline runs its micro-batches."""

    def __post_init__(self) -> None:
        """Refuse axes below 1."""
        if problems := below(self, 1, "pp", "dp_replicate", "dp_shard"):
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What runs the step and in which precision."""

    kind: Literal["native"] = "native"
    """``native``: PyTorch DDP, FSDP2 and torch.distributed.pipelining."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Compute type; bf16 keeps fp32 master weights, gradients and reductions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; ``auto`` takes CUDA where it is present."""
    attention: Literal["auto", "sdpa", "reference"] = "auto"
    """Attention backend; ``auto`` takes the fastest that is available and logs which."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time in the loss; smaller is less memory."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms; the same layout then repeats bit by bit."""
    timeout_s: float = 600.0
    """Seconds a collective may wait for a peer before the run fails."""

    def __post_init__(self) -> None:
        """Refuse empty chunks and time-outs."""
        if problems := below(self, 1, "loss_chunk_tokens") + not_positive(self, "timeout_s"):
            raise ConfigError(problems)


def implied_world_size(parallel: ParallelConfig) -> int:
    """The fewest processes the layout runs on: ``auto`` counts as 1."""
    shard = 1 if parallel.dp_shard == "auto" else parallel.dp_shard
    return parallel.pp * parallel.dp_replicate * shard


def resolve_dp_shard(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks along dp_shard on ``world_size`` processes.

    Raises:
        LayoutError: the axes do not multiply to the number of processes.
    """
    needed = implied_world_size(parallel)
    exact = parallel.dp_shard != "auto"
    if world_size % needed == 0 and (world_size == needed or not exact):
        return world_size // (parallel.pp * parallel.dp_replicate)
    axes = {"pp": parallel.pp, "dp_replicate": parallel.dp_replicate}
    shown = [f"parallel.{name}={size}" for name, size in axes.items() if size > 1]
    if exact:
        shown.append(f"parallel.dp_shard={parallel.dp_shard}")
    found = " x ".join(shown)
    wrong = f"makes {needed} ranks" if exact else "does not divide the ranks"
    raise LayoutError(
        f"{found} {wrong}, started were {world_size}; {_way_out(parallel, world_size)} "
        f"or start torchrun --nproc-per-node {needed} -m llmtrain ..."
    )


def _way_out(parallel: ParallelConfig, world_size: int) -> str:
    """The overrides that fit ``world_size`` processes."""
    fit = [n for n in range(1, world_size + 1) if world_size % (n * parallel.dp_replicate) == 0]
    if not fit:
        return f"use a parallel.dp_replicate that divides {world_size}"
    if parallel.pp in fit:
        return "use parallel.dp_shard=auto"
    choices = f"in {{{', '.join(map(str, fit))}}}" if len(fit) > 1 else "of 1"
    return f"use parallel.pp {choices}" + ("" if parallel.dp_shard == "auto" else ", dp_shard=auto")
