"""A model cut over ranks for inference: whole logits on every rank, whatever the number of rows.

Between blocks the ranks share the rows of a batch, not the sequence: a decoding step has one token
a row. Rows are filled up to a multiple of the ranks and cut off again.

Invariant: called as a ``Transformer`` it gives the same hidden states and logits on all ranks, so
that all of them choose the same tokens; each rank keeps the keys and values of its own heads.

    with torch.device("meta"):
        model = SpreadTransformer(config.model, group, attention, kernels)
    model.load(StoredWeights(checkpoint), device, dtype)
    logits = model.logits(model(tokens, positions, document_ids, cache)[:, -1])
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.cache import KeyValueCache
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.spec import AttentionFunction
from llmtrain.ops.kernels import Kernels
from llmtrain.parallel.collectives import stack_over
from llmtrain.parallel.mesh import World
from llmtrain.parallel.region import Region, sizes, whole
from llmtrain.parallel.tensor import ROWS, apply_tensor_parallel, even_part


class Weights(Protocol):
    """Where weights come from, in rectangles."""

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield rectangles of a parameter, with the place of their first element."""
        ...


class SpreadTransformer(Transformer):
    """A whole model of which every rank of a group holds its part of each matrix."""

    def __init__(
        self,
        config: ModelConfig,
        group: dist.ProcessGroup,
        attention: AttentionFunction,
        kernels: Kernels,
    ) -> None:
        """Build on the meta device, then cut; raises LayoutError where the ranks do not fit."""
        super().__init__(config, attention=attention, kernels=kernels)
        self.group = group
        self._regions = apply_tensor_parallel(self, group, spread=ROWS)

    def load(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        """Give every parameter memory, and this rank's part of the weights a piece at a time."""
        for path, parameter in list(self.named_parameters()):
            region = self._regions.get(path, whole(tuple(parameter.shape)))
            local = torch.zeros(sizes(region), dtype=dtype, device=device)
            for offsets, piece in weights.pieces(path):
                _put(local, region, offsets, piece)
            module_path, _, name = path.rpartition(".")
            setattr(self.get_submodule(module_path), name, nn.Parameter(local, requires_grad=False))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        extent: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return hidden [B, S, D] of tokens [B, S] after the final norm, on every rank."""
        rows = len(x)
        missing = -rows % self.group.size()
        if missing:
            x, positions = _filled(x, missing), _filled(positions, missing)
            document_ids = None if document_ids is None else _filled(document_ids, missing)
        return super().forward(x, positions, document_ids, cache, extent)[:rows]

    def logits(self, hidden_BSD: Tensor) -> Tensor:  # noqa: N803
        """Return logits [B, S, V] over the whole vocabulary."""
        own = super().logits(hidden_BSD)
        size, ranks = self.config.vocab_size, self.group.size()
        parts = [even_part(size, ranks, rank) for rank in range(ranks)]
        widest = parts[0].stop - parts[0].start
        padded = torch.nn.functional.pad(own, (0, widest - own.shape[-1]))
        gathered = stack_over(padded, self.group)
        return torch.cat(
            [gathered[rank, ..., : part.stop - part.start] for rank, part in enumerate(parts)],
            dim=-1,
        )


def sharing_group(world: World, model: ModelConfig) -> dist.ProcessGroup | None:
    """Return the ranks of a training run that share its model for inference.

    All of them where they divide the key and value heads, else those of the tensor-parallel group;
    None where each rank has the model whole.
    """
    fits = min(model.intermediate_size, model.vocab_size) >= world.world_size
    if world.world_size > 1 and fits and model.num_key_value_heads % world.world_size == 0:
        return dist.group.WORLD
    return world.group("tp")


def _filled(x: Tensor, missing: int) -> Tensor:
    """Add copies of the first row."""
    return torch.cat((x, x[:1].expand(missing, *x.shape[1:])))


def _put(local: Tensor, region: Region, offsets: tuple[int, ...], piece: Tensor) -> None:
    """Copy into ``local`` what of a rectangle lies in ``region``."""
    there, here = [], []
    for held, offset, size in zip(region, offsets, piece.shape, strict=True):
        start, stop = max(held.start, offset), min(held.stop, offset + size)
        if start >= stop:
            return
        there.append(slice(start - offset, stop - offset))
        here.append(slice(start - held.start, stop - held.start))
    local[tuple(here)] = piece[tuple(there)].to(local.dtype)
