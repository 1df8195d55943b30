"""Paragraphs by Bloom filter against sets, whatever the cut into shards, parts and passes."""

import random
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config.dedup import ParagraphConfig
from data_pipeline.dedup import paragraphs
from data_pipeline.dedup.bloom import Bloom, filter_bytes
from data_pipeline.dedup.paragraphs import num_parts, paragraph_ngrams
from data_pipeline.document import Document
from llmtrain.errors import ConfigError
from tests.dedup_corpus import document, run_stage

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("n", "st", "rk")]


def corpus() -> list[Document]:
    """Pages of new, repeated, half repeated and short paragraphs."""
    rng = random.Random(4)
    known: list[str] = []
    documents = []
    for number in range(40):
        lines = []
        for _ in range(rng.randint(1, 5)):
            kind = rng.random()
            words = rng.choices(WORDS, k=rng.randint(3, 40))
            if known and kind < 0.3:
                words = rng.choice(known).split()
            elif known and kind < 0.5:
                words = [*rng.choice(known).split(), *rng.choices(WORDS, k=rng.randint(1, 8))]
            lines.append(" ".join(words))
        known += lines
        documents.append(document(number, "\n".join(lines)))
    return documents


def expected(documents: list[Document], ngram: int, share: float) -> dict[int, str]:
    seen: set[int] = set()
    result = {}
    for number, page in enumerate(documents):
        grams = {line: set(h.tolist()) for line, h in paragraph_ngrams(page.text, ngram)}
        gone = set()
        for line, found in grams.items():
            if len(found & seen) >= share * len(found):
                gone.add(line)
            seen |= found
        left = [x for i, x in enumerate(page.text.split("\n")) if i not in gone]
        if left:
            result[number] = "\n".join(left)
    return result


@pytest.mark.parametrize(
    ("rows", "memory_gib", "bytes_per_ngram", "parts", "passes"),
    [(7, 4.0, 4, 1, 1), (40, 60_000 / 2**30, 4, 2, 1), (11, 4_000 / 2**30, 4, 16, 1),
     (11, 4_000 / 2**30, 40, 2, 8)],
)  # fmt: skip
def test_repeated_paragraphs_go_and_the_first_stays(
    rows: int, memory_gib: float, bytes_per_ngram: int, parts: int, passes: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(paragraphs, "BYTES_PER_NGRAM", bytes_per_ngram)
    documents = corpus()
    config = ParagraphConfig(ngram=5, false_positive_rate=1e-6)
    outcome = run_stage(
        tmp_path, "paragraph_dedup", documents, rows, memory_gib=memory_gib, paragraph_dedup=config
    )
    assert outcome.texts == expected(documents, 5, 0.8)
    assert 0 < len(outcome.reasons) < 20
    assert set(outcome.reasons.values()) == {"paragraph_dedup.empty"}
    details = outcome.manifest.details
    assert (details["parts"], details["passes"]) == (parts, passes)


def test_a_paragraph_does_not_repeat_itself_and_short_ones_stay(tmp_path: Path) -> None:
    lines = ["buy it now " * 20, "a short line", "a short line"]
    config = ParagraphConfig(ngram=4)
    outcome = run_stage(
        tmp_path, "paragraph_dedup", [document(1, "\n".join(lines))], paragraph_dedup=config
    )
    assert outcome.texts == {1: "\n".join(lines)}


def test_scripts_without_spaces_have_ngrams_of_characters() -> None:
    ((line, hashes),) = paragraph_ngrams("短い\n吾輩は猫である。名前はまだ無い。", 13)
    assert (line, len(hashes)) == (1, 2)


def test_a_filter_forgets_nothing_and_errs_as_rarely_as_asked() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, 40_000, dtype=np.uint64)
    bloom = Bloom(20_000, 1e-2)
    first = bloom.add(keys[:20_000])
    assert first.mean() < 1e-2
    assert bloom.add(keys[:20_000]).all()
    assert bloom.add(keys[20_000:20_400]).mean() < 2.5e-2
    assert filter_bytes(20_000, 1e-2) == 30_016
    assert num_parts(10**9, 1e-3, 2**30) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, r"share=0.0; use a number in \(0, 1\]"),
        ({"false_positive_rate": 0.2}, r"false_positive_rate=0.2; use \(0, 0.1\]"),
        ({"ngram": 0}, "ngram=0; use a number above 0"),
    ],
)
def test_settings_that_are_none_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParagraphConfig(**settings)  # type: ignore[arg-type]
