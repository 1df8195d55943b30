"""Stochastic rounding to bf16, by draws that depend on the seed, a name, an index and a step alone.

A value between two neighbours in bf16 becomes the upper one with the probability that makes the
mean right, so updates too small to move a bf16 weight still move it on average (arXiv:2010.06192).

Invariant: element i of a parameter draws word i of a stream keyed by hash(seed, name) and the count
of updates: the same bits on every layout, on every device and after a resume, without a generator
and without asking the device. Words are SplitMix64's (Steele, Lea, Flood, OOPSLA 2014, figure 17):
integer arithmetic that every device does alike.

    words = draw(key, step, global_indices(region, shape, 0, 100, device))
    weight.copy_(rounded(updated, words, number=0))
"""

import hashlib
import math

import torch
from torch import Tensor

from llmtrain.parallel.region import Region, sizes

_GAMMA = 0x9E3779B97F4A7C15
"""Step of the counter: 2^64 over the golden ratio, made odd."""
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shifts and factors that turn a counter into a word."""
_LAST_SHIFT = 31

_DROPPED_BITS = 16
"""Bits of an fp32 value that bf16 has no room for; one draw takes as many."""
_DROPPED = (1 << _DROPPED_BITS) - 1

DRAWS_PER_WORD = 64 // _DROPPED_BITS
"""Independent draws in one word: ``number`` of ``rounded`` is below this."""


def rounding_key(seed: int, name: str) -> int:
    """Derive the key of a parameter's stream, apart from that of its starting values."""
    digest = hashlib.blake2b(f"{seed}/{name}/rounding".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def global_indices(
    region: Region, shape: tuple[int, ...], start: int, stop: int, device: torch.device
) -> Tensor:
    """Give the places in the whole parameter of elements ``start`` to ``stop`` of a region.

    Args:
        region: what is held of the parameter.
        shape: of the whole parameter.
        start: first element, counted in the flattened region.
        stop: end of the elements.
        device: where to put them.

    Returns:
        int64 [stop - start], counted in the flattened whole.
    """
    first = 1 + max((d for d, size in enumerate(sizes(region)) if size != shape[d]), default=-1)
    run = math.prod(shape[first:])  # dims that are whole: a run of the whole's elements
    local = torch.arange(start, stop, dtype=torch.int64, device=device)
    if first <= 1:
        return local.add_(region[0].start * run if first else 0)
    index, stride = local % run, run
    local = local // run
    for part, size in zip(reversed(region[:first]), reversed(shape[:first]), strict=True):
        length = part.stop - part.start
        index += (local % length + part.start) * stride
        local, stride = local // length, stride * size
    return index


def draw(key: int, step: Tensor, index: Tensor) -> Tensor:
    """Draw the words [N] of ``index`` in the stream of ``key`` at the update numbered ``step``.

    Args:
        key: of ``rounding_key``.
        step: count of updates, scalar of any type.
        index: int64 [N]; overwritten.

    Returns:
        int64 [N], 64 random bits each.
    """
    stream = _mix(step.to(torch.int64, copy=True).mul_(_signed(_GAMMA)).add_(key))
    return _mix(index.mul_(_signed(_GAMMA)).add_(stream))


def rounded(values: Tensor, words: Tensor, number: int) -> Tensor:
    """Round fp32 ``values`` [N] to bf16 neighbours at random, without bias.

    Args:
        values: finite or not; infinities and NaN stay what they are.
        words: int64 [N] of ``draw``.
        number: which draw of each word to take; two roundings of one step take different ones.
    """
    bits = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    bits.copy_(words.view(torch.int16)[number::DRAWS_PER_WORD])
    bits.bitwise_and_(_DROPPED).add_(values.view(torch.int32))
    return bits.view(torch.int16)[1::2].view(torch.bfloat16)  # the upper halves


def _mix(words: Tensor) -> Tensor:
    """Turn counters into words, in place; products wrap around as unsigned ones would."""
    for shift, factor in _MIX:
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shifted(words, _LAST_SHIFT))


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Shift right as if unsigned."""
    return words.bitwise_right_shift(shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    """The signed 64-bit number with the same bits."""
    return value - (1 << 64) if value >> 63 else value
