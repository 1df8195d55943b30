"""Regional compilation: every block is compiled alone, and blocks that are alike share the code.

Invariant: only a block's ``forward`` is compiled, so that what wraps modules (FSDP2's gathering,
pipelines, the loss) runs as before, and parameters keep their names. A plain block is one graph;
collectives inside a block may cut it into several. Each shape of a micro-batch compiles once: a
ramp of lengths at its edges, a ramp of batches never.

    compile_blocks(transformer, torch.device("cpu"))    # after recomputation, before sharding
"""

import logging
import shutil
from typing import Any

import torch
from torch import nn

from llmtrain.errors import ConfigError
from llmtrain.model.layers import Attention, Block, BlockContext
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention import ATTENTION, AttentionFunction

logger = logging.getLogger(__name__)

_MAX_SHAPES = 64
"""Codes of one block. torch stops at 8 by default: the rest would run uncompiled."""

BACKEND = "inductor"
"""Compiler behind torch.compile; tests of what surrounds it take ``aot_eager``, which is quick."""


def compile_blocks(
    transformer: Transformer, device: torch.device, backend: str | None = None
) -> None:
    """Replace the ``forward`` of every block by a compiled one; nothing is compiled before it runs.

    Raises:
        ConfigError: what the compiler needs on ``device`` is missing.
    """
    backend = backend or BACKEND
    reason = missing_compiler(device) if backend == "inductor" else None
    if reason is not None:
        raise ConfigError(f"engine.compile=true on {device.type} {reason}, or set it to false")
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_SHAPES)
    blocks = [block for block in transformer.model.layers.values() if isinstance(block, Block)]
    for block in blocks:
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, dynamic=False, backend=backend
        )
    if blocks and _sees_a_mask(blocks[0].self_attn):
        blocks[0].register_forward_pre_hook(_make_mask)
    logger.info("%d blocks compile with %s when they first run", len(blocks), backend)


def kept_eager(attention: AttentionFunction) -> AttentionFunction:
    """Leave context-parallel attention out of what is compiled.

    What a rank sees changes with every batch's documents: compiled, it would compile every time.
    """
    eager: AttentionFunction = torch.compiler.disable(attention)  # type: ignore[no-untyped-call]
    return eager


def missing_compiler(device: torch.device) -> str | None:
    """Tell what inductor lacks on ``device``; None where it can run."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "needs Triton, found none: pip install triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        found = None
    if found is None:
        return "needs a C++ compiler, found none: apt-get install g++"
    return None


def _sees_a_mask(attention: Attention) -> bool:
    """Tell whether attention reads the masks that a spec keeps."""
    return any(attention.attention is backend.function for backend in ATTENTION.values())


def _make_mask(block: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Make the masks of a forward before its first block, not in it: all blocks are then alike."""
    hidden, context = inputs
    if isinstance(context, BlockContext) and not context.spec.causal_rows:
        context.spec.bias(hidden.dtype)
