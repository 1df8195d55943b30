"""What one rank runs and owns: its stages, its parameters, and the sums that finish its gradients.

Invariant: after ``reduce_gradients`` every holder of a region has the same gradient of it, bit by
bit, summed over everything that used it: replicas, tensor-parallel ranks, tied copies.

    sums = local.run(batch, scale=1 / target_tokens, training=True)
    gradients = local.reduce_gradients()
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.hang.heartbeat import Phase
from llmtrain.model.parameters import ParameterInfo
from llmtrain.ops.nf4 import PackedMatrix
from llmtrain.parallel.context import split_sequence
from llmtrain.parallel.float8 import GatheredScales
from llmtrain.parallel.fsdp import reshard, set_last_backward
from llmtrain.parallel.mesh import World
from llmtrain.parallel.precision import MasterWeights
from llmtrain.parallel.region import Region, local_part
from llmtrain.parallel.replicas import GradientSum, sum_over
from llmtrain.parallel.scopes import BACKWARD, scope
from llmtrain.parallel.stage import StageModule, batch_fields

if TYPE_CHECKING:
    from llmtrain.parallel.pipeline import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedParameter:
    """A parameter of which this rank holds a region, in the type the optimizer updates."""

    info: ParameterInfo
    """Its row in the parameter table."""
    index: int
    """Number of that row: the fixed order of sums."""
    tensor: Tensor
    """The parameter as the module has it, plain or DTensor; its ``grad`` is accumulated."""
    local: nn.Parameter
    """The plain tensor this rank holds, sharing storage; what the optimizer updates."""
    region: Region
    """Where ``local`` lies in the whole parameter."""
    counted: bool
    """Whether this rank is the first that holds the region: it alone adds to norms."""
    partial_over_tp: bool
    """Whether each tensor-parallel rank computes only a part of the gradient's sum."""
    copy: bool
    """Whether this is the head's copy of a tied embedding on another stage."""
    packed: PackedMatrix | None = None
    """Where the values are if they are kept in 4 bits; ``local`` has then no memory."""

    def values(self) -> Tensor:
        """Give the values of the local part: shared, or expanded where they are packed."""
        return self.local.detach() if self.packed is None else self.packed.values()

    def local_gradient(self) -> Tensor:
        """Give the plain gradient of the local part; zeros, kept, where nothing flowed."""
        if self.tensor.grad is not None:
            return local_part(self.tensor.grad)
        if self.local.grad is None:
            self.local.grad = self.zero_gradient()
        return self.local.grad

    def zero_gradient(self) -> Tensor:
        """Make a plain gradient of the local part; fp32 where parameters are bf16."""
        return torch.zeros_like(self.local, dtype=self.local.grad_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """The part of a model on one rank; built by ``parallel.apply.build_local_model``."""

    modules: tuple[StageModule, ...]
    """The pipeline stages of this rank, in the order of the model."""
    parameters: tuple[OwnedParameter, ...]
    """What it owns and trains, in table order."""
    frozen: tuple[OwnedParameter, ...]
    """What it owns and never changes, in table order: they get no gradient and no state."""
    sources: tuple[Tensor, ...]
    """The leaves whose backward brings the gradients of ``parameters``, one for each."""
    table: tuple[ParameterInfo, ...]
    """Stored parameters of the whole model."""
    pipeline: "Pipeline | None"
    """Runs the micro-batches where there are several pipeline ranks."""
    masters: MasterWeights | None
    """The fp32 parameters behind bf16 modules that are not sharded."""
    scales: GatheredScales | None
    """Scales of the weights that FSDP2 gathers in fp8."""
    replica_sum: GradientSum | None
    """Sums gradients over replicas; None where there is one, or FSDP2 sums over them."""
    world: World
    """Process groups."""
    loss_rank: int
    """The first rank that holds the last stage."""
    reduces_every_microbatch: bool = False
    """Whether FSDP2 sums gradients over its shards after each micro-batch."""
    keeps_gradients: bool = False
    """Whether gradients stay where they are from step to step, as CUDA graphs need."""

    @property
    def owned(self) -> tuple[OwnedParameter, ...]:
        """Everything this rank owns, in table order."""
        both = (*self.parameters, *self.frozen)
        return tuple(sorted(both, key=lambda owned: (owned.index, owned.copy)))

    def run(self, batch: StepBatch, scale: Tensor | None, training: bool) -> dict[str, Tensor]:
        """Run all micro-batches; gradients of loss times ``scale`` add up in the parameters.

        Returns:
            Sums of the loss and its metrics over this rank's tokens, float64; empty but on the
            first tensor-parallel rank of the last stage.
        """
        if self.world.axes.cp > 1:
            batch = split_sequence(batch, self.world.cp_rank, self.world.axes.cp)
        if training and self.replica_sum is not None:
            self.replica_sum.begin(batch.num_microbatches)
        last = self.modules[-1]
        last.scale, last.totals = scale, {}
        if self.pipeline is not None:
            with torch.set_grad_enabled(training):
                self.pipeline.run(batch, training)
        else:
            self._run_alone(last, batch, training)
        if not training:
            for module in self.modules:
                reshard(module)
        return last.totals if self.world.tp_rank == 0 else {}

    def _run_alone(self, module: StageModule, batch: StepBatch, training: bool) -> None:
        parts, beat = batch.microbatches(), self.world.beat
        for number, part in enumerate(parts, start=1):
            beat.at(Phase.FORWARD if training else Phase.EVALUATE, number)
            with torch.set_grad_enabled(training):
                loss = module(part.tokens, **batch_fields(part))
            if training:
                set_last_backward(module, number == len(parts), self.reduces_every_microbatch)
                beat.at(Phase.BACKWARD, number)
                with scope(BACKWARD):
                    loss.sum().backward()

    def reduce_gradients(self) -> list[Tensor]:
        """Finish the sums of the gradients; return the local ones in table order."""
        if self.replica_sum is not None:
            self.replica_sum.finish()
        gradients = [owned.local_gradient() for owned in self.parameters]
        partial = [
            gradient
            for owned, gradient in zip(self.parameters, gradients, strict=True)
            if owned.partial_over_tp
        ]
        sum_over(partial, self.world.group("tp"), self.world.device)
        self._sum_tied(gradients)
        return gradients

    def _sum_tied(self, gradients: list[Tensor]) -> None:
        """Add the gradients of an embedding and of its copy at the head."""
        copies = [i for i, owned in enumerate(self.parameters) if owned.copy]
        ends = self.world.group("ends")
        if ends is not None:
            row = copies[0] if copies else self._row_of_embedding()
            sum_over([gradients[row]], ends, self.world.device)
        elif copies:
            both = (gradients[copies[0]], gradients[self._row_of_embedding()])
            both[0].add_(both[1])
            both[1].copy_(both[0])

    def _row_of_embedding(self) -> int:
        return next(
            i for i, o in enumerate(self.parameters) if "embed_tokens" in o.info.name and not o.copy
        )

    def clear_gradients(self) -> None:
        """Forget the gradients of the last step."""
        for owned in self.parameters:
            if self.keeps_gradients:  # adding to them copies what a graph will overwrite
                owned.local.grad = owned.local_gradient().zero_()
                continue
            owned.tensor.grad = None
            owned.local.grad = None

    def publish_parameters(self) -> None:
        """Make forward see updated parameters."""
        if self.masters is not None:
            self.masters.publish()
        if self.scales is not None:
            self.scales.publish()
