"""Continuing many prompts at once, one token a step, with a KV cache.

Prompts are padded on the left; padding is a document of its own, so no token sees it, and positions
count from the first real token of each row.

Invariant: what a prompt gives depends on the prompt, its stream, the seed and the sampling alone,
not on the prompts beside it (but for rounding); greedy decoding equals running the whole text
through the model anew for every token.

    ids = generate(model, [[5, 9], [7]], Sampling(max_new_tokens=64, temperature=0), stop_ids={2})
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from llmtrain.eval.sampling import Sampling, choose, draw_numbers
from llmtrain.model.cache import KeyValueCache
from llmtrain.model.transformer import Transformer

PADDING = -1
"""Document id of the tokens that fill short prompts on the left; no real token sees them."""

Watch = Callable[[int, int], bool]
"""(row, id of its new token) -> whether the row is done; not asked about a stop token."""


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    streams: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop token, until ``watch`` ends it, or to the limit.

    Args:
        model: whole, or this rank's part of one that gives whole logits.
        prompts: ids, one row each, of any lengths.
        sampling: how tokens are chosen.
        stop_ids: ids that end a row.
        vocab_size: ids of the tokenizer: rows of the head beyond it are never chosen.
        streams: number of each row's random stream; its place in ``prompts`` by default.
        watch: told every new token of the rows that go on.

    Returns:
        The new ids of each row, without the stop token.

    Raises:
        ValueError: a prompt is empty.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    device = next(model.parameters()).device
    tokens, positions, document_ids = left_padded(prompts, device)
    cache = KeyValueCache(tokens.shape[1] + sampling.max_new_tokens)
    draws = draw_numbers(sampling, range(len(prompts)) if streams is None else streams).to(device)
    present: Tensor | None = None
    chosen: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step in range(sampling.max_new_tokens):
        hidden = model(tokens, positions, document_ids, cache)
        logits = model.logits(hidden[:, -1])[:, :vocab_size]
        if sampling.repetition_penalty != 1.0:
            if present is None:
                present = torch.zeros_like(logits, dtype=torch.bool)
            _note(present, tokens, document_ids)
        ids = choose(logits, draws[:, step], sampling, present)
        for row, token in enumerate(ids.tolist()):
            if row not in going:
                continue
            if token in stop_ids:
                going.discard(row)
                continue
            chosen[row].append(token)
            if watch is not None and watch(row, token):
                going.discard(row)
        if not going:
            break
        tokens, positions = ids[:, None], positions[:, -1:] + 1
        document_ids = torch.zeros_like(positions)
    return chosen


def _note(present: Tensor, tokens: Tensor, document_ids: Tensor) -> None:
    """Mark in ``present`` [B, V] the tokens [B, S] that are no padding."""
    rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
    real = (document_ids != PADDING) & (tokens < present.shape[1])
    present[rows[real], tokens[real]] = True


def left_padded(
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
