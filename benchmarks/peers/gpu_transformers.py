"""transformers' LLaMA under torch.compile in a short loop, as a side of the GPU benchmark.

Its fastest usual settings: sdpa attention without a mask, autocast to bf16 over fp32 parameters,
fused AdamW, clipping at 1.0.

    python benchmarks/peers/gpu_transformers.py "$CASE"
"""

import torch
from gpu_side import adamw, measure, read_case
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    case = read_case()
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim",
        "rms_norm_eps", "tie_word_embeddings",
    )  # fmt: skip
    config = LlamaConfig(
        **{name: case.model[name] for name in names if case.model[name] is not None},
        rope_parameters={"rope_type": "default", "rope_theta": case.model["rope_theta"]},
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(case.device):
        model = LlamaForCausalLM(config)
    forward = torch.compile(model) if case.compile else model
    optimizer = adamw(model)

    def step(parts: list[tuple[Tensor, Tensor]]) -> None:
        for tokens, targets in parts:
            with case.autocast():
                loss = forward(input_ids=tokens, labels=targets, shift_labels=targets).loss
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    measure(case, step, "transformers")


if __name__ == "__main__":
    main()
