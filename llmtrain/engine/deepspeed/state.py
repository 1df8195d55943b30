"""DeepSpeed's flat partitions in the layout-free schema of engine/state.py.

Invariant: a portion's chunks are views of the partitions and of the optimizer's state, and after
loading the next forward reads what was loaded: the weights it computes with are copies.

    state = state_dict(holder, optimizer)
    load_state_dict(holder, optimizer, state)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmtrain.engine.deepspeed.partitions import Holder, Run
from llmtrain.engine.portion import Chunk, Portion, take
from llmtrain.engine.state import STEP, check_schema, gated_step, require_gate
from llmtrain.parallel.region import rectangles, sizes


def make_optimizer_state(holder: Holder, optimizer: torch.optim.Optimizer) -> None:
    """Have ``optimizer`` create its state now, by an update that its gate skips.

    DeepSpeed leaves it to the first step, and ZeRO 3 takes the parameters out of their groups
    between steps.

    Raises:
        TypeError: the optimizer does not take ``found_inf``, which gates updates on the device.
    """
    require_gate(optimizer)
    kept = [group["params"] for group in optimizer.param_groups]
    gradients = [partition.tensor.grad for partition in holder.partitions]
    for number, group in enumerate(optimizer.param_groups):
        group["params"] = [p.tensor for p in holder.partitions if p.group == number]
    for partition in holder.partitions:
        partition.tensor.grad = torch.zeros_like(partition.tensor)
    device = holder.partitions[0].tensor.device
    gated_step(optimizer, skip=torch.ones((), device=device), divisor=None)
    for partition, gradient in zip(holder.partitions, gradients, strict=True):
        partition.tensor.grad = gradient
    for group, parameters in zip(optimizer.param_groups, kept, strict=True):
        group["params"] = parameters


def state_dict(holder: Holder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name every tensor of which this rank owns a part."""
    chunks: dict[str, list[Chunk]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for partition in holder.partitions:
        flats = {"model.{}": partition.tensor.detach()}
        for key, value in optimizer.state[partition.tensor].items():
            if key != STEP:
                flats[f"optim.{{}}.{key}"] = value
        for run in partition.runs:
            for pattern, flat in flats.items():
                name = pattern.format(run.info.name)
                chunks.setdefault(name, []).extend(_chunks(run, flat))
                shapes[name] = run.info.shape
    state: dict[str, Tensor] = {
        name: Portion(shapes[name], parts, like=parts[0][1]) for name, parts in chunks.items()
    }
    first = optimizer.state[holder.partitions[0].tensor]
    state["optim.step"] = first[STEP].detach().clone()
    return state


def load_state_dict(
    holder: Holder, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Copy ``state`` into the partitions and publish them to the forward weights; collective.

    Values may be whole tensors or portions of the same chunks.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    targets = state_dict(holder, optimizer)
    check_schema(targets, state)
    with torch.no_grad():
        for name, target in targets.items():
            take(target, state[name])
        for partition in holder.partitions:
            optimizer.state[partition.tensor][STEP].copy_(state["optim.step"])
        holder.publish()


def _chunks(run: Run, flat: Tensor) -> list[Chunk]:
    """Cut a run into rectangles of its parameter, as views."""
    view = run.of(flat)
    return [
        (region, view[part].view(sizes(region)))
        for region, part in rectangles(run.info.shape, run.start, run.length)
    ]
