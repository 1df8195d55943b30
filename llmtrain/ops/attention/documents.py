"""Attention on a CPU, document by document: no work on what a mask would hide.

Invariant: a document costs what a row of its length costs, and short ones no call of their own
each. A window is worked off in runs of queries, each with the keys it sees.

    out, lse = segmented_attention("documents")(q, k, v, AttentionSpec.within(positions, ids))
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.ops.attention.bins import BIN_TOKENS, Bins, bins_of
from llmtrain.ops.attention.kernel import Call, Kernel
from llmtrain.ops.attention.plain import PLAIN_BLOCKS
from llmtrain.ops.attention.spec import AttentionSpec
from llmtrain.ops.wide import takes_fp32

_WINDOW_QUERIES = 128
"""Fewest queries of a window that are worked off together."""

_MAX_BIAS = 1 << 24
"""Elements of a bias at most; longer segments are worked off in parts."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent queries and all keys they see, of all tokens."""

    queries: slice
    keys: slice
    num_q: int
    num_k: int
    causal: bool
    """Whether the last query stands at the last key, and none sees a later key."""
    window: int
    """Number of keys a query sees; 0 where it sees all up to its own."""

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same tokens, all seen up to the query's own."""
        return self.causal and self.num_q == self.num_k and not self.window

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Give 0 where a query looks and -inf elsewhere; None where nothing is hidden so."""
        if self.square or not self.causal:
            return None
        ahead = self.num_k - self.num_q
        seen = torch.ones(self.num_q, self.num_k, dtype=torch.bool).tril_(ahead)
        if self.window:
            seen.triu_(ahead - self.window + 1)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)

    def spec(self, softcap: float) -> AttentionSpec:
        """Say the same as a spec."""
        ahead = self.num_k - self.num_q if self.causal else self.num_k
        queries, keys = torch.arange(ahead, ahead + self.num_q), torch.arange(self.num_k)
        return AttentionSpec(
            q_positions=queries[None], q_document_ids=torch.zeros_like(queries)[None],
            kv_positions=keys[None], kv_document_ids=torch.zeros_like(keys)[None],
            sliding_window=self.window or None, softcap=softcap,
        )  # fmt: skip


def _bins(call: Call) -> Bins | None:
    """Give the bins of the documents that are too short for calls of their own, if any are."""
    starts = call.cu_q.tolist()
    if not call.causal or starts != call.cu_k.tolist():
        return None
    return bins_of(tuple(starts), call.window, call.softcap)


def _runs(call: Call, binned: bool) -> Iterator[_Run]:
    """Cut the segments into what is worked off at one time, but those that are in bins."""
    q_starts, k_starts = call.cu_q.tolist(), call.cu_k.tolist()
    for i in range(len(q_starts) - 1):
        q_start, k_start = q_starts[i], k_starts[i]
        num_q, num_k = q_starts[i + 1] - q_start, k_starts[i + 1] - k_start
        if num_q == 0 or num_k == 0 or (binned and num_q <= BIN_TOKENS):
            continue
        window = call.window if call.window < num_k else 0
        count = num_q
        if window:
            count = max(window, _WINDOW_QUERIES)
        elif call.causal and num_q != num_k:
            count = max(1, _MAX_BIAS // num_k)
        for start in range(0, num_q, count):
            stop = min(start + count, num_q)
            last = num_k - num_q + stop if call.causal else num_k
            first = max(0, last - (stop - start) - window + 1) if window else 0
            yield _Run(
                slice(q_start + start, q_start + stop), slice(k_start + first, k_start + last),
                stop - start, last - first, call.causal, window,
            )  # fmt: skip


def _equal_rows(call: Call) -> int:
    """Give the number of segments where all are alike and square: they are then one batch."""
    starts = call.cu_q.tolist()
    length = starts[1]
    windowed = 0 < call.window < length
    if call.softcap or windowed or not call.causal:
        return 0
    if starts != list(range(0, length * len(starts), length or 1)) or starts != call.cu_k.tolist():
        return 0
    return len(starts) - 1


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    if takes_fp32(q):
        wide_out, lse = _forward(q.float(), k.float(), v.float(), call)
        return wide_out.to(q.dtype), lse
    if rows := _equal_rows(call):
        q_rows, k_rows, v_rows = (_as_rows(x, rows) for x in (q, k, v))
        out, lse = _fused_forward(q_rows, k_rows, v_rows, None, True)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    out = torch.zeros_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=wide)
    if bins := _bins(call):
        out[bins.tokens], lse[:, bins.tokens] = _binned_forward(q, k, v, bins)
    for run in _runs(call, bins is not None):
        some_q, some_k, some_v = q[None, run.queries], k[None, run.keys], v[None, run.keys]
        if call.softcap:
            some_out, some_lse = PLAIN_BLOCKS.forward(
                some_q, some_k, some_v, run.spec(call.softcap)
            )
        else:
            some_out, some_lse = _fused_forward(
                some_q, some_k, some_v, run.bias(q.dtype), run.square
            )
        out[run.queries] = some_out[0]
        lse[:, run.queries] = some_lse[0]
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    if takes_fp32(q):
        shares = _backward(dout.float(), q.float(), k.float(), v.float(), out.float(), lse, call)
        return shares[0].to(q.dtype), shares[1].to(q.dtype), shares[2].to(q.dtype)
    if rows := _equal_rows(call):
        by_row = _as_rows(lse.t(), rows).transpose(1, 2)
        some_dout, some_q, some_k, some_v, some_out = (
            _as_rows(x, rows) for x in (dout, q, k, v, out)
        )
        shares = _fused_backward(some_dout, some_q, some_k, some_v, some_out, by_row, None, True)
        return shares[0].flatten(0, 1), shares[1].flatten(0, 1), shares[2].flatten(0, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros(k.shape, dtype=wide), torch.zeros(v.shape, dtype=wide)
    if bins := _bins(call):
        shares = _binned_backward(dout, q, k, v, out, lse, bins)
        for whole, share in zip((dq, dk, dv), shares, strict=True):
            whole[bins.tokens] = share.to(whole.dtype)
    for run in _runs(call, bins is not None):
        some_q, some_k, some_v = q[None, run.queries], k[None, run.keys], v[None, run.keys]
        some_dout, some_out = dout[None, run.queries], out[None, run.queries]
        some_lse = lse[None, :, run.queries]
        if call.softcap:
            shares = PLAIN_BLOCKS.backward(
                some_dout, some_q, some_k, some_v, some_out, some_lse, run.spec(call.softcap)
            )
        else:
            shares = _fused_backward(
                some_dout, some_q, some_k, some_v, some_out, some_lse,
                run.bias(q.dtype), run.square,
            )  # fmt: skip
        dq[run.queries] = shares[0][0]
        dk[run.keys] += shares[1][0]
        dv[run.keys] += shares[2][0]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _as_rows(x: Tensor, rows: int) -> Tensor:
    return torch.unflatten(x, 0, (rows, -1))


def _binned_forward(q: Tensor, k: Tensor, v: Tensor, bins: Bins) -> tuple[Tensor, Tensor]:
    """Attend in bins; out [U, N, H] and lse [N, U] of their tokens."""
    inputs, spec = (bins.filled(q), bins.filled(k), bins.filled(v)), bins.spec
    if spec.softcap:
        out, lse = PLAIN_BLOCKS.forward(*inputs, spec)
    else:
        out, lse = _fused_forward(*inputs, spec.bias(q.dtype), False)
    return bins.taken(out).to(q.dtype), bins.taken(lse.transpose(1, 2)).t()


def _binned_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bins: Bins
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of the tokens of bins."""
    spec, by_slot = bins.spec, bins.filled(lse.t()).transpose(1, 2)
    inputs = (bins.filled(dout), bins.filled(q), bins.filled(k), bins.filled(v), bins.filled(out))
    if spec.softcap:
        dq, dk, dv = PLAIN_BLOCKS.backward(*inputs, by_slot, spec)
    else:
        dq, dk, dv = _fused_backward(*inputs, by_slot, spec.bias(q.dtype), False)
    return bins.taken(dq), bins.taken(dk), bins.taken(dv)


def _fused_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Run torch's kernel on q [B, S, N, H], k and v [B, T, G, H]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, attn_mask=bias
    )
    return out.transpose(1, 2), lse


def _fused_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    bias: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shares = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        out.transpose(1, 2), lse, 0.0, causal, attn_mask=bias,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in shares)
    return dq, dk, dv


DOCUMENTS = Kernel(_forward, _backward)
"""Torch's fused kernel of the CPU, once for each long document and once for all short ones."""
