"""litgpt's model and pretraining loop, as a side of the training benchmark.

The loop is that of ``litgpt.pretrain.fit`` through Lightning Fabric, its cross entropy in chunks
included; AdamW is fused, which litgpt asks for on CUDA only. It has no document masks in training:
packed rows are plainly causal.

    /data/peer-train/bin/python benchmarks/peers/train_litgpt.py < requests.jsonl
"""

import itertools

import lightning as L
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from train_side import Case, begin, fill, fused_weights, rows_of

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}
NAMES = {
    "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2",
    "self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj", "model.layers": "transformer.h",
    "model.embed_tokens": "lm_head", "model.norm": "transformer.ln_f",
}  # fmt: skip
"""Its names, by parts of Hugging Face's."""


def model_of(case: Case) -> GPT:
    config = Config(
        name="side", block_size=case.sequence_length, vocab_size=case.vocab_size,
        padded_vocab_size=case.vocab_size, n_layer=case.num_layers, n_head=case.num_heads,
        n_embd=case.hidden_size, n_query_groups=case.num_heads, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=case.eps,
        mlp_class_name="LLaMAMLP", intermediate_size=case.intermediate_size,
        rope_base=int(case.rope_theta),
    )  # fmt: skip
    model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    fill(model, fused_weights(case, NAMES, "transformer.h.{}.attn.qkv.weight"))
    return model


def main() -> None:
    case, meter = begin()
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=PRECISION[case.precision])
    model = model_of(case)
    if case.compile:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=case.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    optimizer = fabric.setup_optimizers(optimizer)
    for step in itertools.count():
        rows = rows_of(case, step)
        logits = model(rows.tokens)
        loss = chunked_cross_entropy(logits, rows.targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=case.clip)
        optimizer.step()
        optimizer.zero_grad()
        del logits  # it would live on into the next forward, as in no run of litgpt's
        meter.done(loss.item())


if __name__ == "__main__":
    main()
