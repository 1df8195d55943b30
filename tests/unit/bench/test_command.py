"""The bench itself in its smallest form: what it measures, writes and refuses."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.bench.attribution import PARTS
from llmtrain.bench.kernels import measure_kernels
from llmtrain.bench.rates import Rates
from llmtrain.cli import main
from llmtrain.config.bench import BenchConfig
from llmtrain.config.load import load
from llmtrain.errors import ConfigError
from llmtrain.ops import kernels as fused
from llmtrain.ops.attention import choose
from llmtrain.ops.kernels import KERNELS, KernelBackend

TINY = [
    "model=llama_demo", "model.num_hidden_layers=1", "model.hidden_size=32",
    "model.intermediate_size=64", "model.num_attention_heads=2", "model.num_key_value_heads=1",
    "model.vocab_size=128", "training.sequence_length=32", "training.global_batch_tokens=128",
    "training.micro_batch_size=2", "rate_seconds=0.01", "name=tiny", "engine.device=cpu",
]  # fmt: skip


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_here")
def test_steps_are_timed_divided_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", *TINY, "steps=3", "warmup_steps=2", "profiled_steps=2", "profile=true",
             "monitor.peak_tflops=1"]  # fmt: skip
    assert main(words) == 0
    record: dict[str, Any] = json.loads((tmp_path / "bench/tiny.json").read_text())
    assert len(record["steps_s"]) == 3
    spread = record["step_s"]
    assert spread["lower_quartile"] <= spread["median"] <= spread["upper_quartile"]
    assert record["tokens_per_s"] == pytest.approx(128 / spread["median"])
    assert 0 < record["mfu_causal"] < record["mfu"] < 1
    assert record["mfu_convention"].startswith("6(N - N_embedding) + 12 L d s")
    assert record["recompilations"] == 0
    assert min(record["peak_memory_bytes"]) >= 10 * 2**20  # at least what Python and torch hold

    assert list(record["parts"]) == list(PARTS)
    parts = {name: part["s"] for name, part in record["parts"].items()}
    assert sum(parts.values()) == pytest.approx(record["profiled_step_s"])
    for name in ("attention", "matmul", "norm and elementwise", "loss", "optimizer"):
        assert parts[name] > 0, name
        assert record["parts"][name]["roofline_s"] > 0, name
    outside = record["profiled_step_s"] - sum(record["phases"].values())
    assert record["overhead_s"] == pytest.approx(outside - parts["communication"], abs=1e-6)

    machine = record["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["processor"]
    assert re.fullmatch("[0-9a-f]+", record["config_hash"])
    assert record["config"]["training"]["sequence_length"] == 32
    with gzip.open(tmp_path / record["trace"], "rt") as file:
        trace = json.load(file)
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"llmtrain::forward", "llmtrain::loss", "llmtrain::backward",
            "llmtrain::optimizer", "llmtrain::data"} <= names  # fmt: skip

    shown = capsys.readouterr().out
    assert f"{record['tokens_per_s']:,.0f}" in shown
    assert "framework overhead" in shown
    page = (tmp_path / "bench/tiny.html").read_text()
    assert page.count("<svg") == 0  # the script draws them
    for text in (*PARTS, "peak_tflops", "framework overhead"):
        assert text in page
    assert "<!--" not in page


@pytest.mark.usefixtures("_here")
def test_kernels_are_checked_timed_or_listed_with_the_reason(tmp_path: Path) -> None:
    words = ["part=kernels", *TINY, "steps=2", "optimizer.grad_clip_norm=inf"]
    assert main(["bench", *words]) == 0
    record = json.loads((tmp_path / "bench/tiny.json").read_text())
    assert record["config"]["optimizer"]["grad_clip_norm"] == "inf"  # JSON has no infinity
    rows = record["kernels"]
    backends = {row["backend"] for row in rows if row["kernel"] == "attention"}
    assert backends == set(choose.ATTENTION)
    timed = {(row["kernel"], row["pass"]) for row in rows if row["reason"] is None}
    both = {(name, way) for name in ("attention", "rms_norm", "add_rms_norm", "rotate", "swiglu")
            for way in ("forward", "backward")}  # fmt: skip
    assert timed == both | {("cross_entropy_step", "forward")}
    for row in rows:
        if row["reason"] is None:
            assert row["s"]["median"] > 0
            assert row["error"] < 1e-4
            assert row.get("tflops", row.get("gb_per_s")) > 0
    flash = next(row for row in rows if row["backend"] == "flash2")
    assert "GPU" in flash["reason"]


def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return fused.TORCH_KERNELS.swiglu(gate, up) * 1.01

    broken = KernelBackend(
        lambda: fused.Kernels(**{**_fields(fused.TORCH_KERNELS), "swiglu": wrong}),
        lambda device: None,
    )
    monkeypatch.setitem(KERNELS, "broken", broken)
    config = load("bench", ["part=kernels", *TINY, "steps=1"], BenchConfig)
    rates = Rates(copy_bytes_per_s=1e9, matmul_flops_per_s=1e9)
    rows = measure_kernels(config, torch.device("cpu"), rates)
    (row,) = [r for r in rows if r["backend"] == "broken" and r["kernel"] == "swiglu"]
    assert "error" in row["reason"]
    assert "expected at most 1e-04" in row["reason"]


def _fields(kernels: fused.Kernels) -> dict[str, Any]:
    return {name: getattr(kernels, name) for name in kernels.__slots__}


def test_measurements_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load("bench", [*TINY, "steps=0", "profiled_steps=0", "profile=true"], BenchConfig)
    assert len(caught.value.problems) == 2


@pytest.mark.usefixtures("_here")
def test_what_cannot_run_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *TINY, "out=figures", "engine.attention=flash2"]) == 2
    assert "engine.attention=flash2 cannot run on cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_here")
def test_a_folder_that_is_a_file_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert main(["bench", *TINY, "out=taken"]) == 2
    assert "out=taken cannot be written" in capsys.readouterr().err
