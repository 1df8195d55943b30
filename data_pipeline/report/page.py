"""One self-contained HTML page of a pipeline's folder, and its data card.

The page loads nothing: styles, drawings and samples are inside, so it can be mailed or archived. It
reads what the pipeline wrote and changes none of it; an unfinished folder gives a page of what is
there.

    llmtrain-data report out=corpus    # corpus/report.html and corpus/data_card.json
"""

import html
import json
import logging
from pathlib import Path

from data_pipeline.config.report import ReportConfig
from data_pipeline.report import distributions, funnel_card
from data_pipeline.report.card import CARD_NAME, data_card
from data_pipeline.report.collect import Contents, collect
from data_pipeline.report.markup import card, clock, code, folded, page, percent, short, size, tile
from data_pipeline.stages import replace_file
from llmtrain.config.load import to_yaml
from llmtrain.errors import ConfigError

PAGE_NAME = "report.html"
"""Name of the page in the pipeline's folder."""

logger = logging.getLogger(__name__)


def write_report(config: ReportConfig) -> Path:
    """Write the page and the data card of a folder; return the page's path.

    Raises:
        ConfigError: the page cannot be written there.
        DataError: the folder holds nothing finished, or a shard is damaged.
    """
    out = Path(config.out)
    target = out / PAGE_NAME if config.html is None else Path(config.html)
    if target.is_dir():
        raise ConfigError(f"html={target} is a folder; name a file in it, as {target / PAGE_NAME}")
    contents = collect(out, read_bytes=config.read_bytes, samples=config.samples)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, render(contents))
    text = json.dumps(data_card(contents), indent=1, ensure_ascii=False)
    replace_file(out / CARD_NAME, text + "\n")
    logger.info("report: %s", target)
    return target


def render(contents: Contents) -> str:
    """Return the page."""
    sections = [
        funnel_card.funnel(contents),
        funnel_card.by_source(contents),
        funnel_card.reasons(contents),
        distributions.tokens(contents),
        distributions.lengths(contents),
        distributions.domains(contents),
        distributions.languages(contents),
        distributions.language_scores(contents),
        distributions.quality_scores(contents),
        distributions.clusters(contents),
        funnel_card.deletions(contents),
        funnel_card.seconds(contents),
        _settings(contents),
    ]
    name = contents.record.path.resolve().name
    body = "\n".join(
        [_header(contents, name), _tiles(contents), '<div class="cards">', *sections, "</div>"]
    )
    return page(f"{name} · llmtrain-data", body)


def _header(contents: Contents, name: str) -> str:
    """Name, whether it is finished, and the stages in one line."""
    done = bool(contents.record.stores)
    last = contents.record.stages[-1].name
    kind, text = ("", "token stores written") if done else (" stopped", f"up to {last}")
    steps = " → ".join(row.name for row in contents.record.rows)
    note = "" if contents.kept.share == 1.0 else (
        f" Histograms, domains and samples are of {contents.kept.share:.1%} of the text, in shards "
        "chosen by a hash; counts of documents and tokens are of all."
    )  # fmt: skip
    return (
        f'<header><h1>{html.escape(name)}<span class="status{kind}">{text}</span></h1>'
        f"<p>{html.escape(steps)}.{note}</p></header>"
    )


def _tiles(contents: Contents) -> str:
    """The numbers a reader wants first."""
    rows = contents.record.rows
    read = rows[0].documents_in if rows else 0
    left = sum(shard.rows for shard in contents.record.kept)
    text = sum(shard.text_bytes for shard in contents.record.kept)
    extracted = rows[0].bytes_out if rows else 0
    tokens = sum(store.tokens for store in contents.record.stores)
    held = sum(s.tokens for s in contents.record.stores if s.split == "validation")
    words = sum(contents.words(source) for source in contents.sources)
    seconds = sum(stage.seconds for stage in contents.record.stages)
    tiles = [
        tile("Documents", short(left), f"{percent(left, read)} of {short(read)} records read"),
        tile("Text", size(text), f"{percent(text, extracted)} of {size(extracted)} extracted"),
        tile("Tokens", short(tokens) if tokens else "–", f"{short(held)} of them held out"),
        tile(
            "Bytes per token", f"{text / tokens:.2f}" if tokens else "–",
            f"{tokens / words:.2f} tokens per word" if tokens and words else "not tokenized",
        ),
    ]  # fmt: skip
    if not tokens:
        tiles[-1] = tile("Time", clock(seconds), "of finished stages")
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _settings(contents: Contents) -> str:
    """What the folder was begun with, folded away."""
    text = html.escape(to_yaml(contents.record.settings))
    code_versions = contents.record.stages[0].manifest.code
    versions = ", ".join(f"{name} {number}" for name, number in sorted(code_versions.items()))
    body = folded(f'<pre class="config">{text}</pre>', "pipeline")
    note = f"From {code(str(contents.record.path))}; made with {html.escape(versions)}."
    return card("Settings", note, body, wide=True)
