"""Context parallelism: every rank of an axis holds a part of each sequence.

Invariant: rows are cut into 2 cp chunks and rank r holds chunks r and 2 cp - 1 - r, so that under
a causal mask all ranks do the same work; everything that belongs to a token travels with it. What
comes back from attention is what one device computes, whichever way the keys came.

    batch = split_sequence(batch, world.cp_rank, world.axes.cp)
    attention = context_attention("ring", sdpa_attention, world.group("cp"))
    model = Transformer(config, attention=attention)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.data.batch import StepBatch
from llmtrain.errors import LayoutError
from llmtrain.ops.attention.choose import block_attention
from llmtrain.ops.attention.spec import AttentionFunction, AttentionSpec, KeyOrder
from llmtrain.parallel.collectives import all_to_all, gather_along, stack_over
from llmtrain.parallel.ring import Block, ring_attention


def split_sequence(batch: StepBatch, rank: int, size: int) -> StepBatch:
    """Take what rank ``rank`` of ``size`` holds of every row: chunks rank and 2 size - 1 - rank.

    Raises:
        LayoutError: 2 size chunks do not divide the sequence.
    """
    if size == 1:
        return batch
    length = batch.tokens.shape[1]
    if length % (2 * size):
        raise LayoutError(
            f"training.sequence_length={length} does not split into 2 x parallel.cp = {2 * size} "
            f"equal chunks; use a multiple of {2 * size}"
        )
    return replace(
        batch,
        tokens=_own(batch.tokens, rank, size),
        targets=_own(batch.targets, rank, size),
        positions=_own(batch.positions, rank, size),
        document_ids=_own(batch.document_ids, rank, size),
        loss_weight=_own(batch.loss_weight, rank, size),
    )


def whole_sequence(parts: Sequence[Tensor], dim: int = 1) -> Tensor:
    """Join the parts of all ranks, in rank order, to the tensor that was split along ``dim``."""
    chunks = [chunk for part in parts for chunk in part.chunk(2, dim)]
    size = len(parts)
    return torch.cat([chunks[_slot(chunk, size)] for chunk in range(2 * size)], dim)


def _own(x: Tensor, rank: int, size: int, dim: int = 1) -> Tensor:
    chunks = x.chunk(2 * size, dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim)


def _slot(chunk: int, size: int) -> int:
    """Tell where a chunk of the sequence stands when the parts of all ranks are laid in a row."""
    return 2 * chunk if chunk < size else 2 * (2 * size - 1 - chunk) + 1


def _in_order(x: Tensor, size: int, dim: int = 1) -> Tensor:
    """Bring parts that are laid in a row in rank order into the order of the sequence."""
    return whole_sequence(x.chunk(size, dim), dim)


def context_attention(
    method: str, attention: AttentionFunction, group: dist.ProcessGroup
) -> AttentionFunction:
    """Make an attention function for rows cut by ``split_sequence`` over ``group``.

    Args:
        method: ``all_gather`` (keys and values of all ranks on each; arXiv:2407.21783, section
            3.3.2), ``ulysses`` (all tokens of some heads on each rank; arXiv:2309.14509) or
            ``ring`` (keys and values travel round; arXiv:2310.01889).
        attention: the backend that computes.
        group: the ranks that share each row.

    The function raises LayoutError where ``ulysses`` cannot share out the heads, and where keys
    come from a cache.
    """
    if method not in METHODS:
        raise LayoutError(
            f"parallel.cp_method={method} is unknown; use one of {', '.join(METHODS)}"
        )
    run = METHODS[method](attention, group)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor | None]:
        if spec.kv_positions is not spec.q_positions:
            raise LayoutError("keys from a cache are not shared out over parallel.cp; use cp=1")
        return run(q, k, v, spec)

    return attend


def _all_gather(attention: AttentionFunction, group: dist.ProcessGroup) -> AttentionFunction:
    """Each rank holds the keys of all ranks while it attends."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor | None]:
        own = _chunks_of(group.rank(), group.size())
        runs = spec.derived("context all_gather", lambda: _visible_runs(spec, own, group))
        packed = gather_along(torch.cat((k, v), dim=2), 1, group)
        keys, values = _in_order(packed, group.size()).chunk(2, dim=2)
        return _attend_by_chunk(attention, q, keys, values, runs)

    return attend


def _ulysses(attention: AttentionFunction, group: dist.ProcessGroup) -> AttentionFunction:
    """Each rank attends for its share of the heads, over the whole row."""
    size = group.size()

    def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, None]:
        heads, groups = q.shape[2], k.shape[2]
        if heads % size or groups % size:
            raise LayoutError(
                f"parallel.cp_method=ulysses shares out heads, but parallel.cp={size} does not "
                f"divide the {heads} query and {groups} key heads of a rank; use ring or all_gather"
            )
        runs = spec.derived("context ulysses", lambda: _visible_runs(spec, range(2 * size), group))
        # one exchange carries all three: share i of the heads is (q, k, v) of share i
        shares = [torch.unflatten(x, 2, (size, -1)) for x in (q, k, v)]
        packed = all_to_all(torch.cat(shares, dim=3).flatten(2, 3), 2, 1, group)
        sizes = [heads // size, groups // size, groups // size]
        own_q, own_k, own_v = torch.split(_in_order(packed, size), sizes, dim=2)
        out, _ = _attend_by_chunk(attention, own_q, own_k, own_v, runs)
        parts = torch.cat([_own(out, rank, size) for rank in range(size)], dim=1)
        return all_to_all(parts, 1, 2, group), None

    return attend


def _attend_by_chunk(
    attention: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Block]
) -> tuple[Tensor, Tensor | None]:
    """Let every chunk of the queries attend to the run of the row's keys that it can see."""
    chunks = q.chunk(len(runs), dim=1)
    pairs = [
        attention(chunk, k[:, run.keys], v[:, run.keys], run.spec)
        for chunk, run in zip(chunks, runs, strict=True)
    ]
    lses = [lse for _, lse in pairs if lse is not None]
    return torch.cat([out for out, _ in pairs], dim=1), torch.cat(lses, dim=2) if lses else None


def _ring(attention: AttentionFunction, group: dist.ProcessGroup) -> AttentionFunction:
    """Keys and values visit rank after rank; partial results are joined by their lse."""
    block = block_attention(attention)

    def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        blocks = spec.derived("context ring", lambda: _ring_blocks(spec, group))
        return ring_attention(q, k, v, blocks, block, group)

    return attend


METHODS: dict[str, Callable[[AttentionFunction, dist.ProcessGroup], AttentionFunction]] = {
    "all_gather": _all_gather,
    "ulysses": _ulysses,
    "ring": _ring,
}
"""Ways to share attention over the ranks that share a row."""


@dataclass(frozen=True, slots=True)
class _Row:
    """Positions and documents of the whole rows, in the order of the sequence."""

    positions: Tensor
    document_ids: Tensor
    readable: bool
    """Whether reading values stops no device."""

    def spec(self, local: AttentionSpec) -> AttentionSpec:
        """Attention of the whole rows to themselves."""
        return replace(
            local,
            q_positions=self.positions,
            q_document_ids=self.document_ids,
            kv_positions=self.positions,
            kv_document_ids=self.document_ids,
            extent=_extent(local, self.positions.shape[1]),
        )

    def first_key(self, start: int, window: int | None) -> int:
        """Give a token of the row before which no query from ``start`` on sees a key.

        A document's tokens follow each other, so the window bounds it, and so does the start of
        the document that goes on at ``start``, where that can be read. Elsewhere shapes are those
        of every step, and a compiled backend compiles once.
        """
        first = 0 if window is None else max(0, start - window + 1)
        if self.readable:
            first = max(first, start - int(self.positions[:, start].max()))
        return first


def _extent(local: AttentionSpec, length: int) -> tuple[int, int] | None:
    """Give the extent of documents in whole rows of ``length`` tokens."""
    return None if local.extent is None else (local.extent[0], length)


def _gathered(spec: AttentionSpec, group: dist.ProcessGroup) -> _Row:
    """Fetch the other ranks' positions and documents: once per spec, so once per forward."""

    def build() -> _Row:
        own = torch.stack((spec.q_positions, spec.q_document_ids))
        positions, documents = whole_sequence(stack_over(own, group).unbind(), dim=2).unbind()
        # batches that come with an extent were copied to a device
        return _Row(positions, documents, own.device.type == "cpu" and spec.extent is None)

    return spec.derived("context row", build)


def _chunks_of(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def _visible_runs(
    spec: AttentionSpec, chunks: Sequence[int], group: dist.ProcessGroup
) -> tuple[Block, ...]:
    """For queries that are ``chunks`` of the row, the run of the row's keys each can see."""
    row, length = _gathered(spec, group), spec.q_positions.shape[1] // 2
    whole = row.spec(spec)
    blocks = []
    for place, chunk in enumerate(chunks):
        start, stop = chunk * length, (chunk + 1) * length
        keys = slice(row.first_key(start, spec.sliding_window), stop)
        queries = slice(place * length, (place + 1) * length)
        blocks.append(Block(queries, keys, whole.part(slice(start, stop), keys, "ending")))
    return tuple(blocks)


def _ring_blocks(spec: AttentionSpec, group: dist.ProcessGroup) -> tuple[tuple[Block, ...], ...]:
    """For each rank whose keys may come, which queries of this rank see which of them."""
    row, size = _gathered(spec, group), group.size()
    length = spec.q_positions.shape[1] // 2
    chunks = _chunks_of(group.rank(), size)
    firsts = [row.first_key(chunk * length, spec.sliding_window) for chunk in chunks]
    blocks = []
    for source in range(size):
        visible: dict[tuple[int, ...], list[int]] = {}
        for half, (chunk, first) in enumerate(zip(chunks, firsts, strict=True)):
            others = enumerate(_chunks_of(source, size))
            seen = tuple(i for i, c in others if c <= chunk and (c + 1) * length > first)
            if seen:
                visible.setdefault(seen, []).append(half)
        pair = replace(
            spec,
            kv_positions=_own(row.positions, source, size),
            kv_document_ids=_own(row.document_ids, source, size),
            extent=_extent(spec, row.positions.shape[1]),
        )
        blocks.append(
            tuple(
                _block(pair, halves, seen, length, own=source == group.rank())
                for seen, halves in visible.items()
            )
        )
    return tuple(blocks)


def _block(
    pair: AttentionSpec, halves: Sequence[int], seen: Sequence[int], length: int, own: bool
) -> Block:
    """Pair adjacent halves of a rank's part with the keys they see: its ``own``, or earlier ones.

    A window does not reach over the tokens of other ranks between two halves.
    """
    queries, keys = _run(halves, length), _run(seen, length)
    order: KeyOrder = "ending" if own else "earlier"
    if pair.sliding_window is not None and len(seen) > 1:
        order = "any"
    return Block(queries, keys, pair.part(queries, keys, order))


def _run(halves: Sequence[int], length: int) -> slice:
    """Give the tokens of adjacent halves of a rank's part."""
    return slice(halves[0] * length, (halves[-1] + 1) * length)
