"""Sampling: greedy against the uncached model, batches, filters, draws, the end of a document."""

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.eval.decoding import generate
from llmtrain.eval.sampling import Sampling, choose
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
PROMPTS = [[5, 9, 2, 11], [7], [3, 3, 8, 1, 40, 12]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    initialize_model(model, CONFIG, seed=0)
    return model


def test_greedy_equals_the_model_run_anew_for_every_token(model: Transformer) -> None:
    found = generate(model, PROMPTS, Sampling(max_new_tokens=20, temperature=0))
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for _ in range(20):
            tokens = torch.tensor([ids])
            hidden = model(tokens, torch.arange(len(ids))[None])
            ids.append(int(model.logits(hidden)[0, -1].argmax()))
        assert continuation == ids[len(prompt) :]


def test_a_prompt_does_not_depend_on_its_neighbours(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=4)
    together = generate(model, PROMPTS, sampling)
    assert generate(model, PROMPTS[:1], sampling) == together[:1]
    assert generate(model, PROMPTS, sampling) == together
    changed = generate(model, [*PROMPTS[:2], [1] * 9], sampling)
    assert changed[:2] == together[:2]


def test_seed_and_row_choose_the_draws(model: Transformer) -> None:
    first, second = generate(model, [[5], [5]], Sampling(max_new_tokens=12, seed=0))
    (other,) = generate(model, [[5]], Sampling(max_new_tokens=12, seed=1))
    assert first != second
    assert first != other


def test_it_stops_at_the_end_of_a_document(model: Transformer) -> None:
    greedy = Sampling(max_new_tokens=20, temperature=0)
    free = generate(model, PROMPTS, greedy)
    eos = free[0][7]
    stopped = generate(model, PROMPTS, greedy, stop_ids={eos})
    for before, after in zip(free, stopped, strict=True):
        assert after == (before[: before.index(eos)] if eos in before else before)


def test_padding_of_the_vocabulary_is_never_chosen(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=5.0)
    assert max(max(ids) for ids in generate(model, PROMPTS, sampling)) >= 50
    assert max(max(ids) for ids in generate(model, PROMPTS, sampling, vocab_size=50)) < 50


def test_an_empty_prompt_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        generate(model, [[1], []], Sampling(max_new_tokens=1))


LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


def chosen(**fields: float) -> set[int]:
    """Every id that some draw gives."""
    sampling = Sampling(max_new_tokens=1, **fields)  # type: ignore[arg-type]
    draws = torch.linspace(0, 1, 1001)[:-1]
    return set(choose(LOGITS.expand(1000, -1), draws, sampling).tolist())


def test_filters_keep_the_likeliest() -> None:
    assert chosen() == {0, 1, 2, 3}
    assert chosen(top_k=2) == {1, 3}
    assert chosen(top_k=9) == {0, 1, 2, 3}
    assert chosen(top_p=0.39) == {1}
    assert chosen(top_p=0.41) == {1, 3}
    assert chosen(top_p=1.0) == {0, 1, 2, 3}
    assert chosen(top_k=1, top_p=0.99) == {1}
    assert chosen(temperature=0.0) == {1}
    assert chosen(temperature=1e-3) == {1}


def test_draws_follow_the_probabilities() -> None:
    draws = torch.linspace(0, 1, 1001)[:-1]
    ids = choose(LOGITS.expand(1000, -1), draws, Sampling(max_new_tokens=1, top_k=3))
    shares = torch.bincount(ids, minlength=4) / 1000
    expected = torch.tensor([0, 0.4, 0.2, 0.3]) / 0.9
    torch.testing.assert_close(shares, expected, rtol=0, atol=2e-3)


def test_min_p_leaves_out_what_is_much_less_likely() -> None:
    assert chosen(min_p=0.4) == {1, 2, 3}
    assert chosen(min_p=1.0) == {1}
    assert chosen(min_p=0.4, top_k=2) == {1, 3}


def test_a_penalty_is_for_tokens_that_stand_there() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    greedy = Sampling(max_new_tokens=1, temperature=0, repetition_penalty=1.5)
    here = torch.tensor([[True, False, True]])
    assert choose(logits, torch.zeros(1), greedy, here).item() == 1
    assert choose(logits, torch.zeros(1), greedy, ~here).item() == 0
