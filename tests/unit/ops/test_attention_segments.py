"""Documents as runs of tokens, and the choice of a backend."""

import logging

import pytest
import torch
from torch import Tensor

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.data.synthetic import BatchShape, synthetic_batch
from llmtrain.errors import ConfigError
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention import choose, flash
from llmtrain.ops.attention.choose import ATTENTION, needs_of, select_attention, why_not
from llmtrain.ops.attention.flex import flex_supports
from llmtrain.ops.attention.segments import segments_of
from llmtrain.ops.attention.spec import AttentionSpec, Needs
from llmtrain.parallel.compile import compile_blocks, num_compilations
from llmtrain.parallel.recompute import recompute_block

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = Needs(head_size=128, dtype=torch.bfloat16)


def packed(*rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    positions = [torch.cat([torch.arange(n) for n in row]) for row in rows]
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    return torch.stack(positions).int(), torch.stack(ids).int()


def test_segments_are_the_documents_of_all_rows() -> None:
    spec = AttentionSpec.within(*packed((2, 5, 1), (8,)))
    segments = segments_of(spec)
    assert segments is not None
    assert segments.extent.tolist() == [6, 8, 8]
    assert segments.cu_q.tolist() == [0, 2, 7, 8, 16, 16, 16, *[16] * 10]
    assert segments.cu_k.equal(segments.cu_q)
    assert segments_of(spec) is segments


def test_numbers_of_documents_may_be_any_in_a_row_to_itself() -> None:
    positions, ids = packed((2, 5, 1), (3, 4, 1))
    odd = torch.tensor([7, -1, 900], dtype=torch.int32)[ids.long()]
    found, expected = (segments_of(AttentionSpec.within(positions, x)) for x in (odd, ids))
    assert found is not None
    assert expected is not None
    assert found.cu_q.equal(expected.cu_q)


def test_what_the_host_knows_is_not_asked_of_the_device() -> None:
    """The meta device has no numbers to ask for."""
    positions, ids = (x.to("meta") for x in packed((2, 5, 1)))
    segments = segments_of(AttentionSpec.within(positions, ids, extent=(3, 5)))
    assert segments is not None
    assert segments.extent.tolist() == [3, 5, 5]
    assert segments.cu_q.shape == (9,)


def test_a_batch_on_a_device_knows_its_documents() -> None:
    batch = synthetic_batch(BatchShape(rows=4, sequence_length=32, vocab_size=9), seed=0, step=0)
    assert batch.extent is None
    moved = batch.to(torch.device("meta"))
    assert moved.extent == (int(batch.document_ids.max()) + 1, int(batch.positions.max()) + 1)
    assert moved.microbatches()[0].extent == moved.extent


def test_what_is_no_run_of_tokens_has_no_segments() -> None:
    spec = AttentionSpec.within(*packed((2, 6)), sliding_window=3)
    assert segments_of(spec.part(slice(4, 8), slice(0, 8))) is None
    assert segments_of(spec.part(slice(4, 8), slice(0, 4), "earlier")) is None
    assert segments_of(spec.part(slice(4, 8), slice(0, 8), "ending")) is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("policy", ["none", "selective"])
def test_other_documents_compile_nothing_again(policy: str) -> None:
    config = ModelConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, attn_logit_softcapping=5.0,
    )  # fmt: skip
    models = []
    for compiled in (False, True):
        model = Transformer(config, attention=ATTENTION["documents"].function).double()
        initialize_model(model, config, seed=0)
        if policy == "selective":
            recompute_block(model.model.layers["0"], policy)
        if compiled:
            compile_blocks(model, CPU, "aot_eager")
        models.append(model)
    tokens = torch.arange(16)[None]
    before = num_compilations()
    for lengths in ((16,), (5, 11), (1,) * 16, (8, 8)):
        gradients = []
        for model in models:
            model.zero_grad()
            model(tokens, *packed(lengths)).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(gradients[1], gradients[0])
    assert num_compilations() - before == 1
    torch._dynamo.reset()


def test_auto_says_what_it_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        select_attention("auto", CPU, BF16)
    assert "attention backend: documents on cpu; passed over: flash3: FlashAttention-3 runs" in (
        caplog.text
    )


@pytest.mark.parametrize("name", ["flash3", "flash4", "flash2", "varlen", "flex"])
def test_a_backend_of_gpus_is_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"engine.attention={name} cannot run on cpu: .*use auto"
    ):
        select_attention(name, CPU, BF16)


def on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A GPU of a capability on which every library is installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(flash, "_missing", lambda *_: None)


@pytest.mark.parametrize(
    ("capability", "needs", "chosen"),
    [
        ((9, 0), BF16, "flash3"),
        ((9, 0), Needs(head_size=128, dtype=torch.bfloat16, deterministic=True), "flash4"),
        ((10, 0), BF16, "flash4"),
        ((10, 0), Needs(head_size=192, dtype=torch.bfloat16), "flash2"),
        ((10, 0), Needs(head_size=256, dtype=torch.bfloat16, softcap=True), "flash2"),
        ((8, 0), BF16, "flash2"),
        ((8, 0), Needs(head_size=100, dtype=torch.bfloat16), "sdpa"),
        ((7, 5), BF16, "sdpa"),
        ((9, 0), Needs(head_size=128, dtype=torch.float64), "sdpa"),
    ],
)
def test_a_gpu_takes_the_fastest_that_can(
    capability: tuple[int, int], needs: Needs, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, capability)
    without_triton = dict(ATTENTION)
    del without_triton["flex"]
    monkeypatch.setattr(choose, "ATTENTION", without_triton)
    assert choose.choose_attention("auto", GPU, needs) == chosen


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, (9, 0))
    capped = Needs(head_size=128, dtype=torch.bfloat16, softcap=True)
    assert why_not("varlen", GPU, capped) == "it cannot cap scores"
    assert "not in float32" in str(why_not("flash2", GPU, Needs(head_size=8, dtype=torch.float32)))
    assert "has 9.0" in str(flash._needs_gpu("x", (8,), "torch", "")(GPU))
    assert "16 elements" in str(flex_supports(Needs(head_size=8, dtype=torch.float32), GPU))
    monkeypatch.undo()
    assert "no_such_module cannot be imported" in str(flash._missing("no_such_module", "pip"))


def test_needs_are_those_of_the_model_and_the_engine() -> None:
    model = ModelConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, attn_logit_softcapping=5.0, sliding_window=3,
    )  # fmt: skip
    needs = needs_of(model, EngineConfig(precision="bf16", deterministic=True))
    assert needs == Needs(
        head_size=8, dtype=torch.bfloat16, sliding_window=True, softcap=True, deterministic=True
    )
