"""What the loop may ask of an engine; native and DeepSpeed engines satisfy it alike.

Everything returned is a device scalar or a device tensor: an engine never makes the host wait.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.data.batch import StepBatch
from llmtrain.model.parameters import ParameterInfo
from llmtrain.parallel.matrices import MatrixMap
from llmtrain.parallel.region import Region
from llmtrain.parallel.stage import LossFunction

__all__ = [
    "LR_MULTIPLIER",
    "Engine",
    "EngineParts",
    "LossFunction",
    "MatrixMap",
    "OptimizerFactory",
    "StepLimits",
    "StepResult",
]


LR_MULTIPLIER = "lr_multiplier"
"""Key of an optimizer's group: what its learning rate is of the step's; every group has it."""


class OptimizerFactory(Protocol):
    """Makes the optimizer of the plain tensors a rank holds, given with their rows of the table.

    The engine knows the parameters, not the update rule; the optimizer must take ``found_inf``, and
    its groups have an LR_MULTIPLIER.
    """

    def __call__(
        self,
        parameters: Sequence[tuple[ParameterInfo, nn.Parameter]],
        matrix_map: MatrixMap,
        regions: Sequence[Region] | None = None,
    ) -> torch.optim.Optimizer:
        """Make it; ``regions`` tell where the tensors lie in whole parameters.

        None where the engine will put other tensors in their place.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest loss and gradient norm a step may have and still be applied; inf is off."""

    max_loss: Tensor
    """Largest mean loss in nats per target, float32 scalar on the device."""
    max_grad_norm: Tensor
    """Largest global gradient norm before clipping, float32 scalar on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did, summed over the whole global batch; identical on every rank."""

    loss_sum: Tensor
    """Sum in nats of what is optimised, float32 scalar (float64 in fp64 runs).

    It is the weighted cross entropy of all targets, plus the z-loss where it has a weight, which
    ``metrics`` then gives apart as ``z_loss_sum``.
    """
    target_tokens: Tensor
    """Number (total weight) of targets in the global batch, scalar."""
    grad_norm: Tensor
    """Global L2 norm of the gradient before clipping, scalar; 0 in evaluation."""
    applied: Tensor
    """Whether the update was made: finite and within the limits, bool scalar."""
    metrics: Mapping[str, Tensor]
    """Sums over the global batch by name; ``source_loss_sum``, ``source_tokens``: [num_sources]."""
    gradient_squares: Tensor | None = None
    """Squared norms of the gradient, before clipping, by row of the parameter table, float64.

    None in evaluation.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine is made of, beside the processes it runs on."""

    model: ModelConfig
    """The architecture."""
    parallel: ParallelConfig
    """The layout."""
    engine: EngineConfig
    """Which engine, in which precision."""
    seed: int
    """Run seed: start values derive from it."""
    loss: LossFunction
    """What the last stage computes."""
    optimizer_factory: OptimizerFactory
    """Makes the update rule of what a rank holds."""
    grad_clip_norm: float
    """Largest global gradient norm; larger gradients are scaled down to it."""
    update_in_backward: bool = False
    """Whether each parameter is updated as soon as its gradient is there (native engine)."""


class Engine(Protocol):
    """One optimizer step at a time on the rows of this rank."""

    def train_step(self, batch: StepBatch, lr: float, limits: StepLimits) -> StepResult:
        """Forward, backward, clip and, within the limits, update with learning rate ``lr``."""
        ...

    def eval_step(self, batch: StepBatch) -> StepResult:
        """Forward only, over the same kind of batch."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Full gradients (before clipping) of the last train_step by global parameter name.

        Collective: every rank calls it, every rank gets the same dict (float32 or float64, CPU).
        """
        ...

    def full_parameters(self) -> dict[str, Tensor]:
        """Full logical parameters by global name, on CPU, on every rank (collective)."""
        ...

    def weight_squares(self) -> Tensor:
        """Squared norms of the parameters by row of the parameter table, float64; no collective.

        Each rank counts what no other does: the sum over all ranks is that of the model.
        """
        ...

    def stages(self) -> Sequence[nn.Module]:
        """Parts of the model on this rank, in order; they are looked at, not run."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Model and optimizer in the layout-free schema of engine/state.py."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` of any engine and layout produced."""
        ...

    def before_update(self, act: Callable[[], None]) -> None:
        """Have ``act`` called in every step before it changes anything ``state_dict`` names.

        Checkpoints copy the state while gradients are computed.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; safe to call on the failure path, runs no collective."""
        ...
