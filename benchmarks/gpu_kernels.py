"""Time the fused kernels beside Liger-Kernel and torch.compile: same shapes, inputs and run.

It is `llmtrain bench part=kernels` with two more implementations in the table; arguments are those
of that command. Each is first compared with the definition in fp64.

    pip install liger-kernel==0.8.5
    python benchmarks/gpu_kernels.py model=llama3_2_1b engine.precision=bf16 \
        training.sequence_length=4096 out=benchmarks/results
    TRITON_INTERPRET=1 python benchmarks/gpu_kernels.py model=llama_demo steps=1 rate_seconds=0.01 \
        training.sequence_length=8 training.global_batch_tokens=8 training.micro_batch_size=1
"""

import sys
from dataclasses import fields

import torch
from peers.kernels_liger import LIGER
from torch._functorch import config as autograd_config

from llmtrain import cli
from llmtrain.ops.kernels import KERNELS, TORCH_KERNELS, KernelBackend, Kernels
from llmtrain.parallel.compile import missing_compiler


def compiled() -> Kernels:
    """Give the plain operations, each compiled alone."""
    return Kernels(**{
        field.name: torch.compile(getattr(TORCH_KERNELS, field.name), dynamic=False)
        for field in fields(Kernels)
    })  # fmt: skip


if __name__ == "__main__":
    autograd_config.donated_buffer = False  # the backward is timed again and again
    KERNELS["liger"] = LIGER
    KERNELS["compiled"] = KernelBackend(compiled, missing_compiler)
    sys.exit(cli.main(["bench", "part=kernels", *sys.argv[1:]]))
