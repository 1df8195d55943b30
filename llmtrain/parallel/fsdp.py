"""Sharded data parallelism: FSDP2 over dp_shard x cp, hybrid with dp_replicate.

Invariant: gradients are summed over the data-parallel ranks, never averaged (the loss is already
divided by the global number of targets), in fp32 or, in fp64 runs, fp64.

    shard(stage_module, world, bf16=True, reshard=True)
"""

import functools

import torch
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from llmtrain.parallel.mesh import World
from llmtrain.parallel.stage import StageModule


def shard(
    stage: StageModule, world: World, bf16: bool, reshard: bool, cpu_offload: bool = False
) -> None:
    """Shard every block, then what is left (embedding, norm, head) as one group.

    Args:
        stage: on the meta device, already cut to its tensor-parallel part.
        world: groups; dp_shard is above 1.
        bf16: compute and gather in bf16, keep and reduce in fp32.
        reshard: free gathered parameters after each forward.
        cpu_offload: keep the shards in host memory.
    """
    wrap = functools.partial(
        fully_shard,
        mesh=world.shard_mesh(),
        reshard_after_forward=reshard,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32 if bf16 else None,
            cast_forward_inputs=False,
        ),
        offload_policy=(
            CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
            if cpu_offload
            else OffloadPolicy()
        ),
    )
    for block in stage.transformer.model.layers.values():
        wrap(block)
    wrap(stage, reshard_after_forward=False)  # its backward follows at once
    for module in sharded_modules(stage):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def sharded_modules(stage: StageModule) -> list[FSDPModule]:
    """List the modules of ``stage`` that FSDP2 wraps."""
    return [module for module in stage.modules() if isinstance(module, FSDPModule)]


def settle_shards(stage: StageModule) -> None:
    """Have FSDP2 make its final (padded) storage now, so that local shards may be kept."""
    for module in sharded_modules(stage):
        module.unshard()
        module.reshard()


def reshard(stage: StageModule) -> None:
    """Drop gathered parameters that a forward without backward left behind."""
    for module in sharded_modules(stage):
        module.reshard()


def set_last_backward(stage: StageModule, last: bool) -> None:
    """Reduce gradients only in the backward of the last micro-batch."""
    if isinstance(stage, FSDPModule):
        stage.set_requires_gradient_sync(last)
        stage.set_is_last_backward(last)
