"""A tensor of which this rank holds some rectangles, as torch's distributed checkpoint sees it.

Invariant: it owns nothing: its chunks are views of the engine's storage, so what a checkpoint
loads into them reaches the engine. Holders of equal chunks write one of them; each reads its own.

    state["model.norm.weight"] = Portion((4096,), [(region, local)])
    dcp.save(state, checkpoint_id=folder)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from llmtrain.ops.nf4 import PackedMatrix
from llmtrain.parallel.region import Region, sizes, whole

Chunk = tuple[Region, Tensor]
"""Where a rectangle lies in the whole, and the view of the engine's storage that holds it."""


class Portion(Tensor):
    """Rectangles of a logical tensor; has the shape of the whole and no data of its own."""

    chunks: tuple[Chunk, ...]
    """What this rank holds, empty rectangles left out."""

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        chunks: Sequence[Chunk],
        like: Tensor,
        dtype: torch.dtype | None = None,
    ) -> "Portion":
        """``like`` gives device and dtype, for ranks that hold nothing.

        ``dtype`` is another one for checkpoints, which convert to and from that of the chunks.
        """
        wrapper: Portion = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype or like.dtype, device=like.device
        )
        wrapper.chunks = tuple((region, view) for region, view in chunks if view.numel())
        return wrapper

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse arithmetic: a portion is an address, not a value."""
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} on a Portion; use its chunks")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Show shape and regions."""
        regions = [region for region, _ in self.chunks]
        return f"Portion(shape={tuple(self.shape)}, regions={regions})"

    def __create_write_items__(self, name: str, value: object) -> list[WriteItem]:
        """List what to write, for torch's planner."""
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """List where the chunks lie, for torch's planner."""
        return [
            ChunkStorageMetadata(
                offsets=torch.Size(part.start for part in region), sizes=torch.Size(sizes(region))
            )
            for region, _ in self.chunks
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Find the chunk at an offset, for torch's planner."""
        for region, view in self.chunks:
            if index.offset == torch.Size(part.start for part in region):
                return view
        raise ValueError(f"{index.fqn} holds no chunk at {index.offset}")


class PackedPortion(Portion):
    """A logical tensor whose values are packed: they are expanded where they are asked for.

    Nothing loaded into what it gives reaches the engine: loaders ask for ``opened`` first.
    """

    packed: PackedMatrix
    """Holds the values, all of them here."""

    @staticmethod
    def __new__(cls, packed: PackedMatrix) -> "PackedPortion":
        """Stand for ``packed`` in fp32."""
        like = packed.factors
        wrapper: PackedPortion = Tensor._make_wrapper_subclass(
            cls, packed.shape, dtype=torch.float32, device=like.device
        )
        wrapper.packed, wrapper.chunks = packed, ((whole(packed.shape), like),)
        return wrapper

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Expand the values, for torch's planner."""
        return self.packed.values()


def opened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put room in host memory in the place of packed tensors, for loading into."""
    return {
        name: torch.zeros(value.shape) if isinstance(value, PackedPortion) else value
        for name, value in state.items()
    }


def take(portion: Tensor, value: Tensor) -> None:
    """Fill a portion (or a plain tensor) from a whole tensor or from the same chunks."""
    if isinstance(portion, PackedPortion):
        if not isinstance(value, PackedPortion):
            portion.packed.store(value)
    elif not isinstance(portion, Portion):
        portion.copy_(value)
    elif isinstance(value, Portion):
        for (_, view), (_, source) in zip(portion.chunks, value.chunks, strict=True):
            if view is not source:
                view.copy_(source)
    else:
        for region, view in portion.chunks:
            view.copy_(value[region].view_as(view))
