"""Keys and values of the tokens already seen, for generation one token at a time.

Invariant: slot t of row b holds the key and value of the token whose position and document the
cache also holds, so attention over the cache needs no other bookkeeping; an empty slot belongs to
no document and is seen by no query.

    cache = KeyValueCache(config, batch_size=2, capacity=64, like=model_parameter)
    hidden = model(tokens, positions, document_ids, cache)
"""

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.ops.attention.spec import AttentionSpec

EMPTY = -2
"""Document id of a slot that holds no token."""


class KeyValueCache:
    """Pre-allocated keys and values of every layer, filled from the left."""

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, like: Tensor) -> None:
        """Reserve ``capacity`` tokens in each row, with the dtype and device of ``like``."""
        self.capacity = capacity
        self.length = 0
        shape = (batch_size, capacity, config.num_key_value_heads, config.head_size)
        self._keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self._values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self._positions = torch.zeros(shape[:2], dtype=torch.int64, device=like.device)
        self._document_ids = torch.full_like(self._positions, EMPTY)
        self._start = 0

    def begin(
        self,
        positions: Tensor,
        document_ids: Tensor,
        sliding_window: int | None,
        softcap: float | None = None,
    ) -> AttentionSpec:
        """Reserve slots for new tokens [B, S] and return what they see: all slots up to their own.

        Raises:
            ValueError: the new tokens do not fit the capacity.
        """
        end = self.length + positions.shape[1]
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot hold {end}")
        self._positions[:, self.length : end] = positions
        self._document_ids[:, self.length : end] = document_ids
        self._start, self.length = self.length, end
        return AttentionSpec(
            q_positions=positions,
            q_document_ids=document_ids,
            kv_positions=self._positions[:, :end],
            kv_document_ids=self._document_ids[:, :end],
            sliding_window=sliding_window,
            softcap=softcap,
        )

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, S, G, H] of the tokens begun; return all so far [B, T, G, H]."""
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self._start : self.length] = k
        values[:, self._start : self.length] = v
        return keys[:, : self.length], values[:, : self.length]
