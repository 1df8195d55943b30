"""The least work of a training step, by part: operations and bytes, in closed form.

Invariant: counted is what the mathematics asks for, once: no recomputation, no copy that a better
kernel would save, attention inside documents only and causal. Whatever runs cannot do with less;
what it takes beyond the time of these is overhead of kernels.

    work = least_work(config, visible_pairs({512: 2, 1024: 1}), tokens=2048)
    work["matmul"].flops
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.planner.flops import num_matmul_parameters
from llmtrain.planner.memory import is_trained, num_moments, parameter_shapes

FORWARD_AND_BACKWARD = 3
"""A product's backward is two products."""

_FP32 = 4
_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations of matrix products and bytes between memory and processor."""

    flops: float
    """Operations, a multiplication and an addition counted as two."""
    bytes_moved: float
    """Bytes read and written."""


def least_work(config: RunConfig, pairs: float, tokens: int) -> dict[str, Work]:
    """Count one optimizer step over all ranks, by part of the step.

    Args:
        config: model, precision and optimizer of the run.
        pairs: (query, key) pairs that see each other in the batch, of one head of one layer.
        tokens: tokens of the batch.
    """
    model, item = config.model, _BYTES[config.engine.precision]
    head = model.vocab_size * model.hidden_size
    body = num_matmul_parameters(model) - head
    width = model.num_attention_heads * model.head_size
    keys = model.num_key_value_heads * model.head_size
    layers = model.num_hidden_layers
    return {
        "attention": Work(
            flops=FORWARD_AND_BACKWARD * 4 * layers * width * pairs,
            # forward: q, k, v in, out; backward: those and its gradient in, three gradients out
            bytes_moved=item * layers * tokens * 6 * (width + keys),
        ),
        "matmul": Work(
            flops=2 * FORWARD_AND_BACKWARD * body * tokens,
            bytes_moved=item * (FORWARD_AND_BACKWARD * body + _matmul_activations(model, tokens)),
        ),
        "norm and elementwise": Work(
            flops=0.0, bytes_moved=item * tokens * layers * _elementwise(model)
        ),
        "loss": Work(
            flops=2 * FORWARD_AND_BACKWARD * head * tokens,
            bytes_moved=item * (2 * head + 2 * tokens * model.hidden_size) + _FP32 * head,
        ),
        "optimizer": Work(flops=0.0, bytes_moved=_optimizer_bytes(config)),
    }


def visible_pairs(lengths: Mapping[int, int], window: int | None = None) -> float:
    """Pairs of a query and a key it sees, from how many documents there are of each length."""
    total = 0.0
    for length, count in lengths.items():
        seen = min(length, window or length)
        total += count * (seen * (seen + 1) / 2 + (length - seen) * seen)
    return total


def _matmul_activations(model: ModelConfig, tokens: int) -> int:
    """Values in and out of the blocks' products, forward and backward."""
    width, keys = (n * model.head_size for n in (model.num_attention_heads,
                                                 model.num_key_value_heads))  # fmt: skip
    hidden, inner = model.hidden_size, model.intermediate_size
    shapes = ((hidden, width + 2 * keys), (width, hidden), (hidden, 2 * inner), (inner, hidden))
    return FORWARD_AND_BACKWARD * model.num_hidden_layers * tokens * sum(map(sum, shapes))


def _elementwise(model: ModelConfig) -> int:
    """Values a block reads and writes per token outside products and attention."""
    heads = (model.num_attention_heads + model.num_key_value_heads) * model.head_size
    norms = 2 * model.hidden_size * (4 + 4)  # with the residual: x, r -> sum, normed; and back
    if model.post_norms:
        norms += 2 * model.hidden_size * (2 + 3)
    rotary = heads * (2 + 2)
    swiglu = model.intermediate_size * (3 + 5)
    return norms + rotary + swiglu


def _optimizer_bytes(config: RunConfig) -> float:
    """Bytes of the update: parameter and states in and out, gradient in, the bf16 copy out."""
    half = config.engine.master_dtype == "bf16"
    kept = 2 if half else _FP32
    moment = 2 if config.optimizer.state_dtype == "bf16" else _FP32
    copy = 2 if config.engine.precision == "bf16" and not half else 0
    total = 0
    for name, shape in parameter_shapes(config.model).items():
        if not is_trained(config.model, name):
            continue
        values = math.prod(shape)
        moments = num_moments(config.optimizer.kind, name)
        total += values * (_FP32 + 2 * kept + 2 * moments * moment + copy)
    return float(total)
