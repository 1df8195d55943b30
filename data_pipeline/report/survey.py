"""One look at the documents of some shards: lengths, words, languages, scores, domains, clusters.

Documents stream by, a row group in memory at a time; what is kept is histograms and counters of
bounded size, by source. Of more text than asked for, shards chosen by their digests are read, so
that the same corpus gives the same numbers.

    survey = take_survey(Path("corpus"), record.kept, read_bytes=2_000_000_000)
    survey.words.total() / survey.documents.total()
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.shards import Shard, read_batches, text_lengths

Int64Array = npt.NDArray[np.int64]

LENGTH_BINS = 44
"""Bins of lengths: bin i holds 2^(i/2) up to 2^((i+1)/2) characters."""
SCORE_BINS = 20
"""Bins of scores in [0, 1], all of one width."""
SIZE_BINS = 24
"""Bins of cluster sizes: bin i holds 2^i up to 2^(i+1) members."""
LARGEST_CLUSTERS = 5
"""Clusters that are remembered by name."""
_COLUMNS = ("text", "url", "language", "language_score", "cluster", "cluster_size", "metadata")
_HOST = r"^[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?(?:www\.)?(?P<host>[^/?#:]+)"
_NUMBER = r"^[+-]?[0-9]+(\.[0-9]*)?$"
_IS_SPACE = np.isin(np.arange(256), [9, 10, 11, 12, 13, 28, 29, 30, 31, 32])
"""Whether a byte of UTF-8 is white space; wider white space is taken for a character."""


@dataclass(slots=True)
class TopCounter:
    """Counts names in bounded room: what is rare by then is forgotten when it is full."""

    capacity: int = 100_000
    """Names it holds."""
    counts: Counter[str] = field(default_factory=Counter)
    """Name -> number; too small by at most ``error``."""
    error: int = 0
    """Largest number that may have been forgotten of any name."""

    def add(self, numbers: dict[str, int]) -> None:
        """Count names."""
        self.counts.update(numbers)
        if len(self.counts) > self.capacity:
            best = self.counts.most_common(self.capacity // 2)
            left = self.counts.most_common()[len(best)][1]
            self.error += left
            self.counts = Counter(dict(best))


@dataclass(slots=True)
class Survey:
    """What was seen, by source."""

    share: float = 1.0
    """Share of the text that was read."""
    documents: Counter[str] = field(default_factory=Counter)
    """Documents read."""
    text_bytes: Counter[str] = field(default_factory=Counter)
    """UTF-8 bytes read."""
    words: Counter[str] = field(default_factory=Counter)
    """Runs of characters that are no ASCII white space."""
    lengths: dict[str, Int64Array] = field(default_factory=dict)
    """Documents by length in characters, [LENGTH_BINS]."""
    languages: dict[str, Counter[str]] = field(default_factory=dict)
    """Documents by language; an empty name where nobody asked."""
    language_scores: dict[str, Int64Array] = field(default_factory=dict)
    """Documents by language score, [SCORE_BINS]; those with a language only."""
    quality_scores: dict[str, Int64Array] = field(default_factory=dict)
    """Documents by quality score, [SCORE_BINS]; those with one only."""
    cluster_sizes: dict[str, Int64Array] = field(default_factory=dict)
    """Documents by the size of the near-duplicate cluster they stand for, [SIZE_BINS]."""
    domains: TopCounter = field(default_factory=TopCounter)
    """Documents by host, all sources."""
    clusters: list[tuple[int, str, str]] = field(default_factory=list)
    """(members, id, address of who stayed) of the largest clusters, largest first."""


def take_survey(out: Path, shards: Sequence[Shard], read_bytes: int) -> Survey:
    """Look at the documents of shards, at most about ``read_bytes`` of text.

    Raises:
        DataError: a shard is missing or damaged.
    """
    chosen = choose(shards, read_bytes)
    survey = Survey(share=_share(chosen, shards))
    for shard in chosen:
        for table in read_batches(out, shard, _COLUMNS):
            _add(survey, shard.source, table)
    return survey


def take_lengths(out: Path, shards: Sequence[Shard], read_bytes: int) -> dict[str, Int64Array]:
    """Return source -> documents by length in characters, [LENGTH_BINS]."""
    lengths: dict[str, Int64Array] = {}
    for shard in choose(shards, read_bytes):
        for table in read_batches(out, shard, ["text"]):
            _count(lengths, shard.source, length_bins(table), LENGTH_BINS)
    return lengths


def choose(shards: Sequence[Shard], read_bytes: int) -> list[Shard]:
    """Return shards with about ``read_bytes`` of text, by their digests, in their own order."""
    chosen: set[str] = set()
    size = 0
    for shard in sorted(shards, key=lambda shard: shard.digest):
        if chosen and size + shard.text_bytes > read_bytes:
            continue
        chosen.add(shard.path)
        size += shard.text_bytes
    return [shard for shard in shards if shard.path in chosen]


def _share(chosen: Sequence[Shard], shards: Sequence[Shard]) -> float:
    total = sum(shard.text_bytes for shard in shards)
    return sum(shard.text_bytes for shard in chosen) / total if total else 1.0


def _add(survey: Survey, source: str, table: pa.Table) -> None:
    """Count one row group."""
    survey.documents[source] += table.num_rows
    survey.text_bytes[source] += int(text_lengths(table).sum())
    survey.words[source] += sum(count_words(chunk) for chunk in table.column("text").chunks)
    _count(survey.lengths, source, length_bins(table), LENGTH_BINS)
    survey.languages.setdefault(source, Counter()).update(_values(table.column("language")))
    labelled = table.filter(pc.not_equal(table.column("language"), ""))
    scores = _numbers(labelled.column("language_score"))
    _count(survey.language_scores, source, _score_bins(scores), SCORE_BINS)
    quality = pc.map_lookup(table.column("metadata"), "quality", "first").drop_null()
    quality = quality.filter(pc.match_substring_regex(quality, _NUMBER))  # a source may have words
    scores = _numbers(quality.cast(pa.float64()))
    _count(survey.quality_scores, source, _score_bins(scores), SCORE_BINS)
    sizes = _numbers(table.column("cluster_size"))
    bins = np.log2(np.maximum(sizes, 1)).astype(np.int64)
    _count(survey.cluster_sizes, source, bins, SIZE_BINS)
    hosts = pc.struct_field(pc.extract_regex(table.column("url"), _HOST), "host").drop_null()
    survey.domains.add(_values(pc.utf8_lower(hosts)))
    _remember_clusters(survey, table)


def count_words(texts: pa.LargeStringArray) -> int:
    """Runs of bytes without white space in some texts; the end of a text ends a word."""
    _, places, content = texts.buffers()
    if content is None:
        return 0
    starts = np.frombuffer(places, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    space = _IS_SPACE[np.frombuffer(content, np.uint8)[starts[0] : starts[-1]]]
    before = np.concatenate([[True], space[:-1]])
    inside = starts[:-1] - starts[0]
    before[inside[inside < len(space)]] = True
    return int((~space & before[: len(space)]).sum())


def _remember_clusters(survey: Survey, table: pa.Table) -> None:
    large = table.filter(pc.greater(table.column("cluster_size"), 1))
    columns = (large.column(name).to_pylist() for name in ("cluster_size", "cluster", "url"))
    found = [*survey.clusters, *zip(*columns, strict=True)]
    survey.clusters = heapq.nsmallest(LARGEST_CLUSTERS, found, key=lambda c: (-c[0], c[1]))


def length_bins(table: pa.Table) -> Int64Array:
    """Bin of every text's length in characters, [rows]."""
    lengths = _numbers(pc.utf8_length(table.column("text")))
    return (2 * np.log2(np.maximum(lengths, 1))).astype(np.int64)


def _score_bins(scores: npt.NDArray[np.float64]) -> Int64Array:
    return (np.clip(scores, 0.0, 1.0) * SCORE_BINS).astype(np.int64)


def _count(into: dict[str, Int64Array], source: str, bins: Int64Array, number: int) -> None:
    """Add bins to a source's histogram; what lies above the last bin counts there."""
    if len(bins):
        seen = np.bincount(np.minimum(bins, number - 1), minlength=number)
        into[source] = into.get(source, np.zeros(number, np.int64)) + seen


def _values(column: pa.ChunkedArray) -> dict[str, int]:
    counts = pc.value_counts(column)
    return dict(zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True))


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    return np.asarray(column.to_numpy(), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The beginning of a document that is shown."""

    id: str
    """Its id."""
    source: str
    """Its source."""
    url: str
    """Its address, or an empty string."""
    text: str
    """The first characters of its text."""


@dataclass(slots=True)
class DroppedSurvey:
    """What was seen of dropped documents."""

    share: float = 1.0
    """Share of their text that lies in the shards that were read."""
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """Reason -> source -> documents, in those shards."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """Reason -> the documents with the smallest ids, which are hashes."""


def survey_dropped(
    out: Path, shards: Sequence[Shard], read_bytes: int, number: int, characters: int = 600
) -> DroppedSurvey:
    """Count the dropped documents of some shards, and take ``number`` of each reason."""
    chosen = choose(shards, read_bytes)
    found = DroppedSurvey(share=_share(chosen, shards))
    smallest: dict[str, list[str]] = defaultdict(list)
    places: dict[str, Shard] = {}
    for shard in chosen:
        for table in read_batches(out, shard, ["id", "reason"]):
            for reason, rows in _values(table.column("reason")).items():
                found.counts.setdefault(reason, Counter())[shard.source] += rows
                ids = table.filter(pc.equal(table.column("reason"), reason)).column("id")
                first = pc.take(ids, pc.select_k_unstable(ids, number, [("id", "ascending")]))
                for id_ in first.to_pylist():
                    places[id_] = shard
                smallest[reason] = heapq.nsmallest(number, [*smallest[reason], *first.to_pylist()])
            places = {i: places[i] for ids in smallest.values() for i in ids}
    fetched = _fetch(out, places, characters)
    found.samples = {reason: [fetched[i] for i in ids] for reason, ids in sorted(smallest.items())}
    return found


def _fetch(out: Path, places: dict[str, Shard], characters: int) -> dict[str, Sample]:
    """Read the beginnings of documents of which the shards are known."""
    wanted = pa.array(sorted(places), pa.string())
    found: dict[str, Sample] = {}
    for shard in {shard.path: shard for shard in places.values()}.values():
        for table in read_batches(out, shard, ["id", "source", "url", "text"]):
            rows = table.filter(pc.is_in(table.column("id"), wanted))
            start = pc.utf8_slice_codeunits(rows.column("text"), 0, characters)
            columns = (rows.column(name).to_pylist() for name in ("id", "source", "url"))
            for id_, source, url, text in zip(*columns, start.to_pylist(), strict=True):
                found[id_] = Sample(id=id_, source=source, url=url, text=text)
    return found
