"""Requests for documents of token stores as JSON lines in, what their records hold as lines out.

A request is what a store keeps of a document, with the ``source`` and ``folder`` of the pipeline
that made it and the ``spans`` of the extracted text that are wanted. An answer names the document
(``folder``, ``source``, ``id``) and holds ``problem`` (empty: proven), ``file``, ``texts`` of the
spans and ``changes`` by the rules.

    llmtrain-data reopen requests=requests.jsonl rules=true
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data_pipeline.config.commands import ReopenConfig
from data_pipeline.config.extract import ExtractConfig, FieldsConfig
from data_pipeline.document import Extractor
from data_pipeline.manifest import Manifest
from data_pipeline.read.raw_files import RawFiles
from data_pipeline.read.reopen import Answer, Reopener, Request
from data_pipeline.report.history import Change, Wanted, histories
from data_pipeline.report.record import read_folder
from llmtrain.config.load import build
from llmtrain.errors import DataError

_KEYS = tuple(entry.name for entry in fields(Request))


def reopen(config: ReopenConfig) -> Iterator[str]:
    """Yield a JSON line for every request of ``config.requests``, folder by folder.

    Raises:
        DataError: the requests are missing, or one of them is none.
    """
    by_folder: dict[str, list[Request]] = {}
    for name, request in _requests(config.requests):
        by_folder.setdefault(name, []).append(request)
    for name, group in by_folder.items():
        folder = Path(name) if name else None
        changes = _changes(folder, group) if config.rules else {}
        for request, answer in _answers(folder, group, config):
            lines = [change._asdict() for change in changes.get(request.id, [])]
            named = {"folder": name, "source": request.source, "id": request.id}
            found = {**named, **asdict(answer), "changes": lines}
            yield json.dumps(found, ensure_ascii=False)


def _requests(name: str) -> Iterator[tuple[str, Request]]:
    """Read (folder, request) of every line."""
    if name == "-":
        text = sys.stdin.read()
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise DataError(
            f"requests={name} does not exist; give a file of JSON lines, or - for stdin"
        )
    for number, line in enumerate(text.splitlines(), 1):
        try:
            plain = json.loads(line)
            yield plain.get("folder", ""), _request(plain)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"line {number} of requests={name} is no request ({error}); expected an object "
                f"with {', '.join(_KEYS)}"
            ) from None


def _request(plain: Mapping[str, Any]) -> Request:
    values = {key: plain[key] for key in _KEYS if key in plain}
    values["extractor"] = Extractor(**plain["extractor"])
    values["spans"] = tuple((int(low), int(high)) for low, high in plain.get("spans", ()))
    return Request(**values)


def _answers(
    folder: Path | None, requests: Sequence[Request], config: ReopenConfig
) -> list[tuple[Request, Answer]]:
    if not config.records:
        return [(request, Answer()) for request in requests]
    raw = (config.raw,) if isinstance(config.raw, str) else config.raw
    names, limit = _settings(folder)
    with Reopener(files=RawFiles(folder, raw), fields=names, max_record_bytes=limit) as reopener:
        return list(reopener.reopen(requests))


def _settings(folder: Path | None) -> tuple[FieldsConfig, int]:
    """Fields and largest record that the first stage of a folder read its input with."""
    paths = sorted(folder.glob("stages/*/manifest.json")) if folder is not None else []
    noted = Manifest.read(paths[0]).settings if paths else {}
    limit = noted.get("extract", {}).get("max_record_bytes", ExtractConfig().max_record_bytes)
    return build(FieldsConfig, noted.get("fields", {}), "fields"), limit


def _changes(folder: Path | None, requests: Iterable[Request]) -> dict[str, list[Change]]:
    if folder is None or not (folder / "pipeline.json").is_file():
        return {}
    wanted = [Wanted(r.id, r.source, r.source_file_id) for r in requests]
    return histories(read_folder(folder), wanted)
