"""Greedy generation gives transformers' tokens, cached and not, rows of unequal length together."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtrain.eval.decoding import generate
from llmtrain.eval.sampling import Sampling
from llmtrain.interop.huggingface import load_model
from tests.golden.test_huggingface import shake
from tests.golden.test_transformers import SIZES

LENGTH = 200
PROMPTS = [[5, 9, 2, 11, 30], [7], [3, 3, 8, 1, 40, 12, 6, 6, 9, 31, 2, 44], [17, 4]]
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4, "num_hidden_layers": 2}),
    "mistral_window": ("Mistral", {"sliding_window": 7, "num_hidden_layers": 2}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' random model and ours with its weights."""
    kind, fields = FAMILIES[request.param]
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, "tie_word_embeddings": False, **fields},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    shake(theirs)
    with torch.no_grad():  # small random models repeat themselves soon; larger weights, later
        for parameter in theirs.parameters():
            parameter.mul_(3.0)
    folder: Path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder, torch.float32)


def expected(theirs: Any, prompts: list[list[int]], length: int, **more: Any) -> list[list[int]]:
    """What transformers' own generate gives, padded on the left."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    found = theirs.generate(
        tokens, attention_mask=mask, max_new_tokens=length, do_sample=False, **more
    )
    rows: list[list[int]] = found[:, width:].tolist()
    return rows


@torch.no_grad()
def uncached(logits_of: Callable[[torch.Tensor], torch.Tensor], ids: list[int]) -> list[int]:
    """The likeliest token after every beginning of a text, all of it read anew."""
    likeliest: list[int] = logits_of(torch.tensor([ids]))[0].argmax(dim=-1).tolist()
    return likeliest


def test_greedy_equals_transformers(both: Any) -> None:
    theirs, ours = both
    greedy = Sampling(max_new_tokens=LENGTH, temperature=0)
    together = generate(ours, PROMPTS, greedy)
    assert len(set(together[0])) > 10
    assert together == expected(theirs, PROMPTS, LENGTH)
    for prompt, continuation in zip(PROMPTS, together, strict=True):
        text, first = prompt + continuation, len(prompt) - 1
        assert uncached(ours, text)[first:-1] == continuation
        assert uncached(lambda ids: theirs(ids).logits, text)[first:-1] == continuation


def test_a_penalty_on_repetition_is_theirs(both: Any) -> None:
    theirs, ours = both
    sampling = Sampling(max_new_tokens=20, temperature=0, repetition_penalty=1.4)
    for prompt in PROMPTS[2:3]:
        found = generate(ours, [prompt], sampling)
        assert found == expected(theirs, [prompt], 20, repetition_penalty=1.4)
