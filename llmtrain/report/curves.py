"""The curves and heat maps of one run; each function returns a card, empty where nothing is known.

cards = curves.cards(record, plots)
"""

from collections import Counter
from itertools import accumulate

from llmtrain.report.markup import number
from llmtrain.report.plot_card import Plots
from llmtrain.report.record import RunRecord
from llmtrain.report.series import (
    Row,
    Timeline,
    column,
    inside,
    line,
    median,
    names,
    rounded,
    smooth,
    step_seconds,
)


def cards(record: RunRecord, timeline: Timeline, plots: Plots) -> list[str]:
    """Every card of curves that the rows have numbers for, in the order of the page."""
    found = (
        loss, source_loss, throughput, step_time, learning_rate, gradient_norm, layer_gradients,
        layer_weights, attention_logits, memory, power, shares,
    )  # fmt: skip
    return [make(record, timeline, plots) for make in found]


def loss(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Training loss, its running mean and the held-out loss."""
    raw = column(record.rows, "loss")
    series = [
        line("training", 0, timeline.points(raw), faint=True),
        line("running mean", 0, timeline.points(smooth(raw))),
    ]
    for name in names(record.rows, "validation_loss"):
        points = timeline.points(inside(record.rows, "validation_loss", name))
        dots = len(points) <= 60
        series.append(line(f"held out: {name}", record.color(name), points, dots=dots))
    note = "Nats per target token; each point is the mean since the one before."
    return plots.lines("loss", "Loss", note, series, wide=True)


def source_loss(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Training loss per source."""
    series = [
        line(name, record.color(name),
             timeline.points(smooth(inside(record.rows, "source_loss", name))))
        for name in names(record.rows, "source_loss")
    ]  # fmt: skip
    if not any(one["points"] for one in series):
        return ""
    note = "Running mean of each source."
    return plots.lines("source-loss", "Loss per source", note, series)


def throughput(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Tokens per second."""
    series = [line("tokens per second", 0, timeline.points(column(record.rows, "tokens_per_s")))]
    note = "Tokens per second, wall-clock, evaluation apart."
    mfu = median(column(record.rows, "mfu"))
    if mfu is not None:
        note += f" MFU {mfu:.1%} (median; {record.rows[-1]['mfu_convention']})."
    return plots.lines("throughput", "Throughput", note, series, zero=True, unit="/s")


def step_time(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Where the time of a step goes: the slowest rank, waits for data, saves."""
    rows = record.rows
    ranks = [row.get("rank_step_time_s") or {} for row in rows]
    lines = [
        ("step", 0, column(rows, "step_time_s")),
        ("slowest rank", 1, [one.get("max") for one in ranks]),
        ("fastest rank", 2, [one.get("min") for one in ranks]),
        ("wait for data", 3, column(rows, "data_wait_s")),
        ("saving", 4, [value or None for value in column(rows, "checkpoint_s")]),
    ]
    series = [
        line(name, color, timeline.points(values), dots=name == "saving", line=name != "saving")
        for name, color, values in lines
        if any(value is not None for value in values)
    ]
    total = max(sum(step_seconds(rows)), 1e-9)
    note = f"Seconds per step; {_waited(rows) / total:.1%} of the time waited for data"
    if saved := sum(float(value or 0) for value in column(rows, "checkpoint_s")):
        note += f", {saved / total:.1%} stood still for saves (dots: seconds of each)"
    slowest = Counter(r["slowest_rank"] for r in ranks if r.get("slowest_rank") is not None)
    if slowest:
        rank, count = slowest.most_common(1)[0]
        note += f". Rank {rank} was the slowest in {count / sum(slowest.values()):.0%} of the rows"
    return plots.lines("step-time", "Step time", f"{note}.", series, zero=True, unit=" s")


def _waited(rows: list[Row]) -> float:
    """Seconds the steps waited for data: a row holds the mean of its steps."""
    spent = step_seconds(rows)
    pairs = zip(rows, spent, strict=True)
    return sum(
        seconds * float(row.get("data_wait_s") or 0) / max(float(row.get("step_time_s") or 0), 1e-9)
        for row, seconds in pairs
    )


def learning_rate(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Learning rate."""
    series = [line("learning rate", 0, timeline.points(column(record.rows, "lr")))]
    kind = record.config.schedule.kind
    note = f"{kind} over tokens, peak {number(record.config.optimizer.lr)}."
    return plots.lines("lr", "Learning rate", note[0].upper() + note[1:], series, zero=True)


def gradient_norm(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Gradient norm before the clip."""
    series = [line("gradient norm", 0, timeline.points(column(record.rows, "grad_norm")))]
    skipped = sum(int(row.get("skipped_steps") or 0) for row in record.rows)
    clip = record.config.optimizer.grad_clip_norm
    note = f"Global, before clipping to {number(clip)}; {skipped:,} steps skipped."
    return plots.lines("norm", "Gradient norm", note, series)


def layer_gradients(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Gradient norm of every layer."""
    note = "Norm of each layer's gradient, the embedding at the bottom, the head at the top."
    title = "Gradient norm by layer"
    return plots.heat("layer-grad", title, note, record.rows, "layer_grad_norm", "norm")


def layer_weights(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Norm of every layer's weights."""
    note = "Norm of each layer's parameters."
    title = "Weight norm by layer"
    return plots.heat("layer-weight", title, note, record.rows, "layer_weight_norm", "norm")


def attention_logits(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Largest attention logit of every layer."""
    note = "Largest logit in each layer's attention; growth without end foretells divergence."
    title = "Attention-logit maxima"
    return plots.heat("logits", title, note, record.rows, "attention_logit_max", "logit")


def memory(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Memory, on the GPU where there is one."""
    lines = [
        ("on the device", 1, column(record.rows, "gpu_memory_bytes")),
        ("most allocated so far", 0, column(record.rows, "memory_bytes")),
    ]
    series = [
        line(name, color, timeline.points([None if v is None else v / 2**30 for v in values]))
        for name, color, values in lines
        if any(value is not None for value in values)
    ]
    if not series:
        return ""
    note = "GiB of this rank's device, or of its process where it trains on CPUs."
    return plots.lines("memory", "Memory", note, series, zero=True, unit=" GiB")


def power(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Power the GPU draws."""
    watts = column(record.rows, "gpu_power_w")
    middle = median(watts)
    if middle is None:
        return ""
    series = [line("power", 0, timeline.points(watts))]
    note = f"Watts; median {number(middle)} W."
    return plots.lines("power", "GPU power", note, series, zero=True, unit=" W")


def shares(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Planned share of each source so far beside the share trained on."""
    rows = record.rows
    sources = names(rows, "source_tokens")
    if len(sources) < 2 or not any(row.get("planned_share") for row in rows):
        return ""
    counts = {s: list(accumulate(v or 0.0 for v in inside(rows, "source_tokens", s)))
              for s in sources}  # fmt: skip
    totals = [max(sum(one[i] for one in counts.values()), 1e-9) for i in range(len(rows))]
    series = []
    for source in sources:
        seen = [rounded(100 * n / total) for n, total in zip(counts[source], totals, strict=True)]
        planned = [None if share is None else 100 * share
                   for share in inside(rows, "planned_share", source)]  # fmt: skip
        color = record.color(source)
        series.append(line(source, color, timeline.points(seen, 400)))
        series.append(line(f"{source}, planned", color, timeline.points(planned, 400), dash=True))
    note = "Percent of the target tokens so far: trained on (full) and planned (dashed)."
    return plots.lines("shares", "Mixture over the run", note, series, unit=" %")
