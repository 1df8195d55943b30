"""One self-contained HTML page of a run: curves, mixture, data funnel, bits per byte, samples.

The page loads nothing: styles, the script that draws and the numbers are inside, so it can be
mailed or archived. It reads what the run wrote and changes none of it; no torch is imported.

    llmtrain report run=runs/demo
"""

import html
import logging
from pathlib import Path

from llmtrain.config.commands import ReportConfig
from llmtrain.config.load import to_yaml
from llmtrain.errors import ConfigError
from llmtrain.planner.flops import num_matmul_parameters
from llmtrain.report import bars, curves
from llmtrain.report.markup import card, clock, document, number, short
from llmtrain.report.record import Row, RunRecord, read_run

logger = logging.getLogger(__name__)


def main(config: ReportConfig) -> int:
    """Write the page of a run and say where.

    Raises:
        ConfigError: the page cannot be written there.
    """
    record = read_run(Path(config.run), None if config.data is None else Path(config.data))
    out = Path(config.out) if config.out is not None else record.path / "report.html"
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder; name a file in it, as {out / 'report.html'}")
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(render(record), encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}; use another") from error
    logger.info("report: %s", out)
    return 0


def render(record: RunRecord) -> str:
    """Return the page."""
    plots: dict[str, Row] = {}
    sections = [
        curves.loss(record, plots),
        curves.source_loss(record, plots),
        curves.throughput(record, plots),
        curves.learning_rate(record, plots),
        curves.gradient_norm(record, plots),
        bars.mixture(record),
        bars.bits_per_byte(record),
        bars.funnel(record),
        _samples(record),
        _configuration(record),
    ]
    body = "\n".join([_header(record), _tiles(record), '<div class="cards">', *sections, "</div>"])
    return document(f"{record.name} · llmtrain", body, plots)


def _header(record: RunRecord) -> str:
    """Name, how it ended, and the run in one line."""
    c, last = record.config, record.rows[-1]
    reason = str(record.status.get("reason", "training")).replace("_", " ")
    kind = "" if reason == "done" else " stopped"
    axes = [f"{getattr(c.parallel, name)} {text}" for name, text in _AXES.items()
            if getattr(c.parallel, name) not in (1, "auto")]  # fmt: skip
    facts = [
        f"LLaMA-style model, {c.model.num_hidden_layers} layers of width {c.model.hidden_size}",
        f"vocabulary {c.model.vocab_size:,}",
        f"{c.training.global_batch_tokens:,} tokens per step",
        " x ".join(axes) or "one rank or plain data parallel",
        c.engine.precision,
    ]
    return (
        f"<header><h1>{html.escape(record.name)}"
        f'<span class="status{kind}">{html.escape(reason)}, step {last["step"]:,}</span></h1>'
        f"<p>{html.escape(' · '.join(facts))}</p></header>"
    )


_AXES = {
    "pp": "pipeline stages",
    "dp_replicate": "replicas",
    "dp_shard": "shards",
}


def _tiles(record: RunRecord) -> str:
    """The numbers a reader wants first."""
    last, model = record.rows[-1], record.config.model
    rates = sorted(row["tokens_per_s"] for row in record.rows)
    total = num_matmul_parameters(model)
    if not model.tie_word_embeddings:
        total += model.vocab_size * model.hidden_size
    tiles = [
        ("Training loss", number(last["loss"]), "nats per token, last interval"),
        ("Tokens", short(last["tokens"]), f"in {clock(record.trained_s())} of training steps"),
        ("Throughput", short(rates[len(rates) // 2]), "tokens per second, median"),
    ]
    score = record.evaluation.get("all")
    if score:
        share = score["bits_per_byte"] / score["unigram_bits_per_byte"]
        note = f"held out, {share:.0%} of a unigram model's"
        tiles.insert(0, ("Bits per byte", f"{score['bits_per_byte']:.3f}", note))
    else:
        tiles.append(("Parameters", short(total), "embeddings included"))
    cells = (
        f'<div class="tile"><span>{label}</span><b>{value}</b><small>{note}</small></div>'
        for label, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _samples(record: RunRecord) -> str:
    """What the model wrote."""
    figures = [
        f'<figure class="sample"><p><mark>{html.escape(sample["prompt"])}</mark>'
        f"{html.escape(sample['completion'])}</p><figcaption>temperature "
        f"{number(sample['temperature'])}, seed {sample['seed']}</figcaption></figure>"
        for sample in record.samples
    ]
    if not figures:
        return ""
    body = f'<div class="samples">{"".join(figures)}</div>'
    return card("Samples", "The prompt is set off, the rest is the model's.", body, wide=True)


def _configuration(record: RunRecord) -> str:
    """The resolved configuration, folded away."""
    text = html.escape(to_yaml(record.config))
    body = f'<details><summary>config.yaml</summary><pre class="config">{text}</pre></details>'
    return card("Configuration", f"From {html.escape(str(record.path))}.", body, wide=True)
