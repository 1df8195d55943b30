"""What single kernels are timed on: the shapes that one micro-batch of a run gives them.

Invariant: every call to ``inputs`` draws new random tensors of the same shapes; bytes and
operations are those of the mathematics (each input read once, each output written once).

    case = attention_case(config, torch.device("cuda"), torch.bfloat16)
    q, k, v = case.inputs()
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmtrain.bench.batches import bench_batch
from llmtrain.bench.counts import visible_pairs
from llmtrain.config.bench import BenchConfig
from llmtrain.ops.attention.spec import AttentionSpec
from llmtrain.ops.kernels import Kernels
from llmtrain.ops.rope import Rotation, rope_frequencies


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Attention of the rows of a micro-batch, documents apart."""

    spec: AttentionSpec
    """Who sees whom."""
    heads: tuple[int, int, int]
    """Query heads, key heads, head size."""
    dtype: torch.dtype
    """Type of queries, keys and values."""

    @property
    def flops(self) -> float:
        """Operations of the forward: two products for each pair that sees each other."""
        queries, _, size = self.heads
        lengths: Counter[int] = Counter()
        for row in self.spec.q_document_ids:
            lengths.update(torch.bincount(row).tolist())
        return 4.0 * queries * size * visible_pairs(lengths, self.spec.sliding_window)

    def inputs(self) -> list[Tensor]:
        """Draw q, k and v, [B, S, heads, size]."""
        queries, keys, size = self.heads
        rows, length = self.spec.q_positions.shape
        return [
            _random((rows, length, heads, size), self.spec.q_positions.device, self.dtype)
            for heads in (queries, keys, keys)
        ]

    def first(self, tokens: int) -> "AttentionCase":
        """Give the same of the first ``tokens`` of the first row."""
        positions = self.spec.q_positions[:1, :tokens]
        documents = self.spec.q_document_ids[:1, :tokens]
        ids = None if self.spec.causal_rows else documents
        spec = AttentionSpec.within(positions, ids, self.spec.sliding_window, self.spec.softcap)
        return replace(self, spec=spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """One fused operation."""

    name: str
    """Field of ``Kernels``."""
    call: Callable[..., Any]
    """(kernels, *inputs) -> results."""
    inputs: Callable[[], list[Tensor]]
    """Draws inputs."""
    forward_bytes: float
    """Bytes the forward reads and writes at least."""
    backward_bytes: float
    """Bytes the backward reads and writes at least."""


def attention_case(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> AttentionCase:
    """Take the first micro-batch of a run."""
    model, rows = config.model, slice(0, config.training.micro_batch_size)
    batch = bench_batch(config, 0)
    positions, documents = batch.positions[rows], batch.document_ids[rows]
    extent = int(documents.max()) + 1, int(positions.max()) + 1
    ids = None if config.documents == "whole" else documents.to(device)
    return AttentionCase(
        spec=AttentionSpec.within(
            positions.to(device), ids, model.sliding_window, model.attn_logit_softcapping, extent
        ),
        heads=(model.num_attention_heads, model.num_key_value_heads, model.head_size),
        dtype=dtype,
    )


def kernel_cases(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> list[KernelCase]:
    """List the fused operations in the shapes of a micro-batch."""
    model, eps = config.model, config.model.rms_norm_eps
    rows, length = config.training.micro_batch_size, config.training.sequence_length
    chunk = min(config.engine.loss_chunk_tokens, rows * length)
    item = dtype.itemsize
    hidden = item * rows * length * model.hidden_size
    inner = item * rows * length * model.intermediate_size
    heads = (model.num_attention_heads, model.num_key_value_heads)
    turned = item * rows * length * sum(heads) * model.head_size

    def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [_random(shape, device, dtype) for shape in shapes]

    wide = (rows, length, model.hidden_size)
    angles = Rotation.at(
        torch.arange(length, device=device).expand(rows, length),
        rope_frequencies(model.head_size, model.rope_theta)[0].to(device), 1.0, dtype,
    )  # fmt: skip

    def rotate(kernels: Kernels, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        exact = q.dtype == torch.float64
        cos, sin = (t.double() if exact else t for t in (angles.cos, angles.sin))
        return kernels.rotate(q, k, cos, sin)

    def logits() -> list[Tensor]:
        values = _random((chunk, model.vocab_size), device, dtype).detach()
        return [values, torch.randint(model.vocab_size, (chunk,), device=device)]

    return [
        KernelCase(
            name="rms_norm", call=lambda kernels, x, w: kernels.rms_norm(x, w, eps),
            inputs=lambda: draw(wide, (model.hidden_size,)),
            forward_bytes=2 * hidden, backward_bytes=3 * hidden,
        ),
        KernelCase(
            name="add_rms_norm", call=lambda kernels, x, r, w: kernels.add_rms_norm(x, r, w, eps),
            inputs=lambda: draw(wide, wide, (model.hidden_size,)),
            forward_bytes=4 * hidden, backward_bytes=4 * hidden,
        ),
        KernelCase(
            name="rotate", call=rotate,
            inputs=lambda: draw(*((rows, length, n, model.head_size) for n in heads)),
            forward_bytes=2 * turned, backward_bytes=2 * turned,
        ),
        KernelCase(
            name="swiglu", call=lambda kernels, gate, up: kernels.swiglu(gate, up),
            inputs=lambda: draw(*((rows, length, model.intermediate_size),) * 2),
            forward_bytes=3 * inner, backward_bytes=5 * inner,
        ),
        KernelCase(
            name="cross_entropy_step",
            call=lambda kernels, x, t: kernels.cross_entropy_step(x, t, None, 0.0, True),
            inputs=logits,
            forward_bytes=2 * item * chunk * model.vocab_size, backward_bytes=0.0,
        ),
    ]  # fmt: skip


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype).requires_grad_()
