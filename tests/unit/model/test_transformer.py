"""Stages, names, document masks, tied heads, the KV cache."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.errors import LayoutError
from llmtrain.model.cache import KeyValueCache
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)


def made(config: ModelConfig = CONFIG, **part: object) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, **part)  # type: ignore[arg-type]
    model.to_empty(device="cpu")
    initialize_model(model, config, seed=1)
    return model.double()


def packed(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CONFIG.vocab_size, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    return tokens, positions, document_ids


@pytest.mark.parametrize("window", [None, 3])
def test_a_document_does_not_see_the_one_before(window: int | None) -> None:
    model = made(replace(CONFIG, sliding_window=window))
    tokens, positions, document_ids = packed(6, 5)
    other = tokens.clone()
    other[0, :6] = (other[0, :6] + 1) % CONFIG.vocab_size
    before, after = (model.logits(model(t, positions, document_ids)) for t in (tokens, other))
    assert before[0, 6:].equal(after[0, 6:])
    assert not before[0, :6].equal(after[0, :6])


def test_a_token_does_not_see_the_ones_after() -> None:
    model = made()
    tokens, positions, _ = packed(8)
    other = tokens.clone()
    other[0, 5] += 1
    before, after = (model(t, positions) for t in (tokens, other))
    torch.testing.assert_close(before[0, :5], after[0, :5], rtol=1e-14, atol=1e-14)
    assert not torch.allclose(before[0, 5:], after[0, 5:])


def test_stages_run_one_after_the_other_are_the_model() -> None:
    whole = made()
    stages = [
        made(layers=range(1), head=False),
        made(layers=range(1, 3), embedding=False, head=False),
        made(layers=range(3, 4), embedding=False),
    ]
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())
    assert "model.layers.3.self_attn.q_proj.weight" in dict(stages[2].named_parameters())
    tokens, positions, document_ids = packed(6, 5)
    x = tokens
    for stage in stages:
        x = stage(x, positions, document_ids)
    assert x.equal(whole(tokens, positions, document_ids))
    assert stages[2].logits(x).equal(whole.logits(x))


def test_an_empty_stage_is_allowed_and_a_foreign_layer_refused() -> None:
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    stage = made(layers=range(0), embedding=False)
    assert stage(x, torch.arange(3)[None]).shape == x.shape
    with pytest.raises(LayoutError, match=r"layers 3\.\.4 do not lie in a model of 4 layers"):
        Transformer(CONFIG, layers=range(3, 5))


def test_the_head_of_a_stage_without_one_is_refused() -> None:
    with pytest.raises(LayoutError, match="only the last stage has"):
        _ = made(head=False).head


def test_tied_embeddings_are_one_parameter_unless_stages_part_them() -> None:
    tied = replace(CONFIG, tie_word_embeddings=True)
    model = made(tied)
    names = list(model.state_dict())
    assert "lm_head.weight" not in names
    assert model.head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    tokens, positions, _ = packed(5)
    model.logits(model(tokens, positions)).logsumexp(-1).sum().backward()
    gradient = model.head.weight.grad
    assert gradient is not None
    assert gradient.ne(0).any(dim=1).all()
    last = made(tied, embedding=False)
    assert last.head.weight is last.get_parameter("lm_head.weight")
    assert torch.equal(last.head.weight, model.head.weight)
    assert "lm_head.weight" not in made(tied, head=False).state_dict()


@pytest.mark.parametrize("window", [None, 3])
def test_cached_steps_equal_the_whole_row(window: int | None) -> None:
    config = replace(CONFIG, sliding_window=window)
    model = made(config)
    tokens, positions, _ = packed(9)
    cache = KeyValueCache(capacity=9)
    steps = [
        model(tokens[:, part], positions[:, part], None, cache)
        for part in (slice(0, 4), slice(4, 5), slice(5, 9))
    ]
    whole = model(tokens, positions)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="cache of 9 tokens cannot hold 10"):
        model(tokens[:, :1], positions[:, :1], None, cache)


def test_the_model_runs_in_bf16() -> None:
    model = made().bfloat16()
    tokens, positions, document_ids = packed(6, 5)
    found = model.logits(model(tokens, positions, document_ids))
    assert found.dtype == torch.bfloat16
    expected = model.float().logits(model(tokens, positions, document_ids))
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_a_meta_forward_gives_shapes_alone_and_leaves_the_model_usable() -> None:
    with torch.device("meta"):
        model = Transformer(CONFIG, embedding=False)
    tokens, positions, document_ids = (t.to("meta") for t in packed(6, 5))
    hidden = torch.empty(1, 11, 32, device="meta")
    assert model(hidden, positions, document_ids).shape == (1, 11, 32)
    model.to_empty(device="cpu")
    initialize_model(model, CONFIG, seed=0)
    out = model(torch.zeros(1, 11, 32), torch.arange(11)[None])
    assert out.isfinite().all()
    assert tokens.is_meta
