"""The start-up test lets every backend that is right through, and none that is not."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.ops.attention import varlen
from llmtrain.ops.attention.check import check_attention
from llmtrain.ops.attention.documents import DOCUMENTS
from llmtrain.ops.attention.kernel import Call, Kernel
from llmtrain.ops.attention.spec import Needs

CPU = torch.device("cpu")
NEEDS = Needs(head_size=16, dtype=torch.float32)


def seeing(change: Callable[[Call], Call]) -> Kernel:
    """A kernel that is asked something else than it should be."""

    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:
        return DOCUMENTS.forward(q, k, v, change(call))

    def backward(*arguments: Any) -> Any:
        return DOCUMENTS.backward(*arguments[:-1], change(arguments[-1]))

    return Kernel(forward, backward)


def whole_rows(call: Call) -> Call:
    """Both rows of 64 tokens as one document each."""
    starts = torch.tensor([0, 64, 128], dtype=torch.int32)
    return call if call.cu_q[-1] != 128 else replace(call, cu_q=starts, cu_k=starts)


def wrong_gradient(*arguments: Any) -> Any:
    dq, dk, dv = DOCUMENTS.backward(*arguments)
    return dq, dk * 1.05, dv


def raising(*_: Any) -> Any:
    raise RuntimeError("no kernel image is available\nfor this device")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["documents", "sdpa", "reference"])
def test_right_backends_pass(name: str, dtype: torch.dtype) -> None:
    for window, softcap in ((None, None), (16, 30.0)):
        check_attention(name, CPU, Needs(head_size=64, dtype=dtype), window, softcap)


@pytest.mark.parametrize(
    ("broken", "window", "softcap", "said"),
    [
        (seeing(whole_rows), None, None, r"documents sees other documents: a token moves"),
        (seeing(lambda c: replace(c, window=0)), 4096, None, "gives a wrong output"),
        (seeing(lambda c: replace(c, softcap=0.0)), None, 50.0, "gives a wrong output"),
        (seeing(lambda c: replace(c, causal=False)), None, None, "gives a wrong output"),
        (Kernel(DOCUMENTS.forward, wrong_gradient), None, None, "gives a wrong gradient of k"),
        (Kernel(raising, raising), None, None, "fails with RuntimeError: no kernel image is avai"),
    ],
)
def test_a_broken_backend_is_refused_in_one_sentence(
    broken: Kernel,
    window: int | None,
    softcap: float | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(varlen.KERNELS, "documents", broken)
    with pytest.raises(ConfigError, match=said) as refusal:
        check_attention("documents", CPU, NEEDS, window, softcap)
    assert "set engine.attention=sdpa or reference" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_broken_block_form_is_found_behind_a_right_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one_key_too_many(call: Call) -> Call:
        return replace(call, causal=False) if call.cu_q[-1] != 128 else call

    monkeypatch.setitem(varlen.KERNELS, "documents", seeing(one_key_too_many))
    with pytest.raises(ConfigError, match="documents in its block form gives a wrong output"):
        check_attention("documents", CPU, NEEDS)


def test_the_test_takes_little_of_a_start() -> None:
    check_attention("documents", CPU, NEEDS)  # what is imported at the first call
    started = time.process_time()
    for _ in range(5):
        check_attention("documents", CPU, NEEDS)
    assert (time.process_time() - started) / 5 < 0.15, "seconds; 0.02 where nothing else runs"
