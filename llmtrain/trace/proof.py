"""Ask the data pipeline for the raw records behind documents, and compare them with the tokens.

The pipeline is another program with other dependencies: it runs as ``llmtrain-data reopen`` and is
given requests as JSON lines. A stretch is proven when its record is (see ``data_pipeline``), and
every run of its text that the edit map leads back stands in the text that was extracted again.

    answers = ask(run, seen, TraceConfig(run="runs/demo", step=12, verify=True))
    verdict(seen[0], answers[seen[0].document.key])    # '' where proven
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.config.trace import TraceConfig
from llmtrain.data.manifest import MANIFEST
from llmtrain.errors import ConfigError, DataError
from llmtrain.trace.documents import DocumentKey, KnownDocument, Seen
from llmtrain.trace.run import TracedRun

INPUTS = "inputs.json"
"""What every folder of the data pipeline has."""
Span = tuple[int, int]
"""Characters [start, end) of an extracted text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the data pipeline says of a document."""

    problem: str = ""
    """Why its record is not proven, or nothing."""
    file: str = ""
    """Raw file that was opened."""
    texts: Mapping[Span, str] = field(default_factory=dict)
    """Wanted spans of the text that was extracted again."""
    changes: tuple[Mapping[str, Any], ...] = ()
    """What the rules changed: step, deleted characters by rule, labels."""


def ask(run: TracedRun, seen: Iterable[Seen], asked: TraceConfig) -> dict[DocumentKey, Answer]:
    """Return what the pipeline says of every document that has a record, if it is to be asked.

    Raises:
        ConfigError: the folder that is given is none of it.
        DataError: it does not run.
    """
    if not (asked.rules or asked.verify):
        return {}
    documents, spans = dict[DocumentKey, KnownDocument](), dict[DocumentKey, set[Span]]()
    for one in seen:
        if one.document.record is not None:
            documents[one.document.key] = one.document
            own = {(origin, origin + length) for _, origin, length in one.runs}
            spans.setdefault(one.document.key, set()).update(own)
    keys = list(documents)
    folders = {key: _folder(run, key, asked.data) for key in keys}
    if not asked.verify:  # only a folder of `llmtrain-data run` can tell what its rules did
        keys = [key for key in keys if (Path(folders[key]) / "pipeline.json").is_file()]
    requests = [_request(run, documents[key], folders[key], sorted(spans[key])) for key in keys]
    answers: dict[DocumentKey, Answer] = {}
    by_id = {
        (r["folder"], r["source"], r["id"]): key for r, key in zip(requests, keys, strict=True)
    }
    for line in _reopen(requests, asked) if requests else ():
        key = by_id[line["folder"], line["source"], line["id"]]
        answers[key] = Answer(
            problem=line["problem"], file=line["file"], changes=tuple(line["changes"]),
            texts=dict(zip(sorted(spans[key]), line["texts"], strict=False)),
        )  # fmt: skip
    return answers


def verdict(seen: Seen, answer: Answer | None) -> str:
    """Return why a stretch is not proven, or nothing."""
    if answer is None:
        return "its store was written by another program and holds no record"
    if problem := answer.problem or seen.document.problem:
        return problem
    text, (first, _) = seen.text or "", seen.characters or (0, 0)
    for final, origin, length in seen.runs:
        here = text[final - first : final - first + length]
        if answer.texts[origin, origin + length] != here:
            return (
                f"its tokens say {here[:40]!r}, the extracted text says "
                f"{answer.texts[origin, origin + length][:40]!r} at character {origin:,}"
            )
    return ""


def _request(
    run: TracedRun, document: KnownDocument, folder: str, spans: Sequence[Span]
) -> dict[str, Any]:
    record = document.record
    if record is None:
        raise ValueError(f"document {document.key} has no record")
    return {
        "folder": folder, "id": record.id, "source": _source(run, document.key),
        "url": record.url, "source_file_id": record.source_file_id,
        "member_offset": record.member_offset, "member_length": record.member_length,
        "payload_sha256": record.payload_sha256, "extracted_sha256": record.extracted_sha256,
        "extractor": {
            "name": record.extractor_name, "version": record.extractor_version,
            "options": record.extractor_options,
        },
        "spans": [list(span) for span in spans],
    }  # fmt: skip


def _source(run: TracedRun, key: DocumentKey) -> str:
    """Name the pipeline knew the source by: ids are made of it."""
    folder = run.store(key.source).folder_of(key.document)
    notes = json.loads(folder.content(MANIFEST)).get("notes", {})
    return str(notes.get("source", Path(folder.name).name))


def _folder(run: TracedRun, key: DocumentKey, given: str | None) -> str:
    """Folder of the pipeline that wrote a document's store, or an empty string.

    ``llmtrain-data run`` writes OUT/stores/SPLIT/SOURCE, ``llmtrain-data tokenize`` OUT and, of
    documents held out, OUT/validation.
    """
    if given is not None:
        if not (Path(given) / INPUTS).is_file():
            raise ConfigError(
                f"data={given} is no folder of llmtrain-data: it has no {INPUTS}; give the out of "
                "`llmtrain-data run`, or OUT/.pipeline of `llmtrain-data tokenize`"
            )
        return given
    store = Path(run.store(key.source).folder_of(key.document).name).absolute()
    for folder in (*store.parents[2:3], store / ".pipeline", store.parent / ".pipeline"):
        if (folder / INPUTS).is_file():
            return str(folder)
    return ""


def _reopen(requests: Sequence[Mapping[str, Any]], asked: TraceConfig) -> Iterator[dict[str, Any]]:
    """Yield the answers of ``llmtrain-data reopen``."""
    raw = [asked.raw] if isinstance(asked.raw, str) else list(asked.raw)
    command = [
        sys.executable, "-m", "data_pipeline", "reopen", "requests=-", f"raw={json.dumps(raw)}",
        f"records={json.dumps(asked.verify)}", f"rules={json.dumps(asked.rules)}",
    ]  # fmt: skip
    lines = "".join(f"{json.dumps(request)}\n" for request in requests)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().removeprefix("error: ") or "it said nothing"
        raise DataError(f"llmtrain-data reopen failed with status {done.returncode}: {said}")
    for line in done.stdout.splitlines():
        yield json.loads(line)
