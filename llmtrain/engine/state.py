"""The one schema of a checkpoint's tensors, the same for every engine and layout.

``model.<name>`` is a parameter and ``optim.<name>.<state>`` a state of its optimizer, under the
global parameter name, in the whole parameter's coordinates and in fp32 (fp64 in fp64 runs);
``optim.step`` counts the updates made. Hyper-parameters are not state: they come from the
configuration.

Invariant: a rank's dict holds what the rank owns and shares storage with the engine. Loading in
place (as torch's distributed checkpoint does) and then ``load_state_dict`` reaches the engine.

    state = engine.state_dict()
    dcp.load(state, checkpoint_id=folder)
    engine.load_state_dict(state)
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmtrain.engine.portion import PackedPortion, Portion, take
from llmtrain.errors import CheckpointError
from llmtrain.parallel.local import LocalModel, OwnedParameter

STEP = "step"
"""Name under which torch's optimizers count updates, per parameter; saved once."""


def make_optimizer_state(local: LocalModel, optimizer: torch.optim.Optimizer) -> None:
    """Have ``optimizer`` create its state now, by an update that its gate skips.

    Raises:
        TypeError: the optimizer does not take ``found_inf``, which gates updates on the device.
    """
    require_gate(optimizer)
    for owned in local.parameters:
        owned.local.grad = owned.zero_gradient()
    gated_step(optimizer, skip=torch.ones((), device=local.world.device), divisor=None)
    local.clear_gradients()


def require_gate(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that cannot skip an update on the device.

    Raises:
        TypeError: it does not take ``found_inf``.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TypeError(f"{type(optimizer).__name__} has no gate; build it with fused=True")


def gated_step(optimizer: torch.optim.Optimizer, skip: Tensor, divisor: Tensor | None) -> None:
    """Update with gradients / ``divisor`` unless ``skip`` is 1, without asking the device.

    A skipped update changes nothing, the optimizer's step count included.
    """
    device = optimizer.param_groups[0]["params"][0].device  # the host's where FSDP2 offloads
    optimizer.found_inf = skip.to(device)  # type: ignore[attr-defined]
    optimizer.grad_scale = (  # type: ignore[attr-defined]
        None if divisor is None else divisor.to(device)
    )
    optimizer.step()


def state_dict(local: LocalModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name every tensor this rank owns; see the schema above."""
    state: dict[str, Tensor] = {}
    for owned in _originals(local):
        if owned.packed is not None:
            state[f"model.{owned.info.name}"] = PackedPortion(owned.packed)
            continue
        for name, value in _tensors(optimizer, owned):
            dtype = torch.promote_types(value.dtype, torch.float32)
            chunks = [(owned.region, value)]
            state[name] = Portion(owned.info.shape, chunks, like=value, dtype=dtype)
    first = optimizer.state[local.parameters[0].local]
    state["optim.step"] = first[STEP].detach().clone()
    return state


def load_state_dict(
    local: LocalModel, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Copy ``state`` into the engine; tensors that already share its storage stay.

    Values may be whole tensors or portions of the same regions.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    targets = state_dict(local, optimizer)
    check_schema(targets, state)
    with torch.no_grad():
        for name, target in targets.items():
            take(target, state[name])
        for copy, original in _copies(local):
            pairs = zip(_tensors(optimizer, copy), _tensors(optimizer, original), strict=True)
            for (_, mine), (_, theirs) in pairs:
                mine.copy_(theirs)
        for owned in local.parameters:
            optimizer.state[owned.local][STEP].copy_(state["optim.step"])
    local.publish_parameters()


def check_schema(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    missing = sorted(set(targets) - set(state))
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors of this model, first {missing[0]}; "
            "use the model and optimizer configuration the checkpoint was made with"
        )
    for name, target in targets.items():
        if state[name].shape != target.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(state[name].shape)} in the checkpoint, "
                f"{tuple(target.shape)} in this run; use the model configuration the checkpoint "
                "was made with"
            )


def _tensors(
    optimizer: torch.optim.Optimizer, owned: OwnedParameter
) -> Iterator[tuple[str, Tensor]]:
    """List a parameter and the optimizer's tensors of its shape, by their names in the schema."""
    yield f"model.{owned.info.name}", owned.local.detach()
    if not owned.info.trainable:
        return
    for key, value in optimizer.state[owned.local].items():
        if key != STEP:
            yield f"optim.{owned.info.name}.{key}", value


def _originals(local: LocalModel) -> list[OwnedParameter]:
    """List what this rank owns, a tied copy only where the embedding is on another rank."""
    kept = {owned.index: owned for owned in reversed(local.owned)}
    return [kept[index] for index in sorted(kept)]


def _copies(local: LocalModel) -> list[tuple[OwnedParameter, OwnedParameter]]:
    """Pair tied copies with the embedding where both are on this rank."""
    originals = {owned.index: owned for owned in local.owned if not owned.copy}
    return [(o, originals[o.index]) for o in local.owned if o.copy and o.index in originals]
