"""Small token stores for tests, with documents whose tokens tell where they are from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llmtrain.config.mixture import ConstantMixture
from llmtrain.config.ramp import BatchStage, LengthStage, StepSchedule
from llmtrain.data.journal import Journal
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.mixture import Mixture
from llmtrain.data.order import ConcatOrder
from llmtrain.data.pack_blocks import PackBlocks, Packing, count_blocks, packing_of
from llmtrain.data.plan import BatchPlan
from llmtrain.data.shares import share_schedule
from llmtrain.data.store import ShardWriter, TokenStore, write_manifest

VOCAB_SIZE = 32_000
EOS_ID = 2


def write_store(
    directory: Path,
    documents: Sequence[Sequence[int]],
    num_shards: int = 1,
    vocab_size: int = VOCAB_SIZE,
    tokenizer_hash: str = "0" * 64,
) -> TokenStore:
    """Write ``documents`` (without EOS) over shards in order and open the store."""
    infos = []
    for index, part in enumerate(np.array_split(np.arange(len(documents)), num_shards)):
        with ShardWriter(directory, index, vocab_size=vocab_size, eos_id=EOS_ID) as writer:
            for i in part.tolist():
                record = DocumentRecord(
                    id=f"{i:032x}", url=f"https://example.org/{i}", text_bytes=i
                )
                writer.add(documents[i], record)
        infos.append(writer.info)
    write_manifest(
        directory, infos, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size, eos_id=EOS_ID
    )
    return TokenStore.open(directory)


def random_documents(num_documents: int, mean_length: int, seed: int = 0) -> list[list[int]]:
    """Documents of random ids and lengths; EOS occurs inside them too."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 2 * mean_length, num_documents)
    return [rng.integers(2, VOCAB_SIZE, length).tolist() for length in lengths]


def pack_store(store: TokenStore, window_tokens: int) -> Packing:
    """Count the windows of every block of a store."""
    num_blocks = PackBlocks(store, window_tokens).num_blocks
    return packing_of(store, window_tokens, [count_blocks(store, window_tokens, 0, num_blocks)])


def plan_over(
    stores: Mapping[str, TokenStore],
    weights: Mapping[str, float] | None,
    *,
    seed: int = 0,
    sequence_length: int,
    global_batch_size: int,
    batch_ramp: Sequence[BatchStage] = (),
    length_ramp: Sequence[LengthStage] = (),
    num_tokens: int = 1 << 40,
    journal: Journal | None = None,
) -> BatchPlan:
    """Make the plan of a run that concatenates ``stores`` and mixes them by ``weights``."""
    orders = {
        name: ConcatOrder(store, name, seed=seed, window_tokens=sequence_length)
        for name, store in stores.items()
    }
    schedule = share_schedule(
        ConstantMixture(weights=weights),
        {name: order.num_windows for name, order in orders.items()},
        unit_tokens=sequence_length,
        num_tokens=num_tokens,
    )
    tokens = global_batch_size * sequence_length
    steps = StepSchedule(sequence_length, tokens, batch_ramp, length_ramp)
    return BatchPlan(orders, Mixture(schedule), steps, seed=seed, journal=journal)
