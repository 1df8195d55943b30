"""What a pipeline did to documents it kept: which rules edited them, and what they were labelled.

Only what changed a document is told. Many documents are followed at once: a shard is opened once,
and only shards that can hold one of them. Stages whose folders were removed tell nothing.

    histories(read_folder(Path("corpus")), [Wanted("3f9c...", "web", "39e5...")])
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document, identity
from data_pipeline.report.record import AFTER_STAGES, FolderRecord, StageRecord
from data_pipeline.shards import from_table
from data_pipeline.step import Kept
from data_pipeline.steps import STEPS, build_step, step_spec
from llmtrain.config.load import build


class Wanted(NamedTuple):
    """A document to follow."""

    id: str
    """Its id."""
    source: str
    """Its source in the pipeline."""
    source_file_id: str
    """sha256 hex of its raw file."""


class Change(NamedTuple):
    """What one step or stage changed in a document."""

    step: str
    """Step or stage, with the number of its stage: ``02-c4``."""
    deleted: dict[str, int]
    """Characters deleted, by rule."""
    labels: dict[str, str]
    """What was noted of the document: language, cluster, scores."""


def histories(record: FolderRecord, wanted: Iterable[Wanted]) -> dict[str, list[Change]]:
    """Return what changed every document that is found, in order of the stages."""
    left = {one.id: one for one in wanted}
    pipeline = build(PipelineConfig, record.settings, "pipeline") if record.settings else None
    changes: dict[str, list[Change]] = {}
    before: dict[str, Document] = {}
    stems: dict[str, str] = {}
    for number, stage in enumerate(record.stages):
        if stage.kind in AFTER_STAGES:
            break
        if number == 0:
            stems = _first_stems(stage, left.values())
        found = _find(record.path, stage, {id_: stems.get(id_, "") for id_ in left})
        for id_, (document, stem) in found.items():
            changes.setdefault(id_, [])
            if id_ in before:
                changes[id_] += _changes(stage, pipeline, before[id_], document)
            before[id_], stems[id_] = document, stem
        left = {id_: one for id_, one in left.items() if id_ in found}
    return changes


def _first_stems(stage: StageRecord, wanted: Iterable[Wanted]) -> dict[str, str]:
    """Id -> what the name of its shard begins with: source and number of the raw file."""
    numbers = {(e["source"], e["digest"]): i for i, e in enumerate(stage.manifest.inputs)}
    known = {one.id: (one.source, numbers.get((one.source, one.source_file_id))) for one in wanted}
    return {
        id_: f"{source}-{number:05d}-" for id_, (source, number) in known.items()
        if number is not None
    }  # fmt: skip


def _find(
    out: Path, stage: StageRecord, stems: Mapping[str, str]
) -> dict[str, tuple[Document, str]]:
    """Return document and shard name of every id that a stage kept."""
    found: dict[str, tuple[Document, str]] = {}
    for shard in stage.manifest.shards:
        path = out / shard.path
        wanted = [i for i, stem in stems.items() if i not in found and path.name.startswith(stem)]
        if not wanted or not path.is_file():
            continue
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["id"]).column("id")
                rows = pc.indices_nonzero(pc.is_in(ids, pa.array(wanted)))
                if len(rows):
                    documents = from_table(file.read_row_group(group).take(rows))
                    found |= {d.id: (d, f"{path.stem}.") for d in documents}
    return found


def _changes(
    stage: StageRecord, pipeline: PipelineConfig | None, before: Document, after: Document
) -> list[Change]:
    """Return what a stage changed, by step where it is a pass of several."""
    number = stage.name.partition("-")[0]
    names = [name for name in stage.kind.split("+") if name in STEPS]
    labels = _labels(before, after)
    edits: list[Change] = []
    if after.text != before.text:
        if pipeline is not None:
            edits = _edits(number, names, pipeline, before, after)
        if not edits:
            edits = [Change(stage.name, {stage.kind: len(before.text) - len(after.text)}, {})]
    if labels:
        edits.append(Change(stage.name, {}, labels))
    return edits


def _edits(
    number: str, names: Sequence[str], pipeline: PipelineConfig, before: Document, after: Document
) -> list[Change]:
    """Run the steps of a pass again; nothing where they no longer lead to the same text."""
    changes: list[Change] = []
    current = before
    for name in names:
        spec = step_spec(name, pipeline)
        if spec is None:
            continue
        verdict = build_step(spec)(replace(current, edits=identity(current.text)))
        if isinstance(verdict, Kept):
            if verdict.document.text != current.text:
                deleted = {rule: n for rule, n in sorted(verdict.deleted.items()) if n}
                changes.append(Change(f"{number}-{name}", deleted, {}))
            current = verdict.document
    return changes if current.text == after.text else []


def _labels(before: Document, after: Document) -> dict[str, str]:
    """Return what is noted of a document now and was not before."""
    labels = {k: v for k, v in after.metadata.items() if before.metadata.get(k) != v}
    if (after.language, after.language_score) != (before.language, before.language_score):
        labels |= {"language": after.language, "language_score": f"{after.language_score:.3f}"}
    if after.cluster != before.cluster or after.cluster_size != before.cluster_size:
        labels |= {"cluster": after.cluster, "cluster_size": str(after.cluster_size)}
    return labels
