"""A short LLaMA and a plain loop, as nanoGPT has them, as a side of the training benchmark.

One matrix for queries, keys and values, causal sdpa, cross entropy over all logits in the model's
forward, autocast for bf16, fused AdamW. It has no document masks: packed rows are plainly causal.

    /data/peer-train/bin/python benchmarks/peers/train_plain.py < requests.jsonl
"""

import contextlib
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_side import IGNORE, Case, begin, fill, fused_weights, rows_of


class Block(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.hidden_size
        self.num_heads = case.num_heads
        self.norm_1 = nn.RMSNorm(width, case.eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.RMSNorm(width, case.eps)
        self.gate = nn.Linear(width, case.intermediate_size, bias=False)
        self.up = nn.Linear(width, case.intermediate_size, bias=False)
        self.down = nn.Linear(case.intermediate_size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, width = x.shape
        heads = (rows, length, self.num_heads, width // self.num_heads)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.qkv(self.norm_1(x)).split(width, 2))
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v, is_causal=True
        )
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, width))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding = nn.Embedding(case.vocab_size, case.hidden_size)
        self.blocks = nn.ModuleList(Block(case) for _ in range(case.num_layers))
        self.norm = nn.RMSNorm(case.hidden_size, case.eps)
        self.head = nn.Linear(case.hidden_size, case.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        pairs = torch.arange(0, case.head_dim, 2).float() / case.head_dim
        angles = torch.outer(torch.arange(case.sequence_length), case.rope_theta**-pairs)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORE
        )
        return logits, loss


NAMES = {
    "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "self_attn.o_proj": "out",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
    "model.layers": "blocks", "model.embed_tokens": "embedding", "model.norm": "norm",
}  # fmt: skip
"""The names here, by parts of Hugging Face's."""


def model_of(case: Case) -> Model:
    model = Model(case)
    fill(model, fused_weights(case, NAMES, "blocks.{}.qkv.weight"))
    return model


def main() -> None:
    case, meter = begin()
    raw = model_of(case)
    model = torch.compile(raw) if case.compile else raw
    optimizer = torch.optim.AdamW(
        raw.parameters(), lr=case.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in itertools.count():
        rows = rows_of(case, step)
        bf16 = torch.autocast("cpu", dtype=torch.bfloat16)
        with bf16 if case.precision == "bf16" else contextlib.nullcontext():
            logits, loss = model(rows.tokens, rows.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del logits
        meter.done(loss.item())


if __name__ == "__main__":
    main()
