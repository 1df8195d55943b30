"""What each ``llmtrain-data`` command does, once its configuration is built.

The functions are named after the commands and return the exit status.

    run(RunConfig(input={"web": "crawl"}, out="corpus", pipeline=...))
"""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from data_pipeline.config import (
    RunConfig,
    SampleConfig,
    TokenizeConfig,
    TrainTokenizerConfig,
    VerifyConfig,
)
from data_pipeline.execute import LocalExecutor
from data_pipeline.io import TextFields, Unreadable, find_raw_files, fingerprint, read_text_file
from data_pipeline.pipeline import run_pipeline
from data_pipeline.report import make_row, summarise
from data_pipeline.stages import Context, Stage
from data_pipeline.tokenize import part_infos, tokenize_file
from llmtrain.data.store import verify as verify_store
from llmtrain.data.store import write_manifest
from llmtrain.errors import DataError
from llmtrain.tokenizer.tokenizer import load as load_tokenizer
from llmtrain.tokenizer.tokenizer import train_sentencepiece

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> int:
    """``llmtrain-data run``."""
    with LocalExecutor(config.num_workers, config.time_limit_s) as executor:
        run_pipeline(config, _context(Path(config.out), executor))
    return 0


def _context(out: Path, executor: LocalExecutor) -> Context:
    return Context(out=out, executor=executor, progress=sys.stderr.isatty())


def sample(config: SampleConfig) -> int:
    """``llmtrain-data sample``."""
    from data_pipeline.sample import make_sample

    make_sample(Path(config.out), pages=config.pages)
    return 0


def tokenize(config: TokenizeConfig) -> int:
    """``llmtrain-data tokenize``: one part of the store per raw file."""
    out = Path(config.out)
    source = out.name
    files = [fingerprint(file) for file in find_raw_files({source: config.input})]
    wrong = [file.path for file in files if file.format == "warc"]
    if wrong:
        raise DataError(f"{wrong[0]} is a crawl; make text of it with `llmtrain-data run`")
    tokenizer = load_tokenizer(config.tokenizer)
    fields = TextFields(text=config.text_field, id=config.id_field)
    settings = {"tokenizer": tokenizer.hash, "fields": asdict(fields)}
    inputs = [{"source": source, "name": f.name, "digest": f.sha256} for f in files]
    with LocalExecutor(config.num_workers, config.time_limit_s) as executor:
        context = _context(out / ".pipeline", executor)
        stage = Stage(context, "tokenize", settings, inputs, target=out)
        manifest = stage.finished()
        if manifest is None:
            common = {"store": ".", "fields": fields, "tokenizer": config.tokenizer}
            jobs = [({**common, "index": i, "file": f}, f.size) for i, f in enumerate(files)]
            results = stage.run("parts", tokenize_file, jobs)
            for parts in part_infos(results).values():
                write_manifest(
                    out, parts, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size,
                    eos_id=tokenizer.eos_id, pipeline_hash=stage.key,
                )  # fmt: skip
            manifest = stage.finish(results)
    logger.info("%s", summarise(make_row(str(out), manifest.counts, stage.seconds())))
    for reason, number in {**manifest.counts.dropped, **manifest.counts.quarantined}.items():
        logger.info("  left out: %s %d", reason, number)
    return 0


def tokenizer(config: TrainTokenizerConfig) -> int:
    """``llmtrain-data tokenizer``: train on the first texts of every file, equal shares."""
    files = [fingerprint(file) for file in find_raw_files({"text": config.input})]
    wrong = [file.path for file in files if file.format == "warc"]
    if wrong:
        raise DataError(f"{wrong[0]} is a crawl; make text of it with `llmtrain-data run`")
    fields = TextFields(text=config.text_field)
    share = -(-config.sample_bytes // len(files))
    texts: list[str] = []
    for file in files:
        size = 0
        for item in read_text_file(file, fields):
            if isinstance(item, Unreadable):
                continue
            texts.append(item.text)
            size += len(item.text.encode())
            if size >= share:
                break
    train_sentencepiece(
        texts, config.out, vocab_size=config.vocab_size, kind=config.kind,
        max_sample_bytes=config.sample_bytes,
    )  # fmt: skip
    return 0


def verify(config: VerifyConfig) -> int:
    """``llmtrain-data verify``: read every byte of a store and compare with its manifest."""
    store = verify_store(config.store)
    found = {
        "store": str(store.path), "documents": store.num_documents, "tokens": store.num_tokens,
        "shards": len(store.shards),
    }  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")
    return 0
