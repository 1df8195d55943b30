"""What a library's attention over segments of variable length is asked, and its two functions.

out, lse = DOCUMENTS.forward(q, k, v, Call(cu_q=starts, cu_k=starts, ...))
dq, dk, dv = DOCUMENTS.backward(dout, q, k, v, out, lse, call)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a kernel is asked beside q, k and v."""

    cu_q: Tensor
    """Where queries of each segment begin and the last one ends, int32 [segments + 1]."""
    cu_k: Tensor
    """The same of keys."""
    max_q: int
    """Most queries of a segment, or more."""
    max_k: int
    """Most keys of a segment, or more."""
    causal: bool
    """Whether the last query of a segment stands at its last key, and none sees a later key."""
    window: int
    """Number of keys a query sees, its own included; 0 means all. Only where causal."""
    softcap: float
    """Bound of the scores; 0 means none."""

    def with_queries(self, tokens: Tensor, others: Tensor, num_tokens: int) -> Tensor:
        """Tell which of ``num_tokens`` tokens lie in a segment that has some of the others."""
        index = torch.arange(num_tokens, dtype=torch.int32, device=tokens.device)
        segment = torch.searchsorted(tokens, index, right=True) - 1
        return (others.diff() > 0)[segment]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A library's attention over segments."""

    forward: Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor]]
    """(q [T, N, H], k [U, G, H], v [U, G, H], call) -> (out [T, N, H], lse [N, T])."""
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor, Tensor]
    ]
    """(dout, q, k, v, out, lse, call) -> (dq, dk, dv)."""
