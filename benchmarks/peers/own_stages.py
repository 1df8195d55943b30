"""The project's own stages, as a side of benchmarks/data.py.

What the pipeline does in a stage runs here as it does there: the same tasks on the same shards, by
an executor with workers of its own, which stay from request to request; the files are the same.

    python benchmarks/peers/own_side.py < requests.jsonl
"""

import atexit
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.config.extract import FieldsConfig
from data_pipeline.config.run import PipelineConfig, RunConfig
from data_pipeline.dedup.stages import KEYED
from data_pipeline.document import Document
from data_pipeline.execute.local import LocalExecutor
from data_pipeline.jobs import shard_inputs, shard_jobs
from data_pipeline.pipeline import Pipeline, run_pipeline
from data_pipeline.read.extract_task import extract_file
from data_pipeline.read.inputs import find_raw_files
from data_pipeline.shards import Shard, read_batches, read_documents
from data_pipeline.stages import Context
from data_pipeline.step import Kept, Step
from data_pipeline.steps import StepSpec, build_step, step_spec
from data_pipeline.transform import apply_steps
from llmtrain.config.load import load
from llmtrain.tokenizer.encoders import Encoder, choose_encoder, make_encoder
from llmtrain.tokenizer.tokenizer import load as load_tokenizer

WORKERS = 2
"""Processes of a stage that has a driver."""
END_OF_TEXT = "<|endoftext|>"
"""Piece after every document of the tokenizer that both sides use."""


@cache
def pipeline(overrides: tuple[str, ...]) -> PipelineConfig:
    """Return the settings that ``llmtrain-data run`` would make of some overrides."""
    given = ["input.web=unused", "out=unused", *overrides]
    return load("data_run", given, RunConfig).pipeline


def steps_of(overrides: Sequence[str]) -> list[StepSpec]:
    """Return the rules of the stages that the overrides name, in their order."""
    config = pipeline(tuple(overrides))
    made = [step_spec(name, config) for name in config.stages]
    return [spec for spec in made if spec is not None]


def extract(inputs: list[str], root: str, overrides: list[str]) -> dict[str, Any]:
    """Read WARC files, take the text of their pages, write shards below ``root``."""
    config = pipeline(tuple(overrides))
    stage = Pipeline(config, Context(out=Path(root), executor=executor())).stage("extract", {}, [])
    common = {"stage": stage.name, "settings": config.extract, "fields": FieldsConfig()}
    files = find_raw_files({"web": inputs})
    jobs = [
        ({**common, "number": i, "file": file}, Path(file.path).stat().st_size)
        for i, file in enumerate(files)
    ]
    results = stage.run("extract", extract_file, jobs)
    shards = [shard for result in results for shard in result.shards]
    return {
        "documents": sum(result.counts.documents_in for result in results),
        "kept": sum(shard.rows for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }


def filters(
    root: str, shards: list[dict[str, Any]], out: str, overrides: list[str]
) -> dict[str, int]:
    """Judge the documents of shards in one pass, write those kept and those dropped."""
    driver = Pipeline(pipeline(tuple(overrides)), _context(root, out))
    given = list(map(_shard, shards))
    stage = driver.stage("filters", {}, shard_inputs(given))
    common = {"stage": stage.name, "out": out, "steps": steps_of(overrides)}
    results = stage.run("steps", apply_steps, shard_jobs(given, common))
    return {
        "documents": sum(result.counts.documents_in for result in results),
        "kept": sum(result.counts.documents_out for result in results),
    }


def _context(root: str, out: str) -> Context:
    """Return where a stage runs: a folder that has the shards of ``root`` in it."""
    stages = Path(out) / "stages"
    stages.mkdir(parents=True)
    for folder in Path(root, "stages").iterdir():
        (stages / folder.name).symlink_to(folder)
    return Context(out=Path(out), executor=executor())


def keyed(
    root: str, shards: list[dict[str, Any]], out: str, name: str, overrides: list[str]
) -> dict[str, int]:
    """Run a stage that sees many documents at once, as the driver does, on workers of its own."""
    driver = Pipeline(pipeline(tuple(overrides)), _context(root, out))
    left = KEYED[name](driver, name, list(map(_shard, shards)))
    return {
        "documents": sum(shard["rows"] for shard in shards),
        "kept": sum(shard.rows for shard in left),
    }


def run(inputs: list[str], out: str, overrides: list[str]) -> dict[str, Any]:
    """Run a whole pipeline, raw files to token stores, on workers of its own."""
    given = [f"input.web=[{','.join(inputs)}]", f"out={out}", *overrides]
    config = load("data_run", given, RunConfig)
    rows = run_pipeline(config, Context(out=Path(out), executor=executor()))
    return {
        "documents": rows[0].documents_in,
        "tokens": rows[-1].tokens,
        "stages": {row.stage: row.seconds for row in rows},
    }


@cache
def executor() -> LocalExecutor:
    """Return the executor that every request of this process uses, its workers kept warm."""
    made = LocalExecutor(WORKERS, time_limit_s=3600.0)
    made.__enter__()
    atexit.register(made.__exit__, None, None, None)
    return made


def encode(root: str, shards: list[dict[str, Any]], tokenizer: str) -> dict[str, int]:
    """Encode the texts of shards, and nothing else."""
    encoder = _encoder(tokenizer)
    tokens = 0
    for shard in map(_shard, shards):
        for table in read_batches(Path(root), shard, ["text"]):
            texts = table.column("text").to_pylist()
            tokens += int(encoder.encode(texts).offsets[-1])
    return {"tokens": tokens}


@cache
def _encoder(path: str) -> Encoder:
    """Return the encoder the pipeline would choose, tried on its own probes."""
    tokenizer = load_tokenizer(path)
    return make_encoder(tokenizer, fast=choose_encoder(tokenizer, ()).fast)


def decide(
    root: str, shards: list[dict[str, Any]], out: str, steps: dict[str, list[str]]
) -> dict[str, int]:
    """Write what every filter and each of its rules say of every document as it came.

    ``steps`` are overrides that name the filter's stage, by the name the peer gives the filter.
    """
    made = {name: build_step(steps_of(overrides)[0]) for name, overrides in steps.items()}
    documents = 0
    with Path(out).open("w", encoding="utf-8") as file:
        for shard in map(_shard, shards):
            for document in read_documents(Path(root), shard):
                documents += 1
                for name, step in made.items():
                    line = {"id": document.id, "filter": name, **_decision(document, step)}
                    file.write(json.dumps(line) + "\n")
    return {"documents": documents}


def _decision(document: Document, step: Step) -> dict[str, Any]:
    verdict = step(document)
    found = {
        finding.rule.partition(".")[2]: (finding.value, finding.passed)
        for finding in step.findings(document)
    }
    reason = text = ""
    if isinstance(verdict, Kept):
        text = hashlib.sha256(verdict.document.text.encode()).hexdigest()
    else:
        reason = verdict.reason
    return {
        "kept": not reason, "reason": reason, "text": text,
        "failed": [rule for rule, (_, passed) in found.items() if not passed],
        "values": {rule: value for rule, (value, _) in found.items()},
    }  # fmt: skip


def sample(inputs: list[str], out: str, ranges: dict[str, list[float]]) -> dict[str, list[int]]:
    """Copy pages of WARC files by a hash of their address; return pages and bytes of each copy.

    ``ranges`` are the hashes, in [0, 1), that each of the copies takes. A page of a copy has the
    header WARC-Identified-Payload-Type, which those of Common Crawl have.
    """
    from warcio.archiveiterator import ArchiveIterator
    from warcio.warcwriter import WARCWriter

    counts = {name: [0, 0] for name in ranges}
    with ExitStack() as stack:
        writers = {
            name: WARCWriter(stack.enter_context(Path(out, f"{name}.warc.gz").open("wb")))
            for name in ranges
        }
        streams = (stack.enter_context(Path(path).open("rb")) for path in inputs)
        for record in chain.from_iterable(map(ArchiveIterator, streams)):
            draw = _draw(record.rec_headers.get_header("WARC-Target-URI") or "")
            chosen = [name for name, (low, high) in ranges.items() if low <= draw < high]
            if record.rec_type != "response" or not chosen:
                continue
            payload = record.raw_stream.read()
            for name in chosen:
                writers[name].write_record(_with_type(writers[name], record, payload))
                counts[name][0] += 1
                counts[name][1] += len(payload)
    return counts


def _draw(url: str) -> float:
    """Return a number in [0, 1) that depends on the address alone."""
    return int.from_bytes(hashlib.sha256(url.encode()).digest()[:8], "big") / 2**64


def _with_type(writer: Any, record: Any, payload: bytes) -> Any:
    headers = dict(record.rec_headers.headers) | {"WARC-Identified-Payload-Type": "text/html"}
    return writer.create_warc_record(
        headers["WARC-Target-URI"], "response", payload=io.BytesIO(payload), length=len(payload),
        warc_content_type=headers["Content-Type"], http_headers=record.http_headers,
        warc_headers_dict={
            name: headers[name]
            for name in ("WARC-Record-ID", "WARC-Date", "WARC-Identified-Payload-Type")
        },
    )  # fmt: skip


def export(root: str, shards: list[dict[str, Any]], out: str) -> dict[str, int]:
    """Write the documents of shards as plain Parquet, one file, for any reader."""
    schema = pa.schema([(name, pa.string()) for name in ("id", "url", "date", "text")])
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for shard in map(_shard, shards):
            for table in read_batches(Path(root), shard, ["id", "url", "timestamp", "text"]):
                renamed = table.select(["id", "url", "timestamp", "text"])
                writer.write_table(renamed.rename_columns(schema.names).cast(schema))
    return {"documents": sum(shard["rows"] for shard in shards)}


def train(root: str, shards: list[dict[str, Any]], out: str, vocab_size: int) -> dict[str, int]:
    """Train a byte-level BPE ``tokenizer.json`` on the texts of shards."""
    from tokenizers import ByteLevelBPETokenizer

    def texts() -> Iterator[str]:
        for shard in map(_shard, shards):
            for table in read_batches(Path(root), shard, ["text"]):
                yield from table.column("text").to_pylist()

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts(), vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(out) / "tokenizer.json"))
    return {"pieces": tokenizer.get_vocab_size()}


def _shard(values: dict[str, Any]) -> Shard:
    return Shard(**values)


STAGES = {
    stage.__name__: stage
    for stage in (extract, filters, keyed, run, encode, decide, sample, export, train)
}
"""By the names of requests."""
