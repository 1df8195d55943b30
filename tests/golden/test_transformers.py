"""Logits and every gradient equal those of transformers, for random weights of each family."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.strict import build
from llmtrain.eval.decoding import generate
from llmtrain.eval.sampling import Sampling
from llmtrain.model.transformer import Transformer

TOLERANCE = 1e-5
SIZES: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
LLAMA3_SCALING: Mapping[str, Any] = {
    "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
YARN: Mapping[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 64}

# Family, fields that both configs spell alike, rope scaling.
FAMILIES: Mapping[str, tuple[str, dict[str, Any], tuple[str, Mapping[str, Any]] | None]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}, None),
    "llama3": ("Llama", {"rope_theta": 5e5}, ("llama3", LLAMA3_SCALING)),
    "llama_linear": ("Llama", {}, ("linear", {"factor": 2.0})),
    "llama_yarn": ("Llama", {}, ("yarn", YARN)),
    "llama_biased": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}, None),
    "qwen2": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}, None),
    "qwen3": ("Qwen3", {"rope_theta": 1e6, "head_dim": 20}, None),
    "mistral": ("Mistral", {"sliding_window": 7}, None),
}


def theirs(family: str) -> Any:
    """Build transformers' model with random weights; biases and norms too, so that they matter."""
    kind, fields, scaling = FAMILIES[family]
    fields = {**SIZES, "tie_word_embeddings": False, **fields}
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": scaling[0], **scaling[1]}
    rope["rope_theta"] = fields.pop("rope_theta", 1e4)
    config = getattr(transformers, f"{kind}Config")(
        **fields, rope_parameters=rope, attn_implementation="eager", pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


def ours(family: str, weights: Mapping[str, Tensor]) -> Transformer:
    """Build our model from the same fields and load the same weights by name, strictly."""
    kind, fields, scaling = FAMILIES[family]
    fields = {**SIZES, **fields}
    if kind == "Qwen2":
        fields["attention_bias"] = True
    if fields.get("attention_bias") and kind == "Llama":
        fields["attention_output_bias"] = True
    if scaling is not None:
        fields["rope_scaling"] = {"kind": scaling[0], **scaling[1]}
    model = Transformer(build(ModelConfig, {**fields, "qk_norm": kind == "Qwen3"}, "model"))
    names = set(model.state_dict())
    model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name in names or not tied(model)}
    )
    return model


def tied(model: Transformer) -> bool:
    """Whether the head is the embedding; transformers then lists lm_head.weight as well."""
    return model.config.tie_word_embeddings


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Transformer]:
    their_model = theirs(request.param)
    return their_model, ours(request.param, their_model.state_dict())


def test_logits_and_gradients(pair: tuple[Any, Transformer]) -> None:
    their_model, our_model = pair
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 40))
    weights = torch.randn(2, 40, SIZES["vocab_size"])
    expected = their_model(input_ids=tokens).logits
    positions = torch.arange(40).expand(2, 40)
    for document_ids in (None, torch.zeros(2, 40, dtype=torch.int32)):
        found = our_model.logits(our_model(tokens, positions, document_ids))
        assert relative(found, expected) <= TOLERANCE
    (expected.log_softmax(-1) * weights).sum().backward()
    (found.log_softmax(-1) * weights).sum().backward()
    gradients = {name: p.grad for name, p in their_model.named_parameters()}
    scale = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
    for name, parameter in our_model.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - gradients[name]).norm()
        # A key bias shifts all scores of a query alike: its gradient is rounding noise around 0.
        reference = gradients[name].norm() if gradients[name].norm() > 1e-6 * scale else scale
        assert error <= TOLERANCE * reference, name


def test_packed_documents_equal_single_documents(pair: tuple[Any, Transformer]) -> None:
    their_model, our_model = pair
    lengths = (13, 1, 20)
    tokens = torch.randint(0, SIZES["vocab_size"], (1, sum(lengths)))
    expected = torch.cat(
        [their_model(input_ids=part).logits for part in tokens.split(lengths, dim=1)], dim=1
    )
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    found = our_model.logits(our_model(tokens, positions, documents))
    assert relative(found, expected) <= TOLERANCE


def test_greedy_generation(pair: tuple[Any, Transformer]) -> None:
    their_model, our_model = pair
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
    found = generate(our_model, prompts, Sampling(max_new_tokens=50, temperature=0.0))
    for prompt, continuation in zip(prompts, found, strict=True):
        # Each choice, given the ones before it, is theirs: so is the whole continuation.
        tokens = torch.tensor([prompt + continuation])
        choices = their_model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert len(continuation) == 50
        assert continuation == choices.tolist()
