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


def reduce_into_fp32(stage: StageModule) -> None:
    """Leave the sums of bf16 parameters' gradients in fp32; after ``settle_shards``.

    FSDP2 sums them in fp32 and then casts to the type of the parameter, for which it has no option:
    its own field is set, once the first forward, which would set it again, is prepared for.
    """
    if isinstance(stage, FSDPModule):
        stage._get_fsdp_state()._lazy_init()
    for module in sharded_modules(stage):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            group._orig_dtype = torch.float32


def prefetch(stage: StageModule, blocks_ahead: int) -> None:
    """Have each block gather the parameters of the ``blocks_ahead`` blocks that run after it.

    In the backward these are the blocks before it. With 0 FSDP2 gathers a block's as it begins,
    and one ahead in the backward.
    """
    if blocks_ahead == 0:
        return
    layers = stage.transformer.model.layers.values()
    blocks: list[FSDPModule] = [block for block in layers if isinstance(block, FSDPModule)]
    if isinstance(stage, FSDPModule):
        stage.set_modules_to_forward_prefetch(blocks[:blocks_ahead])
        stage.set_modules_to_backward_prefetch(blocks[: -blocks_ahead - 1 : -1])
    for number, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + blocks_ahead])
        first = max(0, number - blocks_ahead)
        block.set_modules_to_backward_prefetch(blocks[first:number][::-1])


def reshard(stage: StageModule) -> None:
    """Drop gathered parameters that a forward without backward left behind."""
    for module in sharded_modules(stage):
        module.reshard()


def set_last_backward(stage: StageModule, last: bool, reduce_every: bool = False) -> None:
    """Reduce gradients in the backward of the last micro-batch, or of each over the shards.

    Over replicas they are summed in the last alone.
    """
    if isinstance(stage, FSDPModule):
        stage.set_requires_gradient_sync(last or reduce_every)
        stage.set_requires_all_reduce(last)
        stage.set_is_last_backward(last or reduce_every)
