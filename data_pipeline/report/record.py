"""A pipeline's folder as its files tell it: settings, finished stages, funnel rows, stores.

Only manifests are read here, never documents. A folder may be unfinished: what has no manifest has
not happened yet. A pass of several steps becomes one funnel row per step, in the order they ran.

    record = read_folder(Path("corpus"))
    [row.name for row in record.rows]   # ['extract', 'url', 'c4', 'language', ...]
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.manifest import Manifest
from data_pipeline.shards import Shard
from llmtrain.data.manifest import MANIFEST, read_manifest
from llmtrain.errors import DataError

AFTER_STAGES = ("split", "tokenizer", "tokenize", "shuffle")
"""Stages behind those of ``pipeline.stages``; they drop nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One step, or one stage that is no pass of steps, in the funnel."""

    name: str
    """Name of the step or stage, without number."""
    stage: str
    """Folder of its stage."""
    documents_in: int
    """Documents it judged."""
    documents_out: int
    """Documents that went on."""
    bytes_out: int
    """UTF-8 bytes of those, as it left them; 0 where nobody counted."""
    tokens: int
    """Tokens it wrote."""
    dropped: dict[str, int]
    """Documents dropped and records quarantined, by reason, largest first."""
    deleted: dict[str, int]
    """Characters deleted from documents that went on, by rule, largest first."""
    sources: dict[str, tuple[int, int]]
    """Source -> documents in and out; empty where nobody counted by source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One finished stage."""

    manifest: Manifest
    """What it says of itself."""
    seconds: float
    """Wall time of the call that finished it."""
    step_seconds: dict[str, float]
    """Processor time of every step of a pass, in all tasks."""
    rows: tuple[Row, ...]
    """Its rows of the funnel."""

    @property
    def name(self) -> str:
        """Its folder's name, such as ``02-c4``."""
        return self.manifest.stage

    @property
    def kind(self) -> str:
        """Its name without the number."""
        return kind_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRecord:
    """One token store."""

    split: str
    """``train`` or ``validation``."""
    source: str
    """Its source."""
    tokens: int
    """Tokens, EOS included."""
    documents: int
    """Documents."""
    vocab_size: int
    """Pieces of its tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderRecord:
    """One pipeline's folder."""

    path: Path
    """The folder."""
    settings: dict[str, Any]
    """``pipeline`` as it was begun with; empty if unknown."""
    stages: tuple[StageRecord, ...]
    """Finished stages in the order they ran."""
    stores: tuple[StoreRecord, ...]
    """Finished token stores."""
    sources: tuple[str, ...] = field(default=())
    """Names of the sources."""

    @property
    def rows(self) -> list[Row]:
        """The funnel."""
        return [row for stage in self.stages for row in stage.rows]

    @property
    def kept(self) -> list[Shard]:
        """Shards of the documents that are left after the last stage that hands documents on."""
        shards = [stage.manifest.shards for stage in self.stages if stage.manifest.shards]
        return shards[-1] if shards else []

    def stage(self, kind: str) -> StageRecord | None:
        """Return the stage of a name, if it has run."""
        return next((stage for stage in self.stages if stage.kind == kind), None)


def kind_of(stage: str) -> str:
    """``02-c4`` -> ``c4``."""
    return stage.partition("-")[2] or stage


def read_folder(path: Path) -> FolderRecord:
    """Read the manifests of a pipeline's folder.

    Raises:
        DataError: it is none, nothing in it is finished, or what it says of itself is damaged.
    """
    settings_path = path / "pipeline.json"
    begun = _json(settings_path)
    paths = sorted(path.glob("stages/*/manifest.json"))
    if not paths:
        raise DataError(
            f"{path} holds no finished stage (no stages/*/manifest.json); give out= a folder that "
            "llmtrain-data run wrote"
        )
    settings = begun.get("pipeline", {})
    stages: list[StageRecord] = []
    before: Mapping[str, int] = {}
    for manifest_path in paths:
        manifest = Manifest.read(manifest_path)
        timing = _json(manifest_path.with_name("timing.json"))
        stages.append(StageRecord(
            manifest=manifest, seconds=float(timing.get("seconds", 0.0)),
            step_seconds=timing.get("steps", {}), rows=tuple(rows_of(manifest, before)),
        ))  # fmt: skip
        if manifest.shards:
            before = _rows_by_source(manifest.shards)
    sources = begun.get("sources") or sorted({s.source for s in stages[0].manifest.shards})
    return FolderRecord(
        path=path, settings=settings, stages=tuple(stages), stores=tuple(_stores(path)),
        sources=tuple(sources),
    )  # fmt: skip


def rows_of(manifest: Manifest, before: Mapping[str, int] | None = None) -> list[Row]:
    """Return the funnel rows of a stage: one, or one per step of a pass in their order.

    ``before`` is the number of documents of every source that the stage read, where it is known.
    """
    steps = manifest.details.get("steps", {})
    if steps:
        names = [name for name in kind_of(manifest.stage).split("+") if name in steps]
        sources = manifest.details.get("sources", {})
        return [_step_row(manifest.stage, name, steps[name], sources) for name in names]
    counts = manifest.counts
    if not counts.documents_in:
        return []
    out = _rows_by_source(manifest.shards)
    gone = _rows_by_source(manifest.dropped)
    totals = {s: out[s] + gone[s] for s in {**out, **gone}} if not before else dict(before)
    return [Row(
        name=kind_of(manifest.stage), stage=manifest.stage, documents_in=counts.documents_in,
        documents_out=counts.documents_out, bytes_out=counts.bytes_out, tokens=counts.tokens,
        dropped=by_size({**counts.dropped, **counts.quarantined}), deleted=by_size(counts.deleted),
        sources={s: (n, out[s]) for s, n in sorted(totals.items())} if manifest.shards else {},
    )]  # fmt: skip


def _step_row(stage: str, name: str, counts: Mapping[str, Any], sources: Mapping[str, Any]) -> Row:
    of_source = {s: steps[name] for s, steps in sorted(sources.items()) if name in steps}
    return Row(
        name=name, stage=stage, documents_in=counts["documents_in"],
        documents_out=counts["documents_out"], bytes_out=counts.get("bytes_out", 0), tokens=0,
        dropped=by_size(counts.get("dropped", {})), deleted=by_size(counts.get("deleted", {})),
        sources={s: (c["documents_in"], c["documents_out"]) for s, c in of_source.items()},
    )  # fmt: skip


def by_size(numbers: Mapping[str, int]) -> dict[str, int]:
    """The same numbers, largest first."""
    return dict(sorted(numbers.items(), key=lambda item: (-item[1], item[0])))


def _rows_by_source(shards: Sequence[Shard]) -> Counter[str]:
    found: Counter[str] = Counter()
    for shard in shards:
        found[shard.source] += shard.rows
    return found


def _stores(path: Path) -> list[StoreRecord]:
    found = []
    for manifest_path in sorted(path.glob(f"stores/*/*/{MANIFEST}")):
        store = read_manifest(manifest_path.parent)
        found.append(StoreRecord(
            split=manifest_path.parent.parent.name, source=manifest_path.parent.name,
            tokens=store.num_tokens, documents=store.num_documents, vocab_size=store.vocab_size,
        ))  # fmt: skip
    return found


def _json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path} is damaged; put it back, or remove it") from None
    return content
