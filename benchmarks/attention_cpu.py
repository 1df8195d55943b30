"""Attention of packed documents on a CPU: document by document, and with a dense mask.

Prints milliseconds of processor time of forward and backward, the less of alternating runs:

    python benchmarks/attention_cpu.py [tokens ...]
"""

import sys
import time

import torch

from llmtrain.ops.attention.choose import ATTENTION
from llmtrain.ops.attention.spec import AttentionSpec

NAMES = ("documents", "sdpa")
HEADS, KEY_HEADS, HEAD_SIZE = 8, 4, 64


def spec_of(tokens: int, mean: int, window: int | None) -> tuple[AttentionSpec, int]:
    """One row of documents of random lengths, and how many there are."""
    generator = torch.Generator().manual_seed(0)
    lengths, left = [], tokens
    while left:
        drawn = torch.empty(1).exponential_(1 / mean, generator=generator)
        lengths.append(left if mean >= tokens else min(left, max(1, int(drawn.item()))))
        left -= lengths[-1]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    return AttentionSpec.within(positions.int(), ids.int(), window), len(lengths)


def measure(name: str, dtype: torch.dtype, tokens: int, mean: int, window: int | None) -> float:
    """Milliseconds of one forward and backward; what a forward's layers share is made before."""
    q, k, v = (
        torch.randn(1, tokens, heads, HEAD_SIZE, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    dout = torch.randn_like(q)
    spec, _ = spec_of(tokens, mean, window)
    ATTENTION[name].prepare(spec, dtype)
    started = time.process_time()
    out, _ = ATTENTION[name].function(q, k, v, spec)
    torch.autograd.grad((out * dout).sum(), (q, k, v))
    return (time.process_time() - started) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    print("type      tokens  documents  window  " + "  ".join(f"{n:>9}" for n in NAMES) + "  ratio")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in [int(word) for word in sys.argv[1:]] or [1024, 2048, 4096]:
            means = sorted({mean for mean in (64, 256, 1024) if mean < tokens} | {tokens})
            for mean, window in [*((mean, None) for mean in means), (tokens, 256)]:
                runs = [[measure(n, dtype, tokens, mean, window) for n in NAMES] for _ in range(3)]
                ours, dense = (min(run[i] for run in runs) for i in range(len(NAMES)))
                print(
                    f"{str(dtype).removeprefix('torch.'):<8}  {tokens:>6,}"
                    f"  {spec_of(tokens, mean, window)[1]:>9}  {window or '':>6}"
                    f"  {ours:>9.1f}  {dense:>9.1f}  {dense / ours:>5.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
