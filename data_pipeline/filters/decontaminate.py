"""Takes the text of evaluation sets out of training data, and says which and where.

With the defaults a document that shares 13 words in a row with an example is dropped. With
``action=cut`` the overlap goes and 200 characters on both sides, as for GPT-3 (arXiv:2005.14165,
appendix C), then pieces under 200 characters, and documents in more than 10 pieces. ``ngram=8
min_share=0.7`` asks for 70 % of an example's 8-grams, the measure of PaLM (arXiv:2204.02311,
section 8).

    Decontaminate(config, sets)(document)  # Dropped("decontaminate.mmlu", notes=...)
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.config.content import DecontaminationConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document, spliced
from data_pipeline.filters.block_lists import ListFile, file_digest
from data_pipeline.filters.evaluation_sets import EvaluationIndex, read_examples
from data_pipeline.read.storage import is_remote, list_files
from data_pipeline.step import Dropped, Finding, Kept, StepKind, Verdict
from data_pipeline.text.normal_words import NormalWords, normal_words
from llmtrain.errors import DataError

EvaluationSets = tuple[tuple[str, tuple[ListFile, ...]], ...]
"""(name, files) of every evaluation set."""
NOTE = "contamination"
"""Name in a document's metadata of what was found."""


class _Overlap(NamedTuple):
    """What a document has in common with the examples it is contaminated by."""

    words: npt.NDArray[np.int64]
    """First words of the n-grams in the text, ascending."""
    example: int
    """Example of the first."""
    share: float
    """Share of that example's n-grams in the text."""


@functools.lru_cache(maxsize=2)
def evaluation_index(sets: EvaluationSets, fields: tuple[str, ...], ngram: int) -> EvaluationIndex:
    """Read evaluation sets; the last two are kept.

    Raises:
        DataError: a file is missing or damaged, a set is empty, or a row lacks a field.
    """
    examples = (e for name, files in sets for e in read_examples(name, files, fields))
    return EvaluationIndex.build(examples, ngram)


class Decontaminate:
    """Drops documents that hold text of evaluation sets, or cuts it out."""

    name = "decontaminate"

    def __init__(self, *, sets: EvaluationSets, fields: tuple[str, ...], **settings: Any) -> None:
        """Read the evaluation sets; ``settings`` are the other fields of the section."""
        self._config = DecontaminationConfig(fields=fields, **settings)
        self._index = evaluation_index(sets, fields, self._config.ngram)

    def __call__(self, document: Document) -> Verdict:
        """Drop the document, cut it, or leave it as it is."""
        words = normal_words(document.text)
        overlap = self._overlap(words)
        if overlap is None:
            return Kept(document)
        benchmark, _ = self._index.examples[overlap.example]
        note = (NOTE, self._note(words, overlap))
        rule = f"{self.name}.{benchmark}"
        cuts = self._cuts(words, overlap, len(document.text))
        if cuts is None:
            return Dropped(rule, (note,))
        text, runs = spliced(document.text, cuts)
        deleted = {rule: sum(end - start for start, end, _ in cuts)}
        inserted = sum(len(instead) for _, _, instead in cuts)
        noted = document.changed(metadata={**document.metadata, NOTE: note[1]})
        return Kept(noted.edited(text, runs), deleted, inserted)

    def findings(self, document: Document) -> list[Finding]:
        """Return the overlap with the first example that contaminates the document."""
        words = normal_words(document.text)
        overlap = self._overlap(words)
        least = self._config.min_share
        limit = f"under {least:.0%} of an example's n-grams" if least else "no n-gram of an example"
        if self._config.action == "cut":
            limit += ", else cut"
        if overlap is None:
            return [Finding(self.name, 0.0, limit, True)]
        benchmark, _ = self._index.examples[overlap.example]
        cut = self._cuts(words, overlap, len(document.text)) is not None
        return [Finding(f"{self.name}.{benchmark}", self._note(words, overlap), limit, cut)]

    def _overlap(self, words: NormalWords) -> _Overlap | None:
        """Return what a text has in common with examples, None if too little."""
        hits = self._index.find(words)
        if not len(hits.words):
            return None
        places = np.unique(hits.places)
        examples, found = np.unique(self._index.example_at(places), return_counts=True)
        shares = found / self._index.ngrams[examples]
        bad = examples[shares >= self._config.min_share]
        chosen = np.isin(self._index.example_at(hits.places), bad)
        if not chosen.any():
            return None
        first = self._index.example_at(hits.places[chosen][:1])
        share = float(shares[np.searchsorted(examples, first)][0])
        return _Overlap(np.unique(hits.words[chosen]), int(first[0]), share)

    def _note(self, words: NormalWords, overlap: _Overlap) -> str:
        """Say which example, how much of it, and the first n-gram."""
        benchmark, number = self._index.examples[overlap.example]
        phrase = words.phrase(int(overlap.words[0]), self._config.ngram)
        return f"{benchmark} example {number}, {overlap.share:.1%} of its n-grams: {phrase}"

    def _cuts(
        self, words: NormalWords, overlap: _Overlap, length: int
    ) -> list[tuple[int, int, str]] | None:
        """Return what is cut and what stands there instead; None if the document has to go."""
        config = self._config
        if config.action == "drop":
            return None
        pieces: list[tuple[int, int]] = []
        done = 0
        for start, end in self._spans(words, overlap.words):
            if start - config.window > done:
                pieces.append((done, start - config.window))
            done = max(done, end + config.window)
        if done < length:
            pieces.append((done, length))
        kept = [p for p in pieces if p[1] - p[0] >= max(1, config.min_piece_characters)]
        if not kept or len(pieces) > config.max_pieces:
            return None
        ends = [0, *(end for _, end in kept)]
        starts = [*(start for start, _ in kept), length]
        gaps = [gap for gap in zip(ends, starts, strict=True) if gap[0] < gap[1]]
        return [(a, b, "\n\n" if a > 0 and b < length else "") for a, b in gaps]

    def _spans(
        self, words: NormalWords, firsts: npt.NDArray[np.int64]
    ) -> Sequence[tuple[int, int]]:
        """Return where the n-grams stand in the text, ascending."""
        last = firsts + self._config.ngram - 1
        return list(zip(words.starts[firsts].tolist(), words.ends[last].tolist(), strict=True))


def _evaluation_sets(config: DecontaminationConfig) -> EvaluationSets:
    return tuple(
        (name, _files(name, (paths,) if isinstance(paths, str) else paths))
        for name, paths in sorted(config.benchmarks.items())
    )


def _files(name: str, paths: Sequence[str]) -> tuple[ListFile, ...]:
    """Return the files that paths, folders and globs stand for."""
    key = f"pipeline.decontaminate.benchmarks.{name}"
    found = [path for given in paths for path in list_files(key, given).paths]
    remote = [path for path in found if is_remote(path)]
    if remote:
        raise DataError(f"{key}={remote[0]} is not on this machine; copy it and give its path")
    return tuple(ListFile(path, file_digest(Path(path))) for path in found)


def _options(config: PipelineConfig) -> dict[str, Any] | None:
    section = config.decontaminate
    if not section.benchmarks:
        return None
    options = asdict(section)
    del options["benchmarks"]
    return {**options, "sets": _evaluation_sets(section)}


def _settings(config: PipelineConfig) -> dict[str, Any]:
    section = config.decontaminate
    if not section.benchmarks:
        return {"benchmarks": "none was given; no page was tested"}
    sets = _evaluation_sets(section)
    index = evaluation_index(sets, section.fields, section.ngram)
    facts = {}
    for name, files in sets:
        own = index.ngrams[[benchmark == name for benchmark, _ in index.examples]]
        facts[name] = {
            "files": [file.digest for file in files],
            "examples": len(own),
            "too_short": int((own == 0).sum()),
        }
    return {**asdict(section), "benchmarks": facts}


DECONTAMINATE = StepKind(build=Decontaminate, options=_options, settings=_settings)
"""How the step comes out of the configuration."""
