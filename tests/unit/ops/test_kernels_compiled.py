"""What Triton makes of the kernels for a GPU, and what torch.compile sees of them; needs no GPU."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmtrain.ops.kernels import KERNELS
from llmtrain.ops.triton import cross_entropy, norm, rope, swiglu

HOPPER = GPUTarget("cuda", 90, 32)
FP32 = {"cos", "sin", "rstd", "d_weight", "loss", "lse", "tops", "totals", "at_targets"}
COUNTS = {"size", "start", "length", "half", "num_rows", "q_heads", "k_heads"}

ROWS = {"ROWS": 1, "COLUMNS": 4096}
STEP = {"LANES": 1024}
KERNEL_BUILDS = {
    "norm": (norm._forward_kernel, {"EPS": 1e-5, "ADD": True, **ROWS}, 8),
    "norm_backward": (norm._backward_kernel, {"ADD": True, "WEIGHT": True, **ROWS}, 8),
    "rotate": (rope._rotate_kernel, {"SIGN": 1, "HEADS": 32, "HALF": 64}, 8),
    "swiglu": (swiglu._forward_kernel, {"BLOCK": swiglu._BLOCK}, 4),
    "swiglu_backward": (swiglu._backward_kernel, {"BLOCK": swiglu._BLOCK}, 4),
    "step": (cross_entropy._whole_kernel, {"Z": 1e-4, "WRITE": True, **STEP}, 32),
    "step_statistics": (cross_entropy._statistics_kernel, STEP, 32),
    "step_gradient": (cross_entropy._gradient_kernel, {"Z": 1e-4, **STEP}, 32),
}


def type_of(name: str) -> str:
    if name in COUNTS or "stride" in name:
        return "i32"
    return "*i64" if name == "targets" else "*fp32" if name in FP32 else "*bf16"


@pytest.mark.parametrize("name", KERNEL_BUILDS)
def test_built_for_hopper_all_wide_accesses_are_of_16_bytes(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants, num_warps = KERNEL_BUILDS[name]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else type_of(n) for n in kernel.arg_names},
        constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(kernel.arg_names)
            if n not in constants
        },
    )
    built = triton.compile(source, target=HOPPER, options={"num_warps": num_warps})
    ptx = built.asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global[.\w:]*?\.(v\d\.)?b(\d+)", ptx)
    widths = {int((lanes or "v1.")[1:-1]) * int(bits) // 8 for lanes, bits in accesses}
    assert 16 in widths
    # beside them only what a row has one of: statistics, targets, the logit of the target
    assert widths <= {2, 4, 8, 16}
    assert sum(lanes in ("", "v1.") for lanes, _ in accesses) <= 5
    assert "atom." not in ptx  # the order of a sum is fixed
    assert ".f64" not in ptx


def test_a_compiler_sees_one_graph_and_what_each_kernel_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: HOPPER)
    )
    kernels, graphs = KERNELS["triton"].load(), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        """Note the graph; where it would run, give zeros of the right shapes."""
        graphs.append(graph)
        values = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]

        def run(given: list[Any]) -> list[Any]:
            return [
                torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for v in values
            ]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def block(x: Tensor, w: Tensor, q: Tensor, k: Tensor, angles: Tensor) -> Tensor:
        normed, total = kernels.add_rms_norm(kernels.rms_norm(x, w, 1e-5), x, w, 1e-5)
        q, k = kernels.rotate(q, k, angles, angles)
        return kernels.swiglu(normed, total).sum() + q.sum() + k.sum()

    shapes = ((2, 8, 64), (64,), (2, 8, 4, 16), (2, 8, 2, 16))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    compiled = torch.compile(
        block, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True
    )
    try:
        compiled(*inputs, torch.ones(2, 8, 1, 16)).backward()
    finally:
        torch._dynamo.reset()
    written = [
        node.kwargs["tensors_to_clone"]
        for graph in graphs
        for node in graph.graph.nodes
        if "triton_kernel_wrapper_functional" in str(node.target)
    ]
    turned = ["q_out", "k_out"]
    assert written == [
        ["normed", "rstd"], ["normed", "total", "rstd"], turned, ["out"],
        ["d_gate", "d_up"], turned, ["dx", "d_weight"], ["dx", "d_weight"],
    ]  # fmt: skip
