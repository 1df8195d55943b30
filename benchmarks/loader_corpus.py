"""Token stores for the loader benchmark, in the format Megatron-Core reads as well.

``dense`` is written by the project's own writer from random ids, in documents of random lengths.
``sparse`` holds no bytes on disk but its indices: ``.bin`` files of zeros of any size, to measure
how long a loader takes to start.

    dense(Path("/tmp/a"), num_tokens=10**8, num_shards=2, seed=0)
    sparse(Path("/tmp/b"), num_tokens=10**12, num_shards=10_000, document_tokens=10**6)
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmtrain.data.files import LocalFile
from llmtrain.data.indexed import ends_digest, token_dtype, write_index
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.manifest import file_sha256
from llmtrain.data.store import MANIFEST, ShardInfo, ShardWriter, write_manifest

VOCAB_SIZE, EOS_ID = 32_000, 2
MEAN_DOCUMENT_TOKENS = 1_000
IDENTITY = {"tokenizer_hash": "0" * 64, "vocab_size": VOCAB_SIZE, "eos_id": EOS_ID}
_BATCH = 1_000
"""Documents written at a time."""


def dense(folder: Path, *, num_tokens: int, num_shards: int, seed: int) -> Path:
    """Write a store of about ``num_tokens`` random tokens, unless it is there."""
    if (folder / MANIFEST).is_file():
        return folder
    rng = np.random.default_rng(seed)
    infos = []
    for index in range(num_shards):
        with ShardWriter(folder, index, vocab_size=VOCAB_SIZE, eos_id=EOS_ID) as writer:
            written = 0
            while written < num_tokens // num_shards:
                offsets = np.cumsum(np.append(0, document_lengths(rng, _BATCH) - 1))
                tokens = rng.integers(3, VOCAB_SIZE, offsets[-1]).astype(np.uint16)
                writer.add_batch(tokens, offsets, no_records(_BATCH))
                written += len(tokens) + _BATCH
        infos.append(writer.info)
    write_manifest(folder, infos, **IDENTITY)
    return folder


def document_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return lengths in tokens, EOS included: log-normal, as documents of the web roughly are."""
    lengths = rng.lognormal(np.log(MEAN_DOCUMENT_TOKENS) - 0.5, 1.0, count)
    return np.maximum(2, lengths.astype(np.int64))


def no_records(count: int) -> pa.Table:
    """Return records that say nothing."""
    empty = DocumentRecord(id="")
    extractor = {"name": empty.extractor_name, "version": "", "options": ""}
    texts = ("id", "url", "source_file_id", "payload_sha256", "extracted_sha256", "cluster")
    numbers = ("member_offset", "member_length", "text_bytes")
    columns = {name: [""] * count for name in (*texts, "language")}
    columns |= {name: [0] * count for name in numbers}
    edits = pa.array([[]] * count, pa.list_(pa.int32()))
    return pa.table({**columns, "extractor": [extractor] * count, "edits": edits})


def sparse(folder: Path, *, num_tokens: int, num_shards: int, document_tokens: int) -> Path:
    """Make a store of equal shards of zeros with equal documents, unless it is there."""
    if (folder / MANIFEST).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    dtype, per_shard = token_dtype(VOCAB_SIZE), num_tokens // num_shards
    lengths = np.full(per_shard // document_tokens, document_tokens)
    size = int(lengths.sum()) * dtype.itemsize
    infos, digests = [], {}
    for index in range(num_shards):
        name = f"part-{index:05d}"
        paths = {end: folder / f"{name}.{end}" for end in ("bin", "idx", "docs.parquet")}
        with paths["bin"].open("wb") as file:
            os.ftruncate(file.fileno(), size)
        if index == 0:
            write_index(paths["idx"], dtype, lengths)
            index_bytes = paths["idx"].read_bytes()
            sizes = {"bin": size, "idx": len(index_bytes), "docs.parquet": 0}
            digests = {e: ends_digest(LocalFile(str(paths[e]), sizes[e])) for e in ("bin", "idx")}
        paths["idx"].write_bytes(index_bytes)
        paths["docs.parquet"].touch()
        infos.append(
            ShardInfo(
                name=name, num_tokens=int(lengths.sum()), num_documents=len(lengths), sizes=sizes,
                sha256={"idx": file_sha256(paths["idx"]), "bin": "", "docs.parquet": ""},
                ends=digests,
            )
        )  # fmt: skip
    write_manifest(folder, infos, **IDENTITY)
    return folder
