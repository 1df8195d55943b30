"""fp8 products of the blocks' matrices, by torchao: input, weight and gradient are scaled and cast.

Scales are computed from what passes by (no history): one for a whole tensor, or one for each row
(arXiv:2209.05433, section 3). Products run on the tensor cores of compute capability 8.9 and above;
on the CPU they are emulated: the same casts, products in fp32.

Invariant: only products change. Parameters, their names and start values, fp32 masters, optimizer
state and checkpoints are those of a bf16 run; embedding and head stay in bf16.

    convert_blocks(transformer, engine, device, gathered=True)    # after tensor parallelism
    scales = gathered_scales(stages, world)                       # after FSDP2 has sharded them
    scales.publish()                                              # after every update
"""

import dataclasses
import importlib.util
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.config.engine import EngineConfig
from llmtrain.errors import ConfigError
from llmtrain.model.layers import Linear
from llmtrain.model.transformer import Transformer

logger = logging.getLogger(__name__)

UNIT = 16
"""Sizes of a product must be multiples of this: what the kernels for float8 take."""

CAPABILITY = (8, 9)
"""Lowest compute capability with float8 tensor cores: Ada; Hopper has 9.0."""

INSTALL = "pip install 'torchao>=0.18'"

_OF_NO_CONCERN = {"torchao": "Failed to load ", "torch.utils._pytree": "%s is an Enum subclass"}
"""How lines begin, by logger, that importing torchao writes of parts that are not used here."""


def unavailable(device: torch.device) -> str | None:
    """Tell why products in fp8 cannot run on ``device``; None where they can."""
    if importlib.util.find_spec("torchao") is None:
        return f"needs the torchao package: {INSTALL}"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < CAPABILITY:
            return (
                f"needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} (Ada, Hopper "
                f"or later), found {found[0]}.{found[1]}"
            )
    return None


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Drop the lines of ``_OF_NO_CONCERN``, no others."""

    def concerns(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(tuple(_OF_NO_CONCERN.values()))

    loggers = [logging.getLogger(name) for name in _OF_NO_CONCERN]
    for writer in loggers:
        writer.addFilter(concerns)
    try:
        yield
    finally:
        for writer in loggers:
            writer.removeFilter(concerns)


@dataclass(frozen=True, slots=True)
class Float8Product:
    """Multiplies as ``F.linear``, with operands in float8."""

    config: Any
    """torchao's Float8LinearConfig."""
    products: Any
    """torchao's LinearMMConfig: how each of the three products of a linear map runs."""

    @classmethod
    def of(cls, recipe: str, emulate: bool, gathered: bool) -> "Float8Product":
        """Take the settings of torchao's ``recipe``; its converter mends inductor on the way."""
        with _quiet_import():
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = dataclasses.replace(
            Float8LinearConfig.from_recipe_name(recipe),
            emulate=emulate,
            enable_fsdp_float8_all_gather=gathered,
        )
        pattern = nn.Linear(UNIT, UNIT, bias=False, device="meta")
        converted: Any = convert_to_float8_training(pattern, config=config)
        return cls(config, converted.linear_mm_config)

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Map [..., I] to [..., O]; the bias is added in the type of ``input``."""
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

        out: Tensor = matmul_with_hp_or_float8_args.apply(
            input, weight.t(), self.products, self.config
        )
        return out if bias is None else out + bias

    def castable(self, weight: Tensor) -> nn.Parameter:
        """Wrap a weight so that FSDP2 gathers it in float8."""
        from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

        dtype = self.config.cast_config_weight.target_dtype
        wrapped: Tensor = WeightWithDynamicFloat8CastTensor(weight.detach(), self.products, dtype)
        return nn.Parameter(wrapped, requires_grad=weight.requires_grad)


def convert_blocks(
    transformer: Transformer, engine: EngineConfig, device: torch.device, gathered: bool
) -> None:
    """Have the blocks of one stage multiply as ``engine.fp8`` says; before compiling and sharding.

    Args:
        transformer: a stage, already cut to its tensor-parallel part.
        engine: what to do; ``fp8=none`` changes nothing.
        device: where the stage will run.
        gathered: wrap the weights for FSDP2 to gather in float8.

    Raises:
        ConfigError: torchao is missing, the GPU has no float8, or no matrix fits.
    """
    if engine.fp8 == "none":
        return
    if reason := unavailable(device):
        raise ConfigError(f"engine.fp8={engine.fp8} {reason}; or use engine.fp8=none")
    product = Float8Product.of(engine.fp8, device.type == "cpu", gathered)
    left: Counter[str] = Counter()
    converted = 0
    for name, linear in _linears(transformer):
        rows, columns = linear.weight.shape
        if rows % UNIT or columns % UNIT:
            left[f"{name} [{rows}, {columns}]"] += 1
            continue
        linear.product = product
        if gathered:
            linear.weight = product.castable(linear.weight)
        converted += 1
    _report(engine, device, converted, left)


def _linears(transformer: Transformer) -> Iterator[tuple[str, Linear]]:
    """List the linear maps of the blocks with their names inside a block."""
    for block in transformer.model.layers.values():
        for name, module in block.named_modules():
            if isinstance(module, Linear):
                yield name, module


def _report(engine: EngineConfig, device: torch.device, converted: int, left: Counter[str]) -> None:
    """Say what is in fp8 and what is not, with the reason."""
    kept = ", ".join(f"{count} {name}" for name, count in left.items())
    if not converted:
        raise ConfigError(
            f"engine.fp8={engine.fp8} finds no matrix with sizes that are multiples of {UNIT}, "
            f"only {kept}; use engine.fp8=none or a model with such sizes"
        )
    logger.info(
        "fp8 %s: %d matrices of the blocks%s; in bf16: embedding, norms, head%s",
        engine.fp8, converted, ", emulated in fp32" if device.type == "cpu" else "",
        f", {kept} (sizes are no multiples of {UNIT})" if kept else "",
    )  # fmt: skip
    if device.type == "cuda" and not engine.compile:
        logger.warning(
            "engine.fp8=%s without engine.compile=true: every cast is a kernel of its own, slower "
            "than bf16", engine.fp8,
        )  # fmt: skip


def plain_part(local: Tensor) -> Tensor:
    """Give the plain tensor behind a local part that FSDP2 gathers in float8; shares storage."""
    inner: Tensor = getattr(local, "_tensor", local)
    return inner


class GatheredScales:
    """The scales of the weights that FSDP2 gathers in float8, one collective for all of them."""

    def __init__(self, weights: list[Any], group: dist.ProcessGroup) -> None:
        """``weights`` are torchao's wrappers of local shards; alike on all ranks of ``group``."""
        self._weights, self._group = weights, group
        held = [number for number, weight in enumerate(weights) if weight.numel()]
        self._held = [weights[number]._tensor for number in held]
        device = weights[0]._tensor.device
        self._rows = torch.tensor(held, dtype=torch.int64, device=device)

    @torch.no_grad()
    def publish(self) -> None:
        """Compute the scale of every weight from the largest value in any shard of it."""
        from torchao.float8.float8_utils import amax_to_scale

        largest = torch.zeros(len(self._weights), device=self._rows.device)
        if self._held:
            norms = torch._foreach_norm(self._held, ord=torch.inf)
            largest[self._rows] = torch.stack(norms).to(largest)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        scales = amax_to_scale(largest, self._weights[0]._dtype)
        for weight, scale in zip(self._weights, scales.unbind(), strict=True):
            weight._precomputed_scale = scale


def gathered_scales(
    stages: Iterable[nn.Module], group: dist.ProcessGroup | None
) -> GatheredScales | None:
    """Find the weights that FSDP2 gathers in float8 over ``group``; None where there are none."""
    locals_ = [
        module.weight._local_tensor
        for stage in stages
        for module in stage.modules()
        if isinstance(module, Linear) and isinstance(module.weight, DTensor)
    ]
    weights = [local for local in locals_ if hasattr(local, "_precomputed_scale")]
    if group is None or not weights:
        return None
    return GatheredScales(weights, group)
