"""Writing one shard of a token store: tokens, index and the origin of every document.

A shard is written under names no reader looks for and renamed when all its documents are in. Any
number of processes may write shards of one store, each its own numbers; writing one twice gives the
same bytes. The store exists once ``write_manifest`` has listed them.

    with ShardWriter(Path("stores/wiki"), 0, vocab_size=32_000, eos_id=2) as writer:
        writer.add([5, 6, 7], DocumentRecord(id="..."))
"""

import secrets
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from llmtrain.data.indexed import Int64Array, token_dtype, write_index
from llmtrain.data.lineage import DocumentRecord, RecordWriter
from llmtrain.data.manifest import ShardInfo, file_sha256, sync
from llmtrain.errors import DataError


class ShardWriter:
    """Writes one shard under temporary names and renames its files when all documents are in.

    Every process writes its own shard numbers; writing one twice gives the same bytes.
    """

    def __init__(self, directory: Path | str, index: int, *, vocab_size: int, eos_id: int) -> None:
        """Open shard ``index`` of the store in ``directory`` (made if absent)."""
        self.name = f"part-{index:05d}"
        self.dtype = token_dtype(vocab_size)
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._vocab_size, self._eos_id = vocab_size, eos_id
        self._sizes = array("q")
        suffix = f".{secrets.token_hex(6)}.tmp"
        names = {end: f"{self.name}.{end}" for end in ("bin", "idx", "docs.parquet")}
        self._final = {end: self._directory / name for end, name in names.items()}
        self._temporary = {
            end: path.with_name(path.name + suffix) for end, path in self._final.items()
        }
        self._file = self._temporary["bin"].open("wb")
        self._records = RecordWriter(self._temporary["docs.parquet"])
        self._info: ShardInfo | None = None

    @property
    def info(self) -> ShardInfo:
        """What to tell ``write_manifest``; there after ``close``."""
        if self._info is None:
            raise DataError(f"shard {self.name} is still open; close it before asking for its info")
        return self._info

    def add(self, tokens: Sequence[int] | Int64Array, record: DocumentRecord) -> None:
        """Append a document; EOS is added here, ``record.num_tokens`` is set here.

        Raises:
            DataError: there are no tokens, or one lies outside the vocabulary.
        """
        values = np.empty(len(tokens) + 1, dtype=np.int64)
        values[:-1] = tokens
        values[-1] = self._eos_id
        if len(tokens) == 0:
            raise DataError(
                f"document {record.id} of {self.name} is empty; drop it before tokenizing"
            )
        if values.min() < 0 or values.max() >= self._vocab_size:
            raise DataError(
                f"document {record.id} holds token {values.max()}, the vocabulary ends at "
                f"{self._vocab_size - 1}; tokenize with the tokenizer the store is made for"
            )
        self._file.write(values.astype(self.dtype).tobytes())
        self._sizes.append(len(values))
        self._records.add(record, len(values))

    def close(self) -> ShardInfo:
        """Write the index, sync, rename and return what the manifest needs; nothing if empty."""
        if self._info is not None:
            return self._info
        self._file.close()
        self._records.close()
        if not self._sizes:
            self._discard()
            self._info = ShardInfo(
                name=self.name, num_tokens=0, num_documents=0, sizes={}, sha256={}
            )
            return self._info
        sizes = np.frombuffer(self._sizes, dtype=np.int64)
        write_index(self._temporary["idx"], self.dtype, sizes)
        for end, path in self._temporary.items():
            sync(path)
            path.rename(self._final[end])
        sync(self._directory)
        self._info = ShardInfo(
            name=self.name,
            num_tokens=int(sizes.sum()),
            num_documents=len(sizes),
            sizes={end: path.stat().st_size for end, path in self._final.items()},
            sha256={end: file_sha256(path) for end, path in self._final.items()},
        )
        return self._info

    def _discard(self) -> None:
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._info is None:
            self._file.close()
            self._records.close()
            self._discard()
