"""Where an export takes weights from, and a source whose adapter is added to its matrices.

Invariant: a merged matrix is W + scale B A, added in fp32 (fp64 of fp64 weights) and given so, to
be rounded once, where it is written; what has no adapter passes as it is. W is never whole here.

    source = Merged(StoredWeights(checkpoint), model.adapter)
    for offsets, piece in source.pieces("model.layers.0.mlp.up_proj.weight"): ...
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.config.adapter import AdapterConfig
from llmtrain.model.adapter import LORA_A, LORA_B, is_adapter


class Source(Protocol):
    """Where an export takes weights from: a checkpoint, or a model in memory."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Type of every parameter."""
        ...

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield rectangles of a parameter, with the place of their first element."""
        ...


class Merged:
    """The weights of a model without its adapter, which computes what it computes with it."""

    def __init__(self, source: Source, adapter: AdapterConfig) -> None:
        """Take the weights of ``source``, the adapter's among them."""
        self._source, self._adapter = source, adapter
        self.dtypes = {n: dtype for n, dtype in source.dtypes.items() if not is_adapter(n)}

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield rectangles of a parameter, with the place of their first element."""
        stem = name.removesuffix(".weight")
        if stem.rpartition(".")[2] not in self._adapter.targets or stem == name:
            yield from self._source.pieces(name)
            return
        down, up = (put_together(self._source, stem + end) for end in (LORA_A, LORA_B))
        for (row, column), piece in self._source.pieces(name):
            wide = torch.promote_types(piece.dtype, torch.float32)
            rows = up[row : row + piece.shape[0]].to(wide) * self._adapter.scale
            columns = down[:, column : column + piece.shape[1]].to(wide)
            yield (row, column), piece.to(wide) + rows @ columns


def put_together(source: Source, name: str) -> Tensor:
    """Give a small matrix whole."""
    pieces = list(source.pieces(name))
    shape = [
        max(start[dim] + piece.shape[dim] for start, piece in pieces)
        for dim in range(pieces[0][1].dim())
    ]
    whole = torch.zeros(shape, dtype=source.dtypes[name])
    for start, piece in pieces:
        place = tuple(slice(s, s + n) for s, n in zip(start, piece.shape, strict=True))
        whole[place] = piece
    return whole
