"""The stage that makes token stores: choose an encoder, write the parts, publish the manifests.

Without the shuffle it is one pass. With it, documents are encoded and scattered, then every part
takes its range of keys. A store is readable when its manifest stands, and its manifest is the last
file written; what an earlier run published is taken away before the first part changes.

    job = StoreJob(tokenizer_path, tokenizer, config.store, memory_bytes, config_hash(config))
    manifest = job.run(stage, tokenize_shards, jobs, sample)
"""

import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.config.extract import FieldsConfig
from data_pipeline.config.tokens import StoreConfig
from data_pipeline.manifest import ConservationError, Counts, Manifest, TaskResult
from data_pipeline.read.inputs import RawFile
from data_pipeline.read.rows import Unreadable, read_text_file
from data_pipeline.shards import Shard, read_batches
from data_pipeline.stages import Stage
from data_pipeline.tokens.shuffle import FOLDER, Scatter
from data_pipeline.tokens.tokenize import HELD_OUT, TokenizerSpec, gather_part
from llmtrain.data.store import MANIFEST, ShardInfo, write_manifest
from llmtrain.tokenizer.encoders import Choice, choose_encoder
from llmtrain.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SAMPLE_PLACES, SAMPLE_DOCUMENTS, SAMPLE_BYTES = 8, 64, 1_000_000
"""Encoders are compared on the first documents of this many files, up to this much text."""
_MIN_CHUNK, _MAX_CHUNK = 1 << 22, 1 << 28
_SLICE_BYTES = 1 << 16
"""What the second pass reads from one place is about this long, on average, or longer."""
_FULL = 0.95
"""How full a shuffled part is on average: hashes fill parts unequally."""

_Item = TypeVar("_Item")
Jobs = Sequence[tuple[dict[str, Any], int]]
Parts = dict[str, list[tuple[ShardInfo, int]]]


@dataclass(frozen=True, kw_only=True)
class StoreJob:
    """What the stores of one stage are made with."""

    tokenizer_path: str
    """Folder or file of the tokenizer."""
    tokenizer: Tokenizer
    """The same, open."""
    config: StoreConfig
    """Sizes and order."""
    memory_bytes: int
    """Memory a worker may use; changes no byte."""
    pipeline_hash: str
    """What made the text; the manifests keep it."""

    def settings(self) -> dict[str, Any]:
        """What decides the bytes of the stores, for the stage's key."""
        order = {"shuffle_seed": self.config.shuffle_seed} if self.config.shuffle else {}
        return {
            "tokenizer": self.tokenizer.hash, "eos_id": self.tokenizer.eos_id,
            "part_bytes": self.config.part_bytes, "shuffle": self.config.shuffle, **order,
        }  # fmt: skip

    def run(
        self,
        stage: Stage,
        task: Callable[..., TaskResult],
        jobs: Jobs,
        sample: Sequence[str],
        check: Callable[[Parts], None] = lambda parts: None,
    ) -> Manifest:
        """Run ``task`` for every job, publish the stores, finish the stage.

        ``check`` sees the parts before they are published.

        Raises:
            DataError: ``check`` refuses, or a store would be empty.
        """
        choice = self.choose(sample)
        spec = TokenizerSpec(self.tokenizer_path, self.tokenizer.hash, choice.fast)
        common = {"tokenizer": spec, "part_bytes": self.config.part_bytes}
        if self.config.shuffle:
            results = self._shuffle(stage, task, jobs, common)
        else:
            results = stage.run("parts", task, [({**job, **common}, cost) for job, cost in jobs])
        return self.finish(stage, results, choice.name, check)

    def finish(
        self,
        stage: Stage,
        results: Sequence[TaskResult],
        encoder: str,
        check: Callable[[Parts], None] = lambda parts: None,
        details: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Publish the stores of the parts in ``results``, which ``encoder`` made; see ``run``.

        ``details`` are kept in the manifest of the stage.

        Raises:
            DataError: ``check`` refuses, or a store would be empty.
        """
        parts = parts_of(results)
        check(parts)
        published = self._publish(stage, parts, encoder)
        stores = {store: _totals(infos) for store, infos in sorted(parts.items())}
        told = {"encoder": encoder, "stores": stores, **(details or {})}
        manifest = stage.finish([*results, published], told)
        clear(stage)
        return manifest

    def choose(self, sample: Sequence[str]) -> Choice:
        """Choose the encoder; say why where it is not the fast one."""
        choice = choose_encoder(self.tokenizer, sample, self.memory_bytes)
        if choice.reason:
            logger.warning("%s encodes: %s", choice.name, choice.reason)
        return choice

    def _shuffle(
        self, stage: Stage, task: Callable[..., TaskResult], jobs: Jobs, common: dict[str, Any]
    ) -> list[TaskResult]:
        """Scatter, then gather every part; return the results with the counts of the first pass."""
        chunk = self.chunk_bytes(sum(cost for _, cost in jobs))
        scatter = Scatter(self.config.shuffle_seed, chunk)
        first = stage.run(
            "scatter", task, [({**job, **common, "scatter": scatter}, cost) for job, cost in jobs]
        )
        totals: dict[str, Counter[str]] = {}
        files: dict[str, list[str]] = {}
        counts = Counts()
        for result in first:
            counts.add(result.counts)
            for store, scattered in result.details["scattered"].items():
                totals.setdefault(store, Counter()).update(scattered)
            for name in result.work:
                store = str(Path(name).parent.relative_to(FOLDER))
                files.setdefault(store, []).append(str(stage.target / name))
        gather = [
            job
            for store in sorted(totals)
            for job in self._gather_jobs(store, totals[store], files[store], chunk)
        ]
        second = stage.run("parts", gather_part, gather)
        _check_gathered(totals, parts_of(second))
        return [TaskResult(counts=counts, details={"parts": []}), *second]

    def chunk_bytes(self, text_bytes: int) -> int:
        """Return how much a worker sorts at a time, for ``text_bytes`` in all; changes no byte.

        Of each of the ``text_bytes / chunk`` chunks a range of keys, half a chunk, takes
        ``chunk**2 / (2 * text_bytes)`` bytes.
        """
        wanted = math.isqrt(2 * text_bytes * _SLICE_BYTES)
        return max(min(wanted, self.memory_bytes // 16, _MAX_CHUNK), _MIN_CHUNK)

    def _gather_jobs(
        self, store: str, total: Counter[str], files: list[str], chunk: int
    ) -> list[tuple[dict[str, Any], int]]:
        size = self.config.part_bytes
        text = total["text_bytes"]
        num_parts = 1 if text <= size else -int(-text // (_FULL * size))
        num_ranges = max(1, -(-total["bytes"] // (num_parts * chunk // 2)))
        common = {
            "store": store, "num_parts": num_parts, "num_ranges": num_ranges, "files": files,
            "vocab_size": self.tokenizer.vocab_size, "eos_id": self.tokenizer.eos_id,
            "part_bytes": size,
        }  # fmt: skip
        return [({**common, "index": i}, text // num_parts) for i in range(num_parts)]

    def _publish(self, stage: Stage, parts: Parts, encoder: str) -> TaskResult:
        """Write the manifest of every store; from then on they are read."""
        seed = self.config.shuffle_seed
        files = {}
        for store, infos in sorted(parts.items()):
            folder = stage.target / store
            named = stage.target if store in (".", HELD_OUT) else folder
            notes = {
                "source": named.resolve().name, "encoder": encoder,
                "order": f"shuffled, seed {seed}" if self.config.shuffle else "as read",
                "text_bytes": {info.name: text_bytes for info, text_bytes in infos},
            }  # fmt: skip
            written = write_manifest(
                folder, [info for info, _ in infos], tokenizer_hash=self.tokenizer.hash,
                vocab_size=self.tokenizer.vocab_size, eos_id=self.tokenizer.eos_id,
                pipeline_hash=self.pipeline_hash, notes=notes,
            )  # fmt: skip
            files[str(Path(store) / MANIFEST)] = written.hash
        return TaskResult(files=files)


def withdraw(stage: Stage, stores: Iterable[str]) -> None:
    """Take the manifests of an earlier run away: no store is read while its parts change."""
    for store in stores:
        (stage.target / store / MANIFEST).unlink(missing_ok=True)


def clear(stage: Stage) -> None:
    """Remove what only the two passes needed; a driver killed before this leaves it to the next."""
    shutil.rmtree(stage.target / FOLDER, ignore_errors=True)


def parts_of(results: Iterable[TaskResult]) -> Parts:
    """Return store folder -> its parts and the bytes of text behind each."""
    parts: Parts = {}
    for result in results:
        for store, info, text_bytes in result.details["parts"]:
            parts.setdefault(store, []).append((ShardInfo(**info), text_bytes))
    return parts


def sample_of_shards(out: Path, shards: Sequence[Shard]) -> list[str]:
    """Return texts from the beginnings of a few shards, spread over all of them."""
    return _few(_first_texts(out, shard) for shard in _spread(shards))


def sample_of_files(files: Sequence[RawFile], fields: FieldsConfig) -> list[str]:
    """Return texts from the beginnings of a few raw files, spread over all of them."""
    return _few(
        (item.text for item in read_text_file(file, fields) if not isinstance(item, Unreadable))
        for file in _spread(files)
    )


def _first_texts(out: Path, shard: Shard) -> Iterator[str]:
    for table in read_batches(out, shard, ["text"]):
        yield from table.column("text").to_pylist()


def _spread(items: Sequence[_Item]) -> list[_Item]:
    number = min(SAMPLE_PLACES, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def _few(places: Iterable[Iterator[str]]) -> list[str]:
    """Return the first texts of every place, within the limits of the sample."""
    texts: list[str] = []
    for place in places:
        room = SAMPLE_BYTES // SAMPLE_PLACES
        for text in islice(place, SAMPLE_DOCUMENTS):
            texts.append(text[:room])
            room -= len(texts[-1])
            if not room:
                break
    return texts


def _totals(parts: Sequence[tuple[ShardInfo, int]]) -> dict[str, int]:
    return {
        "parts": len(parts),
        "documents": sum(info.num_documents for info, _ in parts),
        "tokens": sum(info.num_tokens for info, _ in parts),
        "text_bytes": sum(text_bytes for _, text_bytes in parts),
    }


def _check_gathered(scattered: dict[str, Counter[str]], parts: Parts) -> None:
    """Raise ConservationError unless every scattered document is in a part."""
    for store, total in scattered.items():
        found = _totals(parts.get(store, []))
        wrong = [
            f"{total[name]:,} {name} scattered, {found[name]:,} gathered"
            for name in ("documents", "tokens", "text_bytes")
            if total[name] != found[name]
        ]
        if wrong:
            raise ConservationError(f"{store}: {'; '.join(wrong)}")
