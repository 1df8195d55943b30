"""Writing one shard of a token store: tokens, index, roles and the origin of every document.

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
from typing import Any

import numpy as np

from llmtrain.data.files import LocalFile
from llmtrain.data.indexed import Int64Array, TokenArray, ends_digest, token_dtype, write_index
from llmtrain.data.lineage import DocumentRecord, RecordWriter
from llmtrain.data.manifest import ShardInfo, file_sha256, sync
from llmtrain.data.roles import ENDING, RoleArray, check_roles
from llmtrain.errors import DataError


class ShardWriter:
    """Writes one shard under temporary names and renames its files when all documents are in.

    Every process writes its own shard numbers; writing one twice gives the same bytes.
    """

    def __init__(
        self, directory: Path | str, index: int, *, vocab_size: int, eos_id: int, piece: int = 0
    ) -> None:
        """Open shard ``index`` of the store in ``directory`` (made if absent).

        ``piece`` numbers the shards of an ``index`` whose documents one shard shall not hold; they
        follow each other in the order of the manifest.
        """
        self.name = f"part-{index:05d}" + (f"-{piece:05d}" if piece else "")
        self.dtype = token_dtype(vocab_size)
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._vocab_size, self._eos_id = vocab_size, eos_id
        self._sizes = array("q")
        suffix = f".{secrets.token_hex(6)}.tmp"
        names = {end: f"{self.name}.{end}" for end in ("bin", "idx", ENDING, "docs.parquet")}
        self._final = {end: self._directory / name for end, name in names.items()}
        self._temporary = {
            end: path.with_name(path.name + suffix) for end, path in self._final.items()
        }
        self._file = self._temporary["bin"].open("wb")
        self._roles = self._temporary[ENDING].open("wb")
        self._num_roles = 0
        self._records = RecordWriter(self._temporary["docs.parquet"])
        self._info: ShardInfo | None = None

    @property
    def info(self) -> ShardInfo:
        """What to tell ``write_manifest``; there after ``close``."""
        if self._info is None:
            raise DataError(f"shard {self.name} is still open; close it before asking for its info")
        return self._info

    def add(
        self,
        tokens: Sequence[int] | Int64Array,
        record: DocumentRecord,
        roles: Sequence[int] | RoleArray | None = None,
    ) -> None:
        """Append a document; EOS is added here, ``record.num_tokens`` is set here.

        ``roles`` are those of ``tokens`` and of the EOS behind them: one more than ``tokens``.

        Raises:
            DataError: there are no tokens, one lies outside the vocabulary, or ``roles`` are none,
                or some documents have roles and others not.
        """
        values = np.empty(len(tokens) + 1, dtype=np.int64)
        values[:-1] = tokens
        values[-1] = self._eos_id
        if len(tokens) == 0:
            raise self._empty(record.id)
        if values.min() < 0 or values.max() >= self._vocab_size:
            raise self._outside(record.id, int(values.max()))
        if roles is not None:
            roles = np.asarray(roles, dtype=np.uint8)
            self._add_roles(roles, np.array([len(values)]), record.id)
        self._file.write(values.astype(self.dtype).tobytes())
        self._sizes.append(len(values))
        self._records.add(record, len(values))

    def add_batch(
        self,
        tokens: TokenArray,
        offsets: Int64Array,
        records: Any,
        roles: RoleArray | None = None,
    ) -> None:
        """Append documents: document i has ``tokens[offsets[i] : offsets[i + 1]]``; EOS is added.

        ``records`` is an Arrow table of ``lineage.schema()`` without ``num_tokens``, a row each;
        ``roles`` are those of these documents one behind the other, each with that of its EOS.
        The bytes are those of one ``add`` per document.

        Raises:
            DataError: a document has no tokens, one lies outside the vocabulary, or ``roles`` are
                none, or some documents have roles and others not.
        """
        import pyarrow as pa

        lengths = np.diff(offsets)
        if not len(lengths):
            return
        if lengths.min() <= 0:
            raise self._empty(records.column("id")[int(lengths.argmin())].as_py())
        used = tokens[offsets[0] : offsets[-1]]
        if used.min() < 0 or used.max() >= self._vocab_size:
            document = int(np.searchsorted(offsets - offsets[0], used.argmax(), side="right")) - 1
            raise self._outside(records.column("id")[document].as_py(), int(used.max()))
        if roles is not None:
            self._add_roles(roles, lengths + 1, records.column("id")[0].as_py())
        values = np.full(len(used) + len(lengths), self._eos_id, dtype=self.dtype)
        ordinary = np.ones(len(values), dtype=bool)
        ordinary[np.cumsum(lengths + 1) - 1] = False
        values[ordinary] = used
        self._file.write(values.tobytes())
        self._sizes.frombytes((lengths + 1).astype(np.int64).tobytes())
        counts = pa.array(lengths + 1, pa.int64())
        self._records.add_table(records.append_column("num_tokens", counts))

    def _add_roles(self, roles: RoleArray, lengths: Int64Array, document: str) -> None:
        check_roles(roles, lengths, f"document {document} of {self.name}")
        self._roles.write(roles.tobytes())
        self._num_roles += len(roles)

    def _empty(self, document: str) -> DataError:
        return DataError(f"document {document} of {self.name} is empty; drop it before tokenizing")

    def _outside(self, document: str, token: int) -> DataError:
        return DataError(
            f"document {document} holds token {token}, the vocabulary ends at "
            f"{self._vocab_size - 1}; tokenize with the tokenizer the store is made for"
        )

    def close(self) -> ShardInfo:
        """Write the index, sync, rename and return what the manifest needs; nothing if empty."""
        if self._info is not None:
            return self._info
        self._close_files()
        if not self._num_roles:
            self._temporary.pop(ENDING).unlink()
            self._final.pop(ENDING)
        if not self._sizes:
            self._discard()
            self._info = ShardInfo(
                name=self.name, num_tokens=0, num_documents=0, sizes={}, sha256={}
            )
            return self._info
        sizes = np.frombuffer(self._sizes, dtype=np.int64)
        if self._num_roles not in (0, sizes.sum()):
            self._discard()
            raise DataError(
                f"{self.name} has roles for {self._num_roles:,} of its {sizes.sum():,} tokens; "
                "give roles with every document or with none"
            )
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
            ends={
                end: ends_digest(LocalFile(str(path), path.stat().st_size))
                for end, path in self._final.items()
                if end in ("bin", "idx", ENDING)
            },
        )
        return self._info

    def _close_files(self) -> None:
        self._file.close()
        self._roles.close()
        self._records.close()

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
            self._close_files()
            self._discard()
