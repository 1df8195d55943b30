"""What is handed to the libraries of GPUs, held against the signatures of their released source."""

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.ops.attention import flash
from llmtrain.ops.attention.kernel import Call
from llmtrain.ops.attention.varlen import KERNELS

# Parameter names, in order, of flash-attn 2.8.3.post2, of flash_attn_3 (hopper/ of the repository,
# October 2025) and of flash-attn-4 4.0.0b36, up to the last one that is used here.
FLASH2_FORWARD = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, "
    "causal, window_size_left=-1, window_size_right=-1, softcap=0.0"
)
FLASH2_BACKWARD = (
    "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
    "max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, "
    "alibi_slopes, deterministic, rng_state=None, zero_tensors=False"
)
FLASH3_FORWARD = (
    "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, "
    "seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
    "causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0"
)
FLASH3_BACKWARD = (
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
    "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
    "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, "
    "deterministic=False, sm_margin=0"
)
FLASH4_FORWARD = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, "
    "causal=False, softcap=None, window_size_left=None, window_size_right=None, "
    "learnable_sink=None, return_lse=False"
)
FLASH4_BACKWARD = (
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
    "window_size_left=None, window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False"
)


class Library(ModuleType):
    """A module whose functions have the library's signatures and compute on the CPU.

    They take what was bound under the library's names, so an argument in a wrong place is seen in
    the numbers.
    """

    def __init__(self, forward: tuple[str, str], backward: tuple[str, str]) -> None:
        super().__init__("library")
        setattr(self, forward[0], self._bound(forward[1], self._forward))
        setattr(self, backward[0], self._bound(backward[1], self._backward))

    @staticmethod
    def _bound(signature: str, function: Any) -> Any:
        scope: dict[str, Any] = {}
        exec(f"def named({signature}): pass", scope)
        known = inspect.signature(scope["named"])

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = known.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(bound.arguments)

        return call

    @staticmethod
    def _call(a: dict[str, Any]) -> Call:
        assert a.get("dropout_p", 0.0) == 0.0
        assert a["softmax_scale"] == a["q"].shape[-1] ** -0.5
        causal = a["causal"] if "causal" in a else a["is_causal"]
        assert a["window_size_right"] in ((0,) if causal else (-1, None))
        left = a["window_size_left"]
        return Call(
            cu_q=a["cu_seqlens_q"], cu_k=a["cu_seqlens_k"],
            max_q=a["max_seqlen_q"], max_k=a["max_seqlen_k"], causal=causal,
            window=0 if left in (-1, None) else left + 1, softcap=a["softcap"],
        )  # fmt: skip

    def _forward(self, a: dict[str, Any]) -> tuple[Tensor, Tensor, None, None]:
        out, lse = KERNELS["documents"].forward(a["q"], a["k"], a["v"], self._call(a))
        return out, lse, None, None

    def _backward(self, a: dict[str, Any]) -> Any:
        lse = a["lse"] if "lse" in a else a["softmax_lse"]
        shares = KERNELS["documents"].backward(
            a["dout"], a["q"], a["k"], a["v"], a["out"], lse, self._call(a)
        )
        if "dq" not in a:
            return shares
        for found, wanted in zip((a["dq"], a["dk"], a["dv"]), shares, strict=True):
            found.copy_(wanted)
        return lse


LIBRARIES = {
    "flash2": (
        flash.FLASH2_MODULE,
        ("_flash_attn_varlen_forward", FLASH2_FORWARD),
        ("_flash_attn_varlen_backward", FLASH2_BACKWARD),
    ),
    "flash3": (
        flash.FLASH3_MODULE,
        ("_flash_attn_forward", FLASH3_FORWARD),
        ("_flash_attn_backward", FLASH3_BACKWARD),
    ),
    "flash4": (
        flash.FLASH4_MODULE,
        ("_flash_attn_fwd", FLASH4_FORWARD),
        ("_flash_attn_bwd", FLASH4_BACKWARD),
    ),
}


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (3, 0.0), (0, 5.0)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LIBRARIES)
def test_arguments_reach_the_library_under_its_names(
    name: str, causal: bool, window: int, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if window and not causal:
        window = 0  # windows are of causal calls alone
    module, forward, backward = LIBRARIES[name]
    monkeypatch.setitem(sys.modules, module, Library(forward, backward))
    monkeypatch.setattr(flash.importlib, "import_module", lambda name: sys.modules[name])
    generator = torch.Generator().manual_seed(0)
    dout, q, k, v = (torch.randn(13, n, 16, generator=generator) for n in (4, 4, 2, 2))
    starts = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    call = Call(
        cu_q=starts, cu_k=starts, max_q=8, max_k=9, causal=causal, window=window, softcap=softcap
    )
    out, lse = KERNELS[name].forward(q, k, v, call)
    found = (out, lse, *KERNELS[name].backward(dout, q, k, v, out, lse, call))
    kernel = KERNELS["documents"]
    wanted = (*kernel.forward(q, k, v, call), *kernel.backward(dout, q, k, v, out, lse, call))
    for some, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(some, expected)


def test_torchs_operations_take_what_is_handed_to_them() -> None:
    """They run on GPUs alone; their shapes are computed anywhere."""
    starts = torch.tensor([0, 5, 13], dtype=torch.int32, device="meta")
    q, k, v = (torch.empty(13, n, 16, dtype=torch.bfloat16, device="meta") for n in (4, 2, 2))
    call = Call(cu_q=starts, cu_k=starts, max_q=8, max_k=8, causal=True, window=3, softcap=0.0)
    out, lse = KERNELS["varlen"].forward(q, k, v, call)
    assert (out.shape, lse.shape) == (q.shape, (4, 13))
    shares = KERNELS["varlen"].backward(out, q, k, v, out, lse, call)
    assert [share.shape for share in shares] == [q.shape, k.shape, v.shape]
