"""Starting values that depend on the seed, the parameter's name and the element's index alone.

Invariant: element i of a parameter has the same bits on every layout, because its random word is
word i of a Philox4x64-10 stream (numpy's, whose output is fixed by NEP 19) keyed by hash(seed,
name). A shard computes only its own elements; there is no global generator, no order of creation.
Values are made in fp32, and lower or higher precisions are casts of them.

    initialize_model(model, config, seed=0)
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.adapter import LORA_A, LORA_B
from llmtrain.model.mup import width_multiplier

Locate = Callable[[str, Tensor], tuple[Tensor, tuple[int, ...], tuple[slice, ...]]]
"""(name, parameter) -> (local plain tensor, global shape, slices of the global tensor it holds)."""

_BLOCK = 1 << 15
_LANES = 4
_SIN_PI = tuple((-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(7))
"""Taylor coefficients of sin(pi x) in odd powers of x."""


def initialize_model(
    model: nn.Module, config: ModelConfig, seed: int, locate: Locate | None = None
) -> None:
    """Fill every parameter of ``model`` (whole, a stage, or sharded) in place.

    Matrices are normal with ``initializer_range``; projections into the residual stream are
    narrowed by sqrt(2 * layers) (GPT-2), under muP the matrices of the blocks by the root of how
    much wider they are (model/mup.py); norm weights are 1 and biases 0. Of an adapter A is uniform
    within 1 / sqrt(inputs), as PEFT's, and B is 0.

    Args:
        model: a model with storage (after ``to_empty``), in fp32, fp64 or bf16.
        config: the architecture.
        seed: run seed.
        locate: finds the local part of a sharded parameter; null takes parameters as they are.
    """
    for name, parameter in model.named_parameters():
        if locate is None:
            local, shape = parameter.detach(), tuple(parameter.shape)
            slices = tuple(slice(0, size) for size in shape)
        else:
            local, shape, slices = locate(name, parameter)
        initialize_(local, name, shape, slices, config, seed)


def initialize_(
    local: Tensor,
    name: str,
    global_shape: tuple[int, ...],
    slices: tuple[slice, ...],
    config: ModelConfig,
    seed: int,
) -> None:
    """Fill ``local``, which holds ``slices`` of the parameter ``name`` of ``global_shape``."""
    with torch.no_grad():
        if name.endswith("norm.weight"):
            local.fill_(1.0)
        elif name.endswith((".bias", LORA_B)):
            local.zero_()
        elif local.numel() and name.endswith(LORA_A):
            bound = 1.0 / math.sqrt(global_shape[1])
            _fill(
                local, partial(_uniform, bound=bound), stream_key(seed, name), global_shape, slices
            )
        elif local.numel():
            if config.tie_word_embeddings and name == "lm_head.weight":
                name = "model.embed_tokens.weight"  # a stage's copy of it
            std = standard_deviation(name, config)
            _fill(local, partial(_normal, std=std), stream_key(seed, name), global_shape, slices)


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Return the spread of the matrix ``name``."""
    std = config.initializer_range / math.sqrt(width_multiplier(name, config))
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return std / math.sqrt(2 * config.num_hidden_layers)
    return std


def stream_key(seed: int, name: str) -> int:
    """Derive the 128-bit key of a parameter's stream."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def _fill(
    local: Tensor,
    values_of: Callable[[NDArray[np.uint64]], NDArray[np.float32]],
    key: int,
    shape: tuple[int, ...],
    slices: tuple[slice, ...],
) -> None:
    """Write what ``values_of`` makes of the elements ``slices`` of the stream, block by block."""
    contiguous = local.is_contiguous()
    target = local.view(-1) if contiguous else torch.empty(local.numel(), dtype=torch.float32)
    words = np.empty(_BLOCK, dtype=np.uint64)
    written = filled = 0

    def flush() -> None:
        nonlocal written, filled
        values = torch.from_numpy(values_of(words[:filled]))
        target[written : written + filled].copy_(values)
        written, filled = written + filled, 0

    for start, length in _runs(shape, slices):
        done = 0
        while done < length:
            take = min(length - done, _BLOCK - filled)
            words[filled : filled + take] = _words(key, start + done, take)
            filled, done = filled + take, done + take
            if filled == _BLOCK:
                flush()
    if filled:
        flush()
    if not contiguous:
        local.copy_(target.view(local.shape))


def _runs(shape: tuple[int, ...], slices: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
    """Yield (first global element, length) of each contiguous run of the shard, in its order."""
    starts, sizes = zip(*((s.indices(n)[0], len(range(*s.indices(n)))) for s, n in
                          zip(slices, shape, strict=True)), strict=True)  # fmt: skip
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    cut = max((d for d, (size, full) in enumerate(zip(sizes, shape, strict=True)) if size != full),
              default=0)  # fmt: skip
    length = math.prod(sizes[cut:])
    for index in np.ndindex(*sizes[:cut]):
        lead = sum((i + s) * t for i, s, t in zip(index, starts, strides, strict=False))
        yield lead + starts[cut] * strides[cut], length


def _words(key: int, start: int, count: int) -> NDArray[np.uint64]:
    """Return 64-bit words ``start`` to ``start + count`` of the stream."""
    block, skip = divmod(start, _LANES)
    words: NDArray[np.uint64] = np.random.Philox(key=key, counter=block).random_raw(skip + count)
    return words[skip:]


def _uniform(words: NDArray[np.uint64], bound: float) -> NDArray[np.float32]:
    """Map each word to a value spread evenly within ``bound``."""
    values = (words >> np.uint64(32)).astype(np.float64)
    values += 0.5
    values *= 2.0**-31 * bound
    values -= bound
    return values.astype(np.float32)


def _normal(words: NDArray[np.uint64], std: float) -> NDArray[np.float32]:
    """Map each word to a normal value by Box-Muller: radius from its high half, angle from its low.

    The angle only needs to cover half a turn: cos on [0, pi) is distributed as on [0, 2 pi), and
    is -sin(pi x) on [-1/2, 1/2), here an odd polynomial, exact to 1e-8 on that range,
    which needs only products and sums and is several times faster than the library's cosine.
    """
    radius = (words >> np.uint64(32)).astype(np.float64)
    radius += 0.5
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0 * std * std
    np.sqrt(radius, out=radius)
    x = (words & np.uint64(0xFFFFFFFF)).astype(np.float64)
    x *= 2.0**-32
    x -= 0.5
    square = x * x
    sine = np.full_like(x, _SIN_PI[-1])
    for coefficient in _SIN_PI[-2::-1]:
        sine *= square
        sine += coefficient
    sine *= x
    sine *= radius
    return sine.astype(np.float32)
