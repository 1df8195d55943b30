"""Where DeepSpeed's optimizers keep fp32 parameters and gradients, said in the parameter table.

ZeRO flattens the parameters of a group and cuts the result without regard to their edges: what a
rank updates is a flat tensor that holds runs of some parameters. ZeRO 3 cuts every parameter into
equal runs, ZeRO 0 keeps whole ones.

Invariant: every element of the model lies in exactly one run over all ranks (ZeRO 0: on each rank);
padding lies in none. Views share DeepSpeed's storage.

    holder = hold(engine.optimizer, rows)
    for partition in holder.partitions:
        for run in partition.runs:
            run.of(partition.tensor)   # elements run.start ... of parameter run.info.name
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmtrain.model.parameters import ParameterInfo
from llmtrain.parallel.precision import MasterWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive elements of a flattened parameter inside a flat tensor."""

    info: ParameterInfo
    """The parameter's row in the table."""
    index: int
    """Number of that row."""
    start: int
    """First element, counted in the flattened parameter."""
    length: int
    """Number of elements."""
    offset: int
    """Where the run begins in the flat tensor."""

    def of(self, flat: Tensor) -> Tensor:
        """View the run in a tensor laid out as the partition; [length]."""
        return flat.view(-1).narrow(0, self.offset, self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One fp32 tensor that the optimizer updates."""

    tensor: Tensor
    """Key of the optimizer's state; its elements are the parameters."""
    group: int
    """Number of its group in the optimizer."""
    runs: tuple[Run, ...]
    """What lies in it."""


Rows = Sequence[tuple[int, ParameterInfo, nn.Parameter]]
"""Row number, row and parameter of the module, in table order."""


class Holder(Protocol):
    """One of DeepSpeed's ways to keep parameters."""

    partitions: tuple[Partition, ...]
    """What this rank updates."""
    replicated: bool
    """Whether every rank holds everything."""

    def gradients(self) -> list[Tensor]:
        """Summed fp32 gradients after the last backward, laid out as ``partitions``."""
        ...

    def publish(self) -> None:
        """Make forward see the partitions' values; collective."""
        ...

    def clear(self) -> None:
        """Forget the gradients of the last step."""
        ...


class Whole:
    """ZeRO 0: every rank holds every parameter; in bf16 runs behind it an fp32 one."""

    replicated = True

    def __init__(self, optimizer: torch.optim.Optimizer, rows: Rows) -> None:
        """Find the parameters of ``rows`` (fp32 ones) in the optimizer."""
        group_of = {
            id(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]
        }
        self.masters: MasterWeights | None = None
        self.partitions = tuple(
            Partition(
                tensor=parameter,
                group=group_of[id(parameter)],
                runs=(Run(info=info, index=index, start=0, length=info.numel, offset=0),),
            )
            for index, info, parameter in rows
        )

    def gradients(self) -> list[Tensor]:
        """See ``Holder``."""
        return [_gradient(partition) for partition in self.partitions]

    def publish(self) -> None:
        """See ``Holder``."""
        if self.masters is not None:
            self.masters.publish()

    def clear(self) -> None:
        """See ``Holder``."""
        for partition in self.partitions:
            partition.tensor.grad = None


class Slices:
    """ZeRO 1 and 2: each group flattened and cut into equal slices, one for each rank."""

    replicated = False

    def __init__(self, zero: Any, rows: Rows) -> None:
        """Read the slices of DeepSpeed's optimizer ``zero``."""
        self._zero = zero
        self.partitions = tuple(
            _slice(number, flat, zip(group, offsets, strict=True), rank, rows)
            for number, (flat, group, offsets, rank) in enumerate(
                zip(
                    zero.single_partition_of_fp32_groups,
                    zero.round_robin_bit16_groups,
                    zero.round_robin_bit16_offsets,
                    [torch.distributed.get_rank(g) for g in zero.real_dp_process_group],
                    strict=True,
                )
            )
        )

    def gradients(self) -> list[Tensor]:
        """See ``Holder``; DeepSpeed's list of pieces becomes one tensor, which it then uses."""
        if self._zero.cpu_offload:
            return [_gradient(partition) for partition in self.partitions]
        held = self._zero.averaged_gradients
        for number in range(len(self.partitions)):
            if getattr(held[number], "flat_partition", None) is None:
                held[number] = [torch.cat([piece.reshape(-1) for piece in held[number]])]
        return [
            getattr(held[number], "flat_partition", held[number][0]).view(-1)
            for number in range(len(self.partitions))
        ]

    def publish(self) -> None:
        """See ``Holder``."""
        self._zero.update_lp_params()

    def clear(self) -> None:
        """See ``Holder``; DeepSpeed itself drops them in its step."""


class SlicesOfBF16:
    """ZeRO 1 in bf16: whole fp32 gradients on every rank, of which it updates a slice."""

    replicated = False

    def __init__(self, zero: Any, rows: Rows) -> None:
        """Read the slices of DeepSpeed's BF16_Optimizer, and keep its gradients after its step."""
        self._zero = zero
        self._clear: Callable[[], None] = zero.clear_hp_grads
        zero.clear_hp_grads = lambda: None
        self.partitions = tuple(
            _slice(number, flat, _one_after_the_other(group), rank, rows)
            for number, (flat, group, rank) in enumerate(
                zip(
                    zero.fp32_groups_flat_partition,
                    zero.bf16_groups,
                    [torch.distributed.get_rank(g) for g in zero.real_dp_process_group],
                    strict=True,
                )
            )
        )

    def gradients(self) -> list[Tensor]:
        """See ``Holder``."""
        return list(self._zero.fp32_groups_gradient_flat_partition)

    def publish(self) -> None:
        """See ``Holder``."""
        self._zero.update_lp_params()

    def clear(self) -> None:
        """See ``Holder``."""
        self._clear()


class Shards:
    """ZeRO 3: each parameter cut into equal runs, those of a sub-group behind one another."""

    replicated = False

    def __init__(self, zero: Any, rows: Rows) -> None:
        """Read the sub-groups of DeepSpeed's optimizer ``zero``."""
        self._zero = zero
        known = {id(parameter): (index, info) for index, info, parameter in rows}
        self.partitions = tuple(
            Partition(
                tensor=flat,
                group=zero.sub_group_to_group_id[number],
                runs=tuple(_runs_of_shards(group, known)),
            )
            for number, (flat, group) in enumerate(
                zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            )
        )

    def gradients(self) -> list[Tensor]:
        """See ``Holder``."""
        if self._zero.offload_optimizer:
            return [_gradient(partition) for partition in self.partitions]
        sizes = [partition.tensor.numel() for partition in self.partitions]
        return list(self._zero.grad_partitions_flat_buffer.split(sizes))

    def publish(self) -> None:
        """See ``Holder``."""
        zero = self._zero
        zero._partition_all_parameters()
        for number in range(len(self.partitions)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def clear(self) -> None:
        """See ``Holder``; the next backward overwrites them."""


HOLDERS: Mapping[str, Callable[[Any, Rows], Holder]] = {
    "DeepSpeedZeroOptimizer": Slices,
    "BF16_Optimizer": SlicesOfBF16,
    "DeepSpeedZeroOptimizer_Stage3": Shards,
}
"""Holders by DeepSpeed's class of optimizer; ZeRO 0 leaves the optimizer as it is."""


def hold(optimizer: Any, rows: Rows) -> Holder:
    """Read how DeepSpeed's ``optimizer`` keeps the parameters of ``rows``."""
    return HOLDERS.get(type(optimizer).__name__, Whole)(optimizer, rows)


def _gradient(partition: Partition) -> Tensor:
    """Give the gradient a partition has; zeros where nothing flowed."""
    gradient = partition.tensor.grad
    return torch.zeros_like(partition.tensor) if gradient is None else gradient


def _one_after_the_other(parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Pair flattened parameters with where each begins."""
    offset = 0
    for parameter in parameters:
        yield parameter, offset
        offset += parameter.numel()


def _slice(
    group: int, flat: Tensor, placed: Iterable[tuple[Tensor, int]], rank: int, rows: Rows
) -> Partition:
    """Intersect parameters placed in a flattened group with the slice of ``rank``."""
    known = {id(parameter): (index, info) for index, info, parameter in rows}
    first, size = rank * flat.numel(), flat.numel()
    runs = []
    for parameter, begin in placed:
        start = max(first, begin)
        stop = min(first + size, begin + parameter.numel())
        if start < stop:
            index, info = known[id(parameter)]
            runs.append(
                Run(
                    info=info,
                    index=index,
                    start=start - begin,
                    length=stop - start,
                    offset=start - first,
                )
            )
    return Partition(tensor=flat, group=group, runs=tuple(runs))


def _runs_of_shards(
    group: Iterable[Any], known: Mapping[int, tuple[int, ParameterInfo]]
) -> Iterator[Run]:
    """Place the shards of a sub-group's parameters."""
    offset = 0
    for parameter in group:
        size = parameter.partition_numel()
        start = size * parameter.ds_zero_partition_rank
        length = min(size, parameter.ds_numel - start)
        index, info = known[id(parameter)]
        if length > 0:
            yield Run(info=info, index=index, start=start, length=length, offset=offset)
        offset += size
