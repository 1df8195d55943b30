"""What each ``llmtrain-data`` command does, once its configuration is built.

The functions are named after the commands and return the exit status.

    run(RunConfig(input={"web": "crawl"}, out="corpus", pipeline=...))
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.config import (
    FieldsConfig,
    RunConfig,
    SampleConfig,
    TokenizeConfig,
    TrainTokenizerConfig,
    VerifyConfig,
)
from data_pipeline.execute import LocalExecutor
from data_pipeline.io import (
    RawFile,
    Unreadable,
    file_inputs,
    find_raw_files,
    fingerprint,
    read_text_file,
)
from data_pipeline.pipeline import run_pipeline
from data_pipeline.report import make_row, summarise
from data_pipeline.stages import Context, Stage, exclusive
from data_pipeline.tokenize import HELD_OUT, parts_of, publish, tokenize_file, withdraw
from data_pipeline.transform import check_unique
from llmtrain.data.store import ShardInfo
from llmtrain.data.store import verify as verify_store
from llmtrain.errors import DataError
from llmtrain.tokenizer.tokenizer import JSON_FILE, META_FILE, MODEL_FILE, train_sentencepiece
from llmtrain.tokenizer.tokenizer import load as load_tokenizer

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
    files = _text_files(out.name, config.input)
    tokenizer = load_tokenizer(config.tokenizer)
    fields = FieldsConfig(text=config.text_field, id=config.id_field)
    settings = {
        "tokenizer": tokenizer.hash, "eos_id": tokenizer.eos_id, "fields": asdict(fields),
        "validation_share": config.validation_share,
    }  # fmt: skip
    executor = LocalExecutor(config.num_workers, config.time_limit_s)
    with exclusive(out / ".pipeline"), executor:
        context = _context(out / ".pipeline", executor)
        stage = Stage(context, "tokenize", settings, file_inputs(files), out)
        manifest = stage.finished()
        if manifest is None:
            common = {
                "fields": fields, "share": config.validation_share, "tokenizer": config.tokenizer,
            }  # fmt: skip
            jobs = [({**common, "index": i, "file": f}, f.size) for i, f in enumerate(files)]
            withdraw(out, (".", HELD_OUT))
            results = stage.run("parts", tokenize_file, jobs)
            parts = parts_of(results)
            if "." not in parts:
                raise DataError(f"{out} would be empty: no document with text is left to train on")
            check_unique(_ids(out, parts))
            held_out = sum(part.num_documents for part in parts.get(HELD_OUT, []))
            stores = publish(stage, results, tokenizer, stage.key)
            manifest = stage.finish([*results, stores], {"held_out": held_out})
    logger.info("%s", summarise(make_row(str(out), manifest.counts, stage.seconds())))
    if manifest.details["held_out"]:
        logger.info("  held out: %d, in %s", manifest.details["held_out"], out / HELD_OUT)
    for reason, number in {**manifest.counts.dropped, **manifest.counts.quarantined}.items():
        logger.info("  left out: %s %d", reason, number)
    return 0


def _ids(out: Path, parts: dict[str, list[ShardInfo]]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (source, file, ids) of every part."""
    for store, infos in parts.items():
        for info in infos:
            path = out / store / f"{info.name}.docs.parquet"
            ids = pq.read_table(path, columns=["id"]).column("id").to_pylist()
            yield out.name, str(path), ids


def _text_files(source: str, given: str | tuple[str, ...]) -> list[RawFile]:
    """Return the files of an input with their digests; a crawl is refused."""
    files = find_raw_files({source: given}, key="input")
    wrong = [file.path for file in files if file.format == "warc"]
    if wrong:
        raise DataError(f"{wrong[0]} is a crawl; make text of it with `llmtrain-data run`")
    return [fingerprint(file) for file in files]


def tokenizer(config: TrainTokenizerConfig) -> int:
    """``llmtrain-data tokenizer``: train on the first texts of every file, equal shares."""
    out = Path(config.out)
    if any((out / name).exists() for name in (MODEL_FILE, JSON_FILE, META_FILE)):
        raise DataError(f"out={out} holds a tokenizer already; use another out= or remove it")
    files = _text_files("text", config.input)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)  # what is wrong with it is told at once
    try:
        _train_tokenizer(config, files)
    except BaseException:
        with suppress(OSError):  # no longer empty
            for folder in made:
                folder.rmdir()
        raise
    return 0


def _train_tokenizer(config: TrainTokenizerConfig, files: list[RawFile]) -> None:
    fields = FieldsConfig(text=config.text_field)
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


def verify(config: VerifyConfig) -> int:
    """``llmtrain-data verify``: read every byte of a store and compare with its manifest."""
    store = verify_store(config.store)
    found = {
        "store": str(store.path), "documents": store.num_documents, "tokens": store.num_tokens,
        "shards": len(store.shards),
    }  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")
    return 0
