"""Compiled blocks: one graph, shared by blocks that are alike, compiled once; right gradients."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.errors import ConfigError
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.parallel import compile as blocks
from llmtrain.parallel.compile import compile_blocks
from llmtrain.parallel.recompute import apply_recompute

pytestmark = [  # torch's own warnings, from what its compiler does inside
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

MODEL = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler():  # type: ignore[no-untyped-def]
    """Forget what other tests compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model(recompute: str = "none") -> Transformer:
    made = Transformer(MODEL)
    initialize_model(made, MODEL, seed=0)
    parallel = ParallelConfig(recompute=recompute, recompute_budget=0.45)
    apply_recompute(made, parallel, torch.float32, CPU)
    return made


def gradients(of: Transformer, length: int = 12) -> dict[str, Tensor]:
    tokens = torch.arange(24).reshape(-1, length)
    positions = torch.arange(length, dtype=torch.int32).repeat(24 // length, 1)
    of.zero_grad()
    hidden = of(tokens, positions, positions // 5)
    of.logits(hidden).logsumexp(-1).sum().backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(((got[n] - want[n]).norm() / want[n].norm()).item() for n in want)


@pytest.mark.parametrize(("recompute", "graphs"), [("none", 1), ("full", 1), ("budget", 2)])
def test_one_graph_per_kind_of_block_and_none_after_the_first_step(
    recompute: str, graphs: int
) -> None:
    want = gradients(model())
    compiled = model(recompute)
    compile_blocks(compiled, CPU, backend="aot_eager")
    for _ in range(3):
        assert worst(gradients(compiled), want) <= 5e-6
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_a_ramp_of_lengths_compiles_each_once() -> None:
    """Also where there are more than torch compiles by default: the rest would run uncompiled."""
    compiled, lengths = model(), (6, 12, 24)
    with torch._dynamo.config.patch(recompile_limit=len(lengths) - 1):
        compile_blocks(compiled, CPU, backend="aot_eager")
        for number, length in enumerate(lengths, start=1):
            assert worst(gradients(compiled, length), gradients(model(), length)) <= 5e-6
            assert counters["stats"]["unique_graphs"] == number
        with torch.compiler.set_stance("fail_on_recompile"):
            for length in lengths:
                gradients(compiled, length)


def test_inductor_gives_the_gradients_of_eager() -> None:
    compiled = model()
    compile_blocks(compiled, CPU)
    assert worst(gradients(compiled), gradients(model())) <= 5e-6


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*apt-get install g\+\+"):
        compile_blocks(model(), CPU)


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"cuda_graphs=true needs a CUDA device, found cpu; set"):
        compile_blocks(model(), CPU, cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_recorded_blocks_add_up_micro_batches() -> None:
    """Several replays into gradients that stay: the memory of a recording is used again."""
    device = torch.device("cuda", 0)
    with device:
        plain, recorded = model().to(device), model().to(device)
        compile_blocks(recorded, device, cuda_graphs=True)
        for parameter in recorded.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tokens = torch.arange(24).reshape(2, 12)
        positions = torch.arange(12, dtype=torch.int32).repeat(2, 1)
        for step in range(5):
            for one in (plain, recorded):
                hidden = one((tokens + step) % 31, positions, positions // 5)
                one.logits(hidden).logsumexp(-1).sum().backward()
    for got, want in zip(recorded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)
