"""Regional compilation: every block is compiled alone, and blocks that are alike share the code.

Invariant: only a block's ``forward`` is compiled, so that what wraps modules (FSDP2's gathering,
pipelines, the loss) runs as before, and parameters keep their names. A plain block is one graph;
collectives inside a block may cut it into several. Each shape of a micro-batch compiles once: a
ramp of lengths at its edges, a ramp of batches never.

    compile_blocks(transformer, torch.device("cpu"))    # after recomputation, before sharding
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmtrain.errors import ConfigError
from llmtrain.model.layers import Block, BlockContext
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.choose import backend_of
from llmtrain.ops.attention.spec import AttentionBackend, AttentionFunction

logger = logging.getLogger(__name__)

_MAX_SHAPES = 64
"""Codes of one block. torch stops at 8 by default: the rest would run uncompiled."""

BACKEND = "inductor"
"""Compiler behind torch.compile; tests of what surrounds it take a quicker one."""


def compile_blocks(
    transformer: Transformer,
    device: torch.device,
    backend: str | None = None,
    cuda_graphs: bool = False,
) -> None:
    """Replace the ``forward`` of every block by a compiled one; nothing is compiled before it runs.

    With ``cuda_graphs`` every block's forward and backward are recorded when they have run, and
    replayed from then on. Memory of a recording is used again by the next micro-batch: gradients
    must be added to tensors of their own.

    Raises:
        ConfigError: what the compiler needs on ``device`` is missing, or there are no CUDA graphs.
    """
    backend = backend or BACKEND
    if cuda_graphs and device.type != "cuda":
        raise ConfigError(
            f"engine.cuda_graphs=true needs a CUDA device, found {device.type}; set it to false"
        )
    reason = missing_compiler(device) if backend == "inductor" else None
    if reason is not None:
        raise ConfigError(f"engine.compile=true on {device.type} {reason}, or set it to false")
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_SHAPES)
    blocks = [block for block in transformer.model.layers.values() if isinstance(block, Block)]
    options: Any = {"triton.cudagraphs": True} if cuda_graphs else None
    for block in blocks:
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, dynamic=False, backend=backend, options=options
        )
    if blocks and cuda_graphs:
        blocks[0].register_forward_pre_hook(_begin_replay)
    attention = backend_of(blocks[0].self_attn.attention) if blocks else None
    if attention is not None:
        blocks[0].register_forward_pre_hook(_preparation(attention))
    logger.info("%d blocks compile with %s when they first run", len(blocks), backend)


def num_compilations() -> int:
    """Count the graphs this process has compiled so far, forward and backward of one as one."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


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
    # What inductor asks for, without the two seconds of its import.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return "needs a C++ compiler, found none: apt-get install g++"
    return None


def _preparation(attention: AttentionBackend) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Derive what a spec keeps before the first block, not in it: all blocks are then alike."""

    def prepare(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        del block
        hidden, context = inputs
        if isinstance(context, BlockContext):
            attention.prepare(context.spec, hidden.dtype)

    return prepare


def _begin_replay(block: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Tell CUDA graphs that nothing of the micro-batch before is needed any more."""
    del block, inputs
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
