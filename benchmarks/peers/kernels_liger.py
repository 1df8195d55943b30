"""Liger-Kernel's operations behind the project's signatures, as a side of the kernel benchmark.

Each is called as its own documentation does, with what it changes in place left as it is. Angles
are brought to its layout once for all calls. Of the loss it has the step on whole logits; a part of
a vocabulary is left to ours.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from llmtrain.ops.cross_entropy import VocabPartition
from llmtrain.ops.kernels import KERNELS, KernelBackend, Kernels


def available(device: torch.device) -> str | None:
    """Give the reason why it cannot run."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install liger-kernel==0.8.5"
    if device.type != "cuda":
        return "needs a GPU: the interpreter of Triton does not take its kernels"
    return KERNELS["triton"].available(device)


def load() -> Kernels:
    """Import it."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    @functools.cache
    def plain_angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Give [B, S, H], the sines of both halves with one sign."""
        half = sin.shape[-1] // 2
        return cos.squeeze(2), torch.cat((sin[..., half:],) * 2, dim=-1).squeeze(2)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = LigerRopeFunction.apply(
            q.transpose(1, 2), k.transpose(1, 2), *plain_angles(cos, sin)
        )
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    def step(
        logits: Tensor, targets: Tensor, partition: VocabPartition | None, z: float, _: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if partition is not None:
            return KERNELS["triton"].load().cross_entropy_step(logits, targets, partition, z, True)
        at_target = logits.gather(1, targets[:, None])[:, 0].float()
        loss, squares, _, _, gradient = cross_entropy_forward(
            logits.detach().requires_grad_(), targets, None, -100, z, 0.0, "none", None, bool(z)
        )
        loss = loss - squares if z else loss
        return loss, loss + at_target, gradient

    return Kernels(
        rms_norm=lambda x, w, eps: LigerRMSNormFunction.apply(x, w, eps),
        add_rms_norm=lambda x, r, w, eps: LigerFusedAddRMSNormFunction.apply(x, r, w, eps),
        rotate=rotate,
        swiglu=lambda gate, up: LigerSiLUMulFunction.apply(gate, up),
        cross_entropy_step=step,
    )


LIGER = KernelBackend(load, available)
