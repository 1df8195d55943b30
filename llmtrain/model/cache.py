"""Keys and values of the tokens already seen, for generation one token at a time.

Invariant: slot t of row b holds the key and value of the token whose position and document the
cache also holds, so attention over the cache needs no other bookkeeping; an empty slot belongs to
no document and is seen by no query.

    cache = KeyValueCache(capacity=64)
    hidden = model(tokens, positions, document_ids, cache)
"""

import torch
from torch import Tensor

from llmtrain.ops.attention.spec import AttentionSpec

EMPTY = -2
"""Document id of a slot that holds no token."""


class KeyValueCache:
    """Keys and values of every layer, filled from the left.

    Its memory is taken when the first tokens come, for as many rows and key heads as they have: a
    tensor-parallel rank has only its own.
    """

    def __init__(self, capacity: int) -> None:
        """Hold at most ``capacity`` tokens in each row."""
        self.capacity = capacity
        self.length = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._positions = torch.zeros(0, 0, dtype=torch.int64)
        self._document_ids = self._positions
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
        if self.length == 0:
            self._positions = positions.new_zeros(len(positions), self.capacity)
            self._document_ids = torch.full_like(self._positions, EMPTY)
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
        if layer not in self._keys:
            shape = (len(k), self.capacity, *k.shape[2:])
            self._keys[layer], self._values[layer] = k.new_zeros(shape), v.new_zeros(shape)
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self._start : self.length] = k
        values[:, self._start : self.length] = v
        return keys[:, : self.length], values[:, : self.length]
