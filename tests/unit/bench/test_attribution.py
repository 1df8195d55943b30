"""Parts and phases of made-up traces, whose right answer is known."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.bench.attribution import PARTS, Attribution, attribute, part_of
from llmtrain.bench.trace import parse_trace, read_trace

Event = dict[str, Any]


def host(name: str, start: float, end: float, thread: int = 1, kind: str = "cpu_op") -> Event:
    return {"ph": "X", "cat": kind, "name": name, "pid": 7, "tid": thread,
            "ts": start, "dur": end - start}  # fmt: skip


def scope(name: str, start: float, end: float) -> Event:
    return host(name, start, end, kind="user_annotation")


def kernel(name: str, launched: float, start: float, end: float, thread: int = 1) -> list[Event]:
    number = len(name) * 1000 + int(start)
    return [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 7, "tid": thread,
         "ts": launched, "dur": 1, "args": {"correlation": number}},
        {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 20, "ts": start,
         "dur": end - start, "args": {"correlation": number}},
    ]  # fmt: skip


def found(events: list[Event]) -> Attribution:
    return attribute(parse_trace(events))


def shown(attribution: Attribution) -> dict[str, float]:
    return {name: round(s * 1e6, 6) for name, s in attribution.parts.items() if s}


HOST = [
    scope("ProfilerStep#5", 0, 1000),
    scope("llmtrain::data", 0, 10),
    scope("llmtrain::forward", 20, 420),
    host("aten::linear", 30, 130), host("aten::addmm", 35, 125),
    host("aten::scaled_dot_product_attention", 130, 230), host("aten::bmm", 140, 220),
    host("aten::rms_norm", 230, 260),
    scope("llmtrain::loss", 300, 400), host("aten::mm", 310, 390),
    scope("llmtrain::backward", 420, 820),
    host("autograd::engine::evaluate_function: MmBackward0", 430, 630),
    host("MmBackward0", 440, 620), host("aten::mm", 450, 610),
    host("autograd::engine::evaluate_function: _ChunkedLinearCrossEntropyBackward", 700, 800),
    host("aten::mul", 710, 790),
    host("aten::_foreach_norm", 830, 860),
    scope("llmtrain::optimizer", 870, 970), host("aten::_fused_adamw_", 880, 960),
    host("aten::mm", 0, 900, thread=2),
]  # fmt: skip
"""One step on a CPU; the last operation is another thread's."""


def test_parts_of_a_step_on_the_host_add_up_to_it() -> None:
    made = found(HOST)
    assert shown(made) == {
        "attention": 100, "matmul": 260, "norm and elementwise": 30, "loss": 200,
        "optimizer": 100, "data": 10, "clip and metrics": 30, "waiting": 270,
    }  # fmt: skip
    assert made.step_s * 1e6 == pytest.approx(1000)
    assert {n: round(s * 1e6) for n, s in made.phases.items()} == {
        "forward": 400, "backward": 400, "optimizer": 100
    }  # fmt: skip
    assert made.overhead_s * 1e6 == pytest.approx(100)  # data, clip and what lies between


def test_several_steps_are_averaged_and_communication_is_no_overhead() -> None:
    def moved(event: Event) -> Event:
        return {**event, "ts": event["ts"] + 1000}

    waits = [scope("llmtrain::communication", 830, 860)]
    kept = [event for event in HOST if "foreach" not in event["name"]] + waits
    made = found([*kept, *map(moved, kept)])
    assert made.step_s * 1e6 == pytest.approx(1000)
    assert made.parts["communication"] * 1e6 == pytest.approx(30)
    assert made.overhead_s * 1e6 == pytest.approx(70)


DEVICE = [
    scope("ProfilerStep#5", 0, 500),
    scope("llmtrain::forward", 10, 100),
    host("aten::mm", 20, 30), *kernel("sm90_gemm_kernel", 25, 200, 300),
    host("flash_attn::_flash_attn_varlen_forward", 40, 50),
    *kernel("device_kernel<FlashAttnFwdSm90>", 45, 300, 350),
    *kernel("triton_red_fused_rms_norm", 60, 350, 360),
    scope("llmtrain::backward", 100, 300),
    *kernel("ampere_bf16_s16816gemm", 150, 400, 600, thread=9),
    *kernel("ncclDevKernel_ReduceScatter", 160, 500, 700, thread=9),
    scope("llmtrain::optimizer", 310, 400),
    *kernel("multi_tensor_apply_kernel", 320, 750, 800),
    *kernel("reduce_kernel", 450, 800, 810),
]  # fmt: skip
"""One step on a GPU: the backward is launched by another thread, a reduction overlaps it."""


def test_parts_of_a_step_on_a_device_add_up_to_its_time() -> None:
    made = found(DEVICE)
    assert shown(made) == {
        "attention": 50, "matmul": 300, "norm and elementwise": 10, "communication": 100,
        "optimizer": 50, "clip and metrics": 10, "waiting": 90,
    }  # fmt: skip
    assert made.step_s * 1e6 == pytest.approx(610)  # from the first kernel to the last
    assert made.hidden_communication_s * 1e6 == pytest.approx(100)
    assert {n: round(s * 1e6) for n, s in made.phases.items()} == {
        "forward": 160, "backward": 200, "optimizer": 50
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        (["llmtrain::forward", "FSDP::all_gather", "aten::copy_"], "communication"),
        (["Optimizer.step#Muon.step", "aten::mm"], "optimizer"),
        (["llmtrain::forward", "Torch-Compiled Region: 0/0", "triton_tem_fused_mm_3"], "matmul"),
        (["llmtrain::forward", "Torch-Compiled Region: 0/0"], "norm and elementwise"),
        (["autograd::engine::evaluate_function: X", "flash_bwd_kernel"], "attention"),
        (["aten::_foreach_norm"], "clip and metrics"),
        (["Backward 3", "aten::nll_loss_backward"], "loss"),
    ],
)
def test_names_lead_to_parts(stack: list[str], part: str) -> None:
    assert part in PARTS
    assert part_of(stack) == part


def test_a_trace_without_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rank0.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [host("aten::mm", 0, 1)]}, file)
    with pytest.raises(ValueError, match="no ProfilerStep"):
        read_trace(path)
