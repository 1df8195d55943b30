"""The one order in which parallelism is applied: stages, shard, start values, bf16 copies.

Invariant: whatever the layout, the same seed gives the same parameters bit by bit, under the same
global names; what follows sees plain tensors of this rank only.

    stage = build_stage(config.model, config.parallel, config.engine, world, seed=0, loss=loss)
    stage.run(batch, scale=1 / target_tokens, training=True)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import EngineConfig, ParallelConfig
from llmtrain.data.batch import StepBatch
from llmtrain.errors import LayoutError
from llmtrain.model.init import initialize_model
from llmtrain.model.parameters import ParameterInfo, parameter_table
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention import select_attention
from llmtrain.parallel.fsdp import (
    local_part,
    locate,
    reshard,
    set_last_backward,
    settle_shards,
    shard,
    sum_over_replicas,
)
from llmtrain.parallel.mesh import World
from llmtrain.parallel.precision import MasterWeights
from llmtrain.parallel.stage import (
    PREFIX,
    LossFunction,
    StageModule,
    batch_fields,
    split_layers,
)

if TYPE_CHECKING:
    from llmtrain.parallel.pipeline import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedParameter:
    """A parameter of which this rank holds all or a shard, in fp32 (fp64 in fp64 runs)."""

    info: ParameterInfo
    """Its row in the parameter table."""
    index: int
    """Number of that row: the fixed order of sums."""
    tensor: Tensor
    """The logical parameter, plain or DTensor; its ``grad`` is the accumulated gradient."""
    local: nn.Parameter
    """The plain tensor this rank holds, sharing storage; what the optimizer updates."""

    def local_gradient(self) -> Tensor:
        """Give the plain gradient of the local part; zeros where nothing flowed."""
        gradient = self.tensor.grad
        return torch.zeros_like(self.local) if gradient is None else local_part(gradient)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What this rank runs and owns; built by ``build_stage``."""

    module: StageModule
    """The part of the model, sharded or cast where the layout asks for it."""
    parameters: tuple[OwnedParameter, ...]
    """What it owns, in table order."""
    table: tuple[ParameterInfo, ...]
    """Stored parameters of the whole model."""
    owners: tuple[int, ...]
    """Pipeline stage that holds each row of ``table``."""
    pipeline: "Pipeline | None"
    """Runs the micro-batches where there are several stages."""
    masters: MasterWeights | None
    """The fp32 parameters behind a bf16 module that is not sharded."""
    world: World
    """Process groups."""

    def run(self, batch: StepBatch, scale: Tensor | None, training: bool) -> dict[str, Tensor]:
        """Run all micro-batches; gradients of loss times ``scale`` add up in the parameters.

        Returns:
            Sums of the loss and its metrics over this rank's rows, float64; empty but on the last
            stage.
        """
        self.module.scale = scale
        self.module.totals = {}
        if self.pipeline is not None:
            with torch.set_grad_enabled(training):
                self.pipeline.run(batch, training)
        else:
            self._run_alone(batch, training)
        if not training:
            reshard(self.module)
        return self.module.totals

    def _run_alone(self, batch: StepBatch, training: bool) -> None:
        parts = batch.microbatches()
        for number, part in enumerate(parts, start=1):
            with torch.set_grad_enabled(training):
                loss = self.module(part.tokens, **batch_fields(part))
            if training:
                set_last_backward(self.module, number == len(parts))
                loss.sum().backward()

    def reduce_gradients(self) -> list[Tensor]:
        """Finish the sum over replicas; return the local gradients in table order."""
        gradients = [owned.local_gradient() for owned in self.parameters]
        if self.world.axes.dp_shard == 1:
            sum_over_replicas(gradients, self.world)
        return gradients

    def clear_gradients(self) -> None:
        """Forget the gradients of the last step."""
        for owned in self.parameters:
            owned.tensor.grad = None
            owned.local.grad = None

    def publish_parameters(self) -> None:
        """Make forward see updated parameters."""
        if self.masters is not None:
            self.masters.publish()


def build_stage(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    world: World,
    seed: int,
    loss: LossFunction,
) -> Stage:
    """Build, shard and initialise the part of the model that belongs to this rank.

    Raises:
        LayoutError: the model cannot be split into ``parallel.pp`` stages.
    """
    ranges = _checked_split(model, parallel.pp)
    master_dtype = torch.float64 if engine.precision == "fp64" else torch.float32
    bf16 = engine.precision == "bf16"
    with torch.device("meta"):
        transformer = Transformer(
            model,
            layers=ranges[world.pp_rank],
            embedding=world.is_first_stage,
            head=world.is_last_stage,
            attention=select_attention(engine.attention, world.device),
        ).to(master_dtype)
    module = StageModule(transformer, loss if world.is_last_stage else None)
    sharded = world.axes.dp_shard > 1
    if sharded:
        shard(module, world, bf16)
    module.to_empty(device=world.device)
    if sharded:
        settle_shards(module)
    initialize_model(transformer, model, seed, locate)
    masters = MasterWeights(module) if bf16 and not sharded else None
    pipeline = None
    if parallel.pp > 1:
        from llmtrain.parallel.pipeline import Pipeline  # its part of torch costs 0.7 s to import

        hidden_dtype = torch.bfloat16 if bf16 else master_dtype
        pipeline = Pipeline(module, world, parallel.schedule, model.hidden_size, hidden_dtype)
    table = tuple(info for info in parameter_table(model) if info.tied_to is None)
    return Stage(
        module=module,
        parameters=_owned(table, module, masters),
        table=table,
        owners=tuple(_owner(info.name, ranges) for info in table),
        pipeline=pipeline,
        masters=masters,
        world=world,
    )


def _checked_split(model: ModelConfig, pp: int) -> list[range]:
    if pp > model.num_hidden_layers:
        raise LayoutError(
            f"parallel.pp={pp} stages need a block each, found model.num_hidden_layers="
            f"{model.num_hidden_layers}; use parallel.pp <= {model.num_hidden_layers}"
        )
    return split_layers(model, pp)


def _owned(
    table: tuple[ParameterInfo, ...], module: StageModule, masters: MasterWeights | None
) -> tuple[OwnedParameter, ...]:
    """Pair the rows of the table this stage holds with their tensors."""
    named: dict[str, nn.Parameter] = dict(module.named_parameters())
    if masters is not None:
        named = masters.parameters
    owned = []
    for index, info in enumerate(table):
        tensor = named.get(PREFIX + info.name)
        if tensor is not None:
            plain = type(tensor) is nn.Parameter
            local = tensor if plain else nn.Parameter(local_part(tensor))
            owned.append(OwnedParameter(info=info, index=index, tensor=tensor, local=local))
    return tuple(owned)


def _owner(name: str, ranges: list[range]) -> int:
    """Tell which pipeline stage holds the parameter ``name``."""
    parts = name.split(".")
    if "layers" in parts:
        layer = int(parts[parts.index("layers") + 1])
        return next(stage for stage, layers in enumerate(ranges) if layer in layers)
    return 0 if "embed_tokens" in parts else len(ranges) - 1
