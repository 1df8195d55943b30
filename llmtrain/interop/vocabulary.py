"""Embedding and head of a model for another tokenizer than the one it was trained with.

A token that both have (the same bytes, or a special token of the same name; the token that ends a
document by its part, not its name) keeps its row. The row of a new one is the mean of the rows of
the pieces the old tokenizer cuts its text into (fast vocabulary transfer, arXiv:2402.09977).

Invariant: rows that are kept are the same bits; the matrix is never whole in memory.

    surgery = new_vocabulary(old="Qwen2.5-0.5B", new="tokenizer")
    surgery.sources[17]      # ids of the old tokenizer whose rows make row 17
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.interop.layout import Place
from llmtrain.interop.safetensors import TensorFolder
from llmtrain.tokenizer.spelling import spelling_of
from llmtrain.tokenizer.tokenizer import Tokenizer, load


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVocabulary:
    """Which old rows make every new one."""

    sources: Sequence[Sequence[int]]
    """By new id: old ids, one where the token is kept; none gives zeros."""
    num_kept: int
    """Tokens both vocabularies have."""
    eos_id: int
    """The id that ends a document in the new one."""

    def rows(
        self, tensors: TensorFolder, place: Place, dtype: torch.dtype, start: int, stop: int
    ) -> Tensor:
        """Make rows ``start`` to ``stop`` of the matrix at ``place``; zeros beyond the last id."""
        made = torch.zeros(stop - start, *place.shape[1:], dtype=dtype)
        for row, ids in enumerate(self.sources[start:stop]):
            old = [tensors.rows(place.name, place.start + i, place.start + i + 1) for i in ids]
            if len(old) == 1:
                made[row] = old[0][0].to(dtype)
            elif old:
                wide = torch.promote_types(old[0].dtype, torch.float32)
                made[row] = torch.cat(old).to(wide).mean(dim=0).to(dtype)
        return made


def new_vocabulary(old: Path, new: Path) -> NewVocabulary:
    """Match the tokenizer at ``new`` with the one at ``old``.

    Raises:
        ConfigError: they have no token in common.
        DataError: one of them cannot be loaded.
    """
    before, after = load(old), load(new)
    known, wanted = spelling_of(old), spelling_of(new)
    id_of: dict[bytes | str, int] = {}
    for i, token in enumerate(known):
        if token is not None:
            id_of.setdefault(token, i)
    sources: list[Sequence[int]] = []
    num_kept = 0
    for i, token in enumerate(wanted):
        same = before.eos_id if i == after.eos_id else id_of.get(token or b"")
        num_kept += same is not None
        sources.append([same] if same is not None else _pieces(token, before, known, id_of))
    if num_kept <= 1:  # the end of a document alone
        raise ConfigError(
            f"the tokenizer {new} has no token in common with {old}, nothing of the embedding "
            "would be kept; give another tokenizer, or train a new model"
        )
    return NewVocabulary(sources=sources, num_kept=num_kept, eos_id=after.eos_id)


def _pieces(
    token: bytes | str | None,
    before: Tokenizer,
    known: Sequence[bytes | str | None],
    id_of: Mapping[bytes | str, int],
) -> Sequence[int]:
    """Cut a token as the old tokenizer does; where that changes it, or it is no text, by bytes."""
    if token is None:
        return []
    raw = token.encode() if isinstance(token, str) else token
    try:
        ids = before.encode(raw.decode())
    except UnicodeDecodeError:
        ids = []
    spelled = [known[i] for i in ids]
    if b"".join(part for part in spelled if isinstance(part, bytes)) == raw:
        return ids
    return _longest(raw, id_of)


def _longest(raw: bytes, id_of: Mapping[bytes | str, int]) -> Sequence[int]:
    """Cut bytes into the longest old tokens from the left; bytes that none has are passed over."""
    ids, start = [], 0
    while start < len(raw):
        ends = range(len(raw), start, -1)
        end = next((end for end in ends if raw[start:end] in id_of), None)
        if end is not None:
            ids.append(id_of[raw[start:end]])
        start = end or start + 1
    return ids
