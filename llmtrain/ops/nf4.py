"""Matrices kept in 4 bits: bitsandbytes' NormalFloat in blocks of 64 values (arXiv:2305.14314).

A block is 64 neighbouring values of the flattened matrix and one fp32 factor, 4.5 bits a value.
Matrices are handed to bitsandbytes flattened: its CPU kernel expands a matrix wrongly whose rows
are no multiple of the block (0.50.2).

Invariant: values that were packed once are packed again without loss: ``store(values())`` changes
no bit, so a checkpoint of the values is one of the packed matrix.

    packed = PackedMatrix((4096, 1024), torch.device("cuda"))
    packed.store(weight)
    y = packed.multiply(x, weight, bias)    # as F.linear(x, packed.values(x.dtype), bias)
"""

import importlib
import importlib.util
import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Values that share a factor."""
INSTALL = "pip install 'llmtrain[qlora]'"
_KIND = "nf4"


def unavailable() -> str | None:
    """Tell why matrices cannot be packed; None where they can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"needs the bitsandbytes package: {INSTALL}"
    return None


@cache
def _library() -> Any:
    return importlib.import_module("bitsandbytes.functional")


class PackedMatrix:
    """A matrix [O, I] in 4 bits that is multiplied by and not trained."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Make room for a matrix of ``shape``; its values are zero."""
        self.shape = shape
        count = math.prod(shape)
        self.codes = torch.full((-(-count // 2), 1), 0x77, dtype=torch.uint8, device=device)
        """Two codes a byte; 7 is zero."""
        self.factors = torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=device)
        """What the codes of a block are multiplied by."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.codes.nbytes + self.factors.nbytes

    def store(self, weight: Tensor) -> None:
        """Pack ``weight``, on any device, in place of what is here."""
        flat = weight.detach().reshape(-1).to(self.codes.device, torch.float32)
        codes, state = _library().quantize_4bit(flat, blocksize=BLOCK, quant_type=_KIND)
        self.codes.copy_(codes)
        self.factors.copy_(state.absmax)

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Expand into a new tensor [O, I]; rounded once where ``dtype`` is shorter than fp32."""
        library = _library()
        short = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
        state = library.QuantState(
            absmax=self.factors, shape=torch.Size((math.prod(self.shape),)), dtype=short,
            blocksize=BLOCK, quant_type=_KIND,
        )  # fmt: skip
        flat: Tensor = library.dequantize_4bit(self.codes, state)
        return flat.reshape(self.shape).to(dtype)

    def multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Map the last dim of ``input``; ``weight`` is not read.

        It is expanded for the product and again for the backward; only the codes stay between.
        """
        del weight
        out: Tensor = _Product.apply(input, self, bias)  # type: ignore[no-untyped-call]
        return out


class _Product(torch.autograd.Function):
    """A linear map by a packed matrix; neither matrix nor bias has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedMatrix, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.values(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.packed.values(grads[0].dtype), None, None
