"""One small pipeline, run once, that the tests of this folder look at."""

from pathlib import Path

import pytest

from data_pipeline.config.run import RunConfig
from data_pipeline.execute.local import InlineExecutor
from data_pipeline.pipeline import run_pipeline
from data_pipeline.report.record import FolderRecord, read_folder
from data_pipeline.stages import Context
from llmtrain.config.load import load
from tests.crawl import write_crawl

SETTINGS = [
    "pipeline=demo", "pipeline.extract.shard_bytes=20000", "pipeline.tokenizer.vocab_size=400",
    "pipeline.split.validation_share=0.1", "pipeline.stages=[url,c4,pii,line_dedup,minhash]",
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    inputs = write_crawl(root / "crawl", pages_per_file=30)
    given = [f"input.{name}={path}" for name, path in inputs.items()]
    config = load("data_run", [*SETTINGS, *given, f"out={root / 'out'}"], RunConfig)
    run_pipeline(config, Context(out=root / "out", executor=InlineExecutor()))
    return root / "out"


@pytest.fixture(scope="session")
def record(folder: Path) -> FolderRecord:
    return read_folder(folder)
