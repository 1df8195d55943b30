"""Sampling text from a model with a KV cache, many prompts at once.

Invariant: what a prompt gives depends on the prompt, its index, the seed and the sampling alone,
not on the prompts beside it (but for rounding); greedy sampling equals running the whole text
through the model anew for every token.

    llmtrain generate run=runs/demo prompt='Return the' max_new_tokens=64
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from llmtrain.config.generate import GenerateConfig
from llmtrain.errors import ConfigError
from llmtrain.eval.trained import load_run
from llmtrain.model.cache import KeyValueCache
from llmtrain.model.transformer import Transformer
from llmtrain.train.rundir import write_json

PADDING = -1
"""Document id of the tokens that fill short prompts on the left; no real token sees them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    """Tokens to add at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only; null means all."""
    top_p: float | None = None
    """Sample among the likeliest tokens that hold this probability; null means all."""
    seed: int = 0
    """Seed of the draws; row i of a call has its own stream."""


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_id: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continue each prompt until ``eos_id`` or the limit; returns the new ids, without the EOS.

    ``vocab_size`` is the tokenizer's: rows of the head beyond it are padding and never chosen.

    Raises:
        ValueError: a prompt is empty.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    like = next(model.parameters())
    tokens, positions, document_ids = _left_padded(prompts, like.device)
    capacity = tokens.shape[1] + sampling.max_new_tokens
    cache = KeyValueCache(model.config, len(prompts), capacity, like)
    draws = _draws(sampling, len(prompts)).to(like.device)
    last = torch.zeros(len(prompts), 1, dtype=document_ids.dtype, device=like.device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=like.device)
    chosen: list[Tensor] = []
    for step in range(sampling.max_new_tokens):
        hidden = model(tokens, positions, document_ids, cache)
        ids = choose(model.logits(hidden[:, -1])[:, :vocab_size], draws[:, step], sampling)
        chosen.append(ids)
        if eos_id is not None:
            finished |= ids == eos_id
            if bool(finished.all()):
                break
        tokens, positions, document_ids = ids[:, None], positions[:, -1:] + 1, last
    return [_until(row, eos_id) for row in torch.stack(chosen, dim=1).tolist()]


def choose(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """Pick one id per row of logits [B, V]: the likeliest, or by a draw [B] in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double() / sampling.temperature
    ranked, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked, ids = ranked[:, : sampling.top_k], ids[:, : sampling.top_k]
    mass = ranked.softmax(dim=-1).cumsum(dim=-1)
    if sampling.top_p is not None:
        # The first token is always kept; each next one only while those before hold less.
        kept = (mass[:, :-1] < sampling.top_p).sum(dim=-1, keepdim=True)
    else:
        kept = torch.full_like(ids[:, :1], mass.shape[1] - 1)
    total = mass.gather(1, kept)
    rank = torch.searchsorted(mass, draws.double()[:, None] * total, right=True)
    return ids.gather(1, rank.minimum(kept))[:, 0]


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay prompts out as tokens, positions and document ids [B, P] that end together."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    document_ids = torch.full_like(tokens, PADDING)
    for row, prompt in enumerate(prompts):
        first = width - len(prompt)
        tokens[row, first:] = torch.tensor(prompt)
        positions[row, first:] = torch.arange(len(prompt))
        document_ids[row, first:] = 0
    return tokens.to(device), positions.to(device), document_ids.to(device)


def _draws(sampling: Sampling, num_rows: int) -> Tensor:
    """Uniform numbers [B, max_new_tokens] on the CPU; each row from its own stream."""
    rows = []
    for row in range(num_rows):
        digest = hashlib.blake2b(f"{sampling.seed}/generate/{row}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        rows.append(torch.rand(sampling.max_new_tokens, generator=generator))
    return torch.stack(rows)


def _until(ids: list[int], eos_id: int | None) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def main(config: GenerateConfig) -> int:
    """Write each prompt and its continuations to standard output, an empty line between them.

    Without a prompt the text starts from EOS, the end of the document before.
    """
    run = load_run(config.run, config.step)
    texts = (config.prompt,) if isinstance(config.prompt, str) else config.prompt
    tokenizer = run.tokenizer()
    texts = tuple(text for text in texts for _ in range(config.num_samples))
    prompts = [tokenizer.encode(text) or [tokenizer.eos_id] for text in texts]
    longest = max(len(prompt) for prompt in prompts) + config.max_new_tokens
    if longest > run.config.model.max_position_embeddings:
        raise ConfigError(
            f"prompt and max_new_tokens={config.max_new_tokens} make {longest} tokens, the model "
            f"is meant for {run.config.model.max_position_embeddings}; shorten the prompt or lower "
            "max_new_tokens"
        )
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    outputs = generate(run.model, prompts, sampling, tokenizer.eos_id, tokenizer.vocab_size)
    samples = [(text, tokenizer.decode(ids)) for text, ids in zip(texts, outputs, strict=True)]
    sys.stdout.write("\n\n".join(text + written for text, written in samples) + "\n")
    if config.save:
        kept = [{"prompt": text, "completion": written, **asdict(sampling)}
                for text, written in samples]  # fmt: skip
        write_json(run.directory.path / "samples.json", {"step": run.step, "samples": kept})
    return 0
