"""The shards of a store in order, each made when it is first asked for.

A store of 10,000 shards is opened by every rank; what a rank never reads costs it nothing.

    shards = Shards.listed(LocalFolder(Path("stores/wiki")), manifest)
    shards[7].tokens(0, 2049)
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np

from llmtrain.data.files import Folder
from llmtrain.data.indexed import IndexedShard, Known
from llmtrain.data.manifest import Manifest
from llmtrain.data.roles import ENDING


class Shards:
    """What a store knows of its shards before it reads them, and the shards."""

    def __init__(
        self,
        num_tokens: Sequence[int],
        num_documents: Sequence[int],
        folders: Sequence[Folder],
        make: Callable[[int], IndexedShard],
    ) -> None:
        """Take counts and folders of all shards and what makes shard number i."""
        self.num_tokens = num_tokens
        self.num_documents = num_documents
        self.folders = folders
        self._make = make
        self._made: dict[int, IndexedShard] = {}

    @classmethod
    def listed(cls, folder: Folder, manifest: Manifest) -> "Shards":
        """Return the shards a manifest lists."""
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        listed = manifest.shards

        def make(number: int) -> IndexedShard:
            info = listed[number]
            return IndexedShard(
                folder.file(f"{info.name}.bin", info.sizes["bin"]),
                folder.file(f"{info.name}.idx", info.sizes["idx"]),
                Known(dtype, info.num_tokens, info.num_documents, info.ends),
                folder.file(f"{info.name}.{ENDING}", info.sizes[ENDING])
                if ENDING in info.sizes
                else None,
            )

        return cls(
            [info.num_tokens for info in listed], [info.num_documents for info in listed],
            [folder] * len(listed), make,
        )  # fmt: skip

    @classmethod
    def of(cls, folder: Folder, shard: IndexedShard) -> "Shards":
        """Return one shard that is open."""
        return cls([shard.num_tokens], [shard.num_documents], [folder], lambda number: shard)

    @classmethod
    def joined(cls, parts: Sequence["Shards"]) -> "Shards":
        """Return the shards of several stores, one behind the other."""
        places = [(part, number) for part in parts for number in range(len(part))]
        return cls(
            list(chain.from_iterable(part.num_tokens for part in parts)),
            list(chain.from_iterable(part.num_documents for part in parts)),
            list(chain.from_iterable(part.folders for part in parts)),
            lambda number: places[number][0][places[number][1]],
        )

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __iter__(self) -> Iterator[IndexedShard]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> IndexedShard:
        shard = self._made.get(number)
        if shard is None:
            if not 0 <= number < len(self):
                raise IndexError(f"there are {len(self)} shards; {number} is outside")
            shard = self._made[number] = self._make(number)
        return shard
