"""FlashAttention 2, 3 and 4, and the one inside torch: kernels of GPUs over segments.

Invariant: no library is imported before its kernel runs or is asked for; whatever a build cannot
do is said before the run. The backward repeats bit by bit where torch is asked for deterministic
algorithms.

    reason = flash2_available(torch.device("cuda"))     # None where it can run

FlashAttention-2: arXiv:2307.08691; 3: arXiv:2407.08608; 4: the package ``flash-attn-4`` (CuTe).
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain.ops.attention.kernel import Call, Kernel
from llmtrain.ops.attention.spec import Needs

FLASH2_MODULE = "flash_attn.flash_attn_interface"
FLASH3_MODULE = "flash_attn_interface"
FLASH4_MODULE = "flash_attn.cute.interface"
VARLEN_MODULE = "torch.nn.attention.varlen"


def _window(call: Call, none: int | None = -1) -> tuple[int | None, int | None]:
    """Give how far a query sees to the left and to the right, as all the libraries count."""
    left = call.window - 1 if call.window else none
    return left, 0 if call.causal else none


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _flash2_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    left, right = _window(call)
    out, lse, *_ = importlib.import_module(FLASH2_MODULE)._flash_attn_varlen_forward(
        q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k,
        dropout_p=0.0, softmax_scale=_scale(q), causal=call.causal,
        window_size_left=left, window_size_right=right, softcap=call.softcap,
    )  # fmt: skip
    return out, lse


def _flash2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _window(call)
    dq, dk, dv = _like(q, k, v)
    importlib.import_module(FLASH2_MODULE)._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, dq, dk, dv, call.cu_q, call.cu_k, call.max_q, call.max_k,
        dropout_p=0.0, softmax_scale=_scale(q), causal=call.causal,
        window_size_left=left, window_size_right=right, softcap=call.softcap,
        alibi_slopes=None, deterministic=_deterministic(),
    )  # fmt: skip
    return dq, dk, dv


def _flash3_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    left, right = _window(call)
    out, lse, *_ = importlib.import_module(FLASH3_MODULE)._flash_attn_forward(
        q, k, v, cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k,
        max_seqlen_q=call.max_q, max_seqlen_k=call.max_k,
        softmax_scale=_scale(q), causal=call.causal,
        window_size_left=left, window_size_right=right, softcap=call.softcap,
    )  # fmt: skip
    return out, lse


def _flash3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _window(call)
    dq, dk, dv = _like(q, k, v)
    importlib.import_module(FLASH3_MODULE)._flash_attn_backward(
        dout, q, k, v, out, lse, cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k,
        max_seqlen_q=call.max_q, max_seqlen_k=call.max_k, dq=dq, dk=dk, dv=dv,
        softmax_scale=_scale(q), is_causal=call.causal,
        window_size_left=left, window_size_right=right, softcap=call.softcap,
        deterministic=_deterministic(),
    )  # fmt: skip
    return dq, dk, dv


def _flash4_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    left, right = _window(call, none=None)
    out, lse, *_ = importlib.import_module(FLASH4_MODULE)._flash_attn_fwd(
        q, k, v, cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k,
        max_seqlen_q=call.max_q, max_seqlen_k=call.max_k,
        softmax_scale=_scale(q), causal=call.causal,
        window_size_left=left, window_size_right=right, softcap=call.softcap, return_lse=True,
    )  # fmt: skip
    return out, lse


def _flash4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _window(call, none=None)
    dq, dk, dv = importlib.import_module(FLASH4_MODULE)._flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=_scale(q), causal=call.causal,
        softcap=call.softcap, window_size_left=left, window_size_right=right,
        cu_seqlens_q=call.cu_q, cu_seqlens_k=call.cu_k,
        max_seqlen_q=call.max_q, max_seqlen_k=call.max_k, deterministic=_deterministic(),
    )  # fmt: skip
    return dq, dk, dv


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    importlib.import_module(VARLEN_MODULE)
    out, lse, _ = torch.ops.torch_attn._varlen_attn(
        q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k,
        is_causal=call.causal and not call.window, scale=_scale(q),
        window_size=list(_window(call)), enable_gqa=True,
    )  # fmt: skip
    return out, lse


def _torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    importlib.import_module(VARLEN_MODULE)
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # a seed: nothing is dropped
    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        dout.contiguous(), q, k, v, out, lse, call.cu_q, call.cu_k, call.max_q, call.max_k,
        call.causal and not call.window, unused, scale=_scale(q), window_size=list(_window(call)),
    )  # fmt: skip
    return dq, dk, dv


def _like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give contiguous tensors of the same shapes, for gradients."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


FLASH2 = Kernel(_flash2_forward, _flash2_backward)
"""FlashAttention-2, Ampere and later."""
FLASH3 = Kernel(_flash3_forward, _flash3_backward)
"""FlashAttention-3, Hopper."""
FLASH4 = Kernel(_flash4_forward, _flash4_backward)
"""FlashAttention-4, Hopper and Blackwell."""
TORCH_VARLEN = Kernel(_torch_forward, _torch_backward)
"""The FlashAttention-2 that torch contains."""


def _missing(module: str, install: str) -> str | None:
    """Tell why ``module`` cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error}): {install}"
    return None


def _needs_gpu(
    name: str, generations: tuple[int, ...], module: str, install: str
) -> Callable[[torch.device], str | None]:
    """Make the check for a GPU of one of the generations and for the library."""

    def available(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"{name} runs on NVIDIA GPUs, this is a {device.type}"
        major, minor = torch.cuda.get_device_capability(device)
        if major not in generations:
            known = ", ".join(f"{g}.x" for g in generations)
            return f"{name} runs on compute capability {known}, this GPU has {major}.{minor}"
        return _missing(module, install)

    return available


flash2_available = _needs_gpu(
    "FlashAttention-2", (8, 9, 10, 11, 12), FLASH2_MODULE, "pip install 'llmtrain[flash]'"
)
flash3_available = _needs_gpu(
    "FlashAttention-3", (9,), FLASH3_MODULE,
    "build it from the folder hopper/ of github.com/Dao-AILab/flash-attention",
)  # fmt: skip
flash4_available = _needs_gpu(
    "FlashAttention-4", (9, 10, 11), FLASH4_MODULE, "pip install 'llmtrain[flash]'"
)
varlen_available = _needs_gpu(
    "torch's varlen_attn", (8, 9, 10, 11, 12), VARLEN_MODULE, "pip install 'torch>=2.13'"
)


def flash_supports(needs: Needs, device: torch.device) -> str | None:
    """Tell what none of these kernels can."""
    del device
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in bf16 or fp16, not in {str(needs.dtype).removeprefix('torch.')}"
    if needs.head_size % 8 or needs.head_size > 256:
        return f"heads have at most 256 elements, a multiple of 8; found {needs.head_size}"
    return None


def flash3_supports(needs: Needs, device: torch.device) -> str | None:
    """Tell what FlashAttention-3 cannot; a library that drops ``deterministic`` does not say so."""
    if needs.deterministic and needs.training:
        return "its backward is not known to repeat: builds before September 2025 drop the flag"
    return flash_supports(needs, device)


def varlen_supports(needs: Needs, device: torch.device) -> str | None:
    """Tell what torch's kernel cannot."""
    return "it cannot cap scores" if needs.softcap else flash_supports(needs, device)


def flash4_supports(needs: Needs, device: torch.device) -> str | None:
    """Tell what FlashAttention-4 cannot: on Blackwell it has fewer head sizes."""
    if reason := flash_supports(needs, device):
        return reason
    if torch.cuda.get_device_capability(device)[0] == 9:
        return None
    if needs.head_size == 256:
        return "on Blackwell it cannot cap scores of heads of 256" if needs.softcap else None
    if needs.head_size > 128:
        return f"on Blackwell heads have at most 128 elements, or 256; found {needs.head_size}"
    return None
