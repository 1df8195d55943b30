"""Everything a report tells of a folder, read once: manifests, a survey, samples, clusters.

What is read of documents is bounded by ``read_bytes`` for each histogram, and what is kept of them
by the sizes of histograms and samples, however large the corpus is.

    contents = collect(Path("corpus"), read_bytes=2_000_000_000, samples=3)
    contents.fertility("web")   # tokens per word
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.report.record import FolderRecord, StageRecord, read_folder
from data_pipeline.report.survey import (
    DroppedSurvey,
    Int64Array,
    Sample,
    Survey,
    choose,
    survey_dropped,
    take_lengths,
    take_survey,
)
from data_pipeline.shards import read_batches

_MEMBERS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What is known of a folder."""

    record: FolderRecord
    """Its manifests."""
    kept: Survey
    """The documents that are left."""
    extracted: dict[str, Int64Array]
    """Source -> extracted documents by length, as ``survey.take_lengths`` gives it."""
    dropped: DroppedSurvey
    """The documents that were dropped, of all stages."""
    members: dict[str, list[Sample]]
    """Largest clusters: id -> some of the members that went."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the order of their colors."""
        return self.record.sources

    def tokens(self, source: str) -> int:
        """Tokens of a source in all splits."""
        return sum(store.tokens for store in self.record.stores if store.source == source)

    def text_bytes(self, source: str) -> int:
        """UTF-8 bytes of a source's documents that are left."""
        return sum(shard.text_bytes for shard in self.record.kept if shard.source == source)

    def words(self, source: str) -> float:
        """Words of a source, counted, or scaled from the part that was read."""
        read = self.kept.text_bytes[source]
        return self.kept.words[source] * self.text_bytes(source) / read if read else 0.0

    def bytes_per_token(self, source: str) -> float:
        """UTF-8 bytes of text that one token stands for; 0 before tokenizing."""
        tokens = self.tokens(source)
        return self.text_bytes(source) / tokens if tokens else 0.0

    def fertility(self, source: str) -> float:
        """Tokens per word; 0 where there are no words or tokens."""
        words = self.words(source)
        return self.tokens(source) / words if words else 0.0


def collect(out: Path, *, read_bytes: int, samples: int) -> Contents:
    """Read a pipeline's folder.

    Raises:
        DataError: it holds no finished stage, or a shard is missing or damaged.
    """
    record = read_folder(out)
    dropped = DroppedSurvey()
    for stage in record.stages:
        found = survey_dropped(out, stage.manifest.dropped, read_bytes, samples)
        dropped.share = min(dropped.share, found.share)
        dropped.counts |= found.counts
        dropped.samples |= found.samples
    kept = take_survey(out, record.kept, read_bytes)
    first = record.stages[0].manifest.shards
    return Contents(
        record=record, kept=kept, extracted=take_lengths(out, first, read_bytes), dropped=dropped,
        members=_members(out, record, [cluster for _, cluster, _ in kept.clusters], read_bytes),
    )  # fmt: skip


def _members(
    out: Path, record: FolderRecord, clusters: list[str], read_bytes: int
) -> dict[str, list[Sample]]:
    """Return some of the members of clusters that went."""
    members: dict[str, list[Sample]] = {cluster: [] for cluster in clusters}
    wanted = pa.array(clusters, pa.string())
    for stage in record.stages:
        if not clusters or not _drops_duplicates(stage):
            continue
        for shard in choose(stage.manifest.dropped, read_bytes):
            for table in read_batches(out, shard, ["id", "cluster", "source", "url", "text"]):
                for row in table.filter(pc.is_in(table.column("cluster"), wanted)).to_pylist():
                    group = members[row.pop("cluster")]
                    row["text"] = row["text"][:300]
                    if len(group) < _MEMBERS_SHOWN:
                        group.append(Sample(**row))
    return members


def _drops_duplicates(stage: StageRecord) -> bool:
    return any(reason.endswith(".duplicate") for reason in stage.manifest.counts.dropped)
