"""The stages of datatrove 0.10.1, as a side of benchmarks/data.py; run by datatrove's interpreter.

Filters and splitters are in datatrove_filters.py. A stage reads one file and writes into a folder,
as a task of datatrove's executors does; phases of several tasks are separate stages.

    /data/peer/.venv/bin/python benchmarks/peers/datatrove_stages.py < requests.jsonl
"""

from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datatrove.utils.lid
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.extractors.base import BaseExtractor
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    URLFilter,
)
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import WarcReader
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.batching import batched
from datatrove.utils.tokenization import load_tokenizer
from datatrove_filters import decide, language, make_filter, reader
from loguru import logger
from serve import serve

WORKERS = 2
"""Tasks of every parallel phase: as many as the caller runs of this program."""
ENCODED_AT_ONCE = 10_000
"""Documents, datatrove's default."""


class Resiliparse(BaseExtractor):
    """Resiliparse, which datatrove does not have, in the place of its own extractors."""

    name = "Resiliparse"

    def __init__(self, options: dict[str, Any], timeout: float = 10) -> None:
        super().__init__(timeout)
        self.options = options

    def extract(self, text: str) -> str:
        from resiliparse.extract.html2text import extract_plain_text

        return str(extract_plain_text(text, **self.options))


def make_writer(kind: str, out: Path) -> DiskWriter:
    """Make a writer: the default of datatrove's examples, or the faster Parquet."""
    return JsonlWriter(str(out)) if kind == "jsonl" else ParquetWriter(str(out))


def run(steps: Sequence[PipelineStep], rank: int = 0, world: int = 1) -> None:
    """Pipe documents through steps, as an executor does for one task.

    The first step has its input for itself: what it reads is not shared out among the tasks.
    """
    data: Any = steps[0](None, *((0, 1) if isinstance(steps[0], BaseReader) else (rank, world)))
    for step in steps[1:]:
        data = step(data, rank, world)
    if data is not None:
        deque(data, maxlen=0)


def total(step: PipelineStep, *names: str) -> int:
    """Add up counters of a step."""
    return sum(int(step.stats[name].total) for name in names)


def filters(
    input: str, out: str, names: list[str], splitter: str, sentences: str, writer: str, rank: int
) -> dict[str, int]:
    """Read documents, judge them, write those kept and those dropped."""
    made = [
        make_filter(name, splitter, sentences, make_writer(writer, Path(out, "dropped", name)))
        for name in names
    ]
    run([reader(input), *made, make_writer(writer, Path(out, "kept"))], rank, WORKERS)
    return {
        "documents": total(made[0], "total"),
        "kept": total(made[-1], "forwarded"),
    }


def extract(
    input: str, out: str, method: str, options: dict[str, Any], writer: str
) -> dict[str, int]:
    """Read a WARC file, take the text of its pages, write it."""
    extractor = Resiliparse(options) if method == "resiliparse" else Trafilatura()
    warc = Path(input)
    run(
        [
            WarcReader(str(warc.parent), glob_pattern=warc.name),
            extractor,
            make_writer(writer, Path(out)),
        ]
    )
    return {"documents": total(extractor, "total"), "kept": total(extractor, "forwarded")}


def signatures(input: str, out: str, splitter: str, rank: int) -> None:
    """MinHash, first phase: the signatures of a task's documents."""
    step = MinhashDedupSignature(f"{out}/signatures", MinhashConfig(), language(splitter))
    run([reader(input), step], rank, WORKERS)


def buckets(out: str, rank: int) -> None:
    """MinHash, second phase: pairs, half of the bands each."""
    config = MinhashConfig()
    for band in range(rank, config.num_buckets, WORKERS):
        step = MinhashDedupBuckets(f"{out}/signatures", f"{out}/pairs", config=config)
        run([step], band, config.num_buckets)


def cluster(out: str) -> None:
    """MinHash, third phase: clusters, one task."""
    step = MinhashDedupCluster(f"{out}/pairs", f"{out}/remove", config=MinhashConfig())
    run([step])


def remove(input: str, out: str, writer: str, rank: int) -> dict[str, int]:
    """MinHash, last phase: write the documents of a task that stay, and those that go."""
    step = MinhashDedupFilter(f"{out}/remove", make_writer(writer, Path(out, "dropped")))
    run([reader(input), step, make_writer(writer, Path(out, "kept"))], rank, WORKERS)
    return {"documents": total(step, "total"), "kept": total(step, "forwarded")}


def tokenize(input: str, out: str, tokenizer: str, eos: str, rank: int) -> dict[str, int]:
    """Encode a task's documents and write them, shuffled, to a file of tokens."""
    step = DocumentTokenizer(out, tokenizer, eos_token=eos, seed=rank)
    run([reader(input), step], rank, WORKERS)
    return {"tokens": total(step, "tokens")}


def encode(input: str, tokenizer: str) -> dict[str, int]:
    """Encode the texts of a file, a batch at a time, and nothing else."""
    encoder = load_tokenizer(tokenizer)
    tokens = 0
    for batch in batched(reader(input).run(None, 0, 1), ENCODED_AT_ONCE):
        encoded = encoder.encode_batch([document.text for document in batch])
        tokens += sum(len(one.ids) for one in encoded)
    return {"tokens": tokens}


def merge(out: str, merged: str) -> None:
    """Put the files of tokens together, documents shuffled."""
    run([DocumentTokenizerMerger(out, merged, "tokens", seed=0, progress=False)])


@cache
def url_filter() -> URLFilter:
    """Return the filter of addresses, whose lists of 4.6 million domains load once."""
    return URLFilter()


def path_filters(
    input: str, out: str, method: str, options: dict[str, Any], model: str, rank: int
) -> dict[str, int]:
    """The whole path up to deduplication, in the order of FineWeb, with its writers."""
    datatrove.utils.lid.cached_asset_path_or_download = lambda *_, **__: model
    warc = Path(input)

    def dropped(name: str) -> DiskWriter:
        return JsonlWriter(f"{out}/dropped/{name}")

    extractor = Resiliparse(options) if method == "resiliparse" else Trafilatura()
    source = WarcReader(str(warc.parent), glob_pattern=warc.name)
    addresses = url_filter()
    addresses.exclusion_writer = dropped("url")
    kept = JsonlWriter(f"{out}/filtered", output_filename="${rank}.jsonl.gz")
    run([
        source,
        addresses,
        extractor,
        LanguageFilter(["en"], exclusion_writer=dropped("language")),
        GopherRepetitionFilter(exclusion_writer=dropped("repetition")),
        GopherQualityFilter(exclusion_writer=dropped("quality")),
        C4QualityFilter(filter_no_terminal_punct=False, exclusion_writer=dropped("c4")),
        FineWebQualityFilter(exclusion_writer=dropped("fineweb")),
        kept,
    ], rank, WORKERS)  # fmt: skip
    return {"documents": total(source, "documents"), "kept": total(kept, "total")}


def path_tokens(input: str, out: str, tokenizer: str, eos: str, rank: int) -> dict[str, int]:
    """The rest of the path: leave duplicates out, replace addresses of people, encode."""
    step = DocumentTokenizer(f"{out}/tokens", tokenizer, eos_token=eos, seed=rank)
    stay = MinhashDedupFilter(f"{out}/remove", JsonlWriter(f"{out}/dropped/minhash"))
    run([reader(input), stay, PIIFormatter(), step], rank, WORKERS)
    return {"documents": total(stay, "forwarded"), "tokens": total(step, "tokens")}


STAGES = {
    stage.__name__: stage
    for stage in (
        filters, extract, signatures, buckets, cluster, remove, tokenize, encode, merge,
        path_filters, path_tokens, decide,
    )
}  # fmt: skip

if __name__ == "__main__":
    logger.remove()
    serve(STAGES)
