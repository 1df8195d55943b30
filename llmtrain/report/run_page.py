"""The page of one run: curves, layers, mixture, events, data funnel, bits per byte, samples.

It reads what the run wrote and changes none of it.

    text = render(read_run(Path("runs/demo"), data=None))
"""

import html

from llmtrain.config.load import to_yaml
from llmtrain.planner.flops import num_matmul_parameters
from llmtrain.report import bars, curves, events
from llmtrain.report.markup import card, clock, controls, document, header, number, short, tiles
from llmtrain.report.plot_card import Plots
from llmtrain.report.record import RunRecord
from llmtrain.report.series import Timeline, median, time_unit


def render(record: RunRecord) -> str:
    """Return the page."""
    unit, unit_s = time_unit(record.trained_s())
    axes = ["step", "tokens", f"{unit} of training"]
    plots = Plots(axes=axes, **events.shared(record))
    sections = [
        *curves.cards(record, Timeline(record.rows, unit_s), plots),
        bars.mixture(record),
        bars.bits_per_byte(record),
        events.listing(record),
        bars.funnel(record),
        _samples(record),
        _configuration(record),
    ]
    top = [_header(record), _tiles(record), controls(["steps", "tokens", "time"])]
    body = "\n".join([*top, '<div class="cards">', *sections, "</div>"])
    return document(f"{record.name} · llmtrain", body, plots.specs)


def _header(record: RunRecord) -> str:
    """Name, how it ended, and the run in one line."""
    c, last = record.config, record.rows.last
    reason = str(record.status.get("reason", "training")).replace("_", " ")
    kind = "" if reason == "done" else "stopped"
    axes = [f"{getattr(c.parallel, name)} {text}" for name, text in _AXES.items()
            if getattr(c.parallel, name) not in (1, "auto")]  # fmt: skip
    facts = [
        f"LLaMA-style model, {c.model.num_hidden_layers} layers of width {c.model.hidden_size}",
        f"vocabulary {c.model.vocab_size:,}",
        f"{c.training.global_batch_tokens:,} tokens per step",
        " x ".join(axes) or "one rank or plain data parallel",
        c.engine.precision,
    ]
    badge = f"{reason}, step {last['step']:,}"
    return header(record.name, badge, kind, facts)


_AXES = {
    "pp": "pipeline stages",
    "dp_replicate": "replicas",
    "dp_shard": "shards",
}


def _tiles(record: RunRecord) -> str:
    """The numbers a reader wants first."""
    last, model = record.rows.last, record.config.model
    rate = median(record.rows.column("tokens_per_s"))
    total = num_matmul_parameters(model)
    if not model.tie_word_embeddings:
        total += model.vocab_size * model.hidden_size
    cells = [
        ("Training loss", number(last["loss"]), "nats per token, last interval"),
        ("Tokens", short(last["tokens"]), f"in {clock(record.trained_s())} of training steps"),
        ("Throughput", "–" if rate is None else short(rate), "tokens per second, median"),
    ]
    score = record.evaluation.get("all")
    if score:
        share = score["bits_per_byte"] / score["unigram_bits_per_byte"]
        note = f"held out, {share:.0%} of a unigram model's"
        cells.insert(0, ("Bits per byte", f"{score['bits_per_byte']:.3f}", note))
    else:
        cells.append(("Parameters", short(total), "embeddings included"))
    return tiles(cells)


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
