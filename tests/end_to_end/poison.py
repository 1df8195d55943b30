"""A batch that is no number: documents with a token of their own, weights in which it is NaN.

write_documents(store, num_documents=256, poisoned=numbers)  # documents are windows
spoil(weights, state)                                          # checkpoint.start_from=WEIGHTS
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import CheckpointConfig
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.manifest import write_manifest
from llmtrain.data.writer import ShardWriter
from llmtrain.run.progress import Progress
from tests.end_to_end.commands import TOKENIZER_HASH, VOCABULARY

POISON = VOCABULARY - 1
"""Token of poisoned documents alone."""
_EMBEDDING = "model.model.embed_tokens.weight"


def write_documents(folder: Path, num_documents: int, poisoned: Sequence[int] = ()) -> Path:
    """A store of documents that are a window long and count up; poisoned ones are noise."""
    generator = np.random.default_rng(0)
    noisy = set(poisoned)
    with ShardWriter(folder, 0, vocab_size=VOCABULARY, eos_id=2) as writer:
        for number in range(num_documents):
            tokens = 3 + np.arange(31) % 5
            if number in noisy:
                tokens = generator.integers(20, VOCABULARY, 31)
                tokens[::4] = POISON
            writer.add(tokens, DocumentRecord(id=f"{number:032x}"))
    write_manifest(
        folder, [writer.info], tokenizer_hash=TOKENIZER_HASH, vocab_size=VOCABULARY, eos_id=2
    )
    return folder


def spoil(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """Save ``state`` as a checkpoint in which the embedding of the poison is no number."""
    spoilt = {name: tensor.clone() for name, tensor in state.items()}
    spoilt[_EMBEDDING][POISON] = torch.nan
    made = Checkpoints(folder, CheckpointConfig(asynchronous=False), _Weights(spoilt), facts={})
    if not made.save(Progress(num_steps=9, steps=StepSchedule(32, 256), step=1)):
        raise AssertionError(f"{folder} was not written")
    return folder


class _Weights:
    """What a checkpoint is made of."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Tensor]:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError
