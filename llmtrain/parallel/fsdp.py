"""Data parallelism: FSDP2 over dp_shard, replicas over dp_replicate, and who holds which slice.

Invariant: gradients are summed over the data-parallel ranks, never averaged (the loss is already
divided by the global number of targets), in fp32 or, in fp64 runs, fp64.

    shard(stage_module, world, "bf16")
    sum_over_replicas(gradients, world)
"""

import functools
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from llmtrain.parallel.mesh import World
from llmtrain.parallel.stage import StageModule

BUCKET_BYTES = 32 * 2**20
"""Size of one all-reduce over replicas."""

_BUCKETS_IN_FLIGHT = 2


def shard(stage: StageModule, world: World, bf16: bool) -> None:
    """Shard every block, then what is left (embedding, norm, head) as one group.

    Parameters stay gathered between the forward and the backward of a pipeline's micro-batches:
    gathering again per micro-batch would cost more than it saves, and some schedules break.
    """
    if world.mesh is None:
        raise ValueError("sharding needs a mesh")
    axes = ("dp_replicate", "dp_shard") if world.axes.dp_replicate > 1 else ("dp_shard",)
    wrap = functools.partial(
        fully_shard,
        mesh=world.mesh[axes],
        reshard_after_forward=world.axes.pp == 1,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32 if bf16 else None,
            cast_forward_inputs=False,
        ),
    )
    for block in stage.transformer.model.layers.values():
        wrap(block)
    wrap(stage)
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


def locate(name: str, parameter: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[slice, ...]]:
    """Give the local part of a (sharded) parameter, its global shape and where the part lies."""
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return parameter.detach(), shape, tuple(slice(0, size) for size in shape)
    local = parameter.to_local().detach()
    return local, shape, local_slices(parameter)


def local_slices(parameter: DTensor) -> tuple[slice, ...]:
    """Tell which slice of the whole this rank's part of ``parameter`` is."""
    coordinate = parameter.device_mesh.get_coordinate()
    slices = [slice(0, size) for size in parameter.shape]
    for position, (placement, size) in enumerate(
        zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    ):
        if isinstance(placement, Shard) and coordinate is not None:
            whole = parameter.shape[placement.dim]
            chunk = -(-whole // size)
            start = min(whole, coordinate[position] * chunk)
            slices[placement.dim] = slice(start, min(whole, start + chunk))
    return tuple(slices)


def like_parameter(local: Tensor, parameter: Tensor) -> Tensor:
    """View a local tensor as sharded the way ``parameter`` is; as it is where that is plain."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def local_part(tensor: Tensor) -> Tensor:
    """Give the plain tensor this rank holds; shares storage."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def sum_over_replicas(gradients: list[Tensor], world: World) -> None:
    """Add gradients in place over dp_replicate, flattened in buckets of 32 MiB."""
    group = world.group("dp_replicate")
    if group is None:
        return
    pending: deque[Callable[[], None]] = deque()
    for bucket in in_buckets(gradients):
        pending.append(_start_sum(bucket, group))
        if len(pending) > _BUCKETS_IN_FLIGHT:
            pending.popleft()()
    for finish in pending:
        finish()


def _start_sum(bucket: list[Tensor], group: dist.ProcessGroup) -> Callable[[], None]:
    """Begin the all-reduce of one bucket; the returned call waits and copies the sums back."""
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    work = dist.all_reduce(flat, group=group, async_op=True)

    def finish() -> None:
        work.wait()
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])

    return finish


def in_buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Group gradients in order, each group at most BUCKET_BYTES or one gradient."""
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        room -= gradient.nbytes
        if room < 0 or not buckets:
            buckets.append([])
            room = BUCKET_BYTES - gradient.nbytes
        buckets[-1].append(gradient)
    return buckets
