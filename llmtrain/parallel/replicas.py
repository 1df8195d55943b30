"""Sums of gradients over the ranks that hold equal parameters, after the backward or during it.

Invariant: gradients are summed, never averaged (the loss is already divided by the global number of
targets), in place and in the same buckets whenever the sum runs, so overlapping changes no bit.
Buckets start in one fixed order on every rank, whichever gradient is ready first.

    summed = GradientSum(parameters, world.group("replicas"), overlapped=True)
    summed.begin(num_microbatches=4)     # before the first backward of a step
    ...                                  # 4 backwards; the last one starts the sums
    summed.finish()                      # every parameter's grad is the sum over the group
    sum_over(gradients, group)           # any list of tensors, now
"""

import functools
from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.scopes import COMMUNICATION, scope

BUCKET_BYTES = 32 * 2**20
"""Size of one all-reduce."""

_BUCKETS_IN_FLIGHT = 2


def sum_over(
    gradients: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    device: torch.device | None = None,
) -> None:
    """Add tensors in place over ``group``, flattened in buckets; None is a group of one.

    ``device`` is where the group talks, for tensors that are elsewhere (on the host, offloaded).
    """
    if group is None:
        return
    pending: deque[Callable[[], None]] = deque()
    with scope(COMMUNICATION):
        for bucket in in_buckets(gradients):
            pending.append(_start_sum(bucket, group, device))
            if len(pending) > _BUCKETS_IN_FLIGHT:
                pending.popleft()()
        for finish in pending:
            finish()


def _start_sum(
    bucket: list[Tensor], group: dist.ProcessGroup, device: torch.device | None
) -> Callable[[], None]:
    """Begin the all-reduce of one bucket; the returned call waits and copies the sums back."""
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).to(device)
    work = dist.all_reduce(flat, group=group, async_op=True)

    def finish() -> None:
        work.wait()
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])

    return finish


def in_buckets(tensors: Sequence[Tensor], limit: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Group tensors in order, each group of one dtype and at most ``limit`` bytes or one tensor."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        room -= tensor.nbytes
        if room < 0 or not buckets or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            room = limit - tensor.nbytes
        buckets[-1].append(tensor)
    return buckets


class GradientSum:
    """Sums the gradients of parameters over a group, each step, where they accumulate.

    The gradients live in flat buffers, one for each bucket: ``begin`` puts zeroed views of them
    into ``grad``, so the backward adds in place and an all-reduce needs no copy. The last parameter
    comes first, because the backward reaches it first.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        group: dist.ProcessGroup,
        overlapped: bool,
        sources: Sequence[Tensor] | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Allocate the gradients of ``parameters``.

        Args:
            parameters: leaves whose ``grad`` is accumulated and summed.
            group: ranks that hold equal parameters.
            overlapped: sum a bucket as soon as the last backward has filled it.
            sources: leaves whose backward brings the gradients, where those are others (bf16
                copies that hand their gradients on to fp32 ``parameters``); one for each of them,
                with that hook registered already.
            bucket_bytes: size of one all-reduce.
        """
        self._group = group
        buckets = in_buckets(list(reversed(parameters)), bucket_bytes)
        self._parameters = [parameter for bucket in buckets for parameter in bucket]
        self._sizes = [len(bucket) for bucket in buckets]
        self._flat = [_flat_buffer(bucket) for bucket in buckets]
        self._left: list[int] = []
        self._missing: list[int] = []
        self._works: list[dist.Work | None] = []
        if overlapped:
            self._watch(list(reversed(parameters if sources is None else sources)))

    @property
    def num_started(self) -> int:
        """Number of all-reduces this step has begun so far."""
        return len(self._works)

    def begin(self, num_microbatches: int) -> None:
        """Set all gradients to zero, before the first of ``num_microbatches`` backwards."""
        torch._foreach_zero_(self._flat)
        start = 0
        for size, flat in zip(self._sizes, self._flat, strict=True):
            members = self._parameters[start : start + size]
            parts = torch.split(flat, [parameter.numel() for parameter in members])
            for parameter, part in zip(members, parts, strict=True):
                parameter.grad = part.view_as(parameter)
            start += size
        self._left = [num_microbatches] * len(self._parameters)
        self._missing = list(self._sizes)
        self._works = []

    def finish(self) -> None:
        """Sum what is not yet on its way, wait for all; every ``grad`` is then the sum."""
        while len(self._works) < len(self._flat):
            self._start_next()
        with scope(COMMUNICATION):
            for work in self._works:
                if work is not None:
                    work.wait()
        self._left = []

    def _watch(self, sources: Sequence[Tensor]) -> None:
        """Count the gradients as they arrive, one for each micro-batch of each source."""
        index = 0
        for bucket, size in enumerate(self._sizes):
            for _ in range(size):
                hook = functools.partial(self._arrived, index, bucket)
                sources[index].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                index += 1

    def _arrived(self, index: int, bucket: int, source: Tensor) -> None:
        del source
        if not self._left:
            return
        self._left[index] -= 1
        if self._left[index] < 0:
            raise RuntimeError(
                "a gradient arrived after its sum over replicas had begun; every micro-batch may "
                "add to a parameter once: use parallel.replica_sum=after"
            )
        if self._left[index] == 0:
            self._missing[bucket] -= 1
            while len(self._works) < len(self._flat) and self._missing[len(self._works)] == 0:
                self._start_next()

    def _start_next(self) -> None:
        flat = self._flat[len(self._works)]
        self._works.append(dist.all_reduce(flat, group=self._group, async_op=True))


def _flat_buffer(bucket: list[Tensor]) -> Tensor:
    """Allocate one tensor with room for all gradients of a bucket."""
    size = sum(tensor.numel() for tensor in bucket)
    return bucket[0].new_zeros(size, dtype=bucket[0].grad_dtype).detach()
