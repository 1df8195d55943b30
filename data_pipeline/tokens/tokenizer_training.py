"""Training the tokenizer of a pipeline on a sample of its documents.

The sample is chosen by a hash of the documents' ids, so it is spread over the whole input and does
not depend on shards or workers. Training takes many times the memory of its sample: the sample is
cut to what ``memory_gib`` has room for, and the cut is told.

    train_tokenizer(folder, out, shards, within_memory(settings, memory_bytes, text_bytes))
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipeline.config.tokens import TokenizerTrainingConfig
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard, digest_of, read_batches
from llmtrain.errors import DataError
from llmtrain.tokenizer.texts import spread_sample
from llmtrain.tokenizer.tokenizer import train

MEMORY_PER_BYTE = {"bpe": 14, "unigram": 24, "byte_bpe": 14}
"""Bytes of memory a trainer takes per byte of its sample (measured: 9.5, 21 and 11.3), and some for
the process around it."""

logger = logging.getLogger(__name__)


def within_memory(
    settings: TokenizerTrainingConfig, memory_bytes: int, text_bytes: int
) -> TokenizerTrainingConfig:
    """Return the settings with a sample of ``text_bytes`` of text that training has memory for."""
    most = memory_bytes // MEMORY_PER_BYTE[settings.kind]
    if most < min(settings.sample_bytes, text_bytes):
        logger.warning(
            "the tokenizer is trained on %s bytes of text, not on sample_bytes=%s: kind=%s takes "
            "%d times its sample, and memory_gib=%.3g has no room for more",
            f"{most:,}", f"{settings.sample_bytes:,}", settings.kind,
            MEMORY_PER_BYTE[settings.kind], memory_bytes / 2**30,
        )  # fmt: skip
    return replace(settings, sample_bytes=min(settings.sample_bytes, most))


def training_settings(settings: TokenizerTrainingConfig) -> dict[str, Any]:
    """Return what decides the bytes of the tokenizer: the settings and the version of the trainer.

    Raises:
        DataError: the trainer is not installed.
    """
    package = "tokenizers" if settings.kind == "byte_bpe" else "sentencepiece"
    try:
        return {**asdict(settings), "trainer": f"{package} {version(package)}"}
    except PackageNotFoundError:
        raise DataError(
            f"tokenizer.kind={settings.kind} needs the package {package}, which is not installed; "
            "run: pip install 'llmtrain[data]'"
        ) from None


def train_tokenizer(
    folder: Path, out: str, shards: Sequence[Shard], settings: TokenizerTrainingConfig
) -> TaskResult:
    """Train on a sample of the documents: those whose ids hash lowest."""
    documents = (
        pair
        for shard in shards
        for table in read_batches(Path(out), shard, ["id", "text"])
        for pair in zip(*(table.column(name).to_pylist() for name in ("id", "text")), strict=True)
    )
    train(
        spread_sample(documents, settings.sample_bytes), folder, kind=settings.kind,
        vocab_size=settings.vocab_size, pattern=settings.pattern,
        max_sample_bytes=settings.sample_bytes,
    )  # fmt: skip
    names = sorted(path.name for path in folder.iterdir())
    return TaskResult(files={name: digest_of((folder / name).read_bytes()) for name in names})
