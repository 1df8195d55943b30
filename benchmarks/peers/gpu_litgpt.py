"""litgpt's model under torch.compile in the loop of ``litgpt.pretrain``, as a side.

Its cross entropy in chunks included; Fabric with bf16-mixed precision, fused AdamW, clipping 1.0.

    python benchmarks/peers/gpu_litgpt.py "$CASE"
"""

import lightning as L
import torch
from gpu_side import adamw, measure, read_case
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from torch import Tensor

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}


def main() -> None:
    case = read_case()
    model = case.model
    config = Config(
        name="side", block_size=case.sequence_length, vocab_size=model["vocab_size"],
        padded_vocab_size=model["vocab_size"], n_layer=model["num_hidden_layers"],
        n_head=model["num_attention_heads"], n_embd=model["hidden_size"],
        n_query_groups=model["num_key_value_heads"], head_size=model["head_dim"],
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        norm_eps=model["rms_norm_eps"], mlp_class_name="LLaMAMLP",
        intermediate_size=model["intermediate_size"], rope_base=int(model["rope_theta"]),
    )  # fmt: skip
    fabric = L.Fabric(accelerator=case.device, devices=1, precision=PRECISION[case.precision])
    with fabric.init_module(empty_init=False):
        made = GPT(config)
        if model["tie_word_embeddings"]:
            made.transformer.wte.weight = made.lm_head.weight
    compiled = fabric.setup(torch.compile(made) if case.compile else made)
    optimizer = fabric.setup_optimizers(adamw(compiled))

    def step(parts: list[tuple[Tensor, Tensor]]) -> None:
        for tokens, targets in parts:
            loss = chunked_cross_entropy(compiled(tokens), targets)
            fabric.backward(loss / len(parts))
        fabric.clip_gradients(compiled, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    measure(case, step, "litgpt")


if __name__ == "__main__":
    main()
