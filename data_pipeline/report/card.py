"""``data_card.json``: what a corpus is made of, for programs; docs/data.md documents every field.

It tells no time and no place and holds no text: the same input and settings give the same card on
every executor and with any number of workers.

    json.loads(Path("corpus/data_card.json").read_text())["tokens"]["total"]
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.report.collect import Contents
from data_pipeline.report.record import Row
from data_pipeline.report.survey import LENGTH_BINS, SCORE_BINS, SIZE_BINS, Int64Array

CARD_NAME = "data_card.json"
"""Name of the card in the pipeline's folder."""
CARD_VERSION = 1
"""Raised when a field changes its meaning or goes."""
_DOMAINS = 100


def data_card(contents: Contents) -> dict[str, Any]:
    """Return the card of a folder."""
    record, kept = contents.record, contents.kept
    last = record.stages[-1].manifest
    return {
        "version": CARD_VERSION,
        "finished": bool(record.stores),
        "settings": record.settings,
        "code": last.code,
        "manifests": {stage.name: stage.manifest.key for stage in record.stages},
        "funnel": [_row(row) for row in record.rows],
        "sources": {source: _source(contents, source) for source in contents.sources},
        "tokens": {
            "total": sum(store.tokens for store in record.stores),
            "train": sum(s.tokens for s in record.stores if s.split == "train"),
            "validation": sum(s.tokens for s in record.stores if s.split == "validation"),
            "vocab_size": max((store.vocab_size for store in record.stores), default=0),
        },
        "survey": {
            "share": round(kept.share, 6),
            "documents": kept.documents.total(),
            "length_characters": _histogram(
                kept.lengths, [round(2 ** (i / 2), 3) for i in range(LENGTH_BINS + 1)]
            ),
            "language": _total(kept.languages),
            "language_score": _histogram(kept.language_scores, _SCORE_EDGES),
            "quality_score": _histogram(kept.quality_scores, _SCORE_EDGES),
            "cluster_size": _histogram(
                kept.cluster_sizes, [2.0**i for i in range(SIZE_BINS + 1)]
            ),
            "domain": dict(_ranked(kept.domains.counts)[:_DOMAINS]),
            "domains": len(kept.domains.counts),
            "domain_error": kept.domains.error,
            "dropped": {
                reason: dict(sorted(counts.items()))
                for reason, counts in sorted(contents.dropped.counts.items())
            },
            "dropped_share": round(contents.dropped.share, 6),
        },
    }  # fmt: skip


_SCORE_EDGES = [round(i / SCORE_BINS, 3) for i in range(SCORE_BINS + 1)]


def _row(row: Row) -> dict[str, Any]:
    return {
        "step": row.name,
        "stage": row.stage,
        "documents_in": row.documents_in,
        "documents_out": row.documents_out,
        "text_bytes_out": row.bytes_out,
        "tokens": row.tokens,
        "dropped": row.dropped,
        "deleted_characters": row.deleted,
        "sources": {
            s: {"documents_in": i, "documents_out": o} for s, (i, o) in row.sources.items()
        },
    }  # fmt: skip


def _source(contents: Contents, source: str) -> dict[str, Any]:
    kept = [shard for shard in contents.record.kept if shard.source == source]
    return {
        "documents": sum(shard.rows for shard in kept),
        "text_bytes": sum(shard.text_bytes for shard in kept),
        "text_characters": sum(shard.text_characters for shard in kept),
        "words": round(contents.words(source)),
        "tokens": contents.tokens(source),
        "tokens_per_word": round(contents.fertility(source), 6),
        "bytes_per_token": round(contents.bytes_per_token(source), 6),
    }


def _histogram(found: Mapping[str, Int64Array], edges: list[float]) -> dict[str, Any]:
    """Edges, and the counts of every source that has any."""
    counts = {s: values.tolist() for s, values in sorted(found.items()) if values.any()}
    return {"edges": edges, "counts": counts}


def _total(found: Mapping[str, Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counts in found.values():
        total.update(counts)
    return dict(_ranked(total))


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """Largest first, then by name: the order does not depend on how they were met."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
