"""Building the model, the optimizer and DeepSpeed's engine around them, for ZeRO 0 to 3.

Invariant: start values are written into the fp32 partitions after DeepSpeed has cut them, so every
stage and precision starts with the bits of the native engine, and under ZeRO 3 no rank ever holds
more than one block of the model.

    built = build_zero_model(parts, world)
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.engine.deepspeed.partitions import Holder, Rows, Whole, hold
from llmtrain.engine.deepspeed.runtime import attach, redirected_output, vouch_for
from llmtrain.engine.deepspeed.settings import deepspeed_json
from llmtrain.engine.protocol import EngineParts
from llmtrain.errors import LayoutError
from llmtrain.model.init import initialize_
from llmtrain.model.parameters import ParameterInfo, parameter_table
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.choose import needs_of, select_attention
from llmtrain.ops.kernels import select_kernels
from llmtrain.parallel.matrices import MatrixFunction, run_alone
from llmtrain.parallel.mesh import World
from llmtrain.parallel.precision import COMPUTE_DTYPES, MasterWeights
from llmtrain.parallel.recompute import apply_recompute
from llmtrain.parallel.stage import PREFIX, StageModule
from llmtrain.planner.stages import split_layers

Wrap = Callable[[StageModule, torch.optim.Optimizer, dict[str, Any], World], Any]
"""Makes DeepSpeed's engine around (module, optimizer, settings, world)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroModel:
    """A model in DeepSpeed's hands."""

    deepspeed: Any
    """DeepSpeed's engine: forward, backward, step."""
    module: StageModule
    """The model inside it."""
    optimizer: torch.optim.Optimizer
    """Our optimizer, whose parameters DeepSpeed has replaced by its partitions."""
    holder: Holder
    """Where parameters and gradients lie."""
    table: tuple[ParameterInfo, ...]
    """Stored parameters of the model."""


def build_zero_model(parts: EngineParts, world: World, wrap: Wrap | None = None) -> ZeroModel:
    """Build this rank's stage of the model and hand it to DeepSpeed; collective.

    ``wrap`` makes DeepSpeed's engine where that is not its plain one.

    Raises:
        ConfigError: DeepSpeed is not installed.
        LayoutError: the optimizer needs whole matrices.
    """
    engine = parts.engine
    deepspeed = attach(engine.timeout_s)
    table = tuple(info for info in parameter_table(parts.model) if info.tied_to is None)
    settings = deepspeed_json(
        engine, data_ranks=world.dp_size, num_elements=sum(info.numel for info in table)
    )
    module = _module(parts, world)
    _place(module, deepspeed, settings, world)
    named = {name.removeprefix(PREFIX): p for name, p in module.named_parameters()}
    rows = [
        (index, info, named[info.name]) for index, info in enumerate(table) if info.name in named
    ]
    masters = _masters(engine, rows)
    if masters is not None:
        pairs = zip(rows, masters.parameters, strict=True)
        rows = [(index, info, master) for (index, info, _), master in pairs]
    matrices = _no_matrices if engine.deepspeed.zero_stage > 0 else run_alone
    optimizer = parts.optimizer_factory([(info, p) for _, info, p in rows], matrices)
    if masters is not None:
        # DeepSpeed sums what the optimizer names, where it names anything.
        optimizer.get_grads_for_reduction = _gradients_of(masters)  # type: ignore[attr-defined]
    vouch_for(optimizer)
    with redirected_output():
        made = (wrap or _plain)(module, optimizer, settings, world)
    holder = hold(made.optimizer, rows)
    if isinstance(holder, Whole):
        holder.masters = masters
    _write_start_values(holder, parts.model, parts.seed)
    return ZeroModel(deepspeed=made, module=module, optimizer=optimizer, holder=holder, table=table)


def _plain(
    module: StageModule, optimizer: torch.optim.Optimizer, settings: dict[str, Any], world: World
) -> Any:
    """Make DeepSpeed's engine for a model that is whole."""
    made, *_ = importlib.import_module("deepspeed").initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return made


def _module(parts: EngineParts, world: World) -> StageModule:
    """Build this rank's stage on the meta device, in the dtype it computes in."""
    model, parallel, engine = parts.model, parts.parallel, parts.engine
    last = world.pp_rank == parallel.pp - 1
    bf16 = engine.precision == "bf16" and engine.deepspeed.zero_stage > 0
    with torch.device("meta"):
        transformer = Transformer(
            model,
            layers=split_layers(model, parallel.pp)[world.pp_rank],
            embedding=world.pp_rank == 0,
            head=last,
            attention=select_attention(engine.attention, world.device, needs_of(model, engine)),
            kernels=select_kernels(engine.kernels, world.device),
        ).to(torch.bfloat16 if bf16 else torch.float32)
    apply_recompute(transformer, parallel, COMPUTE_DTYPES[engine.precision], world.device)
    return StageModule(transformer, parts.loss if last else None)


def _place(module: StageModule, deepspeed: Any, settings: dict[str, Any], world: World) -> None:
    """Give the module storage; under ZeRO 3 block by block, each cut before the next."""
    if settings["zero_optimization"]["stage"] < 3:
        module.to_empty(device=world.device)
        return
    for part in (*module.transformer.model.layers.values(), module):
        _materialize(part, world.device)
        deepspeed.zero.Init(module=part, config_dict_or_path=settings)


def _materialize(module: nn.Module, device: torch.device) -> None:
    """Replace parameters on the meta device by ones with storage, in place."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_meta:
                child.register_parameter(
                    name, nn.Parameter(torch.zeros_like(parameter, device=device))
                )


def _masters(engine: EngineConfig, rows: Rows) -> MasterWeights | None:
    """Put fp32 parameters behind a bf16 module where DeepSpeed has none: ZeRO 0."""
    if engine.precision != "bf16" or engine.deepspeed.zero_stage > 0:
        return None
    return MasterWeights([parameter for _, _, parameter in rows])


def _gradients_of(
    masters: MasterWeights,
) -> Callable[[], tuple[list[Tensor], dict[str, list[Tensor]]]]:
    def gradients() -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        return [p.grad for p in masters.parameters if p.grad is not None], {}

    return gradients


def _write_start_values(holder: Holder, model: ModelConfig, seed: int) -> None:
    """Fill every run with its elements of the parameter's stream, and publish them."""
    for partition in holder.partitions:
        for run in partition.runs:
            view = run.of(partition.tensor.detach())
            part = (slice(run.start, run.start + run.length),)
            initialize_(view, run.info.name, (run.info.numel,), part, model, seed)
    with torch.no_grad():
        holder.publish()


def _no_matrices(function: MatrixFunction, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Refuse what ZeRO cannot give: its partitions are runs of flattened parameters."""
    raise LayoutError(
        f"the optimizer asks for {len(values)} whole matrices, DeepSpeed keeps flat partitions; "
        "use optimizer.kind=adamw or lion, zero_stage=0 or engine.kind=native"
    )
