"""The cards about what is left: lengths, languages, scores, clusters, domains, tokens.

lengths(contents)   # HTML of one card; an empty string where there is nothing to tell
"""

import html
from collections import Counter
from collections.abc import Mapping

import numpy as np

from data_pipeline.report.collect import Contents
from data_pipeline.report.funnel_card import sample
from data_pipeline.report.markup import (
    bars,
    card,
    code,
    color,
    count,
    folded,
    histogram,
    legend,
    named_bar,
    percent,
    short,
    size,
    table,
)
from data_pipeline.report.survey import LENGTH_BINS, SCORE_BINS, SIZE_BINS, Int64Array

_LARGEST = 20
"""Languages and domains shown by name."""
_LEAST_SIZES = 8
"""Columns of the histogram of cluster sizes, at least."""


def lengths(contents: Contents) -> str:
    """Lengths in characters of what is left, before what was extracted."""
    kept = _series(contents, contents.kept.lengths, LENGTH_BINS)
    before = total(contents.extracted, LENGTH_BINS)
    low, high = _span(before + total(contents.kept.lengths, LENGTH_BINS))
    edges = [short(2 ** (i / 2)) for i in range(low, high + 1)]
    body = histogram(
        [(name, values[low:high]) for name, values in kept], edges,
        "Documents by length in characters", ("extracted", before[low:high].tolist()),
    )  # fmt: skip
    note = "Characters per document that is left (color), before those extracted (grey)."
    return card("Lengths", note, legend(contents.sources) + body)


def languages(contents: Contents) -> str:
    """Documents by language."""
    found: Counter[str] = Counter()
    for counts in contents.kept.languages.values():
        found.update(counts)
    del found[""]
    if not found:
        return ""
    return card("Languages", "Documents that are left, by language.", _ranked(found))


def language_scores(contents: Contents) -> str:
    """Scores of the language identifier."""
    return _scores(contents, contents.kept.language_scores, "Language scores",
                   "How sure the identifier was of the documents that are left.")  # fmt: skip


def quality_scores(contents: Contents) -> str:
    """Scores of the quality classifier."""
    return _scores(contents, contents.kept.quality_scores, "Quality scores",
                   "Score of the quality classifier for the documents that are left.")  # fmt: skip


def _scores(contents: Contents, found: Mapping[str, Int64Array], title: str, note: str) -> str:
    if not any(values.any() for values in found.values()):
        return ""
    series = _series(contents, found, SCORE_BINS)
    edges = [f"{i / SCORE_BINS:.2f}" for i in range(SCORE_BINS + 1)]
    return card(title, note, legend(contents.sources) + histogram(series, edges, title))


def clusters(contents: Contents) -> str:
    """Sizes of the near-duplicate clusters, and the largest ones."""
    series = _series(contents, contents.kept.cluster_sizes, SIZE_BINS)
    sizes = total(contents.kept.cluster_sizes, SIZE_BINS)
    if not sizes[1:].any():
        return ""
    high = max(_span(sizes)[1], _LEAST_SIZES)
    edges = [f"{2**i:,}" for i in range(1, high + 1)]
    names = [f"{2**i:,} to {2 ** (i + 1) - 1:,} members" for i in range(1, high)]
    columns = [(name, values[1:high]) for name, values in series]
    body = histogram(columns, edges, "Clusters by number of members", names=names)
    figures = []
    for members, cluster, url in contents.kept.clusters:
        gone = "".join(sample(one, gone=True) for one in contents.members.get(cluster, []))
        head = f"{members:,} members, {html.escape(url) or code(cluster)} stayed"
        figures.append(folded(f'<div class="samples">{gone}</div>', head))
    alone = int(sizes[0])
    note = (
        f"Members before one of each cluster stayed; {alone:,} documents are alone. Below, the "
        "largest, with some that went."
    )
    content = legend(contents.sources) + body + "".join(figures)
    return card("Duplicate clusters", note, content, wide=True)


def domains(contents: Contents) -> str:
    """Hosts with the most documents."""
    counts = contents.kept.domains.counts
    if not counts:
        return ""
    error = contents.kept.domains.error
    note = f"{count(len(counts), 'host')} among the documents that are left" + (
        f"; numbers are too small by at most {error:,}." if error else "."
    )
    return card("Domains", note, _ranked(counts))


def tokens(contents: Contents) -> str:
    """Tokens, words and bytes by source."""
    whole = sum(contents.tokens(source) for source in contents.sources)
    if not whole:
        return ""
    lines, rows = [], []
    for i, source in enumerate(contents.sources):
        number = contents.tokens(source)
        fertility, per_token = contents.fertility(source), contents.bytes_per_token(source)
        value = f"{short(number)} · {per_token:.2f} bytes per token · {fertility:.2f} per word"
        tip = f"{source}: {percent(number, whole)} of {whole:,} tokens"
        lines.append(named_bar(html.escape(source), value, [(number / whole, color(i))], tip))
        held = sum(
            s.tokens for s in contents.record.stores
            if s.source == source and s.split == "validation"
        )  # fmt: skip
        rows.append([
            html.escape(source), f"{number:,}", f"{held:,}", percent(number, whole),
            f"{contents.words(source):,.0f}", size(contents.text_bytes(source)), f"{fertility:.3f}",
            f"{per_token:.3f}",
        ])  # fmt: skip
    head = ["source", "tokens", "held out", "share", "words", "text", "tokens per word",
            "bytes per token"]  # fmt: skip
    vocabulary = max(store.vocab_size for store in contents.record.stores)
    note = (
        f"Vocabulary of {vocabulary:,}; tokens include one end mark per document. A word is a run "
        "of characters without white space, which says little for Chinese, Japanese and Thai."
    )
    return card("Tokens and fertility", note, bars(lines) + folded(table(head, rows)), wide=True)


def total(found: Mapping[str, Int64Array], bins: int) -> Int64Array:
    """Histograms of all sources together, [bins]."""
    sums = np.zeros(bins, np.int64)
    for values in found.values():
        sums += values
    return sums


def _series(
    contents: Contents, found: Mapping[str, Int64Array], bins: int
) -> list[tuple[str, list[int]]]:
    """One histogram per source, in the order of their colors; zeros for one without any."""
    empty = np.zeros(bins, np.int64)
    return [(source, found.get(source, empty).tolist()) for source in contents.sources]


def _span(counts: Int64Array) -> tuple[int, int]:
    """First bin with something in it, and one past the last."""
    filled = np.flatnonzero(counts)
    return (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)


def _ranked(counts: Counter[str]) -> str:
    """Names by their numbers."""
    whole, best = counts.total(), counts.most_common(_LARGEST)
    lines = [
        named_bar(html.escape(name), f"{n:,} · {percent(n, whole)}", [(n / best[0][1], color(0))])
        for name, n in best
    ]
    if len(counts) > len(best):
        rest = whole - sum(n for _, n in best)
        lines.append(
            named_bar(f"{len(counts) - len(best):,} others", f"{rest:,} · {percent(rest, whole)}",
                      [(min(1.0, rest / best[0][1]), "var(--lost)")])
        )  # fmt: skip
    return bars(lines)
