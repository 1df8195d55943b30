"""One file of chat data to parts of a token store.

A row that is no conversation ends the task with one sentence that names file and line: chat data is
made by hand or by a program, and a hole in it is a fault there. What is too long is counted.

    llmtrain-data chat input=chats.jsonl tokenizer=DIR sequence_length=4096 out=stores/chat
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipeline.chat.encode import ChatRules, EncodedExample, encoded
from data_pipeline.chat.messages import example_of, pair_of
from data_pipeline.chat.rows import EXTRACTOR, chat_rows, payload_digest, place_of
from data_pipeline.manifest import Counts, TaskResult
from data_pipeline.read.inputs import RawFile, document_id
from data_pipeline.read.rows import Row
from data_pipeline.tokens.split import held_out_by_cluster
from data_pipeline.tokens.tokenize import HELD_OUT, EncodedBatch, PartFiles
from llmtrain.data.lineage import schema as record_schema
from llmtrain.data.roles import ANSWER
from llmtrain.errors import DataError
from llmtrain.tokenizer.answers import AnswerEncoder

_BATCH_TOKENS = 1 << 20
_NO_DAY = "'strftime_now' is undefined"


class _Made(NamedTuple):
    document: EncodedExample
    text: str
    record: dict[str, Any]


def chat_file(
    folder: Path, index: int, file: RawFile, rules: ChatRules, id_field: str | None, share: float,
    tokenizer: str, tokenizer_hash: str, part_bytes: int,
) -> TaskResult:  # fmt: skip
    """Encode the conversations of one file; ``share`` of them go to the store ``validation``.

    Raises:
        DataError: a row holds no conversation, or the tokenizer is another one.
    """
    encoder = rules.encoder(tokenizer)
    if encoder.prompts.tokenizer.hash != tokenizer_hash:
        raise DataError(f"{tokenizer} was changed while the command ran; run it again")
    opened = encoder.prompts.tokenizer
    counts, answered, longest = Counts(), Counter[str](), 0
    with PartFiles(
        folder, index, vocab_size=opened.vocab_size, eos_id=opened.eos_id, part_bytes=part_bytes
    ) as parts:
        waiting: dict[str, list[_Made]] = {".": [], HELD_OUT: []}
        for made in _documents(encoder, file, rules, id_field):
            longest = max(longest, len(made.document.ids))
            if _count(counts, made):
                store = HELD_OUT if held_out_by_cluster(made.record["id"], share) else "."
                answered[store] += int((made.document.roles & ANSWER).sum())
                waiting[store].append(made)
                if sum(len(m.document.ids) for m in waiting[store]) >= _BATCH_TOKENS:
                    parts.add(store, _batch(waiting[store]))
                    waiting[store].clear()
        for store, left in waiting.items():
            if left:
                parts.add(store, _batch(left))
        result = parts.close()
    result.counts = counts
    result.details |= {"answered_tokens": dict(answered), "longest": longest}
    return result


def _documents(
    encoder: AnswerEncoder, file: RawFile, rules: ChatRules, id_field: str | None
) -> Iterator[_Made]:
    read = pair_of if rules.kind == "preferences" else example_of
    uses = {"kind": rules.kind, "train_on": "last" if rules.last_only else "all"}
    version = hashlib.sha256((rules.template or "").encode()).hexdigest()[:16]
    made_by = {"name": EXTRACTOR, "version": version, "options": json.dumps(uses, sort_keys=True)}
    for row in chat_rows(file, id_field):
        values = row.values if isinstance(row.values, dict) else {}
        try:
            digest = payload_digest(values)
            document = encoded(encoder, read(values), rules)
            key = _key(file, row, values, id_field)
        except DataError as error:
            hint = "; say which with date=YYYY-MM-DD" if _NO_DAY in str(error) else ""
            raise DataError(f"{place_of(file, row)}: {error}{hint}") from None
        text = encoder.prompts.tokenizer.decode(document.ids[:-1])
        yield _Made(document, text, {
            "id": document_id(file.source, *key), "url": "", "source_file_id": file.sha256,
            "member_offset": row.ordinal, "member_length": row.length, "payload_sha256": digest,
            "extractor": made_by, "extracted_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "text_bytes": len(text.encode()), "cluster": "", "language": "", "edits": [],
        })  # fmt: skip


def _key(
    file: RawFile, row: Row, values: Mapping[str, Any], id_field: str | None
) -> tuple[str, ...]:
    if id_field is None:
        return file.sha256, str(row.ordinal)
    if values.get(id_field) is None:
        raise DataError(f"it has no {id_field!r}; name another id_field=, or leave it out")
    return (str(values[id_field]),)


def _count(counts: Counts, made: _Made) -> bool:
    """Count a document in, and out if it stays; returns whether it does."""
    characters, size = len(made.text), made.record["text_bytes"]
    counts.add(Counts(documents_in=1, characters_in=characters, bytes_in=size))
    if reason := made.document.dropped:
        counts.add(Counts(dropped={reason: 1}, characters_dropped=characters))
        return False
    tokens = len(made.document.ids)
    counts.add(Counts(documents_out=1, characters_out=characters, bytes_out=size, tokens=tokens))
    return True


def _batch(made: Sequence[_Made]) -> EncodedBatch:
    names = [name for name in record_schema().names if name != "num_tokens"]
    schema = pa.schema([record_schema().field(name) for name in names])
    return EncodedBatch(
        np.concatenate([np.array(m.document.ids[:-1]) for m in made]),
        np.cumsum([0, *(len(m.document.ids) - 1 for m in made)]),
        pa.Table.from_pylist([m.record for m in made], schema=schema),
        np.concatenate([m.document.roles for m in made]),
    )
