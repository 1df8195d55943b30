"""The one schema of a checkpoint's tensors, the same for every engine and layout.

``model.<name>`` is a parameter and ``optim.<name>.<state>`` a state of its optimizer, under the
global parameter name, whole (or a DTensor that stands for the whole) and in fp32 (fp64 in fp64
runs); ``optim.step`` counts the updates made. Hyper-parameters are not state: they come from the
configuration.

Invariant: a rank's dict holds what the rank owns and shares storage with the engine, so loading in
place (as torch's distributed checkpoint does) reaches the engine.

    state = engine.state_dict()
    dcp.load(state, checkpoint_id=folder)
    engine.load_state_dict(state)
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.errors import CheckpointError
from llmtrain.parallel.apply import OwnedParameter, Stage
from llmtrain.parallel.fsdp import like_parameter, local_slices

STEP = "step"
"""Name under which torch's optimizers count updates, per parameter; saved once."""


def make_optimizer_state(stage: Stage, optimizer: torch.optim.Optimizer) -> None:
    """Have ``optimizer`` create its state now, by an update that its gate skips.

    Raises:
        TypeError: the optimizer does not take ``found_inf``, which gates updates on the device.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TypeError(f"{type(optimizer).__name__} has no gate; build it with fused=True")
    for owned in stage.parameters:
        owned.local.grad = torch.zeros_like(owned.local)
    gated_step(optimizer, skip=torch.ones((), device=stage.world.device), divisor=None)
    stage.clear_gradients()


def gated_step(optimizer: torch.optim.Optimizer, skip: Tensor, divisor: Tensor | None) -> None:
    """Update with gradients / ``divisor`` unless ``skip`` is 1, without asking the device.

    A skipped update changes nothing, the optimizer's step count included.
    """
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    optimizer.step()


def state_dict(stage: Stage, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name every tensor this rank owns; see the schema above."""
    state: dict[str, Tensor] = {}
    for owned in stage.parameters:
        state[f"model.{owned.info.name}"] = owned.tensor.detach()
        for key, value in _elementwise(optimizer, owned):
            state[f"optim.{owned.info.name}.{key}"] = like_parameter(value, owned.tensor)
    first = optimizer.state[stage.parameters[0].local]
    state["optim.step"] = first[STEP].detach().clone()
    return state


def load_state_dict(
    stage: Stage, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Copy ``state`` into the engine; tensors that already share its storage stay.

    Values may be whole tensors or DTensors of the same sharding; whole ones are cut to this rank.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    targets = state_dict(stage, optimizer)
    missing = sorted(set(targets) - set(state))
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors of this model, first {missing[0]}; "
            "use the model and optimizer configuration the checkpoint was made with"
        )
    with torch.no_grad():
        for name, target in targets.items():
            _copy(name, target, state[name])
        for owned in stage.parameters:
            optimizer.state[owned.local][STEP].copy_(state["optim.step"])
    stage.publish_parameters()


def _elementwise(
    optimizer: torch.optim.Optimizer, owned: OwnedParameter
) -> list[tuple[str, Tensor]]:
    """List the optimizer's tensors that have the parameter's shape."""
    state = optimizer.state[owned.local]
    return [(key, value) for key, value in state.items() if key != STEP]


def _copy(name: str, target: Tensor, source: Tensor) -> None:
    if source.shape != target.shape:
        raise CheckpointError(
            f"{name} has shape {tuple(source.shape)} in the checkpoint, {tuple(target.shape)} in "
            "this run; use the model configuration the checkpoint was made with"
        )
    if not isinstance(target, DTensor):
        whole = source.full_tensor() if isinstance(source, DTensor) else source
        target.copy_(whole)
    elif isinstance(source, DTensor):
        target.to_local().copy_(source.to_local())
    else:
        target.to_local().copy_(source[local_slices(target)])
