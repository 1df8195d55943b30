"""Held-out documents, chosen by a hash: the same document is held out in every run.

``cluster`` hashes the id of the near-duplicate cluster, so that no near-duplicate of a held-out
page is trained on; ``url`` is C4's rule, a thousandth of the pages by the md5 of the address.

    split_of("0123...", share=0.02)
"""

from pathlib import Path
from typing import Literal

import blake3
import numpy as np
import pyarrow as pa

from data_pipeline.dedup.url import normalize_c4, url_digest
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard, read_batches
from data_pipeline.sink import Sink

SPLITS = ("train", "validation")
SplitKey = Literal["cluster", "url"]


def held_out_by_cluster(cluster: str, share: float) -> bool:
    """Whether the documents of a cluster are held out."""
    return int.from_bytes(blake3.blake3(cluster.encode()).digest(length=8), "big") < share * 2**64


def held_out_by_url(url: str, share: float) -> bool:
    """Whether a page is held out by C4's rule; ``share`` is a number of thousandths."""
    return int(url_digest(normalize_c4(url)), 16) % 1000 < round(share * 1000)


def route(
    folder: Path, stage: str, out: str, shard: Shard, key: SplitKey, share: float
) -> TaskResult:
    """Write the documents of a shard to ``train-*`` and ``validation-*`` shards."""
    names = ("id", "cluster", "url")
    sink = Sink(folder=folder, stage=stage, source=shard.source, name=Path(shard.path).stem)
    sink.count_in(shard.rows, shard.text_characters, shard.text_bytes)
    routes = dict.fromkeys(SPLITS, 0)
    for table in read_batches(Path(out), shard):
        held = [
            held_out_by_url(url, share) if key == "url" and url
            else held_out_by_cluster(cluster or id_, share)
            for id_, cluster, url in zip(*(table.column(n).to_pylist() for n in names), strict=True)
        ]  # fmt: skip
        mask = np.array(held, bool)
        for split, chosen in zip(SPLITS, (~mask, mask), strict=True):
            sink.write_kept(table.filter(pa.array(chosen)), f"{split}-")
            routes[split] += int(chosen.sum())
    result = sink.close()
    result.details = routes
    return result


def split_of(shard: Shard) -> str:
    """Which split a shard of the split stage belongs to."""
    return Path(shard.path).name.partition("-")[0]
