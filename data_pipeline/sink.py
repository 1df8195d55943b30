"""Where a task puts its documents: shards of those that go on and of those that stop here.

Tables may be written one batch at a time; what is counted is what was written, and the shards
depend on the documents alone. Nothing is a shard before ``close``.

    sink = Sink(folder=folder, stage="02-c4", source="web", name="web-00000")
    sink.count_in(table.num_rows, characters, text_bytes)
    sink.write_kept(table)
    result = sink.close()
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from data_pipeline.manifest import TaskResult
from data_pipeline.shards import DROPPED_SCHEMA, SCHEMA, Shard, ShardFile, with_reasons


@dataclass(kw_only=True)
class Sink:
    """Writes the document shards of one task and counts what it writes."""

    folder: Path
    """The attempt's folder."""
    stage: str
    """Name of the stage."""
    source: str
    """Source the documents belong to."""
    name: str
    """File name of the shards, without ending."""
    shard_bytes: int | None = None
    """Bytes of text that fill a shard of kept documents; they are then numbered NAME-000 and so on.
    None keeps all in one."""
    result: TaskResult = field(default_factory=TaskResult)
    """What the task hands back."""
    _open: dict[str, ShardFile] = field(default_factory=dict)
    _rolled: int = 0

    def count_in(self, rows: int, characters: int, text_bytes: int) -> None:
        """Count documents the task has read."""
        counts = self.result.counts
        counts.documents_in += rows
        counts.characters_in += characters
        counts.bytes_in += text_bytes

    def write_kept(self, table: pa.Table, prefix: str = "") -> None:
        """Write documents that go on, to the shard ``prefix`` + name; no file for none."""
        if not table.num_rows:
            return
        number = "" if self.shard_bytes is None else f"-{self._rolled:03d}"
        path = f"documents/{prefix}{self.name}{number}.parquet"
        file = self._file(path, SCHEMA)
        file.add(table.select(SCHEMA.names))
        if self.shard_bytes is not None and file.text_bytes >= self.shard_bytes:
            self._finish(path)
            self._rolled += 1

    def write_dropped(self, table: pa.Table, reasons: Sequence[str]) -> None:
        """Write documents that stop here, as they came in, with a reason each."""
        if not table.num_rows:
            return
        file = self._file(f"dropped/{self.name}.parquet", DROPPED_SCHEMA)
        file.add(with_reasons(table.select(SCHEMA.names), reasons))
        dropped = self.result.counts.dropped
        for reason in reasons:
            dropped[reason] = dropped.get(reason, 0) + 1

    def close(self) -> TaskResult:
        """Finish every shard; return what the task hands back."""
        for path in list(self._open):
            self._finish(path)
        return self.result

    def _file(self, path: str, schema: pa.Schema) -> ShardFile:
        if path not in self._open:
            self._open[path] = ShardFile(self.folder / path, schema)
        return self._open[path]

    def _finish(self, path: str) -> None:
        file = self._open.pop(path)
        digest, size = file.close()
        shard = Shard(
            path=f"stages/{self.stage}/{path}", source=self.source, rows=file.rows,
            text_bytes=file.text_bytes, text_characters=file.text_characters, digest=digest,
            size=size,
        )  # fmt: skip
        counts = self.result.counts
        if path.startswith("dropped/"):
            self.result.dropped.append(shard)
            counts.characters_dropped += shard.text_characters
            return
        self.result.shards.append(shard)
        counts.documents_out += shard.rows
        counts.characters_out += shard.text_characters
        counts.bytes_out += shard.text_bytes
