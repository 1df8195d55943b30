"""A keyed permutation of range(n) with its inverse: shuffling without an index in memory.

A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002)
over the pairs of range(a) x range(b), where a * b is n or little more; values that land at n or
above walk the cycle until they are below it. Any element costs the same, whatever n is.

    order = Permutation(1_000_003, key=derive_key("run", 1234, "wiki", 0))
    order.inverse(order.forward(np.arange(10)))
"""

import math
from collections.abc import Callable

import blake3
import numpy as np
import numpy.typing as npt

from llmtrain.data.indexed import Int64Array

NUM_ROUNDS = 8
"""Even; four rounds are the least for a strong permutation, more mix small domains."""

UInt64Array = npt.NDArray[np.uint64]


def derive_key(*parts: str | int) -> bytes:
    """Return a 32-byte key that depends on every part and on where each begins and ends."""
    digest = blake3.blake3(derive_key_context="llmtrain data permutation v1")
    for part in parts:
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return bytes(digest.digest())


class Permutation:
    """A bijection of range(n) chosen by a key."""

    def __init__(self, n: int, key: bytes) -> None:
        """Permute range(n), 1 <= n < 2**62, by ``key`` (see ``derive_key``)."""
        if not 1 <= n < 1 << 62:
            raise ValueError(f"a permutation needs 1 <= n < 2**62, found {n}")
        self.n = n
        self._left = math.isqrt(n - 1) + 1
        self._right = -(-n // self._left)
        material = blake3.blake3(key).digest(length=8 * NUM_ROUNDS)
        self._keys = np.frombuffer(material, dtype="<u8").astype(np.uint64)

    def forward(self, values: Int64Array) -> Int64Array:
        """Return where each value goes."""
        return self._walk(values, self._encrypt)

    def inverse(self, values: Int64Array) -> Int64Array:
        """Return which value goes there."""
        return self._walk(values, self._decrypt)

    def _walk(self, values: Int64Array, step: Callable[[UInt64Array], UInt64Array]) -> Int64Array:
        current = np.array(values, dtype=np.uint64, ndmin=1)
        if len(current) and int(current.max()) >= self.n:
            raise ValueError(f"{int(current.max())} is outside range({self.n})")
        result = step(current)
        outside = np.flatnonzero(result >= self.n)
        while len(outside):
            result[outside] = step(result[outside])
            outside = outside[result[outside] >= self.n]
        places: Int64Array = result.astype(np.int64).reshape(np.shape(values))
        return places

    def _encrypt(self, values: UInt64Array) -> UInt64Array:
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = values // b, values % b
        for i in range(0, NUM_ROUNDS, 2):
            left = (left + keyed_hash(right, self._keys[i]) % a) % a
            right = (right + keyed_hash(left, self._keys[i + 1]) % b) % b
        return left * b + right

    def _decrypt(self, values: UInt64Array) -> UInt64Array:
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = values // b, values % b
        for i in range(NUM_ROUNDS - 2, -1, -2):
            right = (right + b - keyed_hash(left, self._keys[i + 1]) % b) % b
            left = (left + a - keyed_hash(right, self._keys[i]) % a) % a
        return left * b + right


def keyed_hash(values: UInt64Array, key: np.uint64) -> UInt64Array:
    """Hash 64 bits to 64 bits: splitmix64's finalizer (Steele, Lea, Flood, 2014), keyed twice."""
    mixed = (values ^ key) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31)) ^ key
    return mixed ^ (mixed >> np.uint64(33))
