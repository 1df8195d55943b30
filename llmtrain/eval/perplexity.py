"""Held-out loss and bits per byte on whole documents, beside a unigram and a uniform model.

Every token of every document, its EOS included, is coded exactly once:

- the first token of a document by the unigram model: in training it is never a target, because the
  token before it belongs to another document;
- each other token by the model, from what comes before it in its document, at most S tokens back
  (S = training.sequence_length). A document longer than S + 1 is read in windows of S that advance
  by S / 2, each scoring what no window before it scored: a token has all its context, or S / 2
  tokens of it at least.

Bits per byte are all nats / ln 2 / bytes of the documents' text; the three models code the same
tokens. Short documents share rows, kept apart by document masks as in training.

    llmtrain eval run=runs/demo max_documents=200
"""

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.config.generate import EvalConfig
from llmtrain.data.batch import IGNORE_INDEX
from llmtrain.data.lineage import read_counts
from llmtrain.data.store import TokenStore, open_source, open_sources
from llmtrain.errors import ConfigError, DataError
from llmtrain.eval.trained import TrainedRun, opened_run
from llmtrain.model.transformer import Transformer
from llmtrain.ops.cross_entropy import chunked_linear_cross_entropy
from llmtrain.run.directory import write_json

logger = logging.getLogger(__name__)

Tokens = NDArray[np.int64]
_COUNT_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well one source is predicted."""

    bits_per_byte: float
    """Of the model."""
    unigram_bits_per_byte: float
    """Of token frequencies in the training stores, add-one smoothed."""
    uniform_bits_per_byte: float
    """Of equal probabilities for the whole vocabulary."""
    loss: float
    """Mean nats of the tokens the model predicts, comparable with the training loss."""
    tokens: int
    """Tokens coded, EOS and first tokens included."""
    bytes: int
    """UTF-8 bytes of the documents' text."""
    documents: int
    """Documents scored."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """Sums over documents, from which a Score is made; tallies add up over sources."""

    model_nats: float = 0.0
    """By the model, over predicted tokens."""
    first_nats: float = 0.0
    """By the unigram model, over first tokens."""
    unigram_nats: float = 0.0
    """By the unigram model, over all tokens."""
    tokens: int = 0
    """All tokens."""
    bytes: int = 0
    """Bytes of text."""
    documents: int = 0
    """Documents, each with one first token."""

    def add(self, other: "Tally") -> None:
        """Add the sums of ``other``."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def score(self, vocab_size: int) -> Score:
        """Turn sums into rates."""
        bits = 1.0 / math.log(2) / self.bytes
        return Score(
            bits_per_byte=(self.model_nats + self.first_nats) * bits,
            unigram_bits_per_byte=self.unigram_nats * bits,
            uniform_bits_per_byte=self.tokens * math.log(vocab_size) * bits,
            loss=self.model_nats / max(1, self.tokens - self.documents),
            tokens=self.tokens,
            bytes=self.bytes,
            documents=self.documents,
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """Inputs one row reads together, and from which of them on the predictions count."""

    tokens: Tokens
    """Inputs and one further token, the last target."""
    first_scored: int
    """Offset of the first input whose prediction counts."""


def segments(document: Tokens, sequence_length: int) -> Iterator[Segment]:
    """Cut a document into windows of at most S inputs that score each target exactly once."""
    num_inputs = len(document) - 1
    start, scored = 0, 0
    while scored < num_inputs:
        end = min(start + sequence_length, num_inputs)
        yield Segment(document[start : end + 1], scored - start)
        scored, start = end, start + max(1, sequence_length // 2)


def pack(parts: Iterable[Segment], sequence_length: int) -> Iterator[list[Segment]]:
    """Put segments into rows of at most S inputs, in order, into the first open row with room."""
    open_rows: list[tuple[int, list[Segment]]] = []
    for part in parts:
        size = len(part.tokens) - 1
        for i, (used, row) in enumerate(open_rows):
            if used + size <= sequence_length:
                row.append(part)
                open_rows[i] = (used + size, row)
                break
        else:
            if len(open_rows) == 8:
                fullest = max(range(len(open_rows)), key=lambda i: open_rows[i][0])
                yield open_rows.pop(fullest)[1]
            open_rows.append((size, [part]))
    for _, row in open_rows:
        yield row


@torch.no_grad()
def nats_of(
    model: Transformer, documents: Iterable[Tokens], sequence_length: int, batch_tokens: int
) -> float:
    """Sum the losses of all tokens but the first of each document."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    parts = (part for document in documents for part in segments(document, sequence_length))
    rows: list[list[Segment]] = []
    for row in pack(parts, sequence_length):
        rows.append(row)
        if (len(rows) + 1) * sequence_length > batch_tokens:
            total += _rows_nats(model, rows, sequence_length, device)
            rows = []
    if rows:
        total += _rows_nats(model, rows, sequence_length, device)
    return float(total)


def _rows_nats(
    model: Transformer, rows: Sequence[Sequence[Segment]], length: int, device: torch.device
) -> Tensor:
    """Run rows of segments, each segment a document of its own, and sum the counted losses."""
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    targets = np.full_like(tokens, IGNORE_INDEX)
    positions = np.zeros_like(tokens)
    document_ids = np.full_like(tokens, length)
    for r, row in enumerate(rows):
        start = 0
        for ordinal, part in enumerate(row):
            size = len(part.tokens) - 1
            here = slice(start, start + size)
            tokens[r, here] = part.tokens[:-1]
            targets[r, start + part.first_scored : start + size] = part.tokens[
                part.first_scored + 1 :
            ]
            positions[r, here] = np.arange(size)
            document_ids[r, here] = ordinal
            start += size
    inputs = (torch.from_numpy(a).to(device) for a in (tokens, positions, document_ids))
    hidden = model(*inputs)
    head = model.head
    flat = torch.from_numpy(targets).to(device).flatten()
    _, losses, _ = chunked_linear_cross_entropy(
        hidden.flatten(0, 1), head.weight, flat, partition=head.partition
    )
    return losses.double().sum()


def unigram(stores: Iterable[TokenStore], vocab_size: int, max_tokens: int) -> NDArray[np.float64]:
    """Return nats [V] of each token by its count in the first tokens of the stores, plus one."""
    counts = np.ones(vocab_size, dtype=np.int64)
    for store in stores:
        end = min(store.num_tokens, max_tokens)
        for start in range(0, end, _COUNT_BLOCK):
            block = store.tokens(start, min(end, start + _COUNT_BLOCK))
            counts += np.bincount(block, minlength=vocab_size)[:vocab_size]
    nats: NDArray[np.float64] = -np.log(counts / counts.sum())
    return nats


def tally(
    model: Transformer,
    store: TokenStore,
    unigram_nats: NDArray[np.float64],
    sequence_length: int,
    config: EvalConfig,
) -> Tally:
    """Score the first ``config.max_documents`` documents of a held-out store."""
    count = min(store.num_documents, config.max_documents or store.num_documents)
    result = Tally(bytes=int(text_bytes(store)[:count].sum()), documents=count)

    def documents() -> Iterator[Tokens]:
        for index in range(count):
            document = store.document(index).astype(np.int64)
            nats = unigram_nats[document]
            result.tokens += len(document)
            result.first_nats += float(nats[0])
            result.unigram_nats += float(nats.sum())
            yield document

    result.model_nats = nats_of(model, documents(), sequence_length, config.batch_tokens)
    return result


def text_bytes(store: TokenStore) -> NDArray[np.int64]:
    """Return the bytes of text of every document of a store, in its order.

    Raises:
        DataError: the store keeps no such record (stores of other programs).
    """
    paths = map(store.records_path, range(len(store.shards)))
    found = np.concatenate([read_counts(path, "text_bytes") for path in paths])
    if not found.sum():
        raise DataError(
            f"{store.path} records 0 bytes of text, bits per byte need their number; make the "
            "held-out store with llmtrain-data"
        )
    return found


def evaluate(config: EvalConfig) -> dict[str, Score]:
    """Score each held-out source of a run and all together (``all``); writes ``RUN/eval.json``.

    Raises:
        ConfigError: the run has no held-out source, or one named "all" or "step".
    """
    with opened_run(config.run, config.step, config.parallel.tp) as run:
        return score_run(config, run)


def score_run(config: EvalConfig, run: TrainedRun) -> dict[str, Score]:
    """Do what ``evaluate`` does on a run that is open; every rank gets the scores."""
    sources = config.sources or run.config.data.validation
    if not sources:
        raise ConfigError(
            f"{config.run} was trained without data.validation; name a held-out store with "
            "sources.NAME=DIR"
        )
    if taken := sorted({"all", "step"} & set(sources)):
        raise ConfigError(f"a source is named {taken[0]}, eval.json uses that name; rename it")
    vocab_size = run.config.model.vocab_size
    cache_dir = run.config.data.cache_dir
    training = list(open_sources(run.config.data.sources, cache_dir).values())
    unigram_nats = unigram(training, vocab_size, config.unigram_tokens)
    total, scores = Tally(), dict[str, Score]()
    for name, path in sources.items():
        store = open_source(path, cache_dir)
        length = run.config.training.sequence_length
        found = tally(run.model, store, unigram_nats, length, config)
        scores[name] = found.score(vocab_size)
        total.add(found)
        logger.info("scored %d documents of %s", found.documents, name)
    scores["all"] = total.score(vocab_size)
    record: dict[str, Any] = {name: asdict(score) for name, score in scores.items()}
    if run.rank == 0:
        write_json(run.directory.path / "eval.json", {"step": run.step, **record})
    return scores


def table(scores: Mapping[str, Score]) -> str:
    """Lay the scores out, one source a line."""
    head = f"{'source':<16}{'model':>9}{'unigram':>9}{'uniform':>9}{'ratio':>8}{'loss':>8}"
    lines = [f"{head}{'documents':>11}{'tokens':>12}{'bytes':>14}   (bits per byte)"]
    for name, s in scores.items():
        ratio = s.bits_per_byte / s.unigram_bits_per_byte
        lines.append(
            f"{name:<16}{s.bits_per_byte:>9.3f}{s.unigram_bits_per_byte:>9.3f}"
            f"{s.uniform_bits_per_byte:>9.3f}{ratio:>8.3f}{s.loss:>8.3f}"
            f"{s.documents:>11,}{s.tokens:>12,}{s.bytes:>14,}"
        )
    return "\n".join(lines) + "\n"


def main(config: EvalConfig) -> int:
    """Score a run and write the table to standard output."""
    with opened_run(config.run, config.step, config.parallel.tp) as run:
        scores = score_run(config, run)
        if run.rank == 0:
            sys.stdout.write(table(scores))
    return 0
