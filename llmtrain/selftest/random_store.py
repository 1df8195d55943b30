"""A token store of random documents, for tests of a configuration that names no data.

write_random_store(folder, config)
"""

from pathlib import Path

import numpy as np

from llmtrain.config.run import RunConfig
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.manifest import write_manifest
from llmtrain.data.writer import ShardWriter

_EOS = 2
_LONGEST = 400
_LEAST_TOKENS, _WINDOWS = 100_000, 64


def write_random_store(folder: Path, config: RunConfig) -> Path:
    """Write some windows of ``config`` as documents of random lengths; returns ``folder``."""
    vocabulary, wanted = config.model.vocab_size, config.training.sequence_length * _WINDOWS
    generator = np.random.default_rng(config.training.seed)
    with ShardWriter(folder, 0, vocab_size=vocabulary, eos_id=_EOS) as writer:
        written = number = 0
        while written < max(_LEAST_TOKENS, wanted):
            tokens = generator.integers(_EOS + 1, vocabulary, generator.integers(20, _LONGEST))
            writer.add(tokens, DocumentRecord(id=f"{number:032x}"))
            written, number = written + len(tokens), number + 1
    write_manifest(
        folder, [writer.info], tokenizer_hash="00" * 32, vocab_size=vocabulary, eos_id=_EOS
    )
    return folder
