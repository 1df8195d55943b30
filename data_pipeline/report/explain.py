"""One document on one page: where it is or went, and what every rule measured in it.

Every step of the pipeline is asked for its findings, with the settings of the folder, also those
after the one that dropped the document: they see its text as it was then. Stages that compare
documents say which one stayed.

    llmtrain-data explain out=corpus url=https://example.org/a
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.config.report import ExplainConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document, identity
from data_pipeline.report import verdict_page
from data_pipeline.report.record import AFTER_STAGES, FolderRecord, read_folder
from data_pipeline.report.trail import Place, find_documents, find_stored, find_winner, follow
from data_pipeline.report.verdict import Event, Explained
from data_pipeline.stages import replace_file
from data_pipeline.step import Dropped, Finding, Kept
from data_pipeline.steps import STEPS, build_step, step_spec
from llmtrain.config.load import build
from llmtrain.errors import DataError


def explain(config: ExplainConfig) -> list[Explained]:
    """Return what is known of every document with the address or id; write the page if asked.

    Raises:
        DataError: the folder or the document is not there.
    """
    record = read_folder(Path(config.out))
    if not record.settings:
        raise DataError(f"{record.path} has no pipeline.json, so its rules are not known")
    pipeline = build(PipelineConfig, record.settings, "pipeline")
    ids = find_documents(record, url=config.url, doc=config.doc)
    found = [_explain(record, pipeline, id_) for id_ in ids]
    if config.html is not None:
        path = Path(config.html)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, verdict_page.render(found))
    return found


def _explain(record: FolderRecord, pipeline: PipelineConfig, id_: str) -> Explained:
    """Follow one document."""
    trail = follow(record, id_)
    at = {place.stage: place for place in trail}
    last = trail[-1]
    events: list[Event] = []
    current = trail[0].document
    for stage in record.stages:
        place = at.get(stage.name)
        if stage.kind in AFTER_STAGES:
            continue
        names = [name for name in stage.kind.split("+") if name in STEPS]
        if names:
            for event, after in _judge(pipeline, names, stage.name, place, current):
                events.append(event)
                current = after
        elif place is not None:
            events.append(_keyed(record, pipeline, place, current))
        else:
            events.append(Event(name=stage.kind, stage=stage.name, outcome="not reached"))
        if place is not None and not place.reason:
            current = place.document
    stored = None if last.reason else find_stored(record, id_, last.document.source)
    return Explained(
        document=trail[0].document, events=tuple(events), reason=last.reason,
        dropped_at=_step_of(last) if last.reason else "", stored=stored,
        raw_file=_raw_file(record, trail[0].document), text=current.text,
    )  # fmt: skip


def _step_of(place: Place) -> str:
    """Name of the step that dropped a document, with the number of its stage."""
    return f"{place.stage.partition('-')[0]}-{place.reason.partition('.')[0]}"


def _judge(
    pipeline: PipelineConfig, names: Sequence[str], stage: str, place: Place | None, start: Document
) -> Iterator[tuple[Event, Document]]:
    """Yield what every step of a pass says, and the document as it leaves the step."""
    current, gone = start, place is None
    for name in names:
        spec = step_spec(name, pipeline)
        if spec is None:
            yield Event(name=name, stage=stage, outcome="left out: nothing to test with"), current
            continue
        step = build_step(spec)
        seen = replace(current, edits=identity(current.text))
        findings = tuple(step.findings(seen))
        verdict = step(seen)
        reason = verdict.reason if isinstance(verdict, Dropped) else ""
        if isinstance(verdict, Kept):
            outcome, would = _kept(seen, verdict), "would have stayed"
            current = verdict.document
        else:
            notes = "".join(f"; {key}: {value}" for key, value in verdict.notes)
            outcome, would = f"dropped: {reason}{notes}", f"would go: {reason}{notes}"
        if gone:
            outcome = f"not reached; {would}"
        elif place is not None and reason:
            gone = True
        yield Event(name=name, stage=stage, outcome=outcome, findings=findings), current


def _kept(before: Document, verdict: Kept) -> str:
    """Say what a step made of a document that it kept."""
    text = verdict.document.text
    if text == before.text:
        return "kept"
    deleted = ", ".join(f"{rule} {n:,}" for rule, n in sorted(verdict.deleted.items()) if n)
    return f"kept; {len(before.text):,} characters became {len(text):,} ({deleted})"


def _keyed(record: FolderRecord, pipeline: PipelineConfig, place: Place, before: Document) -> Event:
    """Say what a stage that compares documents did with one."""
    name = place.stage.partition("-")[2]
    document = place.document
    if name == "extract":
        limit = pipeline.extract.max_characters
        length = Finding(
            rule="extract.too_long", value=len(document.text), limit=f"at most {limit:,}",
            passed=len(document.text) <= limit,
        )  # fmt: skip
        outcome = f"dropped: {place.reason}" if place.reason else "read"
        return Event(name=name, stage=place.stage, outcome=outcome, findings=(length,))
    if not place.reason:
        change = len(before.text) - len(document.text)
        outcome = f"kept; {change:,} characters deleted" if change else "kept"
        if document.cluster_size > max(1, before.cluster_size):
            outcome += f"; stands for a cluster of {document.cluster_size:,}"
        return Event(name=name, stage=place.stage, outcome=outcome)
    outcome = f"dropped: {place.reason}"
    if document.cluster and document.cluster_size > 1:
        outcome += f"; one of {document.cluster_size:,} in cluster {document.cluster}"
    winner = find_winner(record, place)
    if winner is not None:
        when = f", {winner.timestamp}" if winner.timestamp else ""
        outcome += f"; {winner.id} stayed ({winner.url or 'no address'}{when})"
    return Event(name=name, stage=place.stage, outcome=outcome)


def _raw_file(record: FolderRecord, document: Document) -> str:
    """Name of the raw file a document came from, or its digest where nobody knows the name."""
    path = record.path / "inputs.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = (name for name, entry in known.items() if entry["sha256"] == document.source_file_id)
    return next(names, document.source_file_id)
