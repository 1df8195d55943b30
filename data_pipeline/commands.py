"""What each ``llmtrain-data`` command does, once its configuration is built.

The functions are named after the commands and return the exit status.

    run(RunConfig(input={"web": "crawl"}, out="corpus", pipeline=...))
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.config.commands import (
    BucketsConfig,
    ClassifierConfig,
    PackConfig,
    ReopenConfig,
    SampleConfig,
    TokenizeConfig,
    TrainTokenizerConfig,
    VerifyConfig,
)
from data_pipeline.config.extract import FieldsConfig
from data_pipeline.config.report import EstimateConfig, ExplainConfig, ReportConfig
from data_pipeline.config.run import RunConfig
from data_pipeline.config.tokens import StoreConfig
from data_pipeline.execute.choose import open_executor
from data_pipeline.execute.local import Executor, InlineExecutor, LocalExecutor
from data_pipeline.folder import note_inputs
from data_pipeline.manifest import Manifest
from data_pipeline.pipeline import run_pipeline
from data_pipeline.read.extract_task import check_unique
from data_pipeline.read.inputs import (
    ROW_FORMATS,
    RawFile,
    file_inputs,
    find_raw_files,
    fingerprint,
)
from data_pipeline.read.rows import Unreadable, read_text_file
from data_pipeline.report.funnel import make_row, summarise
from data_pipeline.stages import Context, Stage, exclusive
from data_pipeline.tokens.stores import Parts, StoreJob, clear, sample_of_files, withdraw
from data_pipeline.tokens.tokenize import HELD_OUT, tokenize_file
from llmtrain.data.store import verify as verify_store
from llmtrain.errors import DataError
from llmtrain.tokenizer.files import META_FILE
from llmtrain.tokenizer.texts import spread_sample
from llmtrain.tokenizer.tokenizer import find as find_tokenizer
from llmtrain.tokenizer.tokenizer import load as load_tokenizer
from llmtrain.tokenizer.tokenizer import train

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> int:
    """``llmtrain-data run``."""
    with open_executor(config) as executor:
        run_pipeline(config, _context(Path(config.out), executor))
    return report(ReportConfig(out=config.out))


def report(config: ReportConfig) -> int:
    """``llmtrain-data report``."""
    from data_pipeline.report.page import write_report

    write_report(config)
    return 0


def explain(config: ExplainConfig) -> int:
    """``llmtrain-data explain``."""
    from data_pipeline.report.explain import explain as explain_document
    from data_pipeline.report.verdict import render

    sys.stdout.write("\n".join(render(found) for found in explain_document(config)))
    return 0


def reopen(config: ReopenConfig) -> int:
    """``llmtrain-data reopen``."""
    from data_pipeline.report.reopened import reopen as reopen_records

    for line in reopen_records(config):
        sys.stdout.write(f"{line}\n")
    return 0


def estimate(config: EstimateConfig) -> int:
    """``llmtrain-data estimate``."""
    from data_pipeline.estimate.command import estimate as estimate_run

    with LocalExecutor(config.num_workers, config.time_limit_s) as executor:
        sys.stdout.write(estimate_run(config, executor))
    return 0


def _context(out: Path, executor: Executor) -> Context:
    return Context(out=out, executor=executor, progress=sys.stderr.isatty())


def sample(config: SampleConfig) -> int:
    """``llmtrain-data sample``."""
    from data_pipeline.sample.crawl import make_sample

    make_sample(Path(config.out), pages=config.pages)
    return 0


def tokenize(config: TokenizeConfig) -> int:
    """``llmtrain-data tokenize``: raw files of text to one store, and one of held-out documents."""
    out = Path(config.out)
    files = text_files(out.absolute().name, config.input)
    fields = FieldsConfig(text=config.text_field, id=config.id_field)
    job = StoreJob(
        tokenizer_path=config.tokenizer, tokenizer=load_tokenizer(config.tokenizer),
        config=StoreConfig(
            part_bytes=config.part_bytes, shuffle=config.shuffle, shuffle_seed=config.shuffle_seed
        ),
        memory_bytes=int(config.memory_gib * 2**30), pipeline_hash="",
    )  # fmt: skip
    settings = {
        **job.settings(),
        "fields": asdict(fields),
        "validation_share": config.validation_share,
    }
    executor = LocalExecutor(config.num_workers, config.time_limit_s)
    with exclusive(out / ".pipeline"), executor:
        note_inputs(out / ".pipeline", files)
        context = _context(out / ".pipeline", executor)
        stage = Stage(context, "tokenize", settings, file_inputs(files), out)
        manifest = stage.finished()
        if manifest is None:
            common = {"fields": fields, "share": config.validation_share}
            jobs = [({**common, "index": i, "file": f}, f.size) for i, f in enumerate(files)]
            withdraw(stage, (".", HELD_OUT))
            manifest = replace(job, pipeline_hash=stage.key).run(
                stage, tokenize_file, jobs, sample_of_files(files, fields),
                check=lambda parts: check_parts(out, parts),
            )  # fmt: skip
        else:
            clear(stage)
    _tell(out, manifest, stage.seconds())
    return 0


def _tell(out: Path, manifest: Manifest, seconds: float) -> None:
    logger.info("%s", summarise(make_row(str(out), manifest.counts, seconds)))
    held_out = manifest.details["stores"].get(HELD_OUT)
    if held_out:
        logger.info("  held out: %d, in %s", held_out["documents"], out / HELD_OUT)
    for reason, number in {**manifest.counts.dropped, **manifest.counts.quarantined}.items():
        logger.info("  left out: %s %d", reason, number)


def check_parts(out: Path, parts: Parts) -> None:
    """Raise DataError if nothing is left to train on, or an id stands twice."""
    if "." not in parts:
        raise DataError(f"{out} would be empty: no document with text is left to train on")
    check_unique(_ids(out, parts))


def _ids(out: Path, parts: Parts) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (source, file, ids) of every part."""
    for store, infos in parts.items():
        for info, _ in infos:
            path = out / store / f"{info.name}.docs.parquet"
            ids = pq.read_table(path, columns=["id"]).column("id").to_pylist()
            yield out.name, str(path), ids


def text_files(source: str, given: str | tuple[str, ...]) -> list[RawFile]:
    """Return the files of an input with their digests; a crawl is refused."""
    files = find_raw_files({source: given}, key="input")
    wrong = [file for file in files if file.format not in ROW_FORMATS]
    if wrong:
        named = wrong[0].members[0] if wrong[0].members else wrong[0].path
        raise DataError(f"{named} is no JSONL or Parquet; make text of it with `llmtrain-data run`")
    return [fingerprint(file) for file in files]


def tokenizer(config: TrainTokenizerConfig) -> int:
    """``llmtrain-data tokenizer``: train on a sample spread over the whole input."""
    out = Path(config.out)
    if out.is_dir() and (find_tokenizer(out) is not None or (out / META_FILE).exists()):
        raise DataError(f"out={out} holds a tokenizer already; use another out= or remove it")
    files = text_files("text", config.input)
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
    documents = (
        (item.id, item.text)
        for file in files
        for item in read_text_file(file, fields)
        if not isinstance(item, Unreadable)
    )
    train(
        spread_sample(documents, config.sample_bytes), config.out, kind=config.kind,
        vocab_size=config.vocab_size, pattern=config.pattern, max_sample_bytes=config.sample_bytes,
    )  # fmt: skip


def classifier(config: ClassifierConfig) -> int:
    """``llmtrain-data classifier``: train a linear model on wanted and unwanted texts."""
    from data_pipeline.filters.classifier_training import train_on_files

    out = Path(config.out)
    if out.exists():
        raise DataError(f"out={out} exists already; use another out= or remove it")
    positive = text_files("positive", config.positive)
    negative = text_files("negative", config.negative)
    model = train_on_files(positive, negative, config)
    model.save(out)
    facts = {**asdict(model.facts), "model": str(out)}
    sys.stdout.write(json.dumps(facts) + "\n")
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


def pack(config: PackConfig) -> int:
    """``llmtrain-data pack``."""
    from data_pipeline.tokens.pack import pack_with

    inline = config.num_workers == 1
    with (
        nullcontext() if inline else LocalExecutor(config.num_workers, config.time_limit_s) as pool
    ):
        found = pack_with(config, pool or InlineExecutor())
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def buckets(config: BucketsConfig) -> int:
    """``llmtrain-data buckets``."""
    from data_pipeline.tokens.buckets import cut

    inline = config.num_workers == 1
    with (
        nullcontext() if inline else LocalExecutor(config.num_workers, config.time_limit_s) as pool
    ):
        made = cut(config, pool or InlineExecutor())
    sys.stdout.write("".join(f"{json.dumps(bucket)}\n" for bucket in made))
    return 0
