"""Activation recomputation: what a block keeps for its backward, and what it computes again.

Invariant: the numbers are those of a run that keeps everything, bit by bit: the same operations run
again on the same inputs, their collectives included, and a block draws no random numbers. Names of
parameters do not change: a block's ``forward`` is replaced on the instance.

    apply_recompute(transformer, ParallelConfig(recompute="budget", recompute_budget=0.4),
                    torch.float32, torch.device("cpu"))
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.model.layers import Block, BlockContext
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention import varlen as _varlen  # noqa: F401 its operation is kept
from llmtrain.ops.attention.sdpa import sdpa_attention
from llmtrain.ops.attention.spec import AttentionSpec
from llmtrain.ops.kernels import TORCH_KERNELS, Kernels
from llmtrain.ops.rope import Rotation

logger = logging.getLogger(__name__)

Policy = Literal["none", "selective", "full"]
"""What one block does: keep everything, keep what ``kept_operations`` gave, keep its input."""

_MEASURED_TOKENS = 128
"""Length of the row a block is measured on; all that counts grows with the number of tokens."""


@functools.cache
def kept_operations() -> list[Any]:
    """List the operations whose results ``selective`` keeps: matrix products, fused attention.

    Batched products are not among them: in attention they hold [S, S] scores, the largest tensors
    of a block and cheap to make again.
    """
    names = (
        "mm", "addmm", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    )  # fmt: skip
    kept = [getattr(torch.ops.aten, name).default for name in names]
    return [*kept, torch.ops.llmtrain.attention_forward.default]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """What one block keeps and computes again under each policy, per micro-batch."""

    kept_bytes: dict[Policy, int]
    """Bytes that live from a block's forward to its backward."""
    flops: dict[Policy, int]
    """Operations done again in the backward; one for each element of what is no product."""


def apply_recompute(
    transformer: Transformer, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Have the blocks recompute as ``parallel.recompute`` says; before compiling and sharding.

    Args:
        transformer: one stage, on any device, already cut to its tensor- and context-parallel part.
        parallel: the layout; ``budget`` measures a whole block of the model in one process, which
            depends on the model and the device type only: all ranks of a stage choose alike.
        dtype: type of the hidden states.
        device: where the blocks will run; its type decides which attention runs.
    """
    blocks = [block for block in transformer.model.layers.values() if isinstance(block, Block)]
    policies: list[Policy]
    if parallel.recompute == "budget":
        kernels = blocks[0].mlp.kernels if blocks else TORCH_KERNELS
        cost = measure_block(transformer.config, dtype, device, kernels)
        policies = choose_policies(len(blocks), cost, parallel.recompute_budget)
    else:
        policies = [parallel.recompute] * len(blocks)
    for block, policy in zip(blocks, policies, strict=True):
        if policy != "none":
            recompute_block(block, policy)


def recompute_block(block: Block, policy: Policy) -> None:
    """Replace the ``forward`` of one block by one that recomputes."""
    forwards: dict[Policy, Callable[..., Tensor]] = {"full": _full, "selective": _selective}
    block.forward = MethodType(forwards[policy], block)  # type: ignore[method-assign]


def _full(self: Block, x_BSD: Tensor, context: BlockContext) -> Tensor:  # noqa: N803
    return _recomputed(self, x_BSD, context)


def _selective(self: Block, x_BSD: Tensor, context: BlockContext) -> Tensor:  # noqa: N803
    return _recomputed(self, x_BSD, context, context_fn=_selective_contexts)


def _recomputed(block: Block, x_BSD: Tensor, context: BlockContext, **options: Any) -> Tensor:  # noqa: N803
    out: Tensor = checkpoint(
        lambda x: type(block).forward(block, x, context),
        x_BSD,
        use_reentrant=False,
        preserve_rng_state=False,
        **options,
    )
    return out


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(kept_operations())  # type: ignore[no-untyped-call]


def choose_policies(num_blocks: int, cost: BlockCost, budget: float) -> list[Policy]:
    """Choose each block's policy: least recomputation within ``budget`` of the bytes of ``none``.

    Blocks are alike, so only how many take each policy matters; all splits are tried. Blocks that
    keep least come first: in a pipeline and in one process alike they wait longest for their
    backward. Where even ``full`` keeps more than the budget, all blocks take it.
    """
    allowed = budget * num_blocks * cost.kept_bytes["none"]
    best: tuple[int, int, list[Policy]] | None = None
    for full in range(num_blocks + 1):
        for selective in range(num_blocks - full + 1):
            none = num_blocks - full - selective
            counts: dict[Policy, int] = {"full": full, "selective": selective, "none": none}
            kept = sum(n * cost.kept_bytes[policy] for policy, n in counts.items())
            flops = sum(n * cost.flops[policy] for policy, n in counts.items())
            if kept <= allowed and (best is None or (flops, kept) < best[:2]):
                best = flops, kept, [p for p, n in counts.items() for _ in range(n)]
    whole = num_blocks * cost.kept_bytes["none"]
    if best is None:
        kept = num_blocks * cost.kept_bytes["full"]
        logger.warning(
            "parallel.recompute_budget=%g cannot be kept: block inputs alone are %.3f of the "
            "activations; every block recomputes in full",
            budget, kept / max(whole, 1),
        )  # fmt: skip
        return ["full"] * num_blocks
    _, kept, policies = best
    logger.info(
        "recompute budget %g: %d blocks keep all, %d matrix products and attention, %d their "
        "input; %.3f of the activation bytes stay",
        budget, *(policies.count(p) for p in ("none", "selective", "full")), kept / max(whole, 1),
    )  # fmt: skip
    return policies


def measure_block(
    model: ModelConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels = TORCH_KERNELS
) -> BlockCost:
    """Run one block on tensors without storage and count what each policy keeps and repeats.

    Attention is ``sdpa``, whichever backend will run: fused ones all keep q, k, v, out and lse.
    """
    with FakeTensorMode(), torch.device(device):
        block = Block(model, 0, sdpa_attention, kernels)
        weights = {
            name: torch.empty(p.shape, dtype=dtype, requires_grad=True)
            for name, p in block.named_parameters()
        }
        x = torch.empty(1, _MEASURED_TOKENS, model.hidden_size, dtype=dtype, requires_grad=True)
        context = _measured_context(model, dtype)
        shared = [*weights.values(), context.rotation.cos, context.rotation.sin]
        shared += [context.spec.bias(dtype), context.spec.mask]
        saved = _Storages(shared)
        operations = _Operations()
        with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda t: t), operations:
            torch.func.functional_call(block, weights, (x, context))
    inputs = x.untyped_storage().nbytes()
    # the last product of a block is followed by nothing that needs it, so it is never repeated
    repeated = operations.kept_flops - operations.last_kept_flops + operations.other_flops
    return BlockCost(
        kept_bytes={
            "none": saved.num_bytes,
            "selective": inputs + operations.kept_bytes,
            "full": inputs,
        },
        flops={"none": 0, "selective": operations.other_flops, "full": repeated},
    )


def _measured_context(model: ModelConfig, dtype: torch.dtype) -> BlockContext:
    """One row of one document, with the mask that document masks bring."""
    positions = torch.zeros(1, _MEASURED_TOKENS, dtype=torch.int32)
    rotation = Rotation.at(positions, torch.zeros(model.head_size // 2), 1.0, dtype)
    return BlockContext(rotation, AttentionSpec.within(positions, torch.zeros_like(positions)))


class _Storages:
    """Bytes of the distinct storages among saved tensors, those a block shares left out."""

    def __init__(self, shared: list[Tensor]) -> None:
        self.num_bytes = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in shared}
        self._held: list[Tensor] = []

    def add(self, tensor: Tensor) -> Tensor:
        """Count ``tensor`` unless its storage was; keeps it alive, so that no address recurs."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations of a forward: those whose results ``selective`` keeps, and the others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept_bytes = self.kept_flops = self.last_kept_flops = self.other_flops = 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        several = out if isinstance(out, (tuple, list)) else (out,)
        results = [value for value in several if isinstance(value, Tensor)]
        if func in kept_operations():
            self.last_kept_flops = _flops(func, args, kwargs or {}, out)
            self.kept_flops += self.last_kept_flops
            self.kept_bytes += sum(t.nbytes for t in results)
        elif not func.is_view:
            self.other_flops += sum(t.numel() for t in results)
        return out


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Operations of a product or of attention; of the latter q, k and v are the first three."""
    if func.overloadpacket in flop_registry:
        return int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
    query, key = args[0], args[1]
    return 4 * int(query.numel()) * int(key.shape[-2])
