"""One run of the real pipeline over a sample, in a folder of its own, and what it cost.

trial = run_trial(config, inputs={"web": "scratch/sample-2/web"}, out=Path("scratch/run-2"))
trial.steps[1].documents_out
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.config.report import EstimateConfig
from data_pipeline.config.run import PipelineConfig, RunConfig
from data_pipeline.execute.local import Executor
from data_pipeline.pipeline import run_pipeline
from data_pipeline.report.record import AFTER_STAGES, FolderRecord, read_folder
from data_pipeline.stages import Context
from data_pipeline.steps import STEPS
from llmtrain.errors import DataError

_BYTES_PER_PIECE = 150
"""Text behind each piece of a vocabulary that a sample is asked for, at least."""
_LEAST_PIECES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStep:
    """One row of a trial's funnel."""

    name: str
    """Name of the step or stage."""
    stage: str
    """Folder of its stage."""
    compares: bool
    """Whether it compares documents, so that what it drops depends on how many there are."""
    documents_in: int
    """Documents it judged."""
    documents_out: int
    """Documents that went on."""
    bytes_in: int
    """UTF-8 bytes it judged."""
    bytes_out: int
    """UTF-8 bytes that went on."""
    dropped: dict[str, int]
    """Documents dropped, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStage:
    """What one stage of a trial cost."""

    name: str
    """Its folder."""
    seconds: float
    """Wall time."""
    bytes_in: int
    """UTF-8 bytes it read; raw bytes for extraction."""
    disk_bytes: int
    """Bytes of what it left on disk."""
    kept_by_file: dict[str, int]
    """Beginning of the names of a raw file's shards -> documents that went on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run over one sample."""

    raw_bytes: int
    """Bytes of the sample."""
    steps: tuple[TrialStep, ...]
    """The funnel."""
    stages: tuple[TrialStage, ...]
    """The stages, the last ones included."""
    tokens: int
    """Tokens of all stores."""
    vocab_size: int
    """Pieces of the vocabulary that counted them; 0 without stores."""


def run_trial(
    config: EstimateConfig, inputs: Mapping[str, str], out: Path, executor: Executor
) -> Trial:
    """Run the pipeline over a sample.

    Raises:
        DataError: no document of the sample is left.
    """
    given = {source: folder for source, folder in inputs.items() if Path(folder).is_dir()}
    raw = sum(p.stat().st_size for f in given.values() for p in Path(f).rglob("*") if p.is_file())
    run = RunConfig(
        input=given, out=str(out), pipeline=_small_vocabulary(config.pipeline, raw),
        num_workers=config.num_workers, time_limit_s=config.time_limit_s,
    )  # fmt: skip
    try:
        with _quiet():
            run_pipeline(run, Context(out=out, executor=executor))
    except DataError as error:
        raise DataError(f"a sample of {raw:,} raw bytes: {error}; or raise sample_bytes") from None
    return _read(read_folder(out), raw)


def _small_vocabulary(pipeline: PipelineConfig, raw_bytes: int) -> PipelineConfig:
    """Ask no more pieces of a sample than its text can have."""
    settings = pipeline.tokenizer
    pieces = max(_LEAST_PIECES, raw_bytes // _BYTES_PER_PIECE)
    if settings.path is not None or pieces >= settings.vocab_size:
        return pipeline
    return replace(pipeline, tokenizer=replace(settings, vocab_size=pieces))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the lines of a trial's stages off the console."""
    log = logging.getLogger("data_pipeline")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _read(record: FolderRecord, raw_bytes: int) -> Trial:
    steps: list[TrialStep] = []
    stages: list[TrialStage] = []
    before = 0
    for stage in record.stages:
        counts = stage.manifest.counts
        for row in stage.rows:
            if row.name == "tokenize":
                continue
            bytes_out = row.bytes_out or counts.bytes_out
            steps.append(TrialStep(
                name=row.name, stage=stage.name,
                compares=row.name not in (*STEPS, *AFTER_STAGES, "extract"),
                documents_in=row.documents_in, documents_out=row.documents_out, bytes_in=before,
                bytes_out=bytes_out, dropped=row.dropped,
            ))  # fmt: skip
            before = bytes_out
        kept: dict[str, int] = {}
        for shard in stage.manifest.shards:
            name = Path(shard.path).stem.removeprefix("train-").removeprefix("validation-")
            file = name.removeprefix(f"{shard.source}-").partition("-")[0]
            key = f"{shard.source}-{file}"
            kept[key] = kept.get(key, 0) + shard.rows
        stages.append(TrialStage(
            name=stage.name, seconds=stage.seconds, kept_by_file=kept,
            bytes_in=raw_bytes if stage.kind == "extract" else counts.bytes_in or before,
            disk_bytes=_disk_bytes(record, stage.name),
        ))  # fmt: skip
    return Trial(
        raw_bytes=raw_bytes, steps=tuple(steps), stages=tuple(stages),
        tokens=sum(store.tokens for store in record.stores),
        vocab_size=max((store.vocab_size for store in record.stores), default=0),
    )  # fmt: skip


def _disk_bytes(record: FolderRecord, stage: str) -> int:
    """Bytes of a stage's folder, and of the stores for the stage that writes them."""
    folders = [record.path / "stages" / stage]
    if stage == record.stages[-1].name:
        folders.append(record.path / "stores")
    return sum(p.stat().st_size for f in folders for p in f.rglob("*") if p.is_file())
