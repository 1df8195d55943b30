"""Stages that see many documents, run in this process over documents from a test."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config.run import PipelineConfig
from data_pipeline.dedup.stages import KEYED, Work
from data_pipeline.document import Document, identity
from data_pipeline.execute.local import InlineExecutor
from data_pipeline.manifest import Manifest
from data_pipeline.shards import SCHEMA, Shard, ShardFile, read_documents, read_table, to_table
from data_pipeline.stages import Context, Stage


def document(number: int, text: str, **fields: Any) -> Document:
    """A document whose id is a number in hex."""
    values = {"source": "s", "edits": identity(text), **fields}
    return Document(id=f"{number:032x}", text=text, **values)


def make_shards(out: Path, documents: Sequence[Document], rows: int) -> list[Shard]:
    """Write documents to shards of some rows."""
    shards = []
    for start in range(0, len(documents), rows):
        path = f"stages/in/documents/s-{start:05d}.parquet"
        file = ShardFile(out / path, SCHEMA)
        file.add(to_table(documents[start : start + rows]))
        digest, size = file.close()
        shards.append(Shard(
            path=path, source="s", rows=file.rows, text_bytes=file.text_bytes,
            text_characters=file.text_characters, digest=digest, size=size,
        ))  # fmt: skip
    return shards


class Driver:
    """What a keyed stage needs of the pipeline."""

    def __init__(self, out: Path, config: PipelineConfig) -> None:
        self.config = config
        self.context = Context(out=out, executor=InlineExecutor())
        self.memory_bytes = int(config.memory_gib * 2**30)
        self.manifest: Manifest | None = None

    def stage(
        self, name: str, settings: dict[str, Any], inputs: list[dict[str, Any]], target: str = ""
    ) -> Stage:
        return Stage(self.context, f"01-{name}", settings, inputs)

    def finish(self, stage: Stage, work: Work) -> list[Shard]:
        self.manifest = stage.finished()
        if self.manifest is None:
            results, details = work()
            self.manifest = stage.finish(results, details)
        return self.manifest.shards


@dataclass
class Outcome:
    """What a stage made of some documents."""

    kept: list[Document]
    reasons: dict[str, str]
    manifest: Manifest

    @property
    def ids(self) -> list[int]:
        return sorted(int(d.id, 16) for d in self.kept)

    @property
    def texts(self) -> dict[int, str]:
        return {int(d.id, 16): d.text for d in self.kept}


def run_stage(
    out: Path, name: str, documents: Sequence[Document], rows: int = 7, **settings: Any
) -> Outcome:
    """Run a stage over documents in shards of ``rows``; settings are those of PipelineConfig."""
    shards = make_shards(out, documents, rows)
    driver = Driver(out, PipelineConfig(stages=(name,), **settings))  # type: ignore[arg-type]
    kept = [d for shard in KEYED[name](driver, name, shards) for d in read_documents(out, shard)]
    assert driver.manifest is not None
    tables = [read_table(out, shard) for shard in driver.manifest.dropped]
    reasons = {
        id_: reason
        for table in tables
        for id_, reason in zip(
            table.column("id").to_pylist(), table.column("reason").to_pylist(), strict=True
        )
    }
    return Outcome(kept, reasons, driver.manifest)
