"""The documents of a spec as runs of tokens: what kernels of variable length take.

Invariant: made without asking the device where the host knows how many documents a row may have
(``spec.extent``); every token lies in one segment, and those beyond the last document are empty.

    segments = segments_of(spec)
    starts_and_ends = segments.cu_q[: segments.num + 1]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.ops.attention.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class Segments:
    """Segment i is queries cu_q[i] to cu_q[i + 1] and keys cu_k[i] to cu_k[i + 1], rows in a row.

    A compiled block sees tensors of fixed shapes alone: what changes with the documents of a batch
    is in them, so that nothing compiles again.
    """

    cu_q: Tensor
    """Where queries of a segment begin, int32 [B S + 1 or more]; B S beyond the last."""
    cu_k: Tensor
    """Where keys of a segment begin, int32 [B T + 1 or more]; B T beyond the last."""
    extent: Tensor
    """Number of segments, most queries and most keys of one: int64 [3], in the host's memory."""


def segments_of(spec: AttentionSpec) -> Segments | None:
    """Give the segments of ``spec``, made once; None where its documents are no runs of tokens."""
    if spec.order == "any" or (spec.order == "earlier" and spec.sliding_window is not None):
        return None
    return spec.derived("segments", lambda: _segments(spec))


def _segments(spec: AttentionSpec) -> Segments:
    own = spec.order == "own"
    queries = _ordinals(spec.q_document_ids) if own else spec.q_document_ids
    documents, longest = spec.extent or (_most_documents(queries), queries.shape[1])
    cu_q = _starts(queries, documents)
    cu_k = cu_q.clone() if own else _starts(spec.kv_document_ids, documents)
    rows, num_keys = spec.kv_document_ids.shape
    extent = torch.tensor(
        [rows * documents, min(longest, queries.shape[1]), min(longest, num_keys)]
        if spec.extent
        else [rows * documents, queries.shape[1], num_keys]
    )
    return Segments(cu_q, cu_k, extent)


def _ordinals(document_ids: Tensor) -> Tensor:
    """Number the runs of equal ids [B, S] of each row from 0."""
    changes = torch.zeros_like(document_ids, dtype=torch.int32)
    changes[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return changes.cumsum(dim=1, dtype=torch.int32)


def _most_documents(document_ids: Tensor) -> int:
    """Ask how many documents a row has at most; on an accelerator the host waits for it."""
    return int(document_ids[:, -1].max()) + 1


def _starts(document_ids: Tensor, documents: int) -> Tensor:
    """Find where documents 0 to ``documents`` of each row begin, in tokens of all rows."""
    rows, length = document_ids.shape
    numbers = torch.arange(documents, dtype=document_ids.dtype, device=document_ids.device)
    starts = torch.searchsorted(
        document_ids.contiguous(), numbers.expand(rows, -1).contiguous(), out_int32=True
    )
    starts += torch.arange(0, rows * length, length, device=starts.device, dtype=torch.int32)[
        :, None
    ]
    size = max(rows * length, starts.numel()) + 1
    padded = starts.new_full((size,), rows * length)
    padded[: starts.numel()] = starts.flatten()
    return padded
