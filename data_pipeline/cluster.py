"""Near-duplicate clusters: MinHash band keys become edges, edges become clusters, one page stays.

Documents that share a band key are joined to the first of them (k - 1 edges, never k squared).
Components are found by label propagation, so a cluster and its id, the smallest id of its members,
do not depend on the order of edges. The longest member stays, the smallest id among equals.

    edges = star_edges(keys, ordinals)
    roots = components(edges, num_documents)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.dedup import bucket_range, read_bucket, save_work
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import SCHEMA, Shard, read_table
from data_pipeline.transform import Sink
from llmtrain.errors import DataError

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
KEY = np.dtype([("key", "<u8"), ("document", "<i8")])
"""A band key and the ordinal of the document in the corpus."""
_BATCH = 256
_BYTES_PER_DOCUMENT = 48


def star_edges(records: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.void], Int64Array]:
    """Return (the first record of every key, sorted by key; edges [E, 2] from others to it)."""
    ordered = records[np.lexsort((records["document"], records["key"]))]
    first = np.ones(len(ordered), bool)
    first[1:] = ordered["key"][1:] != ordered["key"][:-1]
    root = ordered["document"][np.flatnonzero(first)][np.cumsum(first) - 1]
    edges = np.stack([ordered["document"], root], axis=1)[~first]
    edges = edges[edges[:, 0] != edges[:, 1]]
    return ordered[first], np.unique(edges, axis=0) if len(edges) else edges.astype(np.int64)


def components(edges: Int64Array, nodes: int) -> Int64Array:
    """Return for each node the smallest node it is connected with."""
    label = np.arange(nodes, dtype=np.int64)
    while True:
        before = label.copy()
        low = np.minimum(label[edges[:, 0]], label[edges[:, 1]])
        for ends in (edges[:, 0], edges[:, 1]):
            np.minimum.at(label, before[ends], low)
            np.minimum.at(label, ends, low)
        label = label[label]
        if np.array_equal(label, before):
            return label


def emit_bands(
    folder: Path, out: str, shard: Shard, index: int, first: int, preset: str
) -> TaskResult:
    """Write a shard's band keys, one record per key, and the edges inside the shard."""
    from data_pipeline.minhash import MinHasher  # compiles kernels: not for the driver

    texts = read_table(Path(out), shard, ["text"]).column("text").to_pylist()
    hasher = MinHasher(preset)
    parts = [hasher.band_keys_batch(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
    keys = np.concatenate(parts)
    records = np.empty(keys.size, dtype=KEY)
    records["key"] = keys.ravel()
    records["document"] = np.repeat(np.arange(first, first + len(texts)), keys.shape[1])
    kept, edges = star_edges(records)
    return save_work(
        folder, {f"work/keys-{index:05d}.npy": kept, f"work/local-{index:05d}.npy": edges}
    )


def reduce_bands(
    folder: Path, stage_folder: str, bucket: int, buckets: int, num_shards: int
) -> TaskResult:
    """Write the edges one range of keys gives over all shards."""
    records = read_bucket(Path(stage_folder), "key", bucket_range(bucket, buckets), num_shards)
    _, edges = star_edges(records)
    return save_work(folder, {f"work/edges-{bucket:05d}.npy": edges})


def find_clusters(
    folder: Path,
    out: str,
    stage_folder: str,
    shards: Sequence[Shard],
    buckets: int,
    memory_bytes: int,
) -> TaskResult:
    """Join the edges and choose who stays; writes one table of all documents that are not alone.

    Raises:
        DataError: the corpus has more documents than the memory budget can join.
    """
    nodes = sum(shard.rows for shard in shards)
    work = Path(stage_folder) / "work"
    names = [f"local-{i:05d}" for i in range(len(shards))] + [
        f"edges-{b:05d}" for b in range(buckets)
    ]
    edges = np.concatenate([np.load(work / f"{name}.npy") for name in names])
    needed = nodes * _BYTES_PER_DOCUMENT + 4 * edges.nbytes
    if needed > memory_bytes:
        raise DataError(
            f"joining {nodes:,} documents over {len(edges):,} edges needs "
            f"{needed / 2**30:.1f} GiB; raise pipeline.memory_gib={memory_bytes / 2**30:g} to that"
        )
    roots = components(edges, nodes)
    sizes = np.bincount(roots, minlength=nodes)
    members = np.flatnonzero(sizes[roots] > 1)
    ids, lengths = _read_members(Path(out), shards, members)
    root = roots[members]
    cluster = ids[_first_of_cluster(root, ids)]
    winner = members[_first_of_cluster(root, -lengths, ids)]
    size = sizes[root]
    result = save_work(folder, {
        "work/members.npy": members, "work/cluster.npy": cluster,
        "work/keep.npy": members == winner, "work/size.npy": size,
    })  # fmt: skip
    result.details = {
        "documents": nodes,
        "clusters": len(np.unique(root)),
        "members": len(members),
        "largest": int(size.max()) if len(size) else 1,
        "edges": len(edges),
    }
    return result


def _first_of_cluster(root: Int64Array, *order: npt.NDArray[Any]) -> Int64Array:
    """Return for each member the position of the first of its cluster in the given order."""
    by = np.lexsort((*reversed(order), root))
    roots, first = np.unique(root[by], return_index=True)
    found: Int64Array = by[first][np.searchsorted(roots, root)]
    return found


def _read_members(
    out: Path, shards: Sequence[Shard], members: Int64Array
) -> tuple[npt.NDArray[Any], Int64Array]:
    """Return the ids and text lengths of some documents, by ordinal."""
    ids: list[str] = []
    lengths: list[int] = []
    first = 0
    for shard in shards:
        rows = members[(members >= first) & (members < first + shard.rows)] - first
        first += shard.rows
        if len(rows):
            table = read_table(out, shard, ["id", "text"]).take(pa.array(rows))
            ids += table.column("id").to_pylist()
            lengths += [len(text) for text in table.column("text").to_pylist()]
    return np.array(ids, dtype="U32"), np.array(lengths, dtype=np.int64)


def keep_longest(folder: Path, stage: str, out: str, shard: Shard, first: int) -> TaskResult:
    """Write the documents of a shard that stay, with their cluster; the others to ``dropped/``."""
    table = read_table(Path(out), shard)
    work = Path(out) / "stages" / stage / "work"
    members = np.load(work / "members.npy", mmap_mode="r")
    low, high = np.searchsorted(members, [first, first + shard.rows])
    rows = np.asarray(members[low:high]) - first
    cluster = np.array(table.column("id").to_pylist(), dtype="U32")
    size = np.ones(table.num_rows, np.int64)
    keep = np.ones(table.num_rows, bool)
    cluster[rows] = np.load(work / "cluster.npy", mmap_mode="r")[low:high]
    size[rows] = np.load(work / "size.npy", mmap_mode="r")[low:high]
    keep[rows] = np.load(work / "keep.npy", mmap_mode="r")[low:high]
    columns = {"cluster": pa.array(cluster.tolist(), pa.string()), "cluster_size": pa.array(size)}
    for name, values in columns.items():
        position = SCHEMA.get_field_index(name)
        table = table.set_column(position, SCHEMA.field(name), values)
    sink = Sink(folder=folder, stage=stage, source=shard.source, name=Path(shard.path).stem)
    sink.count_in(shard.rows, shard.text_characters, shard.text_bytes)
    sink.write_kept(table.filter(pa.array(keep)))
    sink.write_dropped(table.filter(pa.array(~keep)), ["minhash.duplicate"] * int((~keep).sum()))
    return sink.result
