"""The one order in which parallelism is applied to a plain model.

Stages on the meta device, tensor and sequence parallel, context parallel, fp8 or 4-bit products,
recomputation, compilation, offload, sharding, memory, start values, bf16 copies, fp8 scales.

Invariant: whatever the layout, the same seed gives the same parameters bit by bit, under the same
global names; what follows sees plain tensors of this rank only.

    local = build_local_model(config.model, config.parallel, config.engine, world, seed, loss)
    sums = local.run(batch, scale=1 / target_tokens, training=True)
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import SPLIT_BACKWARD, ParallelConfig
from llmtrain.errors import LayoutError
from llmtrain.model.init import initialize_
from llmtrain.model.parameters import ParameterInfo, parameter_table
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.choose import needs_of, select_attention
from llmtrain.ops.kernels import select_kernels
from llmtrain.parallel.compile import compile_blocks, kept_eager
from llmtrain.parallel.context import context_attention
from llmtrain.parallel.float8 import convert_blocks, gathered_scales, plain_part
from llmtrain.parallel.fsdp import prefetch, reduce_into_fp32, settle_shards, shard
from llmtrain.parallel.local import LocalModel, OwnedParameter
from llmtrain.parallel.mesh import World
from llmtrain.parallel.offload import offload_blocks
from llmtrain.parallel.packed import Packed, give_memory, pack_blocks
from llmtrain.parallel.precision import (
    COMPUTE_DTYPES,
    MasterWeights,
    keep_frozen_as_computed,
    keep_gradients_in_fp32,
    storage_dtype,
)
from llmtrain.parallel.recompute import apply_recompute
from llmtrain.parallel.region import Region, held, local_part, whole
from llmtrain.parallel.replicas import GradientSum
from llmtrain.parallel.stage import PREFIX, LossFunction, StageModule
from llmtrain.parallel.tensor import apply_tensor_parallel
from llmtrain.planner.stages import rank_of_stage, split_layers, stages_of_rank

if TYPE_CHECKING:
    from llmtrain.parallel.pipeline import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One stage of the pipeline while it is built."""

    module: StageModule
    """On the meta device, cut over tp."""
    cuts: Mapping[str, Region]
    """Regions of the parameters that tensor parallelism cut."""
    packed: Packed
    """Matrices that are kept in 4 bits."""


def build_local_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    world: World,
    seed: int,
    loss: LossFunction,
) -> LocalModel:
    """Build, shard and initialise the stages of the model that belong to this rank.

    Raises:
        LayoutError: the model cannot be split into as many stages.
    """
    per_rank = parallel.num_stages_per_rank
    numbers = stages_of_rank(parallel.schedule, parallel.pp, world.pp_rank, per_rank)
    parts = [_part(model, parallel, engine, world, number, loss) for number in numbers]
    bf16, sharded = engine.precision == "bf16", world.axes.dp_shard > 1
    for part in parts:
        _allocate(part, parallel, world, bf16)
        if engine.master_dtype == "bf16":
            reduce_into_fp32(part.module)
    table = tuple(info for info in parameter_table(model) if info.tied_to is None)
    owned = sorted(
        (o for part in parts for o in _owned(table, part, world)), key=lambda o: (o.index, o.copy)
    )
    _initialize(owned, model, seed)
    trained = [o for o in owned if o.info.trainable]
    computing = [o.tensor for o in trained]
    copied = bf16 and not sharded and engine.master_dtype == "fp32"
    masters = MasterWeights([o.local for o in trained]) if copied else None
    if masters is not None:
        pairs = zip(trained, masters.parameters, strict=True)
        trained = [replace(o, tensor=master, local=master) for o, master in pairs]
    last = rank_of_stage(parallel.schedule, parallel.pp, parallel.num_stages - 1)
    if model.tie_word_embeddings and parallel.pp > 1 and model.adapter is None:
        world.join_ends(rank_of_stage(parallel.schedule, parallel.pp, 0), last)
    modules = tuple(part.module for part in parts)
    local = LocalModel(
        modules=modules,
        parameters=tuple(trained),
        frozen=tuple(o for o in owned if not o.info.trainable),
        sources=tuple(computing),
        table=table,
        pipeline=_pipeline(modules, numbers, model, parallel, engine, world),
        masters=masters,
        scales=gathered_scales(modules, world.group("shard")),
        replica_sum=_replica_sum(trained, computing, parallel, world),
        world=world,
        loss_rank=last * (world.world_size // parallel.pp),
        reduces_every_microbatch=parallel.reduce_every_microbatch,
        keeps_gradients=engine.cuda_graphs,
    )
    local.publish_parameters()
    return local


def _initialize(owned: list[OwnedParameter], model: ModelConfig, seed: int) -> None:
    """Fill what this rank owns, many parameters at a time: each has a stream of its own."""

    def fill(parameter: OwnedParameter) -> None:
        name, shape, packed = parameter.info.name, parameter.info.shape, parameter.packed
        local = parameter.local.detach() if packed is None else torch.empty(shape)
        initialize_(local, name, shape, parameter.region, model, seed)
        if packed is not None:
            packed.store(local)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, owned))


def _part(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    world: World,
    number: int,
    loss: LossFunction,
) -> _Part:
    """Build stage ``number`` on the meta device, with all that changes its forward."""
    last = number == parallel.num_stages - 1
    attention = select_attention(engine.attention, world.device, needs_of(model, engine))
    context = world.group("cp")
    if context is not None:
        attention = context_attention(parallel.cp_method, attention, context)
        attention = kept_eager(attention) if engine.compile else attention
    with torch.device("meta"):
        transformer = Transformer(
            model,
            layers=_checked_split(model, parallel)[number],
            embedding=number == 0,
            head=last,
            attention=attention,
            kernels=select_kernels(engine.kernels, world.device),
        ).to(storage_dtype(engine.precision, engine.master_dtype))
    keep_frozen_as_computed(transformer.parameters(), COMPUTE_DTYPES[engine.precision])
    tensor = world.group("tp")
    cuts = {} if tensor is None else apply_tensor_parallel(transformer, tensor)
    gathered = engine.fp8_all_gather and world.axes.dp_shard > 1
    convert_blocks(transformer, engine, world.device, gathered)
    packed = pack_blocks(transformer, model.adapter, world.device)
    apply_recompute(transformer, parallel, COMPUTE_DTYPES[engine.precision], world.device)
    if engine.compile:
        compile_blocks(transformer, world.device, cuda_graphs=engine.cuda_graphs)
    if parallel.activation_offload:
        offload_blocks(transformer, world.device)
    module = StageModule(transformer, loss if last else None)
    return _Part(module=module, cuts=cuts, packed=packed)


def _allocate(part: _Part, parallel: ParallelConfig, world: World, bf16: bool) -> None:
    """Shard a stage where the layout does, and give what is left on this rank its memory."""
    module = part.module
    if part.packed:
        give_memory(module, world.device, part.packed, PREFIX)
        return
    if world.axes.dp_shard == 1:
        module.to_empty(device=world.device)
        return
    shard(module, world, bf16, _reshards(parallel), parallel.cpu_offload)
    module.to_empty(device=torch.device("cpu") if parallel.cpu_offload else world.device)
    settle_shards(module)
    prefetch(module, parallel.fsdp_prefetch)


def _checked_split(model: ModelConfig, parallel: ParallelConfig) -> list[range]:
    num_stages, per_rank = parallel.num_stages, parallel.num_stages_per_rank
    if num_stages > model.num_hidden_layers:
        raise LayoutError(
            f"{num_stages} pipeline stages need a block each, found model.num_hidden_layers="
            f"{model.num_hidden_layers}; use parallel.pp x stages_per_rank of at most "
            f"{model.num_hidden_layers}"
        )
    return split_layers(model, num_stages, parallel.schedule, per_rank)


def _reshards(parallel: ParallelConfig) -> bool:
    """Whether FSDP2 frees what it gathered; under pp some schedules would lose gradients."""
    if parallel.reshard_after_forward == "auto":
        return parallel.pp == 1
    return parallel.reshard_after_forward


def _owned(table: tuple[ParameterInfo, ...], part: _Part, world: World) -> Iterator[OwnedParameter]:
    """Pair the tensors of a stage with their rows of the table."""
    rows = {info.name: index for index, info in enumerate(table)}
    for full_name, tensor in part.module.named_parameters():
        name = full_name.removeprefix(PREFIX)
        copy = name not in rows  # the head's copy of a tied embedding
        index = rows["model.embed_tokens.weight" if copy else name]
        info = table[index]
        plain = type(tensor) is nn.Parameter
        part_here = plain_part(local_part(tensor))
        local = tensor if plain else nn.Parameter(part_here, requires_grad=info.trainable)
        keep_gradients_in_fp32((tensor, local))
        uncut = world.axes.tp > 1 and name not in part.cuts
        yield OwnedParameter(
            info=info,
            index=index,
            tensor=tensor,
            local=local,
            region=held(tensor, part.cuts.get(name, whole(info.shape))),
            counted=world.is_first_replica and not copy and not (uncut and world.tp_rank > 0),
            partial_over_tp=uncut,
            copy=copy,
            packed=part.packed.get(name),
        )


def _replica_sum(
    owned: list[OwnedParameter],
    computing: list[Tensor],
    parallel: ParallelConfig,
    world: World,
) -> GradientSum | None:
    """Sum over replicas during the last backward, where the layout can and the user wants it."""
    group = world.group("replicas")
    if group is None or world.axes.dp_shard > 1:  # FSDP2 sums over replicas itself
        return None
    split = parallel.pp > 1 and parallel.schedule in SPLIT_BACKWARD
    overlapped = not split and parallel.replica_sum != "after"
    return GradientSum([o.tensor for o in owned], group, overlapped, sources=computing)


def _pipeline(
    modules: tuple[StageModule, ...],
    numbers: tuple[int, ...],
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    world: World,
) -> "Pipeline | None":
    if parallel.pp == 1:
        return None
    from llmtrain.parallel.pipeline import Pipeline  # its part of torch costs 0.7 s to import

    return Pipeline(
        modules,
        numbers,
        parallel.num_stages,
        world,
        parallel.schedule,
        model.hidden_size,
        COMPUTE_DTYPES[engine.precision],
    )
