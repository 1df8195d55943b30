"""Small stores of preferences whose answers can be told apart, and batches of them."""

from pathlib import Path

import numpy as np

from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.pack_blocks import PackBlocks, count_blocks, packing_of, write_packing
from llmtrain.data.roles import ANSWER, SECOND
from llmtrain.data.store import ShardWriter, TokenStore, write_manifest

EOS_ID = 2


def make_pairs(
    folder: Path, seed: int, *, num_pairs: int = 60, vocab_size: int = 64, window_tokens: int = 32,
    tokenizer_hash: str = "ab" * 32,
) -> TokenStore:  # fmt: skip
    """Random prompts; chosen answers are of low ids, rejected ones of high ids. It is packed."""
    generator = np.random.default_rng(seed)
    low, high = (3, vocab_size // 2), (vocab_size // 2, vocab_size)
    with ShardWriter(folder, 0, vocab_size=vocab_size, eos_id=EOS_ID) as writer:
        for number in range(num_pairs):
            prompt = generator.integers(3, vocab_size, generator.integers(2, 5)).tolist()
            answers = [generator.integers(*ids, generator.integers(2, 6)).tolist()
                       for ids in (low, high)]  # fmt: skip
            tokens = [*prompt, *answers[0], EOS_ID, *prompt, *answers[1]]
            roles = [0] * len(prompt) + [ANSWER] * (len(answers[0]) + 1)
            roles += [SECOND] * len(prompt) + [SECOND | ANSWER] * (len(answers[1]) + 1)
            writer.add(tokens, DocumentRecord(id=f"{seed:08x}{number:024x}"), roles)
    write_manifest(
        folder, [writer.info], tokenizer_hash=tokenizer_hash, vocab_size=vocab_size, eos_id=EOS_ID
    )
    store = TokenStore.open(folder)
    blocks = PackBlocks(store, window_tokens).num_blocks
    counts = [count_blocks(store, window_tokens, 0, blocks)]
    write_packing(store, packing_of(store, window_tokens, counts))
    return store
