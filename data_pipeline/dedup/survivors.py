"""Which member of every near-duplicate cluster stays, and the documents that go on.

One task joins all edges. It holds 9 bytes per document and 76 per cluster, says so before it
begins, and refuses a corpus that is too large for the memory it has; edges and ranks are read a
piece at a time.

    result = find_clusters(folder, "corpus/stages/07-minhash", shards, memory_bytes)
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.dedup.cluster import KNOWN, RANK
from data_pipeline.dedup.components import Forest, UInt32Array
from data_pipeline.dedup.cuts import write_verdicts
from data_pipeline.dedup.jaccard import EDGE
from data_pipeline.dedup.keyed import tables_of
from data_pipeline.dedup.keys import LAST_ORDER
from data_pipeline.dedup.losers import LostPlaces, shard_sink, work_of
from data_pipeline.dedup.sorted_runs import RecordFile, Records, limit_bytes
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import SCHEMA, Shard
from data_pipeline.step import Dropped, Verdict
from llmtrain.errors import DataError

MEMBER = np.dtype([
    ("shard", "<u4"), ("row", "<u4"), ("size", "<u4"), ("state", "<u4"),
    ("id_hi", "<u8"), ("id_lo", "<u8"),
])  # fmt: skip
"""A document that is not alone: where it stands, its cluster, and whether it stays."""
KEPT, DUPLICATE, KNOWN_BEFORE = 0, 1, 2
_REASONS = {DUPLICATE: "minhash.duplicate", KNOWN_BEFORE: "minhash.known"}
_BYTES_PER_DOCUMENT = 9
_BYTES_PER_CLUSTER = 76


def find_clusters(
    folder: Path, stage_folder: str, shards: Sequence[Shard], memory_bytes: int
) -> TaskResult:
    """Join the edges and choose who stays; writes one file of all documents that are not alone.

    Raises:
        DataError: the corpus has more documents than the memory budget can join.
    """
    work = Path(stage_folder) / "work"
    joined, num_edges = _join(work, sum(shard.rows for shard in shards), memory_bytes)
    ranks = [work / f"ranks-{index:05d}.bin" for index in range(len(shards))]
    chosen = _choose(joined.heads, joined.roots, ranks, memory_bytes)
    name = "work/members-000.bin"
    size = _write_members(folder / name, joined, chosen, shards, memory_bytes)
    several = joined.sizes[joined.sizes > 1]
    details = {
        "documents": len(joined.roots),
        "clusters": len(several),
        "members": int(several.sum()),
        "largest": int(joined.sizes.max(initial=1)),
        "edges": num_edges,
        "known": int(joined.sizes[joined.known].sum()),
        "sizes": _histogram(joined.sizes),
    }
    return TaskResult(work={name: size}, details=details)


class Joined(NamedTuple):
    """The documents of a corpus in their clusters; a cluster is named by its first document."""

    roots: UInt32Array
    """First document of the cluster of each."""
    sizes: UInt32Array
    """Members, at the first document; 0 at all others."""
    known: npt.NDArray[np.bool_]
    """Whether an earlier corpus holds a member, at the first document."""
    heads: UInt32Array
    """First documents of clusters with several members or a known one, in increasing order."""


def _join(work: Path, nodes: int, memory_bytes: int) -> tuple[Joined, int]:
    """Return the clusters, and the number of edges they were made from."""
    _check_memory(nodes, 0, memory_bytes)
    forest = Forest(nodes)
    num_edges = 0
    for edges in _pieces(work, "edges", EDGE, memory_bytes):
        forest.unite(edges["document"], edges["root"])
        num_edges += len(edges)
    roots, sizes = forest.finish()
    known = np.zeros(nodes, bool)
    for piece in _pieces(work, "known", KNOWN, memory_bytes):
        known[roots[piece["document"]]] = True
    heads = np.flatnonzero((sizes > 1) | known).astype(np.uint32)
    _check_memory(nodes, len(heads), memory_bytes)
    return Joined(roots, sizes, known, heads), num_edges


def _check_memory(nodes: int, clusters: int, memory_bytes: int) -> None:
    if nodes >= 1 << 32:
        raise DataError(
            f"minhash counts documents in 32 bits, {nodes:,} are too many; run the pipeline on "
            f"{nodes // (1 << 32) + 1} parts, each against= the ones before it"
        )
    needed = nodes * _BYTES_PER_DOCUMENT + clusters * _BYTES_PER_CLUSTER
    if 2 * needed > memory_bytes:
        raise DataError(
            f"joining {nodes:,} documents in {clusters:,} clusters takes {needed / 2**30:.2f} GiB, "
            f"half of pipeline.memory_gib={memory_bytes / 2**30:g} at most; set "
            f"pipeline.memory_gib={2.1 * needed / 2**30:.2f} or more"
        )


def _histogram(sizes: UInt32Array) -> dict[str, int]:
    """Return how many clusters have 1, 2, 3 to 4, 5 to 8 members and so on."""
    counts: dict[str, int] = {}
    found, numbers = np.unique(sizes[sizes > 0], return_counts=True)
    for size, number in zip(found.tolist(), numbers.tolist(), strict=True):
        top = 1 << (size - 1).bit_length()
        name = str(size) if size <= 2 else f"{top // 2 + 1}-{top}"
        counts[name] = counts.get(name, 0) + number
    return counts


def _pieces(work: Path, name: str, dtype: np.dtype[Any], memory_bytes: int) -> Iterator[Records]:
    """Yield the records of every file ``NAME-*.bin``, a piece at a time."""
    for path in sorted(work.glob(f"{name}-*.bin")):
        yield from _read(path, dtype, memory_bytes)


def _read(path: Path, dtype: np.dtype[Any], memory_bytes: int) -> Iterator[Records]:
    file = RecordFile(path, dtype)
    step = limit_bytes(memory_bytes) // dtype.itemsize // 2
    for start in range(0, file.count, step):
        yield file.read(start, min(file.count, start + step))


class _Chosen:
    """For every cluster so far: who stays and with which rank, and the smallest id."""

    def __init__(self, clusters: int) -> None:
        self.document = np.zeros(clusters, np.uint32)
        self.rank = np.full(clusters, LAST_ORDER, RANK)
        self.smallest = np.full(clusters, LAST_ORDER, RANK)

    def improve(self, slots: npt.NDArray[np.int64], ranks: Records, documents: UInt32Array) -> None:
        """Take members of clusters: slots[i] is the cluster of documents[i]."""
        best = _first_of_each(slots, ranks, ("order_hi", "order_lo", "id_hi", "id_lo"))
        better = best[_less(ranks[best], self.rank[slots[best]], RANK.names or ())]
        self.rank[slots[better]] = ranks[better]
        self.document[slots[better]] = documents[better]
        least = _first_of_each(slots, ranks, ("id_hi", "id_lo"))
        least = least[_less(ranks[least], self.smallest[slots[least]], ("id_hi", "id_lo"))]
        self.smallest[slots[least]] = ranks[least]


def _first_of_each(
    slots: npt.NDArray[np.int64], ranks: Records, names: Sequence[str]
) -> npt.NDArray[np.int64]:
    """Return where the smallest rank of every slot stands."""
    order = np.lexsort((*(ranks[name] for name in reversed(names)), slots))
    _, first = np.unique(slots[order], return_index=True)
    found: npt.NDArray[np.int64] = order[first]
    return found


def _less(one: Records, other: Records, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Compare records field by field."""
    less = np.zeros(len(one), bool)
    equal = np.ones(len(one), bool)
    for name in names:
        less |= equal & (one[name] < other[name])
        equal &= one[name] == other[name]
    return less


def _choose(
    heads: UInt32Array, roots: UInt32Array, ranks: Sequence[Path], memory_bytes: int
) -> _Chosen:
    """Read the ranks in the order of the corpus and keep the best of every cluster."""
    chosen = _Chosen(len(heads))
    first = 0
    for path in ranks:
        for piece in _read(path, RANK, memory_bytes):
            rows, slots = _members(heads, roots[first : first + len(piece)])
            chosen.improve(slots, piece[rows], (rows + first).astype(np.uint32))
            first += len(piece)
    return chosen


def _members(
    heads: UInt32Array, roots: UInt32Array
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (which of the documents are in a cluster, which cluster that is)."""
    if not len(heads):
        nothing = np.empty(0, np.int64)
        return nothing, nothing
    slots = np.minimum(np.searchsorted(heads, roots), len(heads) - 1)
    rows = np.flatnonzero(heads[slots] == roots)
    return rows, slots[rows]


def _write_members(
    path: Path, joined: Joined, chosen: _Chosen, shards: Sequence[Shard], memory_bytes: int
) -> int:
    """Write a record for every document that is not alone, in the order of the corpus."""
    path.parent.mkdir(parents=True, exist_ok=True)
    step = limit_bytes(memory_bytes) // MEMBER.itemsize
    first = 0
    with path.open("wb") as file:
        for index, shard in enumerate(shards):
            for start in range(0, shard.rows, step):
                end = min(shard.rows, start + step)
                rows, slots = _members(joined.heads, joined.roots[first + start : first + end])
                heads = joined.heads[slots]
                members = np.empty(len(rows), MEMBER)
                members["shard"], members["row"] = index, rows + start
                members["size"] = joined.sizes[heads]
                members["id_hi"] = chosen.smallest["id_hi"][slots]
                members["id_lo"] = chosen.smallest["id_lo"][slots]
                loses = chosen.document[slots] != rows + first + start
                members["state"] = np.where(loses, DUPLICATE, KEPT)
                members["state"][joined.known[heads]] = KNOWN_BEFORE
                file.write(members.tobytes())
            first += shard.rows
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def keep_members(folder: Path, stage: str, out: str, shard: Shard, index: int) -> TaskResult:
    """Write the documents of a shard that stay, with their cluster; the others to ``dropped/``.

    Reasons: ``minhash.duplicate``, ``minhash.known``.
    """
    sink = shard_sink(folder, stage, shard)
    members = LostPlaces(work_of(out, stage), index, "members", dtype=MEMBER)
    for first, table in tables_of(out, shard):
        found = members.between(first, first + table.num_rows)
        rows = (found["row"] - np.uint32(first)).tolist()
        clusters = table.column("id").to_pylist()
        sizes = np.ones(table.num_rows, np.int64)
        sizes[rows] = found["size"]
        for row, high, low in zip(
            rows, found["id_hi"].tolist(), found["id_lo"].tolist(), strict=True
        ):
            clusters[row] = f"{high:016x}{low:016x}"
        columns = {"cluster": pa.array(clusters, pa.string()), "cluster_size": pa.array(sizes)}
        for name, values in columns.items():
            position = SCHEMA.get_field_index(name)
            table = table.set_column(position, SCHEMA.field(name), values)
        verdicts: dict[int, Verdict] = {
            row: Dropped(_REASONS[state])
            for row, state in zip(rows, found["state"].tolist(), strict=True)
            if state != KEPT
        }
        write_verdicts(sink, table, verdicts)
    return sink.close()
